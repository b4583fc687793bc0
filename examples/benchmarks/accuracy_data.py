"""Data for the benchmark: what is loaded once, and what a regime and a seed make of it."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import torch
from accuracy_arrays import load_arrays
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from lpg_hf.data import add_label_noise, class_counts, find_label_column, make_long_tailed


DIGITS = "digits"
# What a model is fed, decided by its kind.
PIXELS, FEATURES, PROCESSED = "pixels", "features", "processed"

TEST_SHARE = 0.2
NOISE_KINDS = {"symmetric": "symmetric", "pairflip": "pairflip", "instance": "instance"}
REGIMES = (
    "balanced",
    "long_tail_10",
    "long_tail_50",
    "long_tail_100",
    "symmetric_20",
    "symmetric_40",
    "pairflip_20",
    "instance_20",
    "long_tail_20+symmetric_20",
    "long_tail_10+symmetric_40",
)
KNOWN_REGIMES = (
    "balanced, natural, long_tail_RATIO, symmetric_PERCENT, pairflip_PERCENT, instance_PERCENT, human:COLUMN (labels "
    "of that column), and a long tail or `natural` joined with a noise by +, such as long_tail_20+symmetric_20"
)


@dataclass(frozen=True)
class Regime:
    """
    What is done to the training data.

    Args:
        name (`str`): As on the command line.
        imbalance_ratio (`float`, *optional*): Largest class over smallest; `None` leaves the classes as they come.
        noise (`str`, *optional*): `"symmetric"`, `"pairflip"`, `"instance"` or `"human"`.
        rate (`float`): Share of wrong labels that is asked for.
        column (`str`, *optional*): The column of human labels.
    """

    name: str
    imbalance_ratio: float | None = 1.0
    noise: str | None = None
    rate: float = 0.0
    column: str | None = None

    @property
    def is_noisy(self) -> bool:
        return self.noise is not None

    @property
    def is_balanced(self) -> bool:
        return self.imbalance_ratio == 1

    @property
    def is_long_tailed(self) -> bool:
        return self.imbalance_ratio is not None and self.imbalance_ratio > 1


def parse_regime(name: str) -> Regime:
    """
    Reads a regime as the command line writes it.

    Human labels leave the classes as they come, every other noise is put on classes of equal size, unless the name
    says otherwise.

    Raises:
        ValueError: If the name cannot be read; the message lists what can.
    """
    parts = name.split("+")
    settings: dict[str, object] = {}
    for part in parts:
        if part in ("balanced", "natural"):
            found = {"imbalance_ratio": 1.0 if part == "balanced" else None}
        elif part.startswith("human:") and len(part) > len("human:"):
            found = {"noise": "human", "column": part.removeprefix("human:")}
        elif match := re.fullmatch(r"(long_tail|symmetric|pairflip|instance)_(\d+(?:\.\d+)?)", part):
            kind, number = match[1], float(match[2])
            is_valid = number > 1 if kind == "long_tail" else 0 < number < 100
            found = {"imbalance_ratio": number} if kind == "long_tail" else {"noise": kind, "rate": number / 100}
            found = found if is_valid else None
        else:
            found = None
        if found is None or found.keys() & settings.keys():
            raise ValueError(f"Cannot read the regime {name!r}. The known ones are {KNOWN_REGIMES}.")
        settings |= found
    if settings.get("noise") == "human":
        settings.setdefault("imbalance_ratio", None)
    return Regime(name, **settings)


@dataclass(frozen=True)
class DataSpec:
    """What is loaded and how it is fed to a model; the same spec gives the same [`Source`]."""

    data: str
    feed: str
    checkpoint: str | None = None
    input_column: str | None = None
    label_column: str | None = None
    max_train_rows: int | None = None
    max_test_rows: int | None = None
    max_length: int = 128
    cache_dir: str = "."


@dataclass
class Source:
    """
    Rows in memory. Classes are numbered by size, the largest first, so that a long tail keeps as many rows as it can.

    Args:
        inputs (`dict[str, Tensor]`): What the model takes, rows along the first axis.
        labels (`np.ndarray` of shape `[N]`): Clean labels.
        label_names (`list[str]`): Names of the classes.
        human (`dict[str, np.ndarray]`): Label columns beside the clean one.
        is_test (`np.ndarray` of shape `[N]`): The rows of the data set's own test split, all `False` if it has none.
        vectors (`Callable`): Gives what instance-dependent noise looks at, an array of shape `[N, d]`.
    """

    inputs: dict[str, Tensor]
    labels: np.ndarray
    label_names: list[str]
    human: dict[str, np.ndarray]
    is_test: np.ndarray
    vectors: Callable[[], np.ndarray]

    @property
    def num_labels(self) -> int:
        return len(self.label_names)

    def fingerprint(self) -> str:
        """Changes when the rows do."""
        digest = hashlib.sha256(self.labels.tobytes())
        for name, value in sorted(self.inputs.items()):
            digest.update(name.encode() + value.numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass
class Split:
    """
    Row numbers of the parts; the labels of `train` and `validation` are noisy where the regime is.

    `natural_test` are the rows of `test` that have the class shares of `train`, as they were before the noise.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    natural_test: np.ndarray
    noisy: np.ndarray
    clean: np.ndarray

    def class_counts(self, num_labels: int) -> list[int]:
        return np.bincount(self.noisy[self.train], minlength=num_labels).tolist()

    @property
    def noise_rate(self) -> float:
        return float(np.mean(self.noisy[self.train] != self.clean[self.train]))


