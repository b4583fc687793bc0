"""Class shares: their checks, what follows from them alone, and when counted ones may be used."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


# Samples, in total and per class, after which a prior that is being counted is used before the epoch has ended.
MIN_COUNTED_SAMPLES = 1000
MIN_COUNTED_PER_CLASS = 20


@runtime_checkable
class Keyed(Protocol):
    """A mapping, or a Series of pandas: the order of its values says nothing of the classes that they belong to."""

    def keys(self) -> Any: ...

    def items(self) -> Any: ...


class PriorTerms(NamedTuple):
    """
    The class shares and what follows from them alone. It is computed again only when they change.

    Tensors have shape `[C]` where nothing else is said.

    Attributes:
        shares: Share of each class in the training set.
        log_rarity:
            Minus the logarithm of the share, relative to the largest; a class without samples counts as the rarest
            class that has some.
        log_eval: Logarithm of the shares of the evaluation, up to a constant.
        present_mean: Weights of a mean over the classes that have samples.
        onehot_distance: `||onehot(c) - shares||`.
    """

    shares: Tensor
    log_rarity: Tensor
    log_eval: Tensor
    present_mean: Tensor
    onehot_distance: Tensor


def relative_prior(shares: Tensor) -> Tensor:
    """
    Shares relative to the largest class. A class without samples counts as the rarest class that has some.

    Args:
        shares (`torch.Tensor` of shape `[C]`): Share of each class in the training set, not negative.

    Returns:
        `torch.Tensor` of shape `[C]`: In (0, 1].

    Example:

    ```python
    >>> import torch
    >>> relative_prior(torch.tensor([0.8, 0.2, 0.0]))
    tensor([1.0000, 0.2500, 0.2500])

    ```
    """
    smallest = torch.where(shares > 0, shares, torch.inf).min()
    return shares.clamp(min=smallest) / shares.max()


def prior_terms(shares: Tensor, eval_shares: Tensor | None = None) -> PriorTerms:
    """The [`PriorTerms`] of the class shares of training and evaluation, `[C]` each. By default they are the same."""
    relative = relative_prior(shares)
    log_eval = (relative if eval_shares is None else relative_prior(eval_shares)).log()
    present = (shares > 0).to(shares)
    squares = shares.square()
    # Where a share is nearly 1, the difference to the sum of all would leave nothing of the others.
    largest = squares.argmax(keepdim=True)
    others = (squares.sum() - squares).scatter(0, largest, squares.scatter(0, largest, 0.0).sum(0, keepdim=True))
    distance = ((1 - shares).square() + others).sqrt()
    return PriorTerms(shares, -relative.log(), log_eval, present / present.sum(), distance)


def min_counted_samples(num_labels: int) -> int:
    """The number of samples after which counted classes have a prior, though the first epoch has not ended."""
    return max(MIN_COUNTED_SAMPLES, MIN_COUNTED_PER_CLASS * num_labels)


def check_order(name: str, values: object, num_labels: int) -> None:
    """
    Refuses values whose order is that of their keys, as `value_counts()` of pandas sorts by size.

    Raises:
        ValueError: If they have keys. A Series whose index counts from 0 is in the order of the classes.
    """
    if not isinstance(values, Keyed):
        return
    if isinstance(values, Mapping) or list(values.keys()) != list(range(len(values.keys()))):
        each = name.rpartition("_")[2]
        raise ValueError(
            f"`{name}` must be a list in the order of the classes; found a {type(values).__name__}. Pass "
            f"`[{each}[label] for label in range({num_labels})]`."
        )


def check_shares(name: str, shares: Sequence[float], num_labels: int) -> Tensor:
    """Class shares as a tensor that sums to 1, `[C]`."""
    check_order(name, shares, num_labels)
    try:
        values = torch.as_tensor(shares, dtype=torch.float32)
    except (TypeError, ValueError):  # names, or lists of unequal length
        values = torch.empty(0)
    is_valid = values.shape == (num_labels,) and values.isfinite().all() and (values >= 0).all() and (values > 0).any()
    if not is_valid:
        raise ValueError(
            f"`{name}` must be {num_labels} numbers, one per class, not negative and at least one positive; found "
            f"{shares!r}. Pass counts or shares in the order of the classes."
        )
    return values / values.sum()


def check_class_counts(class_counts: Sequence[int], num_labels: int) -> Tensor:
    check_order("class_counts", class_counts, num_labels)
    counts = torch.as_tensor(class_counts)
    if counts.shape != (num_labels,):
        raise ValueError(
            f"`class_counts` has shape {list(counts.shape)}, but there are {num_labels} classes. Pass one count per "
            "class."
        )
    if not counts.isfinite().all() or (counts < 0).any() or not (counts > 0).any():
        raise ValueError(
            f"`class_counts` must be finite and not negative, with at least one positive entry; found "
            f"{counts.tolist()}. Count the training rows of each class, for instance with "
            "`lpg_hf.data.class_counts(dataset)`."
        )
    if (counts != counts.round()).any():
        raise ValueError(
            f"`class_counts` must be whole numbers of training rows, not shares; found {counts.tolist()}. Pass the "
            "counts themselves."
        )
    return counts.to(torch.int64, copy=True)
