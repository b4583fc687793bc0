"""The class shares of the data that the model will meet, from what the user says of them."""

from collections.abc import Mapping, Sequence

from ..class_shares import check_shares
from ..data.training_labels import class_counts_or_none


EVAL_DATASET, TRAIN, UNIFORM = "eval_dataset", "train", "uniform"

EvalShares = str | Sequence[float]


def read_eval_shares(text: str) -> EvalShares:
    """
    Reads the form that command line and JSON use: a word, or numbers with commas between them.

    Raises:
        ValueError: If it is neither.

    Example:

    ```python
    >>> read_eval_shares("uniform"), read_eval_shares("0.9, 0.1")
    ('uniform', [0.9, 0.1])

    ```
    """
    if text in (EVAL_DATASET, TRAIN, UNIFORM):
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"`eval_shares` is {text!r}. Use 'eval_dataset', 'train', 'uniform', or one number per class with commas "
            "between them."
        ) from None


def find_eval_shares(
    requested: EvalShares, eval_dataset: object, num_labels: int
) -> tuple[Sequence[float] | None, str]:
    """
    Finds the class shares of the evaluation.

    Args:
        requested (`str` or `Sequence[float]`):
            `"eval_dataset"`: those of the labels of `eval_dataset`, every count plus one, or of the first one of
            several; where there are no labels to read, those of the training set. `"train"`, `"uniform"`, or shares.
        eval_dataset (`object`): The evaluation set, or several by name.
        num_labels (`int`): Number of classes.

    Returns:
        `tuple[Sequence[float] | None, str]`: The shares, up to a factor; `None` for those of the training set. And
        where they come from, for the log.

    Raises:
        ValueError: If shares do not fit the number of classes.

    Example:

    ```python
    >>> find_eval_shares("eval_dataset", [{"label": 0}, {"label": 0}, {"label": 1}], num_labels=2)
    ([3, 2], '`eval_dataset`')
    >>> find_eval_shares("eval_dataset", None, num_labels=2)
    (None, 'the training set, since there is no `eval_dataset`')

    ```
    """
    if not isinstance(requested, str):
        check_shares("eval_shares", requested, num_labels)
        return requested, "`eval_shares`"
    if requested == TRAIN:
        return None, "the training set"
    if requested == UNIFORM:
        return [1.0] * num_labels, "all classes alike"
    if eval_dataset is None:
        return None, "the training set, since there is no `eval_dataset`"
    first = next(iter(eval_dataset.values()), None) if isinstance(eval_dataset, Mapping) else eval_dataset
    try:
        counts = class_counts_or_none(first, num_labels)
    except ValueError:  # labels out of range, which a transform may put right
        counts = None
    if counts is None:
        return None, "the training set, since the labels of `eval_dataset` cannot be read"
    return [count + 1 for count in counts], "`eval_dataset`"
