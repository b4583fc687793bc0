"""LPL: class-level perturbations of the logits, found by projected gradient steps on the loss."""

from collections.abc import Sequence

from torch import Tensor

from ..functional import lpl_delta
from ..statistics import ClassStatistics
from .base import check_count
from .strategy import ClassLevelPerturbation


class LPL(ClassLevelPerturbation):
    r"""
    Logit perturbation: one shift of the logits per class, that raises the loss of some classes and lowers others'.

    The strategy gives every class a sign and a radius, see [`ClassLevelPerturbation`].

    Level: class.
    Formula: `delta = softmax(z + d_c) - softmax(z)`, `d_c` from projected steps on the loss of class c, max or min.
    Helps: long tails (the tail is amplified); it switches itself off on well-fitted samples, where LPG does not.
    Hurts: label noise, which amplification amplifies.
    Cost: O(k NC), k steps with a softmax each.
    Source: Li et al., Logit perturbation (AAAI 2022); the ball and the normalised step are ours.

    Args:
        strategy (`str`, *optional*, defaults to `"frequency"`): `"frequency"`, `"accuracy"` or `"fixed"`.
        epsilon (`float`, *optional*, defaults to 1.0): Largest radius of a `d_c`, at least 0, in logits.
        steps (`int`, *optional*, defaults to 5): Number of projected steps, at least 1.
        warmup_steps (`int`, *optional*, defaults to 0): Optimizer steps without perturbation at the start.
        signs (`Sequence[int]`, *optional*): For `"fixed"`: +1, -1 or 0 for each class.
        bounds (`Sequence[float]`, *optional*): For `"fixed"`: radius of each class; `epsilon` for all when left out.

    Raises:
        ValueError: If an argument is out of its range, or `signs` or `bounds` don't fit the strategy or the classes.

    Example:

    ```python
    >>> LPL("accuracy", epsilon=0.5)
    lpl(strategy='accuracy', epsilon=0.5)

    ```
    """

    name = "lpl"
    depends_on_split = True

    def __init__(
        self,
        strategy: str = "frequency",
        epsilon: float = 1.0,
        steps: int = 5,
        warmup_steps: int = 0,
        signs: Sequence[int] | None = None,
        bounds: Sequence[float] | None = None,
    ):
        super().__init__(strategy, epsilon, warmup_steps, signs, bounds)
        check_count("steps", steps)
        self.steps = steps

    def delta(self, gradient: Tensor, logits: Tensor, labels: Tensor, statistics: ClassStatistics) -> Tensor:
        signs, bounds = self.signs_and_bounds(statistics)
        gradient = statistics.batch(logits, labels).gradient
        return lpl_delta(logits, labels, signs, bounds, self.steps, base_gradient=gradient)
