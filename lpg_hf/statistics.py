"""What training has seen of each class so far, kept on the device and reduced over processes once per step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from .batch import LogitBatch


# Running means give the n samples that a step has of a class the weight n / (n + INERTIA).
MEAN_INERTIA = 20
CONFIDENT_ERROR_INERTIA = 40
# Samples added to every class while the prior is being counted, so that a few batches do not look imbalanced.
PRIOR_PSEUDO_COUNT = 10
# Samples, in total and per class, after which a prior that is being counted is used before the epoch has ended.
MIN_COUNTED_SAMPLES = 1000
MIN_COUNTED_PER_CLASS = 20


class PriorTerms(NamedTuple):
    """
    The class shares and what follows from them alone. It is computed again only when they change.

    Tensors have shape `[C]` where nothing else is said.

    Attributes:
        shares: Share of each class in the training set.
        log_rarity:
            Minus the logarithm of the share, relative to the largest; a class without samples counts as the rarest
            class that has some.
        present_mean: Weights of a mean over the classes that have samples.
        onehot_distance: `||onehot(c) - shares||`.
        smallest_ratio (scalar): Share of the rarest class that has samples, relative to the largest.
    """

    shares: Tensor
    log_rarity: Tensor
    present_mean: Tensor
    onehot_distance: Tensor
    smallest_ratio: Tensor


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


def prior_terms(shares: Tensor) -> PriorTerms:
    """The [`PriorTerms`] of class shares `[C]`."""
    relative = relative_prior(shares)
    present = (shares > 0).to(shares)
    squares = shares.square()
    # Where a share is nearly 1, the difference to the sum of all would leave nothing of the others.
    largest = squares.argmax(keepdim=True)
    others = (squares.sum() - squares).scatter(0, largest, squares.scatter(0, largest, 0.0).sum(0, keepdim=True))
    distance = ((1 - shares).square() + others).sqrt()
    return PriorTerms(shares, -relative.log(), present / present.sum(), distance, relative.min())


def min_counted_samples(num_labels: int) -> int:
    """The number of samples after which counted classes have a prior, though the first epoch has not ended."""
    return max(MIN_COUNTED_SAMPLES, MIN_COUNTED_PER_CLASS * num_labels)


class ClassStatistics(nn.Module):
    """
    Class prior, and running means per class of what the model makes of its training samples.

    A step uses the statistics of the step before. [`~ClassStatistics.update`] only adds the samples of a micro-batch
    to pending sums. [`~ClassStatistics.step`] reduces these over processes and moves the running means, once per
    optimizer step. The result does not depend on how the batch was split into micro-batches and processes.

    Args:
        num_labels (`int`): Number of classes C.
        class_counts (`Sequence[int]`, *optional*):
            Training samples of each class. Left out, the samples that training sees are counted.
        waits_for_epoch (`bool`, *optional*, defaults to `False`):
            Whether counted classes have a uniform prior until [`~ClassStatistics.end_epoch`], or until
            [`min_counted_samples`] have been seen, which ends the wait in a stream that is read once. Before that,
            the order of the data biases a prior.

    Attributes:
        class_counts (`torch.Tensor` of shape `[C]`): Samples of each class, in the data set or seen so far.
        seen_counts (`torch.Tensor` of shape `[C]`): Samples of each class that training has met.
        counts_are_given (`bool`): Whether `class_counts` was given.
        steps (`torch.Tensor`, scalar): Number of optimizer steps so far.

    Raises:
        ValueError: If `class_counts` does not have `num_labels` entries, has a negative one, or no positive one.

    Example:

    ```python
    >>> import torch
    >>> statistics = ClassStatistics(num_labels=2, class_counts=[30, 10])
    >>> statistics.prior
    tensor([0.7500, 0.2500])
    >>> statistics.update(LogitBatch(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0])))
    >>> statistics.step()
    >>> statistics.accuracy  # a mean of 1/2 with weight 2 / (2 + 20)
    tensor([0.0455, 0.0000])

    ```
    """

    class_counts: Tensor
    seen_counts: Tensor
    steps: Tensor
    _running: Tensor
    _inertia: Tensor
    _pending: Tensor

    def __init__(self, num_labels: int, class_counts: Sequence[int] | None = None, waits_for_epoch: bool = False):
        super().__init__()
        self.counts_are_given = class_counts is not None
        self._prior_is_ready = not waits_for_epoch
        counts = torch.zeros(num_labels, dtype=torch.int64)
        if class_counts is not None:
            counts = _check_class_counts(class_counts, num_labels)
        self.register_buffer("class_counts", counts)
        self.register_buffer("seen_counts", torch.zeros(num_labels, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("_running", torch.zeros(4, num_labels))
        inertia = [[MEAN_INERTIA]] * 3 + [[CONFIDENT_ERROR_INERTIA]]
        self.register_buffer("_inertia", torch.tensor(inertia, dtype=torch.float32), persistent=False)
        # Zero between optimizer steps, which is when state is saved.
        self.register_buffer("_pending", torch.zeros(5, num_labels), persistent=False)
        self._update_prior()

    @property
    def num_labels(self) -> int:
        return len(self.class_counts)

    @property
    def pending(self) -> Tensor:
        """What the next [`~ClassStatistics.step`] sums over processes, `[5, C]`."""
        return self._pending

    @property
    def prior(self) -> Tensor:
        """Share of each class in the training set, `[C]`; uniform while it is unknown."""
        return self.prior_terms.shares

    def _update_prior(self) -> None:
        if self.counts_are_given:
            counts = self.class_counts
        elif self._prior_is_ready:
            counts = self.class_counts + PRIOR_PSEUDO_COUNT
        else:  # decided on the device
            is_enough = self.class_counts.sum() >= min_counted_samples(self.num_labels)
            counts = torch.where(is_enough, self.class_counts + PRIOR_PSEUDO_COUNT, 1)
        self.prior_terms = prior_terms(counts.to(self._running.dtype) / counts.sum())

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        module = super()._apply(*args, **kwargs)
        self._update_prior()
        return module

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._update_prior()

    @property
    def accuracy(self) -> Tensor:
        """
        Running training accuracy of each class, `[C]`, measured before the step that learns from the sample.

        A prediction counts as correct if no logit is larger than that of the label, so ties favor no class.
        """
        return self._running[0]

    @property
    def label_prob(self) -> Tensor:
        """Running mean of `p_{i,c}` over the samples of class c, `[C]`."""
        return self._running[1]

    @property
    def confidence_ratio(self) -> Tensor:
        """Running mean of `p_{i,c} / max_j p_ij`, `[C]`."""
        return self._running[2]

    @property
    def confident_error_rate(self) -> Tensor:
        """Running share of samples with `p_{i,c} < max_j p_ij / 10` and `max_j p_ij > 0.3`, `[C]`."""
        return self._running[3]

    @property
    def confident_error_share(self) -> Tensor:
        """
        Share of the errors on the training set in which the model confidently contradicts the label, a scalar.

        Both rates are weighted by [`~ClassStatistics.prior`]. A model that finds its data hard is mostly unsure where
        it errs. One that has learned the classes and meets wrong labels is sure of itself.
        """
        accuracy, _, _, confident_error_rate = self._running @ self.prior
        return confident_error_rate / (1 - accuracy).clamp(min=0.01)

    @torch.no_grad()
    def update(self, batch: LogitBatch) -> None:
        """Adds a micro-batch to the pending sums."""
        rows = torch.stack(
            [batch.valid_mask, batch.is_correct, batch.label_prob, batch.confidence_ratio, batch.is_confident_error]
        )
        # Filled and not multiplied: an ignored sample may have logits that are not finite.
        rows.masked_fill_(batch.ignore_mask, 0.0)
        self._pending.index_add_(1, batch.classes, rows.to(self._pending.dtype))

    @torch.no_grad()
    def step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """
        Moves the running means by the pending sums and clears these: once per optimizer step.

        Args:
            reduce (`Callable`, *optional*): Sums a tensor over processes.
        """
        pending = self._pending if reduce is None else reduce(self._pending)
        counts = pending[0]
        # A running mean m moves to the mean of the step's n samples by (sum - n m) / n, with weight n / (n + inertia).
        move = pending[1:].addcmul(counts, self._running, value=-1)
        # Logits that are not finite move no mean: the optimizer or a gradient scaler may have skipped their step.
        self._running.addcdiv_(move.nan_to_num_(0.0, 0.0, 0.0), counts + self._inertia)
        self.steps += 1
        self.seen_counts += counts.long()
        if not self.counts_are_given:
            self.class_counts.copy_(self.seen_counts)
            self._update_prior()
        self._pending.zero_()

    def end_epoch(self) -> None:
        """Says that all training data has been seen: counted classes have a prior from here on, however few."""
        if not self._prior_is_ready:
            self._prior_is_ready = True
            self._update_prior()


def _check_class_counts(class_counts: Sequence[int], num_labels: int) -> Tensor:
    if isinstance(class_counts, Mapping):
        raise ValueError(
            f"`class_counts` must be a list in the order of the classes; found a {type(class_counts).__name__}. Pass "
            f"`[counts[label] for label in range({num_labels})]`."
        )
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
