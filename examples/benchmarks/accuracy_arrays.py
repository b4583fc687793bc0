"""Features in an .npz file, with clean and noisy labels, as the data set that the benchmark reads."""

from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value


TRAIN, TEST = ("X", "y_clean"), ("Xt", "yt")


def load_arrays(path: Path) -> DatasetDict:
    """
    Reads the arrays `X`, `y_clean` (training rows), `Xt`, `yt` (test rows) and noisy labels `y_NAME` of training rows.

    Returns:
        `DatasetDict`: Splits `train` and `test` with the columns `features` and `label`, and in both a column `NAME`
        per noisy label; that of test rows, which are never noisy, repeats the clean one.

    Raises:
        ValueError: If an array is missing, or if their lengths differ.
    """
    with np.load(path) as file:
        arrays = dict(file)
    missing = [name for name in (*TRAIN, *TEST) if name not in arrays]
    if missing:
        raise ValueError(f"{str(path)!r} has no array {missing[0]!r}; found {', '.join(sorted(arrays))}.")
    noisy = {name.removeprefix("y_"): value for name, value in arrays.items() if name.startswith("y_")}
    clean = noisy.pop("clean")
    for name, labels in (noisy | {"clean": clean}).items():
        if len(labels) != len(arrays["X"]):
            raise ValueError(f"{str(path)!r} has {len(arrays['X'])} rows in 'X', but {len(labels)} in 'y_{name}'.")
    num_labels = 1 + max(int(labels.max()) for labels in (clean, arrays["yt"], *noisy.values()))
    classes = ClassLabel(names=[str(number) for number in range(num_labels)])
    return DatasetDict(
        train=_dataset(arrays["X"], {"label": clean, **noisy}, classes),
        test=_dataset(arrays["Xt"], dict.fromkeys(["label", *noisy], arrays["yt"]), classes),
    )


def _dataset(vectors: np.ndarray, labels: dict[str, np.ndarray], classes: ClassLabel) -> Dataset:
    features = Features({"features": List(Value("float32")), **dict.fromkeys(labels, classes)})
    columns = {"features": vectors.astype(np.float32)} | {
        name: value.astype(np.int64) for name, value in labels.items()
    }
    return Dataset.from_dict(columns, features=features)
