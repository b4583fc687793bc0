"""From the arguments to `datasets`: what is named is loaded, and what cannot be is explained."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from glob import escape, glob
from pathlib import Path
from typing import Any, NoReturn

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from safetensors import SafetensorError

from .arguments import DataArguments, FolderArguments, ModelArguments


TRAIN, VALIDATION, TEST = "train", "validation", "test"
LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
FILE_NAME = "file_name"
FOLDER_CURE = (
    "Make one folder per class, two at least, with the files in them; or a metadata.csv with the columns file_name "
    "and label."
)
# As pandas reads them, for `datasets`.
EMPTY_CELLS = (
    "In CSV files, cells with the words None, NA, null or nan are empty as well: give such a class or text another "
    "name, or save the data as JSON lines."
)
SHOWN = 5
OTHER_DELIMITERS = (";", "\t", "|")
# In the error of `load_dataset` for files without rows.
NO_ROWS = "corresponds to no data"


@contextmanager
def explaining_what_is_missing(
    kind: str, name: str, argument: str, cure: str, must_hold: str | None = None
) -> Iterator[None]:
    """
    Says what to do where a model or a data set can be found neither on this machine nor on the hub, or where its
    folder, which must hold something, does not.

    Raises:
        OSError: Instead of the one of the library that looked for it.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        if Path(name).exists():
            if must_hold is None:
                raise
            raise OSError(
                f"`{argument}` is {name!r}, but no {kind} can be read from this folder, which must hold {must_hold} "
                f"({reason})."
            ) from error
        if not isinstance(error, OSError):
            raise
        raise OSError(
            f"`{argument}` is {name!r}: there is no such folder here, and the {kind} could not be fetched from the "
            f"hub ({reason}). Check the name and the network. Without a network, {cure}"
        ) from error


def load_splits(
    data: DataArguments, model: ModelArguments, load_folder: Callable[[str, str | None], Dataset] | None = None
) -> DatasetDict:
    """
    Reads what the arguments name, as splits `train`, `validation` and `test`, those that there are.

    Args:
        data, model: The arguments; `model` for cache and token alone.
        load_folder (`Callable`, *optional*): Reads a folder; given it and the cache.

    Raises:
        ValueError: If nothing is named, or both a data set and files, or a file of an unknown type.
        OSError: If it does not exist, or cannot be fetched.
    """
    files = {TRAIN: data.train_file, VALIDATION: data.validation_file, TEST: data.test_file}
    folders: dict[str, str | None] = {}
    if load_folder is not None and isinstance(data, FolderArguments):
        folders = {TRAIN: data.train_dir, VALIDATION: data.validation_dir, TEST: data.test_dir}
    named_files = {split: file for split, file in files.items() if file is not None}
    named_folders = {split: folder for split, folder in folders.items() if folder is not None}
    if (data.dataset_name is None) == (not named_files and not named_folders):
        what = "nothing to read" if data.dataset_name is None else f"{data.dataset_name!r} and local data as well"
        local = "--train_file and --validation_file" + (" or --train_dir and --validation_dir" if load_folder else "")
        raise ValueError(f"Found {what}: pass either --dataset_name, or {local}.")
    if data.dataset_name is not None:
        return without_columns(load_named(data, model), data)
    if both := named_files.keys() & named_folders.keys():
        raise ValueError(f"Both a file and a folder were given for {', '.join(sorted(both))}: pass one of them.")
    splits = DatasetDict()
    for split, file in named_files.items():
        with naming(f"--{split}_file"):
            splits[split] = load_file(file, model.cache_dir)
    for split, folder in named_folders.items():
        assert load_folder is not None  # else no folder has a name
        with naming(f"--{split}_dir"):
            check_folder(folder)
            splits[split] = load_folder(folder, model.cache_dir)
            if split != TEST:
                check_has_labels(splits[split], folder)
    return without_columns(splits, data)


def without_columns(splits: DatasetDict, data: DataArguments) -> DatasetDict:
    """
    The splits without the columns of `--remove_columns`.

    Raises:
        ValueError: If a split has no such column.
    """
    columns = split_list(data.remove_columns)
    for split, dataset in splits.items():
        for column in columns:
            check_column(dataset, split, "remove_columns", column)
    return splits.remove_columns(columns)


def split_list(names: str | None) -> list[str]:
    """Names that commas separate."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]


@contextmanager
def naming(argument: str) -> Iterator[None]:
    """Begins the message of an error with the argument that led to it."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"`{argument}`: {error}") from error
    except ValueError as error:
        raise ValueError(f"`{argument}`: {error}") from error


def load_named(data: DataArguments, model: ModelArguments) -> DatasetDict:
    assert data.dataset_name is not None
    cure = "pass files (--train_file), or the folder of a data set that was saved or cloned before."
    with explaining_what_is_missing("data set", data.dataset_name, "--dataset_name", cure):
        found = load_dataset(data.dataset_name, data.dataset_config_name, cache_dir=model.cache_dir, token=model.token)
    for split in split_list(data.remove_splits):
        if split not in found:
            raise ValueError(
                f"`--remove_splits` has {split!r}, but {data.dataset_name!r} has the splits {', '.join(found)}."
            )
        del found[split]
    names = {TRAIN: data.train_split_name, VALIDATION: data.validation_split_name, TEST: data.test_split_name}
    defaults = {TRAIN, VALIDATION, TEST}
    for split, name in names.items():
        if name not in found and name not in defaults:
            raise ValueError(
                f"`--{split}_split_name` is {name!r}, but {data.dataset_name!r} has the splits {', '.join(found)}."
            )
    return DatasetDict({split: found[name] for split, name in names.items() if name in found})


