"""Label noise, long tails and class counts for `datasets.Dataset`.

Only the label column is ever read or written. Image columns are neither decoded nor encoded again (instance-dependent
noise looks at them, and leaves them as they are), a `set_transform` never runs and comes back unchanged.
"""

from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import ndtr, ndtri


LABEL_COLUMNS = ("labels", "label", "label_ids")
CLEAN_LABEL_COLUMN = "clean_label"
NOISE_KINDS = ("symmetric", "pairflip", "asymmetric", "instance")

_IGNORED_LABEL = -100
_INSTANCE_RATE_STD = 0.1
_THUMBNAIL_SIZE = (8, 8)
_ARRAY_FEATURES = (datasets.Array2D, datasets.Array3D, datasets.Array4D, datasets.Array5D)


def find_label_column(dataset: datasets.Dataset) -> str:
    """
    Names the column that holds the labels: the first of `labels`, `label` and `label_ids` that exists.

    These are the names that the collators of [`~transformers.Trainer`] understand.

    Args:
        dataset (`datasets.Dataset`):
            The dataset to look at.

    Returns:
        `str`: The name of the label column.

    Raises:
        ValueError: If the dataset has none of these columns.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from lpg_hf.data import find_label_column

    >>> find_label_column(Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]}))
    'label'

    ```
    """
    _check_is_dataset(dataset)
    for name in LABEL_COLUMNS:
        if name in dataset.column_names:
            return name
    raise ValueError(
        f"dataset has no label column: looked for {', '.join(LABEL_COLUMNS)}, found the columns "
        f"{dataset.column_names}. Rename the column with `dataset.rename_column(..., 'labels')`, or pass its name as "
        "`label_column` where the function takes it."
    )


def class_counts(
    dataset: datasets.Dataset, num_labels: int | None = None, label_column: str | None = None
) -> list[int]:
    """
    Counts the rows of every class.

    Rows labelled -100 (ignored by the loss) are left out.

    Args:
        dataset (`datasets.Dataset`):
            The dataset to count, as seen through its `shuffle`, `select` and `filter`.
        num_labels (`int`, *optional*):
            The number of classes. Defaults to the number of names of a `ClassLabel` column, else to the largest
            label plus one.
        label_column (`str`, *optional*):
            The column of integer labels, stored as `[N]` or `[N, 1]`. Defaults to what [`find_label_column`] finds.

    Returns:
        `list[int]`: `num_labels` counts, in the order of the class indices.

    Raises:
        ValueError: If the dataset is empty, or the labels are missing, not integers, or out of range.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from lpg_hf.data import class_counts

    >>> class_counts(Dataset.from_dict({"label": [0, 2, 2, -100]}), num_labels=4)
    [1, 0, 2, 0]

    ```
    """
    column = _resolve_label_column(dataset, label_column)
    labels = _read_labels(dataset, column)
    if num_labels is None:
        num_labels = _number_of_classes(dataset, column, labels)
    _check_range(labels, num_labels, column)
    return np.bincount(labels[labels != _IGNORED_LABEL], minlength=num_labels).tolist()


