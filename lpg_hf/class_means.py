"""Means per class of what the model makes of its training samples, over the last steps and over epochs."""

import torch
from torch import Tensor, nn


# Running means give the n samples that a step has of a class the weight n / (n + INERTIA).
INERTIA = 20
# The `error_share` of a model that is sure of itself where it errs.
SURE = 0.25


class ClassMeans(nn.Module):
    """
    Means per class, and what follows from them about the labels.

    Means over the last steps follow the model. What must not follow single batches is a mean over a whole epoch, and
    holds through the next one.

    Args:
        num_labels (`int`): Number of classes C.

    Attributes:
        epochs (`torch.Tensor`, scalar): Number of epochs that have ended.

    Example:

    ```python
    >>> from lpg_hf.batch import LogitBatch
    >>> from lpg_hf.statistics import ClassStatistics
    >>> means = ClassStatistics(num_labels=2, class_counts=[2, 2])  # the labels of class 0 are believed, or not at all
    >>> means.update(LogitBatch(torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, 0.0]]), torch.tensor([0, 0, 1])))
    >>> means.step()
    >>> means.end_epoch()
    >>> means.confidence_ratio, means.confident_error_rate
    (tensor([0.5001, 1.0000]), tensor([0.5000, 0.0000]))

    ```
    """

    epochs: Tensor
    _running: Tensor
    _epoch_sums: Tensor
    _epoch_means: Tensor
    _least_error: Tensor

    def __init__(self, num_labels: int):
        super().__init__()
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))
        # Accuracy, probability of the label, and weight that dampening takes away.
        self.register_buffer("_running", torch.zeros(3, num_labels))
        # Samples, confidence ratios, their squares, and confident errors of the present epoch.
        self.register_buffer("_epoch_sums", torch.zeros(4, num_labels))
        # The last three as means over the epochs before, the last of which makes a half. And the running probability
        # of the label at the end of the last epoch.
        self.register_buffer("_epoch_means", torch.zeros(4, num_labels))
        # The smallest share of all samples that the model contradicted in an epoch, once it was sure of itself.
        self.register_buffer("_least_error", torch.tensor(torch.inf))

    @property
    def prior(self) -> Tensor:
        """Share of each class in the training set, `[C]`."""
        raise NotImplementedError

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
        return self._epoch_means[2]

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
    def error_rise(self) -> Tensor:
        """
        How far the share of all samples that the model contradicts has risen above its smallest since the model has
        been sure of itself, a scalar.

        Right labels that are hard become fewer from epoch to epoch. Wrong ones stand out more and more, until they are
        memorized.
        """
        return (self._error - self._least_error).clamp(min=0)

    @property
    def error_share(self) -> Tensor:
        """
        Share of the belief that the labels of all samples lack, which those that the model contradicts could make up
        for, a scalar in [0, 10/9]: a contradicted label lacks more than 0.9.

        A model that is still learning its classes is mostly unsure where it errs. One that has learned them and meets
        wrong labels is sure of itself.
        """
        missing = 1 - torch.dot(self.confidence_ratio, self.prior)
        return self._error / missing.clamp(min=torch.finfo(missing.dtype).eps)

    @property
    def _error(self) -> Tensor:
        return torch.dot(self.confident_error_rate, self.prior)

    @property
    def last_label_prob(self) -> Tensor:
        """The [`~ClassStatistics.label_prob`] at the end of the last epoch, `[C]`; 0 before."""
        return self._epoch_means[3]

    @property
    def mean_weight(self) -> Tensor:
        """Running mean of the weights of the samples of class c under dampening, `[C]`; 1 before."""
        return 1 - self._running[2]

    def _move_means(self, sums: Tensor) -> None:
        """
        Moves the running means by the sums of a step, and adds these to the sums of the epoch.

        Args:
            sums (`torch.Tensor` of shape `[7, C]`):
                Samples, confidence ratios, their squares, confident errors, correct predictions, probabilities of the
                label, and weights that dampening takes away. They are overwritten.
        """
        # Logits that are not finite move no mean: the optimizer or a gradient scaler may have skipped their step.
        sums.masked_fill_(sums[5].isnan(), 0.0)
        self._epoch_sums += sums[:4]
        # A running mean m moves to the mean of the step's n samples by (sum - n m) / n, with weight n / (n + INERTIA).
        move = sums[4:].addcmul_(sums[0], self._running, value=-1)
        self._running.addcdiv_(move, sums[0] + INERTIA)

    def _end_epoch_where(self, is_over: Tensor) -> None:
        """Turns the sums of the epoch into means if it is over, which is decided on the device."""
        counts, before = self._epoch_sums[0], self._epoch_means[:3]
        means = self._epoch_sums[1:] / counts.clamp(min=1)
        means.lerp_(before, 0.5 * before[:1].sign())
        means = torch.cat([means, self.label_prob[None]])
        # A class that the epoch did not have keeps its means.
        torch.where(is_over & (counts > 0), means, self._epoch_means, out=self._epoch_means)
        # Before, a model that becomes sure of itself contradicts more and more labels, and be they right.
        is_sure = is_over & (self.error_share >= SURE)
        torch.where(is_sure, torch.minimum(self._error, self._least_error), self._least_error, out=self._least_error)
        self._epoch_sums.masked_fill_(is_over, 0.0)
        self.epochs += is_over
