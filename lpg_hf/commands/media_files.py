"""Columns of images, recordings and videos, which stay files until their rows are read."""

import logging
from collections.abc import Callable, Container, Sequence
from pathlib import Path

from datasets import Array2D, Array3D, Audio, Dataset, DatasetDict, Image, List, Value, Video

from .arguments import DataArguments
from .load_data import FILE_NAME, FOLDER_CURE, SHOWN, check_input_column, load_file, metadata_files, shorten


logger = logging.getLogger(__name__)


def load_labeled_files(
    folder: str, cache_dir: str | None, column: str, suffixes: Container[str], kind: str
) -> Dataset:
    """
    Reads a folder with one folder per class, or with a `metadata.csv` (`.jsonl`, `.parquet`) that has `file_name`, or
    with files that have no labels.

    That is the layout of `load_dataset("audiofolder")` and `"videofolder"`, which need torchcodec to read it.

    Args:
        folder (`str`): The folder.
        cache_dir (`str`, *optional*): Of `datasets`.
        column (`str`): What the column of the paths is called.
        suffixes (`Container[str]`): Of the files, in small letters with their dot.
        kind (`str`): What they are, for the error.

    Raises:
        OSError: If there are none.
    """
    root = Path(folder)
    for metadata in metadata_files(folder):
        rows = load_file(str(metadata), cache_dir)
        name_column = next(name for name in rows.column_names if name.endswith(FILE_NAME))
        paths = [str(root / name) for name in rows[name_column][:]]
        return rows.remove_columns(name_column).add_column(column, paths)
    for pattern in ("*/*", "*"):
        files = sorted(path for path in root.glob(pattern) if path.suffix.lower() in suffixes)
        if files:
            warn_of_other_files(root, files, kind)
            labels = {"label": [path.parent.name for path in files]} if pattern == "*/*" else {}
            return Dataset.from_dict({column: list(map(str, files))} | labels)
    raise FileNotFoundError(f"There are no {kind} in {folder}. {FOLDER_CURE}")


def warn_of_other_files(root: Path, used: Sequence[Path], kind: str) -> None:
    """Warns of files in a folder that are no rows: of another type, or deeper or less deep than the others."""
    known = set(used)
    others = [path for path in root.rglob("*") if path.is_file() and path not in known]
    names = sorted(str(path.relative_to(root)) for path in others if not path.name.startswith("."))
    if names:
        logger.warning(
            f"{len(names)} files in {root} are not used: {shorten(names)}. They are no {kind} with a known ending, or "
            "not in a folder as the others are."
        )


def cast_to_files(
    splits: DatasetDict, data: DataArguments, argument: str, column: str, feature: Image | Audio | Video
) -> DatasetDict:
    """
    The splits, with paths or bytes as rows of that column: `feature` decodes nothing.

    Raises:
        ValueError: If a split has no such column, or one of something else.
    """
    check_input_column(splits, data, argument, column)
    files = DatasetDict()
    for split, dataset in splits.items():
        found = dataset.features[column]
        is_pixels = isinstance(feature, Image) and isinstance(found, List | Array2D | Array3D)
        if not (isinstance(found, type(feature)) or holds_files(found) or is_pixels):
            raise ValueError(
                f"`--{argument}` is {column!r}, but this column of the {split} data holds {found}. Pass a column of "
                f"paths, of files as bytes, or of type {type(feature).__name__}."
            )
        if isinstance(found, Value) and "string" in found.dtype:
            # CSV files come as large strings, which `Audio` does not take.
            dataset = dataset.cast_column(column, Value("string"))
        files[split] = dataset.cast_column(column, feature)
    return files


def holds_files(feature: object) -> bool:
    """Whether it is paths, bytes, or both as `datasets` stores them."""
    if isinstance(feature, dict):
        return {"bytes", "path"} >= feature.keys()
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "binary", "large_binary")


def check_files(dataset: Dataset, split: str, column: str, find_damage: Callable[[dict | None], str | None]) -> None:
    """
    Looks at all files before the training begins, which would meet a damaged one hours later.

    Args:
        dataset, split, column: Where the files are.
        find_damage (`Callable`): What is wrong with a file, named; `None` if nothing. Should be quick.

    Raises:
        ValueError: If there are damaged ones; names the first.
    """
    damaged = [damage for file in dataset[column] if (damage := find_damage(file)) is not None]
    if damaged:
        more = f"; and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
        raise ValueError(
            f"{len(damaged)} of {len(dataset)} files of the {split} data cannot be used: {'; '.join(damaged[:SHOWN])}"
            f"{more}. Repair them, or remove their rows."
        )
