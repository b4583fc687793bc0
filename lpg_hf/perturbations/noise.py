"""Noise on the logit gradient."""

import torch
from torch import Tensor

from ..functional import noise_delta
from ..statistics import ClassStatistics
from .base import LogitPerturbation, check, draw_seed
from .processes import process_index


class LogitNoise(LogitPerturbation):
    r"""
    Logit-gradient noise: independent Gaussian noise on every sample's gradient.

    Level: sample.
    Formula: `delta ~ N(0, sigma^2 I)`, projected on the rows that sum to zero.
    Helps: flat regions early in training; a regulariser that does not look at the labels.
    Hurts: the end of training, which it keeps from settling.
    Cost: O(NC).
    Source: ours, after Neelakantan et al., Adding gradient noise (2015), who perturb the parameters' gradient.

    Args:
        sigma (`float`, *optional*, defaults to 0.1): Standard deviation of an entry before the projection, at least 0.
        seed (`int`, *optional*, defaults to 0):
            The noise of a micro-batch depends on the seed, its number in the training, and the process.

    Raises:
        ValueError: If `sigma` is negative.

    Example:

    ```python
    >>> LogitNoise(0.2)
    logit_noise(sigma=0.2)

    ```
    """

    name = "logit_noise"

    def __init__(self, sigma: float = 0.1, seed: int = 0):
        super().__init__()
        check(sigma >= 0, "sigma", sigma, "at least 0")
        self.sigma = sigma
        self.seed = seed
        self._draws = 0

    def delta(self, gradient: Tensor, logits: Tensor, labels: Tensor, statistics: ClassStatistics) -> Tensor:
        generator = torch.Generator(gradient.device)
        generator.manual_seed(draw_seed(self.seed, self._draws, process_index()))
        self._draws += 1
        return noise_delta(gradient, labels, self.sigma, generator)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self._draws)

    def set_extra_state(self, state: Tensor) -> None:
        self._draws = int(state)
