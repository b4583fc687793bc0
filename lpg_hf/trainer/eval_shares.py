"""The class shares of the data that the model will meet, from what the user says of them."""

import json
from collections.abc import Mapping, Sequence

from ..class_shares import check_shares
from ..data.training_labels import class_counts_or_none


EVAL_DATASET, TRAIN, UNIFORM = "eval_dataset", "train", "uniform"

NamedShares = Mapping[str, float] | Mapping[int, float]
EvalShares = str | Sequence[float] | NamedShares

MAX_SHOWN_NAMES = 20


def read_eval_shares(text: str) -> EvalShares:
    """
    Reads the form that command line and JSON use: a word, or shares with commas between them, with the names of their
    classes or without. Names that have commas themselves need a JSON object.

    Raises:
        ValueError: If it is none of these.

    Example:

    ```python
    >>> read_eval_shares("uniform"), read_eval_shares("0.9, 0.1")
    ('uniform', [0.9, 0.1])
    >>> read_eval_shares("ham=0.9, spam=0.1") == read_eval_shares('{"ham": 0.9, "spam": 0.1}')
    True

    ```
    """
    if text in (EVAL_DATASET, TRAIN, UNIFORM):
        return text
    try:
        if text.startswith("{"):
            pairs = json.loads(text, object_pairs_hook=list)
        elif "=" in text:
            pairs = [(name.strip(), share) for name, _, share in (part.rpartition("=") for part in text.split(","))]
        else:
            return [float(part) for part in text.split(",")]
        shares = {name: float(share) for name, share in pairs}
        if "" in shares or len(shares) < len(pairs):
            raise ValueError("a number without a name, or a name twice")
        return shares
    except (TypeError, ValueError):
        raise ValueError(
            f"`eval_shares` is {text!r}. Use 'eval_dataset', 'train', 'uniform', or one number per class with commas "
            "between them: 0.9,0.1 in the order of the classes, or ham=0.9,spam=0.1 with each name once. If names "
            """have commas, write '{"a, b": 0.9, "c": 0.1}'."""
        ) from None


def find_eval_shares(
    requested: EvalShares, eval_dataset: object, num_labels: int, class_indices: Mapping[str, int]
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
        counts = class_counts_or_none(first, num_labels)
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
        classes = _shown([names.get(index, index) for index in range(num_labels)])
        wrong = [f"{_shown(unknown)} is no class"] if unknown else []
        wrong += [f"{_shown([names.get(index, index) for index in missing])} has no share"] if missing else []
        raise ValueError(
            f"`eval_shares` must have each class once; {', and '.join(wrong) or 'a class has two names there'}. The "
            f"classes are, in their order: {classes}."
        )
    by_index = dict(zip(indices, shares.values(), strict=True))
    return [by_index[index] for index in range(num_labels)]


def _shown(values: Sequence[object]) -> str:
    more = f", ... ({len(values)} in all)" if len(values) > MAX_SHOWN_NAMES else ""
    return ", ".join(map(repr, values[:MAX_SHOWN_NAMES])) + more
