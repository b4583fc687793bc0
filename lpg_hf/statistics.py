"""What training has seen of each class so far, kept on the device and reduced over processes once per step."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .batch import Batch


# Running means give a step's n samples of a class the weight n / (n + INERTIA).
MEAN_INERTIA = 20
CONTRADICTION_INERTIA = 40
# Samples added to every class while the prior is still being counted, so that a few batches don't look imbalanced.
PRIOR_PSEUDO_COUNT = 10


class ClassStatistics(nn.Module):
    """
    Class prior, and running means per class of what the model makes of its training samples.

    A step uses the statistics of the step before: [`~ClassStatistics.update`] only adds the samples of a micro-batch
    to pending sums, [`~ClassStatistics.fold`] reduces these over processes and moves the running means, once per
    optimizer step. The result does not depend on how the batch was split into micro-batches and processes.

    Args:
        num_labels (`int`): Number of classes C.
        class_counts (`Sequence[int]`, *optional*):
            Training samples of each class. Without them the samples seen are counted.

    Attributes:
        class_counts (`torch.Tensor` of shape `[C]`): Samples of each class, in the data set or seen so far.
        steps (`torch.Tensor`, scalar): Number of folds so far.
        prior_is_ready (`bool`):
            Whether a prior that is being counted may be used; while `False`, the prior is uniform.

    Raises:
        ValueError: If `class_counts` has not `num_labels` entries, a negative one, or no positive one.

    Example:

    ```python
    >>> import torch
    >>> statistics = ClassStatistics(num_labels=2, class_counts=[30, 10])
    >>> statistics.prior
    tensor([0.7500, 0.2500])
    >>> statistics.update(logits=torch.tensor([[2.0, 0.0], [0.0, 2.0]]), labels=torch.tensor([0, 0]))
    >>> statistics.fold()
    >>> statistics.accuracy  # a mean of 1/2 with weight 2 / (2 + 20)
    tensor([0.0455, 0.0000])

    ```
    """

    class_counts: Tensor
    steps: Tensor
    _running: Tensor
    _pending: Tensor

    def __init__(self, num_labels: int, class_counts: Sequence[int] | None = None):
        super().__init__()
        self.counts_are_given = class_counts is not None
        self.prior_is_ready = True
        counts = torch.zeros(num_labels, dtype=torch.int64)
        if class_counts is not None:
            counts = _check_class_counts(class_counts, num_labels)
        self.register_buffer("class_counts", counts)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("_running", torch.zeros(4, num_labels))
        inertia = [[MEAN_INERTIA]] * 3 + [[CONTRADICTION_INERTIA]]
        self.register_buffer("_inertia", torch.tensor(inertia, dtype=torch.float32), persistent=False)
        # Zero between optimizer steps, which is when state is saved.
        self.register_buffer("_pending", torch.zeros(5, num_labels), persistent=False)
        # What a step looks at again and again.
        self._batch: Batch | None = None
        self._prior: Tensor | None = None

    @property
    def num_labels(self) -> int:
        return len(self.class_counts)

    @property
    def pending(self) -> Tensor:
        """What the next [`~ClassStatistics.fold`] sums over processes, `[5, C]`."""
        return self._pending

    @property
    def prior(self) -> Tensor:
        """Share of each class in the training set, `[C]`; uniform while it is unknown."""
        if self._batch is None and not self.counts_are_given:
            return self._computed_prior()
        if self._prior is None:
            self._prior = self._computed_prior()
        return self._prior

    def _apply(self, *args, **kwargs) -> "ClassStatistics":
        self._prior = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._prior = None
        super()._load_from_state_dict(*args, **kwargs)

    def _computed_prior(self) -> Tensor:
        if self.counts_are_given:
            counts = self.class_counts
        elif self.prior_is_ready:
            counts = self.class_counts + PRIOR_PSEUDO_COUNT
        else:
            counts = torch.ones_like(self.class_counts)
        return counts.to(self._running.dtype) / counts.sum()

    @property
    def accuracy(self) -> Tensor:
        """
        Running training accuracy of each class, `[C]`, measured before the step that learns from the sample.

        A sample is predicted right if no logit is larger than its label's: ties favour no class over another.
        """
        return self._running[0]

    @property
    def own_probability(self) -> Tensor:
        """Running mean of `p_{i,c}` over the samples of class c, `[C]`."""
        return self._running[1]

    @property
    def relative_confidence(self) -> Tensor:
        """Running mean of `p_{i,c} / max_j p_ij`, `[C]`."""
        return self._running[2]

    @property
    def contradiction(self) -> Tensor:
        """Running share of samples with `p_{i,c} < max_j p_ij / 10` and `max_j p_ij > 0.3`, `[C]`."""
        return self._running[3]

    @property
    def confident_error_share(self) -> Tensor:
        """
        Share of the errors on the training set in which the model confidently contradicts the label, a scalar.

        Both shares are weighted by [`~ClassStatistics.prior`]. A model that finds its data hard is mostly unsure where
        it errs; one that has learned the classes and meets wrong labels is sure of itself.
        """
        accuracy, _, _, contradiction = self._running @ self.prior
        return contradiction / (1 - accuracy).clamp(min=0.01)

    def batch(self, logits: Tensor, labels: Tensor) -> Batch:
        """
        What the logits `[N, C]` of a micro-batch say: the one that [`~ClassStatistics.share`] was given, if it is of
        these very tensors, else computed.
        """
        shared = self._batch
        if shared is not None and shared.logits is logits and shared.labels is labels:
            return shared
        return Batch(logits, labels)

    def share(self, batch: Batch | None) -> None:
        """Keeps a batch, and a prior that is being counted, for all who ask in a step; `None` lets them go."""
        self._batch = batch
        if not self.counts_are_given:
            self._prior = None

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a micro-batch (logits `[N, C]`, labels `[N]`, -100 ignored) to the pending sums."""
        batch = self.batch(logits, labels)
        rows = torch.stack(
            [
                batch.labelled,
                batch.is_right,
                batch.own_probability,
                batch.relative_confidence,
                batch.is_contradicted,
            ]
        )
        # Filled and not multiplied: an ignored sample may have logits that are not finite.
        rows.masked_fill_(batch.ignored, 0.0)
        self._pending.index_add_(1, batch.classes, rows.to(self._pending.dtype))

    @torch.no_grad()
    def fold(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """
        Moves the running means by the pending sums and clears these: once per optimizer step.

        Args:
            reduce (`Callable`, *optional*): Sums a tensor over processes.
        """
        pending = self._pending if reduce is None else reduce(self._pending)
        counts = pending[0]
        # A running mean m moves to that of the step's n samples by (sum - n m) / n, with the weight n / (n + inertia).
        self._running.addcdiv_(pending[1:].addcmul(counts, self._running, value=-1), counts + self._inertia)
        if not self.counts_are_given:
            self.class_counts += counts.long()
        self.steps += 1
        self._pending.zero_()


def _check_class_counts(class_counts: Sequence[int], num_labels: int) -> Tensor:
    if isinstance(class_counts, Mapping):
        raise ValueError(
            f"`class_counts` must be a list in the order of the classes; found a {type(class_counts).__name__}. Pass "
            f"`[counts[label] for label in range({num_labels})]`."
        )
    counts = torch.as_tensor(class_counts)
    if counts.shape != (num_labels,):
        raise ValueError(
            f"`class_counts` has shape {list(counts.shape)}, but there are {num_labels} classes: pass one count per "
            "class."
        )
    if not counts.isfinite().all() or (counts < 0).any() or not (counts > 0).any():
        raise ValueError(
            f"`class_counts` must be finite and not negative, and at least one must be positive; found "
            f"{counts.tolist()}. Count the training rows of each class, for instance with "
            "`lpg_hf.data.class_counts(dataset)`."
        )
    if (counts != counts.round()).any():
        raise ValueError(
            f"`class_counts` must be whole numbers of training rows, not shares; found {counts.tolist()}."
        )
    return counts.to(torch.int64, copy=True)