def make_split(source: Source, regime: Regime, seed: int, validation_share: float = 0.2) -> Split:
    """
    Draws test and validation rows, cuts the long tail and flips labels, each from `seed`.

    The validation rows come out of the training rows and go through the same cut and the same noise. Where the data
    set has no test split a fifth of it, with the share of each class kept, becomes one. Test labels are never changed.
    Where the regime asks for classes of equal size the natural test set is the whole test set.

    Raises:
        ValueError: If the data is too small for the long tail, so that a class would be lost, if all the labels that
            a class keeps are wrong, or if the human labels are missing.
    """
    rows = np.arange(len(source.labels))
    test = rows[source.is_test]
    rest = rows[~source.is_test]
    if len(test) == 0:
        rest, test = _stratified(rest, source.labels, TEST_SHARE, seed)
    train, validation = _stratified(rest, source.labels, validation_share, seed)

    if regime.imbalance_ratio is not None:
        train = _cut(source, train, regime, seed)
        validation = _cut(source, validation, regime, seed, is_strict=False)
    noisy = source.labels.copy()
    if regime.is_noisy:
        both = np.concatenate([train, validation])
        noisy[both] = _noisy_labels(source, both, regime, seed)
        _check_classes_survive(source, train, noisy, regime)
    natural_test = test if regime.is_balanced else _with_shares_of(source, train, test, seed)
    return Split(train, validation, test, natural_test, noisy, source.labels)


