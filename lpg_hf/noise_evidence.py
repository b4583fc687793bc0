"""Whether the labels that a model contradicts are wrong, or only hard: judged by the means of an epoch."""

import torch
from torch import Tensor


#: What the contradicted samples must come to, see [`noise_evidence`].
ENOUGH_ERRORS = 0.006
#: Fit excess where a model begins to memorize, and where it does in full, see [`memorizing`].
EXCESS = (0.015, 0.04)
#: How far the contradicted share must rise, beside its standard error, see [`error_rise`].
ENOUGH_RISE = 0.008
#: Share of the missing belief from which on contradictions are compared with later ones.
SETTLED = 0.15


def error_share(error_rate: Tensor, confidence_ratio: Tensor) -> Tensor:
    """
    Share of the belief that all labels lack, for which those that the model contradicts would make up.

    A model that is still learning its classes is mostly unsure where it errs. One that has learned them and meets
    wrong labels is sure of itself.

    Source: ours.

    Args:
        error_rate (`torch.Tensor`, scalar): Share of the samples that the model contradicts, in [0, 1].
        confidence_ratio (`torch.Tensor`, scalar): Mean of [`LogitBatch.confidence_ratio`], in [0, 1].

    Returns:
        `torch.Tensor`, scalar: In [0, 10/9], since a contradicted label lacks more than 0.9.

    Example:

    ```python
    >>> import torch
    >>> error_share(torch.tensor(0.1), torch.tensor(0.6))
    tensor(0.2500)

    ```
    """
    return error_rate / (1 - confidence_ratio).clamp(min=torch.finfo(error_rate.dtype).eps)


def memorizing(fit_excess: Tensor) -> Tensor:
    """
    How far the model fits labels that it has seen before, rather than what it knows of their classes.

    Source: ours.

    Args:
        fit_excess (`torch.Tensor`, scalar): Mean of [`LogitBatch.fit_excess`], in [-1, 1].

    Returns:
        `torch.Tensor`, scalar: Rises from 0 to 1 between 0.015 and 0.04.

    Example:

    ```python
    >>> import torch
    >>> memorizing(torch.tensor(0.0275))
    tensor(0.5000)

    ```
    """
    start, end = EXCESS
    return ((fit_excess - start) / (end - start)).clamp(0, 1)


def noise_evidence(error_rate: Tensor, confidence_ratio: Tensor, fit_excess: Tensor) -> Tensor:
    """
    Evidence of wrong labels: the share of samples that the model contradicts, times the square of its [`error_share`],
    relative to 0.006. It counts twice where the model is [`memorizing`].

    On clean labels it stayed below 0.83 on the features of five sets at moderate learning rates, on digits, and on
    photographs from scratch. With 9 to 40 % wrong labels of people it reached 1.1 in the first epoch. It is no proof:
    features of clean photographs at high learning rates and 77 classes of short requests gave enough on the labels as
    published, and a model that is stopped early may never give it.

    Source: ours.

    Args:
        error_rate (`torch.Tensor`, scalar): Share of the samples that the model contradicts, in [0, 1].
        confidence_ratio (`torch.Tensor`, scalar): Mean of [`LogitBatch.confidence_ratio`], in [0, 1].
        fit_excess (`torch.Tensor`, scalar): Mean of [`LogitBatch.fit_excess`], in [-1, 1].

    Returns:
        `torch.Tensor`, scalar: At least 0. 1 is enough.

    Example:

    ```python
    >>> import torch
    >>> noise_evidence(torch.tensor(0.12), torch.tensor(0.6), fit_excess=torch.tensor(0.0))
    tensor(1.8000)

    ```
    """
    errors = error_rate * error_share(error_rate, confidence_ratio).square()
    return errors * (1 + memorizing(fit_excess)) / ENOUGH_ERRORS


def error_rise(error_rate: Tensor, least_error: Tensor, num_samples: Tensor) -> Tensor:
    """
    How far the contradicted share has risen, relative to 0.008 and its standard error.

    Right labels that are hard become fewer from epoch to epoch. Wrong ones stand out more and more, until they are
    memorized.

    Source: ours.

    Args:
        error_rate (`torch.Tensor`, scalar): Share of the samples that the model contradicts, in [0, 1].
        least_error (`torch.Tensor`, scalar): The smallest one before; infinite if there was none.
        num_samples (`torch.Tensor`, scalar): Samples of the epoch, at least 1.

    Returns:
        `torch.Tensor`, scalar: 1 is enough.

    Example:

    ```python
    >>> import torch
    >>> error_rise(torch.tensor(0.08), torch.tensor(0.064), num_samples=torch.tensor(20_000))
    tensor(1.6000)

    ```
    """
    return (error_rate - least_error) / (ENOUGH_RISE + (error_rate / num_samples).sqrt())
