"""Annealed Gaussian noise on the gradient of the parameters."""

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from .base import GradientPerturbation, gradients_of
from .checks import check_not_negative
from .ops import draw_seed


class GradientNoise(GradientPerturbation):
    r"""
    Annealed gradient noise: Gaussian noise on the gradient of every step, fading as training goes on.

    Level: batch.
    Formula: `delta ~ N(0, eta / (1 + t)^gamma I)` at optimizer step t.
    Helps: deep networks that are hard to start.
    Hurts: fine-tuning, where the gradients are small against the usual eta.
    Cost: a random number per parameter.
    Source: Neelakantan et al., Adding gradient noise improves learning for very deep networks (2015).

    Args:
        eta (`float`, *optional*, defaults to 0.01): Variance at the first step, at least 0.
        gamma (`float`, *optional*, defaults to 0.55): How fast the variance fades, at least 0.
        seed (`int`, *optional*, defaults to 0): The noise of a step depends on the seed and the step alone.

    Raises:
        ValueError: If `eta` or `gamma` is negative or infinite.

    Example:

    ```python
    >>> GradientNoise(eta=0.3)
    gradient_noise(eta=0.3)

    ```
    """

    name = "gradient_noise"

    def __init__(self, eta: float = 0.01, gamma: float = 0.55, seed: int = 0):
        super().__init__()
        check_not_negative("eta", eta)
        check_not_negative("gamma", gamma)
        self.eta = eta
        self.gamma = gamma
        self.seed = seed
        self._steps = 0

    @torch.no_grad()
    def perturb_(self, parameters: list[Parameter], scale: float = 1.0) -> Tensor:
        sigma = (self.eta / (1 + self._steps) ** self.gamma) ** 0.5
        # The same on all processes, whose gradients have been averaged by now.
        generator = torch.Generator(parameters[0].device).manual_seed(draw_seed(self.seed, self._steps))
        self._steps += 1
        noises = []
        for gradient in gradients_of(parameters):
            noise = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype, device=gradient.device)
            gradient.add_(noise, alpha=sigma * scale)
            noises.append(sigma * noise)
        return get_total_norm(noises)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self._steps)

    def set_extra_state(self, state: Tensor) -> None:
        self._steps = int(state)