def _stratified(rows: np.ndarray, labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return train_test_split(rows, test_size=share, stratify=labels[rows], random_state=seed)


def _as_dataset(source: Source, rows: np.ndarray) -> Dataset:
    features = Features({"label": ClassLabel(names=source.label_names), "row": Value("int64")})
    return Dataset.from_dict({"label": source.labels[rows], "row": rows}, features=features)


def _cut(source: Source, rows: np.ndarray, regime: Regime, seed: int, is_strict: bool = True) -> np.ndarray:
    subset = make_long_tailed(_as_dataset(source, rows), regime.imbalance_ratio, seed=seed)
    counts = class_counts(subset)
    if is_strict and max(counts) / min(counts) < 0.9 * regime.imbalance_ratio:
        raise ValueError(
            f"Regime {regime.name!r} would lose the class {source.label_names[-1]!r}: the largest class can keep "
            f"{max(counts)} training rows, and the smallest would get {max(counts) / regime.imbalance_ratio:.2f}. "
            "Take a smaller ratio or more data."
        )
    return np.array(subset["row"][:])


def _with_shares_of(source: Source, train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    """The largest part of the test rows in which each class has its share of the training rows, to half a row."""
    wanted, available = (np.bincount(source.labels[rows], minlength=source.num_labels) for rows in (train, test))
    is_in_both = (wanted > 0) & (available > 0)
    sizes = np.rint(wanted * np.min(available[is_in_both] / wanted[is_in_both])).astype(int)
    shuffled = np.random.default_rng(seed).permutation(test)
    return np.concatenate([shuffled[source.labels[shuffled] == label][:size] for label, size in enumerate(sizes)])


def _noisy_labels(source: Source, rows: np.ndarray, regime: Regime, seed: int) -> np.ndarray:
    if regime.noise == "human":
        if regime.column not in source.human:
            known = ", ".join(sorted(source.human)) or "none"
            raise ValueError(
                f"Regime {regime.name!r} needs the label column {regime.column!r}, which the data does not have. "
                f"Columns that could be human labels: {known}."
            )
        return source.human[regime.column][rows]
    features = source.vectors()[rows] if regime.noise == "instance" else None
    noisy = add_label_noise(_as_dataset(source, rows), regime.rate, regime.noise, seed=seed, features=features)
    return np.array(noisy["label"][:])


def _check_classes_survive(source: Source, train: np.ndarray, noisy: np.ndarray, regime: Regime) -> None:
    is_right = noisy[train] == source.labels[train]
    right = np.bincount(source.labels[train][is_right], minlength=source.num_labels)
    lost = [source.label_names[label] for label in np.flatnonzero(right == 0)]
    if lost:
        raise ValueError(
            f"Regime {regime.name!r} loses {len(lost)} of {source.num_labels} classes ({', '.join(lost[:5])}): no "
            "training row of it keeps its label. Take less noise, a smaller ratio or more data."
        )


@lru_cache(maxsize=4)
def load_source(spec: DataSpec) -> Source:
    """
    Loads data and turns it into tensors; what a checkpoint encodes is kept on disk.

    Raises:
        FileNotFoundError: If a path leads nowhere.
        ValueError: If the data has no column of labels or of inputs.
    """
    table = _load_digits() if spec.data == DIGITS else _load_table(spec)
    order = np.argsort(-np.bincount(table.labels, minlength=len(table.label_names)), kind="stable")
    new_number = np.argsort(order)
    inputs, vectors = _feed(table, spec)
    return Source(
        inputs=inputs,
        labels=new_number[table.labels],
        label_names=[table.label_names[label] for label in order],
        human={name: new_number[labels] for name, labels in table.human.items()},
        is_test=table.is_test,
        vectors=vectors,
    )


@dataclass
class _Table:
    """Rows as loaded: texts, or pixels [N, channels, height, width] from 0 to 1, or vectors [N, d]; or PIL images."""

    labels: np.ndarray
    label_names: list[str]
    human: dict[str, np.ndarray]
    is_test: np.ndarray
    values: list | Tensor
    kind: str


TEXT, IMAGE, VECTOR = "text", "image", "vector"


def _load_digits() -> _Table:
    raw = load_digits()
    pixels = torch.from_numpy(raw.images).float()[:, None] / 16
    names = [str(digit) for digit in range(10)]
    return _Table(raw.target, names, {}, np.zeros(len(raw.target), dtype=bool), pixels, IMAGE)


def _load_table(spec: DataSpec) -> _Table:
    parts = _load_parts(spec)
    label_column = spec.label_column or find_label_column(parts["train"])
    for name, part in parts.items():
        for column in (label_column, spec.input_column):
            if column is not None and column not in part.column_names:
                raise ValueError(
                    f"{spec.data!r} has no column {column!r} in its split {name!r}; found {part.column_names}. Name "
                    "the columns with `label_column` and `input_column`."
                )
    label_names = _label_names(parts["train"], label_column)
    labels = {name: _numbers(part, label_column, label_names) for name, part in parts.items()}
    input_column = spec.input_column or _find_input_column(parts["train"], label_column, spec.data)
    values = [_read_inputs(part, input_column) for part in parts.values()]
    num_test = len(parts["test"]) if "test" in parts else 0
    all_labels = np.concatenate(list(labels.values()))
    human = {}
    for column, feature in parts["train"].features.items():
        is_integer = isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "int" in feature.dtype)
        if column != label_column and is_integer:
            numbers = _numbers(parts["train"], column, label_names)
            if numbers.min() >= 0 and numbers.max() < len(label_names):
                human[column] = np.concatenate([numbers, all_labels[len(numbers) :]])
    is_test = np.arange(len(all_labels)) >= len(all_labels) - num_test
    kind = values[0][0]
    joined = [value for _, part in values for value in part]
    return _Table(all_labels, label_names, human, is_test, torch.stack(joined) if kind == VECTOR else joined, kind)


def _load_parts(spec: DataSpec) -> DatasetDict:
    path = Path(spec.data)
    if path.suffix == ".npz" and path.is_file():
        loaded = load_arrays(path)
    elif path.is_file():
        builders = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
        if path.suffix not in builders:
            raise ValueError(f"`data` is the file {spec.data!r}; files may end in {', '.join(builders)}, .npz.")
        loaded = datasets.load_dataset(builders[path.suffix], data_files={"train": str(path)})
    elif path.exists():
        loaded = datasets.load_dataset(str(path))
    elif path.is_absolute() or spec.data.startswith(".") or path.suffix:
        raise FileNotFoundError(
            f"`data` has {spec.data!r}, which does not exist. Pass 'digits', a file, a folder or the name of a "
            "data set of the hub."
        )
    else:
        try:
            loaded = datasets.load_dataset(spec.data)
        except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
            raise ValueError(
                f"`data` has {spec.data!r}: there is no such file or folder here, and the hub gave none ({error}). "
                "Pass 'digits', a file, a folder or the name of a data set of the hub."
            ) from error
    if "train" not in loaded:
        raise ValueError(f"{spec.data!r} has no split 'train'; found {sorted(loaded)}.")
    test = next((loaded[name] for name in ("test", "validation") if name in loaded), None)
    parts = {"train": _some_rows(loaded["train"], spec.max_train_rows)}
    return DatasetDict(parts if test is None else parts | {"test": _some_rows(test, spec.max_test_rows)})


def _some_rows(part: Dataset, number: int | None) -> Dataset:
    return part if number is None or number >= len(part) else part.shuffle(seed=0).select(range(number))


def _label_names(part: Dataset, column: str) -> list[str]:
    feature = part.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    return [str(value) for value in sorted(set(part[column][:]))]


def _numbers(part: Dataset, column: str, label_names: list[str]) -> np.ndarray:
    feature = part.features[column]
    if isinstance(feature, ClassLabel):
        if set(feature.names) <= set(label_names):
            position = np.array([label_names.index(name) for name in feature.names])
            return position[np.array(part[column][:])]
        return np.array(part[column][:])
    position = {name: number for number, name in enumerate(label_names)}
    values = [str(value) for value in part[column][:]]
    return np.array([position.get(value, -1) for value in values])


def _find_input_column(part: Dataset, label_column: str, data: str) -> str:
    columns = {name: feature for name, feature in part.features.items() if name != label_column}
    for is_wanted in (
        lambda feature: isinstance(feature, datasets.Image),
        lambda feature: isinstance(feature, Value) and feature.dtype in ("string", "large_string"),
        lambda feature: isinstance(feature, datasets.List),
    ):
        for name, feature in columns.items():
            if is_wanted(feature):
                return name
    raise ValueError(f"{data!r} has no column of images, texts or vectors; found {part.features}.")


def _read_inputs(part: Dataset, column: str) -> tuple[str, list]:
    feature = part.features[column]
    if isinstance(feature, datasets.Image):
        return IMAGE, list(part[column])
    if isinstance(feature, Value):
        return TEXT, list(part[column])
    return VECTOR, list(torch.from_numpy(np.stack(part.with_format("numpy")[column][:]).astype(np.float32)))


def _feed(table: _Table, spec: DataSpec) -> tuple[dict[str, Tensor], Callable[[], np.ndarray]]:
    """What the model takes, and what instance-dependent noise looks at."""
    if spec.feed == FEATURES:
        features = _features(table, spec)
        return {"features": features}, lambda: features.numpy()
    if table.kind == VECTOR:
        raise ValueError(f"The inputs of {spec.data!r} are vectors, which only the model 'mlp' takes.")
    if spec.feed == PIXELS:
        if table.kind == TEXT:
            raise ValueError(f"The inputs of {spec.data!r} are texts: pass a checkpoint as `model`, or as `encoder`.")
        pixels = _standardized(_pixels(table), table.is_test, over=(0, 2, 3))
        return {"pixel_values": pixels}, lambda: _thumbnails(pixels)
    if table.kind == TEXT:
        return _tokens(table.values, spec), lambda: _encoded(table, spec).numpy()
    pixels = _pixels(table)
    return {"pixel_values": _processed_images(table, spec)}, lambda: _thumbnails(pixels)


def _pixels(table: _Table) -> Tensor:
    """[N, channels, height, width], from 0 to 1, all of the size of the first image."""
    if isinstance(table.values, Tensor):
        return table.values
    first = table.values[0]
    mode = "L" if first.mode in ("1", "L") else "RGB"
    arrays = [np.asarray(image.convert(mode).resize(first.size), dtype=np.uint8) for image in table.values]
    pixels = torch.from_numpy(np.stack(arrays))
    return (pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)).float() / 255


