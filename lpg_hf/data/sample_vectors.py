"""One numeric vector per sample, for the noise that depends on the sample."""

from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow as pa

from .pixels import as_rgb


_THUMBNAIL_SIZE = (8, 8)
_ARRAY_FEATURES = (datasets.Array2D, datasets.Array3D, datasets.Array4D, datasets.Array5D)


def sample_vectors(dataset: datasets.Dataset, label_column: str) -> np.ndarray:
    """Vectors `[N, d]` from the first image column, else from the first column of numeric arrays of one shape."""
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
        vectors[row] = np.asarray(as_rgb(sample[name]).resize(_THUMBNAIL_SIZE)).reshape(-1)
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
    return as_vectors(np.stack(arrays).reshape(len(arrays), -1), len(dataset), source=f"column {name!r}")


def as_vectors(
    features: Sequence[Sequence[float]] | np.ndarray, num_rows: int, source: str = "features"
) -> np.ndarray:
    """The features as a finite float32 matrix `[N, d]`; `source` names them in an error."""
    vectors = np.asarray(features, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[0] != num_rows or vectors.shape[1] == 0:
        raise ValueError(
            f"{source} has shape {vectors.shape}, but must be [n, d] with n = {num_rows}, one vector per row of the "
            "dataset, in its order, and d at least 1."
        )
    if not np.isfinite(vectors).all():
        raise ValueError(f"{source} holds NaN or infinite values. Replace them, or pass finite `features=`.")
    return vectors
