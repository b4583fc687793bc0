"""Messages about labels: missing classes, unknown counts, labels out of range."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import datasets
from accelerate.logging import get_logger

from ..class_shares import min_counted_samples
from ..data.labels import first_label_column


logger = get_logger(__name__)


def warn_of_counts(
    class_counts: Sequence[int] | None, dataset: object, num_labels: int, disagreement: ValueError | None
) -> None:
    """
    Warns of classes without training rows, or of class counts that are not known.

    Args:
        class_counts (`Sequence[int]`, *optional*): The class counts, if they are known.
        dataset, num_labels and disagreement: As for [`warn_of_unknown_counts`].
    """
    if class_counts is None:
        warn_of_unknown_counts(dataset, num_labels, disagreement)
    else:
        warn_of_missing_classes(class_counts)


def warn_of_correcting_loss() -> None:
    """Warns that `auto` does not correct what the user's loss corrects."""
    logger.warning(
        "`compute_loss_func` corrects the class imbalance already, as class weights and shifted logits do, so `auto` "
        "leaves its own correction out. To let `auto` correct it, pass a loss without these."
    )


def warn_of_missing_classes(class_counts: Sequence[int]) -> None:
    """Warns of classes that have no training rows."""
    missing = [label for label, count in enumerate(class_counts) if count == 0]
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        is_one_left = len(missing) == len(class_counts) - 1
        result = "only one class is left to learn" if is_one_left else "they will not be learned"
        logger.warning(f"{len(missing)} of {len(class_counts)} classes have no training rows ({shown}): {result}.")


def warn_of_unknown_counts(dataset: object, num_labels: int, disagreement: ValueError | None) -> None:
    """
    Warns of a training set whose labels can only be counted as they come.

    Args:
        dataset (`object`): The training set.
        num_labels (`int`): Number of classes.
        disagreement (`ValueError`, *optional*): What is wrong with the labels that it shows.
    """
    cause: object = disagreement or (
        f"it is of the type {type(dataset).__name__}, whose labels cannot be read without loading its rows (looked "
        "for a column of integer labels and an attribute `labels` or `targets`)."
    )
    logger.warning(
        f"The class counts of `train_dataset` are not known: {cause} Until training has seen all rows, or "
        f"{min_counted_samples(num_labels)} samples, all classes count as equally frequent. Pass "
        "`class_counts=[...]`, one number per class, to LPGTrainer."
    )


@contextmanager
def explain_label_errors(disagreement: ValueError | None) -> Iterator[None]:
    """
    Within it, the error of a label that is out of range says what to check. On a GPU, the first reading of a result
    raises it.

    Args:
        disagreement (`ValueError`, *optional*): What is known to be wrong with the labels.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        is_label_error = isinstance(error, IndexError) and "out of bounds" in str(error)
        if not (is_label_error or "device-side assert" in str(error)):
            raise
        hint = disagreement or (
            "if a label is out of range, check the label column and the `num_labels` of the model."
        )
        raise ValueError(f"The loss failed with: {str(error).rstrip('.')}; {hint}") from error


def explain_label_names(error: ValueError, dataset: object) -> None:
    """
    Says what to do about a batch that cannot be made because the labels are names.

    Args:
        error (`ValueError`): The error of the batch.
        dataset (`object`): The training set.

    Raises:
        ValueError: If the labels are names.
    """
    if not isinstance(dataset, datasets.Dataset):
        return
    column = first_label_column(dataset)
    name = None if column is None else dataset.select_columns(column).with_format(None)[0][column]
    if isinstance(name, str):
        raise ValueError(
            f"{str(error).rstrip('.')}. Column {column!r} of `train_dataset` holds names, such as {name!r}. Number "
            f"them before you split the data, with `dataset.class_encode_column({column!r})`, or in your "
            "`data_collator`."
        ) from error