def _thumbnails(pixels: Tensor) -> np.ndarray:
    return F.adaptive_avg_pool2d(pixels, 8).flatten(1).numpy()


def _standardized(values: Tensor, is_test: np.ndarray, over: tuple[int, ...]) -> Tensor:
    """Centered, and scaled to unit variance overall, both as measured outside the test split."""
    rest = values[torch.from_numpy(~is_test)]
    mean = rest.mean(over, keepdim=True)
    return (values - mean) / (rest - mean).std()


def _features(table: _Table, spec: DataSpec) -> Tensor:
    if table.kind == VECTOR:
        features = table.values
    elif spec.checkpoint is not None:
        features = _encoded(table, spec)
    elif table.kind == IMAGE:
        features = _pixels(table).flatten(1)
    else:
        raise ValueError(f"The inputs of {spec.data!r} are texts: pass a checkpoint as `encoder` for their features.")
    return _standardized(features, table.is_test, over=(0,))


def _tokens(texts: list[str], spec: DataSpec) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(spec.checkpoint)
    encoding = tokenizer(texts, truncation=True, max_length=spec.max_length, padding=True, return_tensors="pt")
    return {name: encoding[name] for name in ("input_ids", "attention_mask")}


def _processed_images(table: _Table, spec: DataSpec) -> Tensor:
    processor = AutoImageProcessor.from_pretrained(spec.checkpoint)
    images = [(255 * image).byte() for image in _pixels(table).expand(-1, 3, -1, -1)]
    return torch.cat(
        [processor(images[i : i + 256], return_tensors="pt")["pixel_values"] for i in range(0, len(images), 256)]
    )