def add_label_noise(
    dataset: datasets.Dataset,
    rate: float | None = None,
    kind: str = "symmetric",
    seed: int = 0,
    *,
    matrix: Sequence[Sequence[float]] | np.ndarray | None = None,
    features: Sequence[Sequence[float]] | np.ndarray | None = None,
    label_column: str | None = None,
) -> datasets.Dataset:
    """
    Flips labels at random, and keeps the true ones in a new column `clean_label`.

    Labels of -100 stay as they are. All feature types, the format and the transform of the dataset are kept. A
    shuffled or selected dataset is written out in its new order, as `Dataset.add_column` does it.

    The kinds of noise:

    - `"symmetric"`: a label flips with probability `rate`, to one of the other classes, each equally likely.
    - `"pairflip"` (Han et al., 2018, https://huggingface.co/papers/1804.06872): class `c` flips with probability
      `rate` to class `(c + 1) % C`.
    - `"asymmetric"` (Patrini et al., 2017, https://huggingface.co/papers/1609.03683): class `c` becomes class `k`
      with probability `matrix[c][k]`.
    - `"instance"` (after Xia et al., 2020, https://huggingface.co/papers/2006.07836): every sample has its own flip
      probability, drawn from a normal distribution with mean `rate` and standard deviation 0.1; a flipped sample of
      class `c` goes to another class, drawn from the softmax of its features times a random matrix of class `c`, so
      that similar samples are mislabelled alike. Ours: the normal is truncated symmetrically around `rate` (so the
      expected noise is `rate` exactly, small rates included), and the features are centered and scaled to unit
      variance overall (so their unit does not matter).

    Args:
        dataset (`datasets.Dataset`):
            The dataset with the true labels.
        rate (`float`, *optional*):
            The expected share of wrong labels, in `[0, 1)`. Needed for all kinds but `"asymmetric"`, which takes its
            rates from `matrix`.
        kind (`str`, *optional*, defaults to `"symmetric"`):
            One of `"symmetric"`, `"pairflip"`, `"asymmetric"` and `"instance"`.
        seed (`int`, *optional*, defaults to 0):
            The same seed gives the same noise. NumPy's global random state is neither read nor changed.
        matrix (array-like of shape `[C, C]`, *optional*):
            The transition matrix of asymmetric noise; every row sums to 1.
        features (array-like of shape `[N, d]`, *optional*):
            For instance noise: one numeric vector per row of `dataset`, in its order. Defaults to the first image
            column (as 8 x 8 RGB thumbnails), else to the first column of numeric arrays of one shape.
        label_column (`str`, *optional*):
            The column of integer labels, stored as `[N]` or `[N, 1]`. Defaults to what [`find_label_column`] finds.

    Returns:
        `datasets.Dataset`: A new dataset with the noisy labels in the label column and the true ones in
        `clean_label`, which is the last column and has the same feature type.

    Raises:
        ValueError: If an argument is missing, superfluous or out of range, if the dataset is empty, has fewer than
            two classes or a column `clean_label` already, or if its labels are not integers in range.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from lpg_hf.data import add_label_noise

    >>> dataset = Dataset.from_dict({"label": [0, 1, 2] * 100})
    >>> noisy = add_label_noise(dataset, 0.3, kind="pairflip", seed=0)
    >>> noisy.column_names
    ['label', 'clean_label']
    >>> noisy["clean_label"][:] == dataset["label"][:]
    True
    >>> flipped = [row for row in noisy if row["label"] != row["clean_label"]]
    >>> all(row["label"] == (row["clean_label"] + 1) % 3 for row in flipped)
    True

    ```
    """
    _check_noise_arguments(rate, kind, matrix, features)
    column = _resolve_label_column(dataset, label_column)
    if CLEAN_LABEL_COLUMN in dataset.column_names:
        raise ValueError(
            f"dataset already has a column {CLEAN_LABEL_COLUMN!r}: it has been given noise before, and a second round "
            "would lose the true labels. Start from the clean dataset, or rename or remove that column first."
        )
    labels = _read_labels(dataset, column)
    num_classes = _number_of_classes(dataset, column, labels)
    if kind == "asymmetric":
        matrix = _as_transition_matrix(matrix)
        # A plain integer column does not say how many classes there are: the matrix may know of unseen ones.
        if not isinstance(_label_feature(dataset, column), datasets.ClassLabel):
            num_classes = max(num_classes, len(matrix))
        if len(matrix) != num_classes:
            raise ValueError(
                f"matrix has shape {matrix.shape}, but the labels of column {column!r} need [{num_classes}, "
                f"{num_classes}]: one row and one column per class."
            )
    _check_range(labels, num_classes, column)
    _check_two_classes(num_classes, column)

    rng = np.random.default_rng(seed)
    labelled = labels != _IGNORED_LABEL
    clean = labels[labelled]
    if kind == "symmetric":
        noisy = _flip_uniformly(clean, num_classes, rate, rng)
    elif kind == "pairflip":
        noisy = _flip_to_next_class(clean, num_classes, rate, rng)
    elif kind == "asymmetric":
        noisy = _flip_by_transition_matrix(clean, matrix, rng)
    else:
        vectors = _sample_vectors(dataset, column) if features is None else _as_vectors(features, len(dataset))
        noisy = _flip_by_instance(clean, num_classes, rate, vectors[labelled], rng)
    noisy_labels = labels.copy()
    noisy_labels[labelled] = noisy
    return _with_noisy_labels(dataset, column, noisy_labels)


