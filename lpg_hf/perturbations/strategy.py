"""Strategies that decide which classes are amplified, which are dampened, and how far."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..statistics import ClassStatistics
from .base import LogitPerturbation
from .checks import check, check_choice, check_not_negative


class ClassLevelPerturbation(LogitPerturbation):
    r"""
    Base class of methods with a sign and a radius per class.

    - `"frequency"` (long tails): with `a_c = mean(log pi) - log pi_c` over the classes of the training set, classes
      with `a_c > 0` are amplified and the others dampened, `eps_c = epsilon |a_c| / max|a|`.
    - `"accuracy"` (balanced data): classes whose running training accuracy lies below the mean over classes are
      amplified, those above dampened, `eps_c = epsilon |mean - q_c|`.
    - `"fixed"`: `signs` and `bounds` as given.

    Source: the first two settings are the paper's (arXiv 2605.29494); the radii and `"fixed"` are ours.
    """

    _signs: Tensor
    _bounds: Tensor

    def __init__(
        self,
        strategy: str,
        epsilon: float,
        warmup_steps: int,
        signs: Sequence[int] | None,
        bounds: Sequence[float] | None,
    ):
        super().__init__()
        check_choice("strategy", strategy, ("frequency", "accuracy", "fixed"))
        check_not_negative("epsilon", epsilon)
        check(warmup_steps >= 0, "warmup_steps", warmup_steps, "at least 0")
        if strategy == "fixed":
            has_signs = signs is not None and len(signs) > 0
            check(has_signs, "signs", signs, "given, one per class, with strategy='fixed'")
            signs = [] if signs is None else list(signs)
            check(all(sign in (-1, 0, 1) for sign in signs), "signs", signs, "-1, 0 or 1 for each class")
            radii = [epsilon] * len(signs) if bounds is None else bounds
            check(len(radii) == len(signs), "bounds", bounds, f"as long as `signs`, {len(signs)} entries")
            check(all(0 <= bound < math.inf for bound in radii), "bounds", bounds, "at least 0 for each class")
            self.register_buffer("_signs", torch.tensor(signs, dtype=torch.float32), persistent=False)
            self.register_buffer("_bounds", torch.tensor(radii, dtype=torch.float64), persistent=False)
        else:
            check(signs is None, "signs", signs, f"left out with strategy={strategy!r}; use strategy='fixed'")
            check(bounds is None, "bounds", bounds, f"left out with strategy={strategy!r}; use strategy='fixed'")
        self.strategy = strategy
        self.epsilon = epsilon
        self.warmup_steps = warmup_steps
        self.signs = None if signs is None else list(signs)
        self.bounds = None if bounds is None else list(bounds)

    def setup(self, num_labels: int) -> None:
        if self.signs is not None and len(self.signs) != num_labels:
            raise ValueError(
                f"`signs` has {len(self.signs)} entries, but there are {num_labels} classes. Pass one per class."
            )

    def signs_and_bounds(self, statistics: ClassStatistics) -> tuple[Tensor, Tensor]:
        """Sign and radius of every class at the present step, two tensors of shape `[C]`."""
        if self.strategy == "fixed":
            signs, bounds = self._signs, self._bounds
        else:
            strength = _frequency(statistics) if self.strategy == "frequency" else _accuracy(statistics)
            signs, bounds = strength.sign(), self.epsilon * strength.abs()
        return signs, bounds * (statistics.steps >= self.warmup_steps)


def _frequency(statistics: ClassStatistics) -> Tensor:
    """Signed strength in [-1, 1]: how much rarer than the (geometric) mean a class is. Absent classes get 0."""
    prior = statistics.prior
    present = prior > 0
    log_prior = torch.where(present, prior, 1.0).log()
    rarity = torch.where(present, log_prior.sum() / present.sum() - log_prior, 0.0)
    largest = rarity.abs().max()
    # In a balanced set the rarities are rounding errors, and dividing them by the largest would blow them up.
    return torch.where(largest > 1e-4, rarity / largest.clamp(min=1e-4), 0.0)


def _accuracy(statistics: ClassStatistics) -> Tensor:
    """Signed strength in [-1, 1]: how far below the mean over classes the running accuracy of a class is."""
    present = statistics.prior > 0
    accuracy = torch.where(present, statistics.accuracy, 0.0)
    return torch.where(present, accuracy.sum() / present.sum() - accuracy, 0.0)
