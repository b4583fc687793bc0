"""What training has seen of each class so far, kept on the device and reduced over processes once per step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from .batch import LogitBatch


# Running means give the n samples that a step has of a class the weight n / (n + INERTIA).
INERTIA = 20
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


class ClassStatistics(nn.Module):
    """
    Class prior, and means per class of what the model makes of its training samples.

    A step uses the statistics of the step before. [`~ClassStatistics.update`] only adds the samples of a micro-batch
    to pending sums. [`~ClassStatistics.step`] reduces these over processes and moves the running means, once per
    optimizer step. The result does not depend on how the batch was split into micro-batches and processes. What must
    not follow single batches is a mean over a whole epoch, and holds through the next one.

    Args:
        num_labels (`int`): Number of classes C.
        class_counts (`Sequence[int]`, *optional*):
            Training samples of each class. Left out, the samples that training sees are counted.
        waits_for_epoch (`bool`, *optional*, defaults to `False`):
            Whether the caller ends every epoch with [`~ClassStatistics.end_epoch`]. Until the first one has ended,
            counted classes have a uniform prior, since the order of the data would bias another. In a stream that is
            read once, [`min_counted_samples`] end that wait. Otherwise an epoch ends when as many samples were seen
            as `class_counts` says, and never without them.
        eval_shares (`Sequence[float]`, *optional*):
            Share of each class in the data that the model will meet. Left out, it is the one in the training set.

    Attributes:
        class_counts (`torch.Tensor` of shape `[C]`): Samples of each class, in the data set or seen so far.
        seen_counts (`torch.Tensor` of shape `[C]`): Samples of each class that training has met.
        counts_are_given (`bool`): Whether `class_counts` was given.
        judged_offset (`torch.Tensor` of shape `[C]`):
            Added to the logits, it makes them fit the class shares of the evaluation. At these, labels are judged: in
            a long tail, logits that are trained for balanced classes would contradict every head row near the border.
        steps (`torch.Tensor`, scalar): Number of optimizer steps so far.
        epochs (`torch.Tensor`, scalar): Number of epochs that have ended.

    Raises:
        ValueError: If `class_counts` or `eval_shares` does not have `num_labels` entries, has a negative one, or no
            positive one.

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
    epochs: Tensor
    _running: Tensor
    _epoch_sums: Tensor
    _epoch_means: Tensor
    _pending: Tensor
    _eval_shares: Tensor | None

    def __init__(
        self,
        num_labels: int,
        class_counts: Sequence[int] | None = None,
        waits_for_epoch: bool = False,
        eval_shares: Sequence[float] | None = None,
    ):
        super().__init__()
        self.counts_are_given = class_counts is not None
        self._waits_for_epoch = waits_for_epoch
        # What the methods of a chain add to the logarithm of the class shares that the logits are trained for.
        self._corrections: list[Callable[[ClassStatistics], Tensor]] = []
        counts = torch.zeros(num_labels, dtype=torch.int64)
        if class_counts is not None:
            counts = _check_class_counts(class_counts, num_labels)
        self.register_buffer("class_counts", counts)
        self.register_buffer("seen_counts", torch.zeros(num_labels, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        # Like the counts it belongs to the data, and not to a checkpoint.
        shares = None if eval_shares is None else check_shares("eval_shares", eval_shares, num_labels)
        self.register_buffer("_eval_shares", shares, persistent=False)
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))
        # Accuracy, probability of the label, and weight that dampening takes away.
        self.register_buffer("_running", torch.zeros(3, num_labels))
        # Samples, confidence ratios and confident errors of the present epoch.
        self.register_buffer("_epoch_sums", torch.zeros(3, num_labels))
        # The last two as means over the epochs before, the last of which makes a half. And the running probability of
        # the label at the end of the last epoch.
        self.register_buffer("_epoch_means", torch.zeros(3, num_labels))
        # Zero between optimizer steps, which is when state is saved.
        self.register_buffer("_pending", torch.zeros(6, num_labels), persistent=False)
        self._update_prior()

    @property
    def num_labels(self) -> int:
        return len(self.class_counts)

    @property
    def pending(self) -> Tensor:
        """What the next [`~ClassStatistics.step`] sums over processes, `[6, C]`."""
        return self._pending

    @property
    def prior(self) -> Tensor:
        """Share of each class in the training set, `[C]`; uniform while it is unknown."""
        return self.prior_terms.shares

    def _update_prior(self) -> None:
        if self.counts_are_given:
            counts = self.class_counts
        elif not self._waits_for_epoch:
            counts = self.class_counts + PRIOR_PSEUDO_COUNT
        else:  # decided on the device, by what a checkpoint has
            is_enough = self.class_counts.sum() >= min_counted_samples(self.num_labels)
            counts = torch.where(is_enough | (self.epochs > 0), self.class_counts + PRIOR_PSEUDO_COUNT, 1)
        self.prior_terms = prior_terms(counts.to(self._running.dtype) / counts.sum(), self._eval_shares)
        self._update_judged_offset()

    def _update_judged_offset(self) -> None:
        self.judged_offset = self.prior_terms.log_eval - self.log_output_shares

    @property
    def judged_offset_or_none(self) -> Tensor | None:
        """The `judged_offset`; `None` where it is 0 by design, and adding it would cost two passes for nothing."""
        is_zero = self._eval_shares is None and not self._corrections
        return None if is_zero else self.judged_offset

    @property
    def log_output_shares(self) -> Tensor:
        """Logarithm of the class shares that the logits are trained for, up to a constant, `[C]`."""
        return sum((correction(self) for correction in self._corrections), -self.prior_terms.log_rarity)

    def add_correction(self, correction: Callable[["ClassStatistics"], Tensor]) -> None:
        """
        Takes into account that a method trains the logits for other class shares than those of the training set.

        Args:
            correction (`Callable`): Returns what it adds to the logarithm of the shares, `[C]`.
        """
        self._corrections.append(correction)
        self._update_judged_offset()

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
        """
        Mean of [`LogitBatch.confidence_ratio`] over the samples of class c, `[C]`. Each epoch makes a half of it, and
        what was before the other half; 0 before the first epoch has ended.
        """
        return self._epoch_means[0]

    @property
    def confident_error_rate(self) -> Tensor:
        """Share of the samples of class c that the model contradicts, `[C]`, averaged like `confidence_ratio`."""
        return self._epoch_means[1]

    @property
    def last_label_prob(self) -> Tensor:
        """The [`~ClassStatistics.label_prob`] at the end of the last epoch, `[C]`; 0 before."""
        return self._epoch_means[2]

    @property
    def mean_weight(self) -> Tensor:
        """Running mean of the weights of the samples of class c under dampening, `[C]`; 1 before."""
        return 1 - self._running[2]

    @torch.no_grad()
    def update(self, batch: LogitBatch, weight: Tensor | None = None) -> None:
        """
        Adds a micro-batch to the pending sums.

        Args:
            batch ([`LogitBatch`]): The micro-batch.
            weight (`torch.Tensor` of shape `[N]`, *optional*):
                Weight of each sample under class-relative dampening, without its compensation.
        """
        values = [batch.valid_mask, batch.confidence_ratio, batch.is_confident_error, batch.is_correct]
        values += [batch.label_prob] if weight is None else [batch.label_prob, 1 - weight]
        rows = torch.stack(values)
        # Filled and not multiplied: an ignored sample may have logits that are not finite.
        rows.masked_fill_(batch.ignore_mask, 0.0)
        self._pending[: len(values)].index_add_(1, batch.classes, rows.to(self._pending.dtype))

    @torch.no_grad()
    def step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """
        Moves the running means by the pending sums and clears these: once per optimizer step.

        Args:
            reduce (`Callable`, *optional*): Sums a tensor over processes.
        """
        pending = self._pending if reduce is None else reduce(self._pending)
        counts = pending[0]
        # A running mean m moves to the mean of the step's n samples by (sum - n m) / n, with weight n / (n + INERTIA).
        move = pending[3:].addcmul(counts, self._running, value=-1)
        # Logits that are not finite move no mean: the optimizer or a gradient scaler may have skipped their step.
        self._running.addcdiv_(move.nan_to_num_(0.0, 0.0, 0.0), counts + INERTIA)
        self._epoch_sums += pending[:3].masked_fill(pending[4].isnan(), 0.0)
        self.steps += 1
        self.seen_counts += counts.long()
        if not self.counts_are_given:
            self.class_counts.copy_(self.seen_counts)
            self._update_prior()
        elif not self._waits_for_epoch:  # decided on the device
            self._roll_over(self._epoch_sums[0].sum() >= self.class_counts.sum())
        self._pending.zero_()

    @torch.no_grad()
    def end_epoch(self) -> None:
        """
        Says that all training data has been seen once more: the means of this epoch hold through the next one, and
        counted classes have a prior from here on, however few.
        """
        self._roll_over(torch.ones_like(self.steps, dtype=torch.bool))
        if not self.counts_are_given:
            self._update_prior()

    def _roll_over(self, is_over: Tensor) -> None:
        counts, before = self._epoch_sums[0], self._epoch_means[:2]
        means = self._epoch_sums[1:] / counts.clamp(min=1)
        means = torch.where(before[0] > 0, (means + before) / 2, means)
        means = torch.cat([means, self.label_prob[None]])
        # A class that the epoch did not have keeps its means.
        torch.where(is_over & (counts > 0), means, self._epoch_means, out=self._epoch_means)
        self._epoch_sums.masked_fill_(is_over, 0.0)
        self.epochs += is_over


def check_shares(name: str, shares: Sequence[float], num_labels: int) -> Tensor:
    """Class shares as a tensor that sums to 1, `[C]`."""
    values = torch.as_tensor(shares, dtype=torch.float32)
    is_valid = values.shape == (num_labels,) and values.isfinite().all() and (values >= 0).all() and (values > 0).any()
    if not is_valid:
        raise ValueError(
            f"`{name}` must be {num_labels} numbers, one per class, not negative and at least one positive; found "
            f"{shares!r}. Pass counts or shares in the order of the classes."
        )
    return values / values.sum()


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