def make_long_tailed(
    dataset: datasets.Dataset, imbalance_ratio: float, seed: int = 0, *, label_column: str | None = None
) -> datasets.Dataset:
    """
    Takes a subsample whose class sizes fall off exponentially with the class index.

    The profile is that of the long-tailed CIFAR of Cui et al., 2019 (https://huggingface.co/papers/1901.05555):
    `n_c = n_0 * imbalance_ratio ** (-c / (C - 1))`, rounded down. Class 0 is the largest, class `C - 1` the smallest.
    Ours is the choice of `n_0`, since data need not be balanced: let `m` be the largest for which every class has
    enough rows. The last class gets `t = floor(m / imbalance_ratio)` rows and class 0 gets
    `n_0 = round(t * imbalance_ratio)`, so a whole ratio is met exactly and any other to within `0.5 / t`. If `m` is
    below the ratio, the last class keeps one row, class 0 gets `m`, and the ratio is as large as the data allow. With
    `imbalance_ratio=1` every class gets as many rows as the smallest has.

    Args:
        dataset (`datasets.Dataset`):
            The dataset to subsample. Every class needs at least one row.
        imbalance_ratio (`float`):
            The size of the largest class over that of the smallest; at least 1.
        seed (`int`, *optional*, defaults to 0):
            The same seed picks the same rows. NumPy's global random state is neither read nor changed.
        label_column (`str`, *optional*):
            The column of integer labels, stored as `[N]` or `[N, 1]`. Defaults to what [`find_label_column`] finds.

    Returns:
        `datasets.Dataset`: The chosen rows in their old order, drawn without replacement. Rows labelled -100 belong
        to no class and are left out.

    Raises:
        ValueError: If `imbalance_ratio` is below 1 or not finite, if the dataset is empty, has fewer than two classes
            or a class without rows, or if its labels are not integers in range.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from lpg_hf.data import class_counts, make_long_tailed

    >>> dataset = Dataset.from_dict({"label": [0, 1, 2] * 100})
    >>> class_counts(make_long_tailed(dataset, imbalance_ratio=25))
    [100, 20, 4]

    ```
    """
    if not 1 <= imbalance_ratio < np.inf:
        raise ValueError(
            f"imbalance_ratio is {imbalance_ratio}, but must be a finite number of at least 1: the size of the "
            "largest class over that of the smallest. Pass 1 for classes of equal size."
        )
    column = _resolve_label_column(dataset, label_column)
    labels = _read_labels(dataset, column)
    num_classes = _number_of_classes(dataset, column, labels)
    _check_range(labels, num_classes, column)
    _check_two_classes(num_classes, column)
    rows_by_class = [np.flatnonzero(labels == index) for index in range(num_classes)]
    available = np.array([len(rows) for rows in rows_by_class])
    if not available.all():
        raise ValueError(
            f"dataset has no row of class {np.argmin(available)} in column {column!r} (it has {num_classes} classes), "
            "so there is no long tail over all classes. Remove the class from the labels, or add rows of it."
        )

    rng = np.random.default_rng(seed)
    wanted = _long_tailed_profile(available, imbalance_ratio)
    chosen = [rng.choice(rows, size, replace=False) for rows, size in zip(rows_by_class, wanted, strict=True)]
    return dataset.select(np.sort(np.concatenate(chosen)))


def _long_tailed_profile(available: np.ndarray, imbalance_ratio: float) -> np.ndarray:
    num_classes = len(available)
    decay = imbalance_ratio ** (np.arange(num_classes) / (num_classes - 1))
    # The powers are inexact: without the slack a whole 1000 may be cut to 999.
    slack = 1 + 1e-9
    largest = int(np.min(available * decay) * slack)
    tail = max(1, int(largest / imbalance_ratio * slack))
    head = min(largest, round(tail * imbalance_ratio))
    return np.maximum(tail, (head / decay * slack).astype(np.int64))


