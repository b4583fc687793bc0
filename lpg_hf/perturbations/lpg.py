"""LPG: amplify or dampen the gradient of each class, inside a ball."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..functional import lpg_delta
from ..statistics import ClassStatistics
from .base import LogitPerturbation, check, check_choice


class LPG(LogitPerturbation):
    r"""
    Learning to Perturb Gradients: class-level deltas of bounded norm, amplifying some classes and dampening others.

    The strategy gives every class c a sign and a radius `eps_c`:

    - `"frequency"` (long tails): with `a_c = mean(log pi) - log pi_c` over the classes of the training set, classes
      with `a_c > 0` are amplified and the others dampened, `eps_c = epsilon |a_c| / max|a|`.
    - `"accuracy"` (balanced data): classes whose running training accuracy lies below the mean over classes are
      amplified, those above dampened, `eps_c = epsilon |mean - q_c|`.
    - `"fixed"`: `signs` and `bounds` as given.

    Source: the framework and the first two settings are the paper's (arXiv 2605.29494); the formulas for the radii,
    the cap on dampening, the sample direction and `"fixed"` are ours.

    Args:
        strategy (`str`, *optional*, defaults to `"frequency"`): `"frequency"`, `"accuracy"` or `"fixed"`.
        epsilon (`float`, *optional*, defaults to 0.1):
            Largest radius, at least 0, in units of a sample's logit gradient (whose norm is at most `sqrt(2)`).
        max_dampening (`float`, *optional*, defaults to 0.5):
            Share of a class's mean gradient that dampening may remove, in (0, 1].
        direction (`str`, *optional*, defaults to `"class"`): `"class"` (the class's mean gradient) or `"sample"`.
        norm (`str`, *optional*, defaults to `"l2"`): `"l2"` or `"linf"`.
        solver (`str`, *optional*, defaults to `"closed_form"`): `"closed_form"` or `"pgd"`, which converges to it.
        warmup_steps (`int`, *optional*, defaults to 0): Optimizer steps without perturbation at the start.
        signs (`Sequence[int]`, *optional*): For `"fixed"`: +1, -1 or 0 for each class.
        bounds (`Sequence[float]`, *optional*): For `"fixed"`: radius of each class; `epsilon` for all when left out.

    Raises:
        ValueError: If an argument is out of its range, or `signs` or `bounds` don't fit the strategy or the classes.

    Example:

    ```python
    >>> LPG("frequency", epsilon=0.3)
    lpg(epsilon=0.3)

    ```
    """

    name = "lpg"

    def __init__(
        self,
        strategy: str = "frequency",
        epsilon: float = 0.1,
        max_dampening: float = 0.5,
        direction: str = "class",
        norm: str = "l2",
        solver: str = "closed_form",
        warmup_steps: int = 0,
        signs: Sequence[int] | None = None,
        bounds: Sequence[float] | None = None,
    ):
        super().__init__()
        check_choice("strategy", strategy, ("frequency", "accuracy", "fixed"))
        check(epsilon >= 0, "epsilon", epsilon, "at least 0")
        check(0 < max_dampening <= 1, "max_dampening", max_dampening, "in (0, 1]")
        check_choice("direction", direction, ("class", "sample"))
        check_choice("norm", norm, ("l2", "linf"))
        check_choice("solver", solver, ("closed_form", "pgd"))
        check(warmup_steps >= 0, "warmup_steps", warmup_steps, "at least 0")
        if strategy == "fixed":
            check(signs is not None, "signs", signs, "given, one per class, with strategy='fixed'")
            check(all(sign in (-1, 0, 1) for sign in signs), "signs", signs, "-1, 0 or 1 for each class")
            check(bounds is None or all(bound >= 0 for bound in bounds), "bounds", bounds, "at least 0 for each class")
            check(
                bounds is None or len(bounds) == len(signs),
                "bounds",
                bounds,
                f"as long as `signs`, {len(signs)} entries",
            )
        else:
            check(signs is None, "signs", signs, f"left out with strategy={strategy!r}; use strategy='fixed'")
            check(bounds is None, "bounds", bounds, f"left out with strategy={strategy!r}; use strategy='fixed'")
        self.strategy = strategy
        self.epsilon = epsilon
        self.max_dampening = max_dampening
        self.direction = direction
        self.norm = norm
        self.solver = solver
        self.warmup_steps = warmup_steps
        self.signs = None if signs is None else list(signs)
        self.bounds = None if bounds is None else list(bounds)
        if strategy == "fixed":
            radii = [epsilon] * len(signs) if bounds is None else bounds
            self.register_buffer("_signs", torch.tensor(self.signs, dtype=torch.float32), persistent=False)
            self.register_buffer("_bounds", torch.tensor(radii, dtype=torch.float64), persistent=False)

    def delta(self, gradient: Tensor, logits: Tensor, labels: Tensor, statistics: ClassStatistics) -> Tensor:
        signs, bounds = self.signs_and_bounds(statistics)
        return lpg_delta(gradient, labels, signs, bounds, self.max_dampening, self.direction, self.norm, self.solver)

    def signs_and_bounds(self, statistics: ClassStatistics) -> tuple[Tensor, Tensor]:
        """Sign and radius of every class at the present step, two tensors of shape `[C]`."""
        if self.strategy == "fixed":
            signs, bounds = self._signs, self._bounds
            if len(signs) != statistics.num_labels:
                raise ValueError(
                    f"`signs` has {len(signs)} entries, but there are {statistics.num_labels} classes: pass one per "
                    "class."
                )
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
