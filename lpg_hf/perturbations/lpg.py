"""LPG: amplify or dampen the gradient of each class, inside a ball."""

from collections.abc import Sequence

from torch import Tensor

from ..functional import lpg_delta
from ..statistics import ClassStatistics
from .base import check, check_choice
from .processes import gather_samples, is_distributed
from .strategy import ClassLevelPerturbation


class LPG(ClassLevelPerturbation):
    r"""
    Learning to Perturb Gradients: class-level deltas of bounded norm, amplifying some classes and dampening others.

    The strategy gives every class a sign and a radius, see [`ClassLevelPerturbation`].

    Level: class.
    Formula: `delta_c = eps_c m_c / ||m_c||` (amplify) or `-min(eps_c, kappa ||m_c||) m_c / ||m_c||` (dampen), with
    `m_c` the mean gradient of class c in the batch.
    Helps: clean long tails (`"frequency"`), classes that lag behind (`"accuracy"`).
    Hurts: label noise, which amplification amplifies; long training, since the push does not fade with the fit.
    Cost: O(NC).
    Source: the paper (arXiv 2605.29494); the cap kappa on dampening and the sample direction are ours.

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
        sync (`bool`, *optional*, defaults to `False`):
            Whether class means run over the micro-batches of all processes. With P processes of N samples each step
            then moves P N C numbers and waits for the slowest process; without it every process uses its own means.

    Raises:
        ValueError: If an argument is out of its range, or `signs` or `bounds` don't fit the strategy or the classes.

    Example:

    ```python
    >>> LPG("frequency", epsilon=0.3)
    lpg(epsilon=0.3)

    ```
    """

    name = "lpg"
    owns_delta = True

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
        sync: bool = False,
    ):
        super().__init__(strategy, epsilon, warmup_steps, signs, bounds)
        check(0 < max_dampening <= 1, "max_dampening", max_dampening, "in (0, 1]")
        check_choice("direction", direction, ("class", "sample"))
        check_choice("norm", norm, ("l2", "linf"))
        check_choice("solver", solver, ("closed_form", "pgd"))
        self.max_dampening = max_dampening
        self.direction = direction
        self.norm = norm
        self.solver = solver
        self.sync = sync
        self.depends_on_split = direction == "class"

    def delta(self, gradient: Tensor, logits: Tensor, labels: Tensor, statistics: ClassStatistics) -> Tensor:
        signs, bounds = self.signs_and_bounds(statistics)
        own = slice(None)
        if self.sync and self.direction == "class" and is_distributed():
            gradient, labels, own = gather_samples(gradient, labels)
        delta = lpg_delta(gradient, labels, signs, bounds, self.max_dampening, self.direction, self.norm, self.solver)
        return delta[own]
