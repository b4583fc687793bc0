"""What training has seen of each class so far, kept on the device and reduced over processes once per step."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from .batch import CONFIDENT_ERROR, CORRECT, LogitBatch, Offsets, stack_rows
from .class_means import ClassMeans
from .class_shares import PriorTerms, check_class_counts, check_shares, min_counted_samples, prior_terms
from .epoch_watch import EpochWatch


# Where the offsets of judged, fitted and unchanged logits are among all.
JUDGED, FITTED, PLAIN = range(3)
# Samples added to every class while the prior is being counted, so that a few batches do not look imbalanced.
PRIOR_PSEUDO_COUNT = 10


class ClassStatistics(ClassMeans):
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
        fitted_offset (`torch.Tensor` of shape `[C]`):
            Added to the logits, it makes them fit the class shares of the training set.
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
    _bounds: Tensor
    _offsets: Tensor
    _pending: Tensor
    _prior_rows: Tensor
    _eval_shares: Tensor | None

    def __init__(
        self,
        num_labels: int,
        class_counts: Sequence[int] | None = None,
        waits_for_epoch: bool = False,
        eval_shares: Sequence[float] | None = None,
    ):
        super().__init__(num_labels)
        self.counts_are_given = class_counts is not None
        self._waits_for_epoch = waits_for_epoch
        # What the methods of a chain add to the logarithm of the class shares that the logits are trained for.
        self._corrections: list[Callable[[ClassStatistics], Tensor]] = []
        # Who keeps terms that follow from the prior, from the means of the last epoch, or from the running means.
        self._prior_followers: list[Callable[[ClassStatistics], None]] = []
        self._epoch_followers: list[Callable[[ClassStatistics], None]] = []
        self._step_followers: list[Callable[[ClassStatistics], None]] = []
        self._epoch_watch = EpochWatch()
        counts = torch.zeros(num_labels, dtype=torch.int64)
        if class_counts is not None:
            counts = check_class_counts(class_counts, num_labels)
        self.register_buffer("class_counts", counts)
        self.register_buffer("seen_counts", torch.zeros(num_labels, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        # Like the counts it belongs to the data, and not to a checkpoint.
        shares = None if eval_shares is None else check_shares("eval_shares", eval_shares, num_labels)
        self.register_buffer("_eval_shares", shares, persistent=False)
        # Zero between optimizer steps, which is when state is saved.
        self.register_buffer("_pending", torch.zeros(8, num_labels), persistent=False)
        # The terms of the prior in their order. They stay in one place, where a CUDA graph finds them.
        self.register_buffer("_prior_rows", torch.zeros(5, num_labels), persistent=False)
        # Offsets at which labels are judged, of the fit excess, and zeros. Then two rows for each target.
        self.register_buffer("_offsets", torch.zeros(3, num_labels), persistent=False)
        # The confidence ratios from which on a label is not contradicted, and the prediction is correct.
        self.register_buffer("_bounds", torch.zeros(2, 1), persistent=False)
        self._fill_constants()
        self._update_prior()

    @property
    def num_labels(self) -> int:
        return len(self.class_counts)

    @property
    def pending(self) -> Tensor:
        """What the next [`~ClassStatistics.step`] sums over processes, `[8, C]`."""
        return self._pending

    @property
    def prior(self) -> Tensor:
        """Share of each class in the training set, `[C]`; uniform while it is unknown."""
        return self._prior_rows[0]

    @property
    def present_mean(self) -> Tensor:
        """Weights of a mean over the classes that have samples, `[C]`."""
        return self._prior_rows[3]

    def _update_prior(self) -> None:
        if self.counts_are_given:
            counts = self.class_counts
        elif not self._waits_for_epoch:
            counts = self.class_counts + PRIOR_PSEUDO_COUNT
        else:  # decided on the device, by what a checkpoint has
            is_enough = self.class_counts.sum() >= min_counted_samples(self.num_labels)
            counts = torch.where(is_enough | (self.epochs > 0), self.class_counts + PRIOR_PSEUDO_COUNT, 1)
        terms = prior_terms(counts.to(self._running.dtype) / counts.sum(), self._eval_shares)
        torch.stack(terms, out=self._prior_rows)
        self._update_offsets()
        self._update_followers(self._prior_followers)

    def _update_offsets(self) -> None:
        log_output, prior = self.log_output_shares, self.prior_terms
        torch.sub(prior.log_eval, log_output, out=self.judged_offset)
        torch.sub(-prior.log_rarity, log_output, out=self.fitted_offset)

    @property
    def prior_terms(self) -> PriorTerms:
        return PriorTerms(*self._prior_rows.unbind())

    @property
    def judged_offset(self) -> Tensor:
        return self._offsets[JUDGED]

    @property
    def fitted_offset(self) -> Tensor:
        return self._offsets[FITTED]

    @property
    def offsets(self) -> Offsets | None:
        """The offsets at which a [`LogitBatch`] is looked at; `None` where all are 0 by design."""
        first = JUDGED if self._eval_shares is not None else FITTED if self._corrections else PLAIN
        has_targets = len(self._offsets) > PLAIN + 1
        if first == PLAIN and not has_targets:
            return None
        # The last row is the second one of a target.
        return Offsets(self._offsets[first : -1 if has_targets else None], PLAIN - first)

    def add_target(self) -> int:
        """
        Keeps an offset for a method whose delta leads to the gradient of cross-entropy at other logits.

        Returns:
            `int`: Its position for [`~ClassStatistics.target_rows`] and [`LogitBatch.take_target`].
        """
        position = len(self._offsets) - (PLAIN + 1)
        self._offsets = torch.cat([self._offsets, torch.zeros_like(self._offsets[:2])])
        return position

    def target_rows(self, position: int) -> Tensor:
        """The offset of a target, and a row for the method to write what it computes along with it, `[2, C]`."""
        return self._offsets[PLAIN + 1 + position :][:2]

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
        self._update_offsets()

    def follow_prior(self, follower: Callable[["ClassStatistics"], None]) -> None:
        """Calls a function with these statistics, now and whenever the class shares have changed."""
        self._prior_followers.append(follower)
        follower(self)

    def follow_epochs(self, follower: Callable[["ClassStatistics"], None]) -> None:
        """Calls a function with these statistics, now and whenever the means of an epoch may have changed."""
        self._epoch_followers.append(follower)
        follower(self)

    def follow_steps(self, follower: Callable[["ClassStatistics"], None]) -> None:
        """
        Calls a function with these statistics, now and whenever the running means or the class shares have moved. The
        followers of the shares come first.
        """
        self._step_followers.append(follower)
        follower(self)

    def _fill_constants(self) -> None:
        """Half precision would round them for good."""
        for row, bound in zip(self._bounds, (CONFIDENT_ERROR, CORRECT), strict=True):
            row.fill_(bound)
        self._offsets[PLAIN].zero_()

    def _update_followers(self, followers: Sequence[Callable[["ClassStatistics"], None]]) -> None:
        for follow in followers:
            follow(self)

    def _update_all(self) -> None:
        self._fill_constants()
        self._update_prior()
        self._update_followers([*self._epoch_followers, *self._step_followers])

    def _replicate_for_data_parallel(self) -> Self:
        # The replica on the device of this module moves its sums, and does so in a thread of its own.
        self._epoch_watch.stop()
        # The followers would read the statistics of a replica and write to the methods of this module.
        self._prior_followers, self._epoch_followers, self._step_followers = [], [], []
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        module = super()._apply(*args, **kwargs)
        self._update_all()
        return module

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._epoch_watch.forget()
        self._update_all()

    @torch.no_grad()
    def update(self, batch: LogitBatch, weight: Tensor | None = None) -> None:
        """
        Adds a micro-batch to the pending sums.

        Args:
            batch ([`LogitBatch`]): The micro-batch, with the offsets of these statistics where they are not 0.
            weight (`torch.Tensor` of shape `[N]`, *optional*):
                Weight of each sample under class-relative dampening, without its compensation.
        """
        self.add(batch, stack_rows(self.rows_of(batch, weight), batch))

    def rows_of(self, batch: LogitBatch, weight: Tensor | None = None) -> list[Tensor]:
        """
        What is summed up per class, `[N]` each, with anything for ignored samples: weight, correct prediction,
        probability of the label, 1, confidence ratio, its square, no confident error, and fit excess. Arguments as
        for `update`.
        """
        one, ratios = batch.is_valid, batch.confidence_ratios
        # As numbers: a GPU would copy rows of several dtypes one by one when they are stacked.
        believed, correct = torch.ge(ratios, self._bounds.to(ratios), out=ratios.new_empty(ratios.shape))
        ratio = ratios[0]
        weight = one if weight is None else weight
        return [weight, correct, batch.label_prob, one, ratio, ratio.square(), believed, batch.fit_excess]

    @torch.no_grad()
    def add(self, batch: LogitBatch, rows: Tensor) -> None:
        """
        Adds a micro-batch to the pending sums, as [`~ClassStatistics.update`] does.

        Args:
            batch ([`LogitBatch`]): The micro-batch.
            rows (`torch.Tensor` of shape `[8, N]`):
                The rows of [`~ClassStatistics.rows_of`]; zero for ignored samples.
        """
        # Before the sums: an interruption between the two may only count too many.
        if self._finds_epochs:
            self._epoch_watch.count_rows(self._epoch_sums, len(batch.classes))
        self._pending.index_add_(1, batch.classes, rows.to(self._pending.dtype))

    @torch.no_grad()
    def step(self, reduce: Callable[[Tensor], Tensor] | None = None, is_seen: bool = False) -> None:
        """
        Moves the running means by the pending sums and clears these: once per optimizer step.

        Args:
            reduce (`Callable`, *optional*): Sums a tensor over processes.
            is_seen (`bool`, *optional*, defaults to `False`):
                Whether the host sees every step and all of its rows: none is replayed by a CUDA graph or reduced.
                Where the statistics find the end of an epoch themselves, they then look for it only when it may have
                come, see [`EpochWatch`].
        """
        pending = self._pending if reduce is None else reduce(self._pending)
        self.seen_counts += pending[3].long()
        self._move_means(pending)
        self._pending.zero_()
        self.steps += 1
        if not self.counts_are_given:
            self.class_counts.copy_(self.seen_counts)
            self._update_prior()
        elif self._finds_epochs and self._epoch_watch.count_step(self._epoch_sums, is_seen):
            self._end_epoch_where(self._samples_left() <= 0)  # decided on the device
            self._update_followers(self._epoch_followers)
            self._epoch_watch.ask(self._samples_left)
        self._update_followers(self._step_followers)

    @property
    def _finds_epochs(self) -> bool:
        """Whether an epoch ends when as many samples were seen as there are."""
        return self.counts_are_given and not self._waits_for_epoch

    def _samples_left(self) -> Tensor:
        """Samples that the present epoch lacks of the data set."""
        return self.class_counts.sum() - self._epoch_sums[0].sum(dtype=torch.int64)

    @torch.no_grad()
    def end_epoch(self) -> None:
        """
        Says that all training data has been seen once more: the means of this epoch hold through the next one, and
        counted classes have a prior from here on, however few.
        """
        self._end_epoch_where(torch.ones_like(self.steps, dtype=torch.bool))
        self._update_followers(self._epoch_followers)
        if not self.counts_are_given:
            self._update_prior()
            self._update_followers(self._step_followers)