@torch.no_grad()
def _encoded(table: _Table, spec: DataSpec) -> Tensor:
    """Frozen features of a checkpoint: the mean of its last hidden states. Computed once, kept in `cache_dir`."""
    key = hashlib.sha256(f"{spec.checkpoint} {spec.max_length} {table.kind}".encode())
    for value in table.values:
        key.update(value.encode() if table.kind == TEXT else np.asarray(value).tobytes())
    path = Path(spec.cache_dir) / f"features-{key.hexdigest()[:16]}.safetensors"
    if path.exists():
        return load_file(path)["features"]

    model = AutoModel.from_pretrained(spec.checkpoint, dtype=torch.float32).eval()
    inputs = _tokens(table.values, spec) if table.kind == TEXT else {"pixel_values": _processed_images(table, spec)}
    # By length, so that little is padded.
    mask = inputs.get("attention_mask")
    order = torch.arange(len(table.values)) if mask is None else mask.sum(1).argsort()
    parts = []
    for rows in order.split(64):
        batch = trim({name: value[rows] for name, value in inputs.items()})
        states = model(**batch).last_hidden_state
        if mask is None:
            parts.append(states.flatten(2).mean(2) if states.ndim == 4 else states.mean(1))
        else:
            weights = batch["attention_mask"][..., None]
            parts.append((states * weights).sum(1) / weights.sum(1))
    features = torch.empty(len(order), parts[0].shape[1])
    features[order] = torch.cat(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A kill while writing must not leave half a file under the name that is looked for.
    unfinished = path.with_suffix(".unfinished")
    save_file({"features": features}, unfinished)
    unfinished.rename(path)
    return features


def trim(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cuts the padding that no row of the batch needs."""
    if "attention_mask" not in batch:
        return batch
    length = int(batch["attention_mask"].sum(1).max())
    return {name: value[:, :length] if value.ndim == 2 else value for name, value in batch.items()}
