"""The line at the start of a training: which methods act, and which class counts they use."""

from collections.abc import Sequence

from datasets import Dataset

from ..data.labels import LABEL_COLUMNS, find_label_column
from ..perturbations import Perturbation


# Of more classes, only the largest and the smallest are shown.
MAX_SHOWN_CLASSES = 10


def start_line(
    chain: Sequence[str | Perturbation],
    methods: Sequence[Perturbation],
    class_counts: Sequence[int] | None,
    source: str,
    shares_source: str,
) -> str:
    """
    Says what the chain of a training means for its data.

    Args:
        chain (`Sequence[str | Perturbation]`): The chain as the user wrote it.
        methods (`Sequence[Perturbation]`): The methods that it stands for.
        class_counts (`Sequence[int]`, *optional*): Training samples of each class. `None` if they are being counted.
        source (`str`): Where the counts come from.
        shares_source (`str`): Where the class shares of the evaluation come from.

    Example:

    ```python
    >>> from lpg_hf import FocalLoss
    >>> line = start_line(["focal_loss"], [FocalLoss()], [90, 10], "`class_counts`", "`eval_dataset`")
    >>> print(line.replace(". ", "\\n"))
    Perturbations ['focal_loss']: [focal_loss()]
    Class counts from `class_counts`: [90, 10]
    Evaluation shares from `eval_dataset`.

    ```
    """
    if class_counts is None:
        counts = "Class counts: unknown, counted while training"
    else:
        counts = f"Class counts from {source}: {_shortened(class_counts)}"
    return f"Perturbations {list(chain)}: {list(methods)}. {counts}. Evaluation shares from {shares_source}."


def _shortened(class_counts: Sequence[int]) -> str:
    if len(class_counts) <= MAX_SHOWN_CLASSES:
        return str(list(map(int, class_counts)))  # they may be numbers of NumPy
    return f"{len(class_counts)} classes, the largest has {max(class_counts)} and the smallest {min(class_counts)}"


def source_of_counts(dataset: object, are_given: bool, were_met: bool) -> str:
    """Where class counts come from: the user, the labels that training met, or the training set."""
    if are_given:
        return "`class_counts`"
    if were_met:
        return "the labels that training met"
    has_column = isinstance(dataset, Dataset) and any(name in dataset.column_names for name in LABEL_COLUMNS)
    return f"the label column {find_label_column(dataset)!r}" if has_column else "the labels of `train_dataset`"
