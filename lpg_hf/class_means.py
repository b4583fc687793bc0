"""Means per class of what the model makes of its training samples, over the last steps and over epochs."""

import torch
from torch import Tensor, nn

from .noise_evidence import SETTLED, error_rise, error_share, memorizing, noise_evidence


# Running means give the n samples that a step has of a class the weight n / (n + INERTIA).
INERTIA = 20


class ClassMeans(nn.Module):
    """
    Means per class, and what follows from them about the labels.

    Means over the last steps follow the model. What must not follow single batches is a mean over a whole epoch, and
    holds through the next one.

    Args:
        num_labels (`int`): Number of classes C.

    Attributes:
        epochs (`torch.Tensor`, scalar): Number of epochs that have ended.
    """

    epochs: Tensor
    _evidence: Tensor
    _running: Tensor
    _epoch_sums: Tensor
    _epoch_means: Tensor
    _least_error: Tensor

    def __init__(self, num_labels: int):
        super().__init__()
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))
        # Weight under dampening, accuracy, probability of the label, and 1.
        self.register_buffer("_running", torch.tensor([[1.0], [0.0], [0.0], [1.0]]).repeat(1, num_labels))
        # Samples, confidence ratios, their squares, samples that are no confident errors, and fit excesses of the
        # present epoch.
        self.register_buffer("_epoch_sums", torch.zeros(5, num_labels))
        # Confidence ratios and their squares as means over the epochs before, the last of which makes a half. And the
        # running probability of the label at the end of the last epoch.
        self.register_buffer("_epoch_means", torch.zeros(3, num_labels))
        # `noise_evidence` and `memorizing`.
        self.register_buffer("_evidence", torch.zeros(2))
        # The smallest share of all samples that the model contradicted in an epoch, once these made up enough.
        self.register_buffer("_least_error", torch.tensor(torch.inf))

    @property
    def accuracy(self) -> Tensor:
        """
        Running training accuracy of each class, `[C]`, measured before the step that learns from the sample.

        A prediction counts as correct if no probability is larger than that of the label, so ties favor no class.
        """
        return self._running[1]

    @property
    def label_prob(self) -> Tensor:
        """Running mean of `p_{i,c}` over the samples of class c, `[C]`."""
        return self._running[2]

    @property
    def confidence_ratio(self) -> Tensor:
        """
        Mean of [`LogitBatch.confidence_ratio`] over the samples of class c, `[C]`. Each epoch makes a half of it, and
        what was before the other half; 0 before the first epoch has ended.
        """
        return self._epoch_means[0]

    @property
    def decidedness(self) -> Tensor:
        """
        How decided the model is about the labels of class c, `[C]` in [0, 1]: the variance of the confidence ratio
        relative to the largest that its mean allows. It is 1 if every label is either believed or not at all.
        """
        mean, square = self._epoch_means[:2]
        tiny = torch.finfo(mean.dtype).tiny
        variance, largest = (moment.addcmul(mean, mean, value=-1) for moment in (square, mean))
        return (variance / largest.clamp(min=tiny)).clamp(0, 1)

    @property
    def last_label_prob(self) -> Tensor:
        """The [`~ClassStatistics.label_prob`] at the end of the last epoch, `[C]`; 0 before."""
        return self._epoch_means[2]

    @property
    def noise_evidence(self) -> Tensor:
        """
        The largest evidence of wrong labels that an epoch gave, by [`noise_evidence`] or by an [`error_rise`]: a
        scalar, at least 0. 1 is enough.
        """
        return self._evidence[0]

    @property
    def memorizing(self) -> Tensor:
        """The largest [`memorizing`] of any epoch until the evidence was enough, a scalar in [0, 1]."""
        return self._evidence[1]

    @property
    def mean_weight(self) -> Tensor:
        """Running mean of the weights of the samples of class c under dampening, `[C]`; 1 before."""
        return self._running[0]

    def _move_means(self, sums: Tensor) -> None:
        """
        Moves the running means by the sums of a step, and adds these to the sums of the epoch.

        Args:
            sums (`torch.Tensor` of shape `[8, C]`):
                Weights under dampening, correct predictions, probabilities of the label, samples, confidence ratios,
                their squares, samples that are no confident errors, and fit excesses. They are overwritten.
        """
        # Logits that are not finite move no mean: the optimizer or a gradient scaler may have skipped their step.
        sums.masked_fill_(sums[2].isnan(), 0.0)
        self._epoch_sums += sums[3:]
        # A running mean m moves to (m + sum / INERTIA) / (1 + n / INERTIA). That of the samples themselves stays 1.
        moved = torch.add(self._running, sums[:4], alpha=1 / INERTIA)
        torch.div(moved, moved[3], out=self._running)

    def _end_epoch_where(self, is_over: Tensor) -> None:
        """Turns the sums of the epoch into means if it is over, which is decided on the device."""
        counts, before = self._epoch_sums[0], self._epoch_means[:2]
        self._look_for_noise(is_over)
        means = self._epoch_sums[1:3] / counts.clamp(min=1)
        means.lerp_(before, 0.5 * before[:1].sign())
        means = torch.cat([means, self.label_prob[None]])
        # A class that the epoch did not have keeps its means.
        torch.where(is_over & (counts > 0), means, self._epoch_means, out=self._epoch_means)
        self._epoch_sums.masked_fill_(is_over, 0.0)
        self.epochs += is_over

    def _look_for_noise(self, is_over: Tensor) -> None:
        sums = self._epoch_sums.sum(1)
        count = sums[0].clamp(min=1)
        sums[3] = sums[0] - sums[3]  # confident errors
        ratio, _, error, excess = sums[1:] / count
        evidence = torch.maximum(noise_evidence(error, ratio, excess), error_rise(error, self._least_error, count))
        # Once dampening acts, the excess says no more what the model would do without it.
        excess_counts = self.noise_evidence < 1
        now = torch.stack([evidence, torch.where(excess_counts, memorizing(excess), 0.0)])
        torch.where(is_over, torch.maximum(self._evidence, now), self._evidence, out=self._evidence)
        # Before that, a model that becomes sure of itself contradicts more and more labels, and be they right.
        is_settled = is_over & (error_share(error, ratio) >= SETTLED)
        torch.where(is_settled, torch.minimum(self._least_error, error), self._least_error, out=self._least_error)