def _flip_uniformly(labels: np.ndarray, num_classes: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    flips = rng.random(len(labels)) < rate
    shift = rng.integers(1, num_classes, size=len(labels))
    return np.where(flips, (labels + shift) % num_classes, labels)


def _flip_to_next_class(labels: np.ndarray, num_classes: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    flips = rng.random(len(labels)) < rate
    return np.where(flips, (labels + 1) % num_classes, labels)


def _flip_by_transition_matrix(labels: np.ndarray, matrix: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    uniform = rng.random(len(labels))
    noisy = np.empty_like(labels)
    for index in np.unique(labels):
        cumulative = np.cumsum(matrix[index])
        # Ending at 1 exactly keeps a draw close to 1 from falling past the last class that has a probability.
        cumulative /= cumulative[-1]
        rows = labels == index
        noisy[rows] = np.searchsorted(cumulative, uniform[rows], side="right")
    return noisy


def _flip_by_instance(
    labels: np.ndarray, num_classes: int, rate: float, vectors: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    flips = rng.random(len(labels)) < _instance_flip_rates(len(labels), rate, rng)
    centered = vectors - vectors.mean(axis=0)
    scale = centered.std()
    # Identical samples have no variance; they are zero after centering, and their targets uniform.
    standardized = centered / scale if scale > 0 else centered
    noisy = labels.copy()
    for index in np.unique(labels[flips]):
        rows = np.flatnonzero(flips & (labels == index))
        projection = rng.standard_normal((vectors.shape[1], num_classes))
        scores = standardized[rows] @ projection
        scores[:, index] = -np.inf
        # The largest of scores plus Gumbel noise is a draw from their softmax.
        noisy[rows] = np.argmax(scores + rng.gumbel(size=scores.shape), axis=1)
    return noisy


def _instance_flip_rates(size: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    half_width = min(rate, 1 - rate)
    upper = ndtr(half_width / _INSTANCE_RATE_STD)
    return rate + _INSTANCE_RATE_STD * ndtri(rng.uniform(1 - upper, upper, size))


def _sample_vectors(dataset: datasets.Dataset, label_column: str) -> np.ndarray:
    columns = {name: feature for name, feature in dataset.features.items() if name != label_column}
    for name, feature in columns.items():
        if isinstance(feature, datasets.Image):
            return _image_vectors(dataset, name, feature)
    for name, feature in columns.items():
        if _holds_numeric_arrays(feature):
            return _array_vectors(dataset, name)
    raise ValueError(
        f"kind='instance' needs a numeric vector per sample, and none of the columns {dataset.column_names} holds "
        "images or numeric arrays. Pass `features=`, an array of shape [n, d], for instance sentence embeddings."
    )


def _holds_numeric_arrays(feature: object) -> bool:
    if isinstance(feature, _ARRAY_FEATURES):
        return True
    if not isinstance(feature, datasets.List | datasets.LargeList):
        return False
    inner = feature.feature
    if isinstance(inner, datasets.Value):
        return pa.types.is_integer(inner.pa_type) or pa.types.is_floating(inner.pa_type)
    return _holds_numeric_arrays(inner)


def _image_vectors(dataset: datasets.Dataset, name: str, feature: datasets.Image) -> np.ndarray:
    images = dataset.with_format("arrow").select_columns([name])
    images = images.cast_column(name, datasets.Image(mode=feature.mode, decode=True)).with_format(None)
    vectors = np.empty((len(images), 3 * _THUMBNAIL_SIZE[0] * _THUMBNAIL_SIZE[1]), dtype=np.float32)
    for row, sample in enumerate(images):
        if sample[name] is None:
            raise ValueError(
                f"kind='instance' needs every image, but column {name!r} has none in row {row}. Filter such rows out, "
                "or pass `features=`, an array of shape [n, d]."
            )
        vectors[row] = np.asarray(sample[name].convert("RGB").resize(_THUMBNAIL_SIZE)).reshape(-1)
    return vectors


def _array_vectors(dataset: datasets.Dataset, name: str) -> np.ndarray:
    arrays = [np.asarray(sample) for sample in dataset.with_format("numpy").select_columns([name])[:][name]]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1 or arrays[0].dtype == object:
        raise ValueError(
            f"kind='instance' needs one numeric vector of the same length per sample, but column {name!r} holds "
            "arrays of different shapes or missing values. Pass `features=`, an array of shape [n, d], for instance "
            "sentence embeddings."
        )
    return _as_vectors(np.stack(arrays).reshape(len(arrays), -1), len(dataset), source=f"column {name!r}")


def _as_vectors(
    features: Sequence[Sequence[float]] | np.ndarray, num_rows: int, source: str = "features"
) -> np.ndarray:
    vectors = np.asarray(features, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[0] != num_rows or vectors.shape[1] == 0:
        raise ValueError(
            f"{source} has shape {vectors.shape}, but must be [n, d] with n = {num_rows}, one vector per row of the "
            "dataset, in its order, and d at least 1."
        )
    if not np.isfinite(vectors).all():
        raise ValueError(f"{source} holds NaN or infinite values. Replace them, or pass finite `features=`.")
    return vectors


def _with_noisy_labels(dataset: datasets.Dataset, column: str, noisy_labels: np.ndarray) -> datasets.Dataset:
    feature = dataset.features[column]
    # Arrow in, arrow out: nothing is decoded, not even where add_column writes a shuffled dataset out.
    result = dataset.with_format("arrow").rename_column(column, CLEAN_LABEL_COLUMN)
    result = result.add_column(column, _as_arrow_column(noisy_labels, feature), feature=feature)
    result = result.select_columns([*dataset.column_names, CLEAN_LABEL_COLUMN])
    _copy_format(dataset, result)
    return result


def _as_arrow_column(labels: np.ndarray, feature: object) -> pa.Array:
    arrow_type = datasets.Features({"labels": feature}).arrow_schema.field("labels").type
    if _is_list(arrow_type):
        return pa.array(labels[:, None].tolist(), type=arrow_type)
    return pa.array(labels).cast(arrow_type)


def _copy_format(source: datasets.Dataset, target: datasets.Dataset) -> None:
    source_format = source.format
    # `select` sorts the names of the formatted columns.
    every_column = set(source_format["columns"]) == set(source.column_names)
    target.set_format(
        type=source_format["type"],
        columns=None if every_column else source_format["columns"],
        output_all_columns=source_format["output_all_columns"],
        **source_format["format_kwargs"],
    )


def _check_is_dataset(dataset: object) -> None:
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}, but must be a `datasets.Dataset`. Take one split of a "
            "`DatasetDict`, for instance `dataset['train']`; turn other data into one with `Dataset.from_dict` or "
            "`Dataset.from_generator`."
        )


def _resolve_label_column(dataset: datasets.Dataset, label_column: str | None) -> str:
    _check_is_dataset(dataset)
    if label_column is None:
        return find_label_column(dataset)
    if label_column not in dataset.column_names:
        raise ValueError(
            f"label_column is {label_column!r}, but the dataset has the columns {dataset.column_names}. Pass one of "
            "these."
        )
    return label_column


def _label_feature(dataset: datasets.Dataset, column: str) -> object:
    feature = dataset.features[column]
    return feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature


def _number_of_classes(dataset: datasets.Dataset, column: str, labels: np.ndarray) -> int:
    feature = _label_feature(dataset, column)
    return feature.num_classes if isinstance(feature, datasets.ClassLabel) else int(labels.max()) + 1


def _read_labels(dataset: datasets.Dataset, column: str) -> np.ndarray:
    if len(dataset) == 0:
        raise ValueError("dataset is empty (0 rows). Check how it was loaded or filtered.")
    # The arrow format replaces a transform of the user's, and follows the indices of shuffle and select.
    values = dataset.with_format("arrow").select_columns([column])[:].column(column)
    values = _unnest_single_labels(values, column)
    _check_integer_labels(values, column)
    labels = values.to_numpy().astype(np.int64)
    if (labels == _IGNORED_LABEL).all():
        raise ValueError(
            f"every label of column {column!r} is {_IGNORED_LABEL}, which means ignored. Check how the labels were "
            "made: at least one row needs a class."
        )
    return labels


def _is_list(arrow_type: pa.DataType) -> bool:
    return (
        pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type) or pa.types.is_fixed_size_list(arrow_type)
    )


def _unnest_single_labels(values: pa.ChunkedArray, column: str) -> pa.ChunkedArray:
    if not _is_list(values.type):
        return values
    lengths = pc.fill_null(pc.list_value_length(values), 0)
    wrong_row = pc.index(pc.equal(lengths, 1), False).as_py()
    if wrong_row >= 0:
        raise ValueError(
            f"column {column!r} holds {lengths[wrong_row]} labels in row {wrong_row}, but one label per sample is "
            "needed: integers stored as [N] or [N, 1]. Multi-label and token-level data are not supported; pass "
            "`label_column` if another column holds the classes."
        )
    return pc.list_flatten(values)


def _check_integer_labels(values: pa.ChunkedArray, column: str) -> None:
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        raise ValueError(
            f"column {column!r} holds strings such as {values[0].as_py()!r}, but labels must be integers. Turn them "
            f"into class indices with `dataset.class_encode_column({column!r})`."
        )
    if not pa.types.is_integer(values.type):
        raise ValueError(
            f"column {column!r} holds values of type {values.type}, but labels must be integers. If they are class "
            f"indices, use `dataset.cast_column({column!r}, datasets.Value('int64'))`; regression targets have no "
            "classes."
        )
    if values.null_count:
        raise ValueError(
            f"column {column!r} has {values.null_count} missing labels (None). Filter these rows out, or set them to "
            f"{_IGNORED_LABEL} (ignored)."
        )


def _check_range(labels: np.ndarray, num_classes: int, column: str) -> None:
    wrong = np.flatnonzero((labels != _IGNORED_LABEL) & ((labels < 0) | (labels >= num_classes)))
    if len(wrong):
        raise ValueError(
            f"column {column!r} holds the label {labels[wrong[0]]} in row {wrong[0]}, but with {num_classes} classes "
            f"labels must lie in 0..{num_classes - 1}. Correct the label or the number of classes (`num_labels`, or "
            f"the names of the `ClassLabel`); a row without a label is marked {_IGNORED_LABEL}."
        )


def _check_two_classes(num_classes: int, column: str) -> None:
    if num_classes < 2:
        raise ValueError(
            f"column {column!r} has {num_classes} class, but at least 2 are needed. Check the labels, or declare all "
            f"classes with `dataset.cast_column({column!r}, datasets.ClassLabel(names=[...]))`."
        )


def _check_noise_arguments(rate: float | None, kind: str, matrix: object, features: object) -> None:
    if kind not in NOISE_KINDS:
        raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(NOISE_KINDS)}.")
    if kind == "asymmetric":
        if matrix is None:
            raise ValueError("matrix is None, but kind='asymmetric' needs it: the [C, C] transition probabilities.")
        if rate is not None:
            raise ValueError(f"rate is {rate}, but kind='asymmetric' takes its rates from `matrix`. Leave `rate` out.")
    else:
        if matrix is not None:
            raise ValueError(f"matrix was passed with kind={kind!r}, which does not use it. Pass kind='asymmetric'.")
        if rate is None or not 0 <= rate < 1:
            raise ValueError(f"rate is {rate}, but must be a number in [0, 1): the expected share of wrong labels.")
    if features is not None and kind != "instance":
        raise ValueError(f"features was passed with kind={kind!r}, which does not use it. Pass kind='instance'.")


def _as_transition_matrix(matrix: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix has shape {matrix.shape}, but must be [C, C]: one row and one column per class.")
    # Written so that NaN fails.
    valid = (matrix >= 0).all(axis=1) & (np.abs(matrix.sum(axis=1) - 1) <= 1e-6)
    if not valid.all():
        row = np.flatnonzero(~valid)[0]
        raise ValueError(
            f"matrix has the row {row} = {matrix[row].tolist()}, which sums to {matrix[row].sum()}, but every row "
            "must hold probabilities that sum to 1. Divide each row by its sum."
        )
    return matrix