def load_file(name: str, cache_dir: str | None = None) -> Dataset:
    """
    Reads a file, or all files that fit a pattern.

    Raises:
        ValueError: If the type is unknown, or the file damaged or without rows.
        FileNotFoundError: If there is none.
    """
    suffix = Path(name).suffix.lower()
    if suffix not in LOADERS:
        raise ValueError(f"{name} ends with {suffix!r}, but files must be one of {', '.join(LOADERS)}.")
    # Brackets in the path of a file are no pattern.
    pattern = escape(name) if Path(name).is_file() else name
    if empty := [path for path in glob(pattern, recursive=True) if Path(path).stat().st_size == 0]:
        raise ValueError(f"{shorten(empty)} has 0 bytes. Write it anew, or leave it out.")
    try:
        return load_dataset(LOADERS[suffix], data_files=pattern, split="train", cache_dir=cache_dir)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file {name}. Check the path.") from error
    except DatasetGenerationError as error:
        raise ValueError(
            f"{name} cannot be read as {LOADERS[suffix]} ({error.__cause__ or error}). Correct the file."
        ) from error
    except ValueError as error:
        if NO_ROWS in str(error):
            raise ValueError(f"{name} has no rows, only a line of column names. Add rows.") from error
        raise ValueError(f"{name} cannot be read as {LOADERS[suffix]} ({error}). Correct the file.") from error


def raise_without_rows(error: ValueError, message: str) -> NoReturn:
    """Instead of an error of `load_dataset` that there is no data; any other is raised as it is."""
    if NO_ROWS not in str(error):
        raise error
    raise ValueError(message) from error


def check_folder(folder: str) -> None:
    """
    Raises:
        FileNotFoundError: If it does not exist, or has no files.
        ValueError: If its `metadata.csv` names none.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Check the path.")
    # The second pattern follows links to the folders of classes.
    if not any(path.is_file() for pattern in ("**/*", "*/*") for path in root.glob(pattern)):
        raise FileNotFoundError(f"There are no files in {folder}. {FOLDER_CURE}")
    for metadata in metadata_files(folder):
        columns = load_file(str(metadata)).column_names
        if not any(column.endswith(FILE_NAME) for column in columns):
            raise ValueError(
                f"{metadata} has the columns {', '.join(columns)}, but needs {FILE_NAME}: the path of every file, "
                "seen from this folder."
            )


def metadata_files(folder: str) -> list[Path]:
    return sorted(path for path in Path(folder).glob("metadata.*") if path.suffix.lower() in LOADERS)


def check_has_labels(dataset: Dataset, folder: str) -> None:
    """
    Raises:
        ValueError: If the labels should be the names of folders, but these are not two at least.
    """
    if "label" not in dataset.column_names and not metadata_files(folder):
        raise ValueError(f"The files in {folder} have no labels. {FOLDER_CURE}")


def check_column(dataset: Dataset, split: str, argument: str, name: str) -> None:
    """
    Raises:
        ValueError: If there is no such column; lists those there.
    """
    if name not in dataset.column_names:
        columns = dataset.column_names
        is_one_line = len(columns) == 1 and any(delimiter in columns[0] for delimiter in OTHER_DELIMITERS)
        cure = "Write the file with commas between its columns." if is_one_line else "Pass one of these."
        raise ValueError(
            f"`--{argument}` is {name!r}, but the {split} data has the columns {', '.join(map(quoted, columns))}. "
            f"{cure}"
        )


def quoted(name: str) -> str:
    """A name, in quotes where it ends with a blank or has one that nobody sees."""
    return name if name == " ".join(name.split()) else repr(name)


def check_input_column(splits: DatasetDict, data: DataArguments, argument: str, name: str) -> None:
    """
    Raises:
        ValueError: If a split has no such column, or it holds the labels.
    """
    for label_argument in ("label_column_name", "eval_label_column_name"):
        if getattr(data, label_argument) == name:
            raise ValueError(
                f"`--{argument}` and `--{label_argument}` are both {name!r}: a model that reads the labels has "
                "nothing to learn. Pass another column as one of the two."
            )
    for split, dataset in splits.items():
        check_column(dataset, split, argument, name)


def shorten(values: Sequence[Any], num_shown: int = SHOWN) -> str:
    """
    The first of them, and how many there are.

    Example:

    ```python
    >>> shorten([3, 4, 5, 6, 7, 8])
    '3, 4, 5, 6, 7, ... (6 in all)'

    ```
    """
    more = f", ... ({len(values)} in all)" if len(values) > num_shown else ""
    return ", ".join(map(str, values[:num_shown])) + more
