"""From the arguments to `datasets`: loaded, with checked columns and class indices, cut, and stressed."""

import logging
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import NoReturn

from datasets import Array2D, Array3D, Audio, ClassLabel, Dataset, DatasetDict, Image, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from safetensors import SafetensorError

from lpg_hf.data import LABEL_COLUMNS, add_label_noise, class_counts, make_long_tailed
from lpg_hf.loss import IGNORE_INDEX

from .arguments import Arguments, DataArguments, ModelArguments


logger = logging.getLogger(__name__)

TRAIN, VALIDATION, TEST = "train", "validation", "test"
LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
FILE_NAME = "file_name"
FOLDER_CURE = (
    "Make one folder per class, two at least, with the files in them; or a metadata.csv with the columns file_name "
    "and label."
)
SHOWN = 5


@contextmanager
def explaining_what_is_missing(kind: str, name: str, argument: str, cure: str, must_hold: str | None = None):
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
    folders = {}
    if load_folder is not None:
        folders = {TRAIN: data.train_dir, VALIDATION: data.validation_dir, TEST: data.test_dir}
    files = {split: file for split, file in files.items() if file is not None}
    folders = {split: folder for split, folder in folders.items() if folder is not None}
    if (data.dataset_name is None) == (not files and not folders):
        what = "nothing to read" if data.dataset_name is None else f"{data.dataset_name!r} and local data as well"
        local = "--train_file and --validation_file" + (" or --train_dir and --validation_dir" if load_folder else "")
        raise ValueError(f"Found {what}: pass either --dataset_name, or {local}.")
    if data.dataset_name is not None:
        return load_named(data, model)
    if both := files.keys() & folders.keys():
        raise ValueError(f"Both a file and a folder were given for {', '.join(sorted(both))}: pass one of them.")
    splits = DatasetDict()
    for split, file in files.items():
        with naming(f"--{split}_file"):
            splits[split] = load_file(file, model.cache_dir)
    for split, folder in folders.items():
        with naming(f"--{split}_dir"):
            check_folder(folder)
            splits[split] = load_folder(folder, model.cache_dir)
            if split != TEST:
                check_has_labels(splits[split], folder)
    return splits


@contextmanager
def naming(argument: str):
    """Begins the message of an error with the argument that led to it."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"`{argument}`: {error}") from error
    except ValueError as error:
        raise ValueError(f"`{argument}`: {error}") from error


def load_named(data: DataArguments, model: ModelArguments) -> DatasetDict:
    cure = "pass files (--train_file), or the folder of a data set that was saved or cloned before."
    with explaining_what_is_missing("data set", data.dataset_name, "--dataset_name", cure):
        found = load_dataset(data.dataset_name, data.dataset_config_name, cache_dir=model.cache_dir, token=model.token)
    names = {TRAIN: data.train_split_name, VALIDATION: data.validation_split_name, TEST: data.test_split_name}
    defaults = {TRAIN, VALIDATION, TEST}
    for split, name in names.items():
        if name not in found and name not in defaults:
            raise ValueError(
                f"`--{split}_split_name` is {name!r}, but {data.dataset_name!r} has the splits {', '.join(found)}."
            )
    return DatasetDict({split: found[name] for split, name in names.items() if name in found})


def load_file(pattern: str, cache_dir: str | None = None) -> Dataset:
    """
    Raises:
        ValueError: If the type is unknown, or the file damaged or without rows.
        FileNotFoundError: If there is none.
    """
    suffix = Path(pattern).suffix.lower()
    if suffix not in LOADERS:
        raise ValueError(f"{pattern} ends with {suffix!r}, but files must be one of {', '.join(LOADERS)}.")
    if empty := [path for path in glob(pattern, recursive=True) if Path(path).stat().st_size == 0]:
        raise ValueError(f"{shorten(empty)} has 0 bytes. Write it anew, or leave it out.")
    try:
        return load_dataset(LOADERS[suffix], data_files=pattern, split="train", cache_dir=cache_dir)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file {pattern}. Check the path.") from error
    except DatasetGenerationError as error:
        raise ValueError(
            f"{pattern} cannot be read as {LOADERS[suffix]} ({error.__cause__ or error}). Correct the file."
        ) from error
    except ValueError as error:
        raise_without_rows(error, f"{pattern} has no rows, only a line of column names. Add rows.")


def raise_without_rows(error: ValueError, message: str) -> NoReturn:
    """Instead of an error of `load_dataset` that there is no data; any other is raised as it is."""
    if "corresponds to no data" not in str(error):
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
    if not any(path.is_file() for path in root.rglob("*")):
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
        raise ValueError(
            f"`--{argument}` is {name!r}, but the {split} data has the columns {', '.join(dataset.column_names)}. "
            "Pass one of these."
        )


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


# Images and recordings


def cast_to_files(
    splits: DatasetDict, data: DataArguments, argument: str, column: str, feature: Image | Audio
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


# Labels


def encode_labels(
    splits: DatasetDict, data: DataArguments, known_names: Iterable[str] | None = None
) -> tuple[DatasetDict, list[str]]:
    """
    Gives every split a `ClassLabel` column `labels`, with the same names in the same order.

    Other columns that a collator would take for the labels are removed. Test data may have no labels.

    Args:
        splits (`DatasetDict`): As loaded.
        data ([`DataArguments`]): Names the columns.
        known_names (`Iterable[str]`, *optional*): Defaults to those of the training data.

    Returns:
        The splits, and the names of the classes.

    Raises:
        ValueError: If the column is missing, has no labels, or names that the training data has not.
    """
    names = None if known_names is None else list(known_names)
    source = "training data" if known_names is None else "model"
    encoded = DatasetDict()
    for split in (TRAIN, VALIDATION, TEST):
        if split not in splits:
            continue
        dataset = splits[split]
        column, argument = data.label_column_name, "label_column_name"
        if split != TRAIN and data.eval_label_column_name is not None:
            column, argument = data.eval_label_column_name, "eval_label_column_name"
        if split == TEST and not has_labels(dataset, column):
            encoded[split] = dataset.remove_columns([c for c in LABEL_COLUMNS if c in dataset.column_names])
            continue
        check_column(dataset, split, argument, column)
        values = label_values(dataset, split, column)
        found = label_names(dataset, column, values)
        if names is None:
            names = found
        elif unknown := [name for name in found if name not in names]:
            raise ValueError(
                f"The {split} data has labels in column {column!r} that the {source} has not: {shorten(unknown)}. The "
                f"{source} has: {shorten(names)}. Correct the names, or train on rows of these classes, too."
            )
        elif split == VALIDATION and len(found) < len(names):
            missing = [name for name in names if name not in found]
            logger.warning(f"The validation data has no labels {shorten(missing)}: they are not evaluated.")
        index = {name: position for position, name in enumerate(names)}
        dataset = dataset.remove_columns([c for c in {*LABEL_COLUMNS, column} if c in dataset.column_names])
        indices = [index[value] for value in values]
        encoded[split] = dataset.add_column("labels", indices, feature=ClassLabel(names=names))
    if len(names) < 2:
        raise ValueError(f"The labels name one class alone, {names[0]!r}: there is nothing to tell apart.")
    return encoded, names


def has_labels(dataset: Dataset, column: str) -> bool:
    """Test sets of the hub have no label column, or one without a class (-1) in any row."""
    if column not in dataset.column_names:
        return False
    return any(value not in (None, IGNORE_INDEX, -1) for value in dataset[column][:])


def label_values(dataset: Dataset, split: str, column: str) -> list[str]:
    """The name of every row's class."""
    feature = dataset.features[column]
    values = dataset[column][:]
    no_label = (None, IGNORE_INDEX, -1) if isinstance(feature, ClassLabel) else (None, IGNORE_INDEX)
    if unlabelled := [row for row, value in enumerate(values) if value in no_label]:
        raise ValueError(
            f"Column {column!r} of the {split} data has no label in {len(unlabelled)} of {len(values)} rows (rows "
            f"{shorten(unlabelled)}). Remove these rows."
        )
    if isinstance(feature, ClassLabel):
        return feature.int2str(values)
    is_class = isinstance(feature, Value) and not feature.dtype.startswith(("float", "double"))
    if not is_class:
        raise ValueError(
            f"Column {column!r} of the {split} data holds {feature}, but labels must be names or integers, one per "
            "row. Pass another --label_column_name."
        )
    return [str(value) for value in values]


