"""Logit-gradient noise."""

import torch
from torch import Tensor

from ..batch import LogitBatch, zero_ignored_
from ..statistics import ClassStatistics
from .base import LogitPerturbation
from .checks import check_not_negative
from .ops import draw_seed
from .processes import process_index


class LogitNoise(LogitPerturbation):
    r"""
    Logit-gradient noise: independent Gaussian noise on every sample's gradient.

    Level: sample.
    Formula: `delta ~ N(0, sigma^2 I)`, projected on the rows that sum to zero.
    Helps: flat regions early in training; it regularizes without a look at the labels.
    Hurts: the end of training, where it keeps the weights from settling.
    Cost: O(NC).
    Source: ours, after Neelakantan et al., Adding gradient noise (2015), who perturb the gradient of the parameters.

    Args:
        sigma (`float`, *optional*, defaults to 0.1): Standard deviation of an entry before the projection, at least 0.
        seed (`int`, *optional*, defaults to 0):
            The noise of a micro-batch depends on the seed, its number in the training, and the process.

    Raises:
        ValueError: If `sigma` is negative or infinite.

    Example:

    ```python
    >>> LogitNoise(0.2)
    logit_noise(sigma=0.2)

    ```
    """

    name = "logit_noise"
    depends_on_split = True

    def __init__(self, sigma: float = 0.1, seed: int = 0):
        super().__init__()
        check_not_negative("sigma", sigma)
        self.sigma = sigma
        self.seed = seed
        # A tensor on the host: `torch.compile` would take a number for a constant.
        self._draws = torch.tensor(0)

    def delta(self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
        noise = _standard_normal(gradient, self._draws, self.seed, process_index())
        self._draws += 1
        centered = noise - noise.mean(-1, keepdim=True)
        return zero_ignored_(centered.mul_(self.sigma), batch.labels)

    def get_extra_state(self) -> Tensor:
        return self._draws.clone()

    def set_extra_state(self, state: Tensor) -> None:
        self._draws = state.cpu().clone()


@torch.library.custom_op("lpg_hf::standard_normal", mutates_args=())
def _standard_normal(like: Tensor, draws: Tensor, seed: int, process: int) -> Tensor:
    """Gaussian noise of counter, seed and process. It is one operation, as compiled graphs hold no generators."""
    generator = torch.Generator(like.device).manual_seed(draw_seed(seed, int(draws), process))
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


@_standard_normal.register_fake
def _(like: Tensor, draws: Tensor, seed: int, process: int) -> Tensor:
    return torch.empty_like(like)
