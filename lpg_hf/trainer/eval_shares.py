"""The class shares of the data that the model will meet, from what the user says of them."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

from ..class_shares import check_shares
from ..data.training_labels import class_counts_or_none
from ..share_texts import TRAIN, UNIFORM, EvalShares, NamedShares


MAX_SHOWN_NAMES = 20
LONGEST_NAME = 60
# Each is compared with the names of all classes.
MAX_GUESSES = 3


def find_eval_shares(
    requested: EvalShares,
    eval_dataset: object,
    num_labels: int,
    class_indices: Mapping[str, int],
    label_names: Sequence[str] | None = None,
) -> tuple[Sequence[float] | None, str]:
    """
    Finds the class shares of the evaluation.

    Args:
        requested (`str`, `Sequence[float]` or `Mapping`):
            `"eval_dataset"`: those of the labels of `eval_dataset`, every count plus one, or of the first one of
            several; where there are no labels to read, those of the training set. `"train"`, `"uniform"`, or
            shares, as a list or by class name or index.
        eval_dataset (`object`): The evaluation set, or several by name.
        num_labels (`int`): Number of classes.
        class_indices (`Mapping[str, int]`): The index of each name of a class.
        label_names (`Sequence[str]`, *optional*): The `label_names` of the `TrainingArguments`.

    Returns:
        `tuple[Sequence[float] | None, str]`: The shares, up to a factor; `None` for those of the training set. And
        where they come from, for the log.

    Raises:
        ValueError: If shares do not fit the number of classes, or their names are not those of all classes.

    Example:

    ```python
    >>> find_eval_shares("eval_dataset", [{"label": 0}, {"label": 0}, {"label": 1}], 2, {})
    ([3, 2], '`eval_dataset`')
    >>> find_eval_shares("eval_dataset", None, 2, {})
    (None, 'the training set, since there is no `eval_dataset`')
    >>> find_eval_shares({"spam": 0.1, "ham": 0.9}, None, 2, {"ham": 0, "spam": 1})
    ([0.9, 0.1], '`eval_shares`')

    ```
    """
    if isinstance(requested, Mapping):
        requested = in_order(requested, num_labels, class_indices)
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
        counts = class_counts_or_none(first, num_labels, label_names)
    except ValueError:  # labels out of range, which a transform may put right
        counts = None
    if counts is None:
        return None, "the training set, since the labels of `eval_dataset` cannot be read"
    return [count + 1 for count in counts], "`eval_dataset`"


def in_order(shares: NamedShares, num_labels: int, class_indices: Mapping[str, int]) -> list[float]:
    """
    The shares of all classes in the order of their indices, from shares by name or index.

    Raises:
        ValueError: If a key is no class, two are the same one, or one is missing.
    """
    indices = [class_indices.get(key, key) if isinstance(key, str) else key for key in shares]
    unknown = [key for key, index in zip(shares, indices, strict=True) if index not in range(num_labels)]
    missing = [index for index in range(num_labels) if index not in indices]
    if unknown or missing or len(indices) > num_labels:
        names = {index: name for name, index in class_indices.items()}
        classes = [names.get(index, index) for index in range(num_labels)]
        wrong = [f"{_shown(unknown)} is no class{_guess(unknown, class_indices)}"] if unknown else []
        wrong += [f"{_shown([classes[index] for index in missing])} has no share"] if missing else []
        raise ValueError(
            f"`eval_shares` must have each class once; {', and '.join(wrong) or 'a class has two names there'}. The "
            f"classes are, in their order: {_shown(classes)}. Give one share to each of them, by name or by index "
            f"(0 to {num_labels - 1})."
        )
    by_index = dict(zip(indices, shares.values(), strict=True))
    return [by_index[index] for index in range(num_labels)]


def _guess(unknown: Sequence[object], names: Iterable[str]) -> str:
    """The known names that are most like the first unknown ones, for a message."""
    by_letters = {name.strip().casefold(): name for name in names}
    words = [key.strip().casefold() for key in unknown[:MAX_GUESSES] if isinstance(key, str)]
    found = [by_letters[match] for word in words for match in difflib.get_close_matches(word, by_letters, n=1)]
    return f" (did you mean {_shown(list(dict.fromkeys(found)))}?)" if found else ""


def _shown(values: Sequence[object]) -> str:
    more = f", ... ({len(values)} in all)" if len(values) > MAX_SHOWN_NAMES else ""
    texts = [repr(value) for value in values[:MAX_SHOWN_NAMES]]
    return ", ".join(text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}…" for text in texts) + more