def label_names(dataset: Dataset, column: str, values: list[str]) -> list[str]:
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        return feature.names
    is_integer = isinstance(feature, Value) and "int" in feature.dtype
    return sorted(set(values), key=int if is_integer else None)


def shorten(values: list) -> str:
    return ", ".join(map(str, values[:SHOWN])) + (f", ... ({len(values)} in all)" if len(values) > SHOWN else "")


# Rows


def choose_rows(splits: DatasetDict, arguments: Arguments) -> DatasetDict:
    """
    Splits off validation rows where there are none, cuts every split to its largest size, and then stresses the
    training rows: first the long tail, then the noise, which so is the same share of every class.
    """
    data, stress, seed = arguments.data, arguments.stress, arguments.training.seed
    splits = DatasetDict(splits)
    if TRAIN in splits and VALIDATION not in splits and arguments.training.do_eval:
        splits |= split_off_validation(splits[TRAIN], data.train_val_split, seed)
    limits = {TRAIN: data.max_train_samples, VALIDATION: data.max_eval_samples, TEST: data.max_predict_samples}
    for split, limit in limits.items():
        if split in splits and limit is not None and limit < len(splits[split]):
            # Files are often sorted by class. Predictions keep the order of their file.
            rows = splits[split] if split == TEST else splits[split].shuffle(seed=seed)
            splits[split] = rows.select(range(limit))
    if TRAIN in splits and stress.imbalance_ratio != 1:
        splits[TRAIN] = make_long_tailed(splits[TRAIN], stress.imbalance_ratio, seed=seed)
        check_imbalance(splits[TRAIN], stress.imbalance_ratio)
    if TRAIN in splits and stress.label_noise != 0:
        splits[TRAIN] = add_label_noise(splits[TRAIN], stress.label_noise, seed=seed)
    return splits


def check_imbalance(train: Dataset, wanted: float) -> None:
    counts = class_counts(train)
    largest, smallest = max(counts), min(counts)
    # A ratio that is no whole number is met to within half a row of the largest class.
    if largest / smallest < wanted - 0.5:
        logger.warning(
            f"`--imbalance_ratio` is {wanted:g}, but there are too few training rows for it: {largest / smallest:g} "
            f"was reached, with {largest} rows of the largest class and {smallest} of the smallest."
        )


def split_off_validation(train: Dataset, share: float, seed: int) -> dict[str, Dataset]:
    """The same share of every class, unless one is too small for that."""
    if not 0 < share < 1:
        raise ValueError(f"`--train_val_split` is {share}, but must be a share of the training rows, in (0, 1).")
    counts = class_counts(train)
    can_stratify = min(count for count in counts if count) >= 2 and share * len(train) >= len(counts)
    parts = train.train_test_split(share, seed=seed, stratify_by_column="labels" if can_stratify else None)
    return {TRAIN: parts["train"], VALIDATION: parts["test"]}
