"""LPG: amplify or dampen the gradient of each class, inside a ball."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import LogitBatch
from ..statistics import ClassStatistics
from .base import returns_new_memory
from .checks import check, check_choice
from .ops import class_segments, per_sample, per_segment, project_l2_ball, segment_means
from .processes import gather_samples, is_distributed
from .strategy import ClassLevelPerturbation


def lpg_delta(
    gradient: Tensor,
    labels: Tensor,
    signs: Tensor,
    bounds: Tensor,
    max_dampening: float = 1.0,
    direction: str = "class",
    norm: str = "l2",
    solver: str = "closed_form",
    pgd_steps: int = 40,
    pgd_step_size: float = 1.0,
) -> Tensor:
    r"""
    Learning to Perturb Gradients: the delta that makes the gradients of a class larger or smaller, inside a ball.

    For a class with mean gradient `m`, sign `s` and bound `eps`, the delta solves `max` (amplify, `s = +1`) or `min`
    (dampen, `s = -1`) of `sum_i ||g_i + delta||^2` over `||delta|| <= eps`. In l2 that is `eps m/||m||`, and
    `-min(eps, kappa ||m||) m/||m||` with `kappa = max_dampening`. In l_inf the delta must also sum to zero: without
    that it is constant for hard labels and says nothing about the gradients.

    Source: the class-wise perturbation is from the paper (Gradient Perturbation: Learning to Perturb Gradients for
    Adaptive Training, arXiv 2605.29494). The cap `max_dampening`, the sample direction and the zero-sum l_inf form are
    ours.

    Args:
        gradient (`torch.Tensor` of shape `[N, C]`): The gradients that the methods before left.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        signs (`torch.Tensor` of shape `[C]`): +1 amplifies a class, -1 dampens it, 0 leaves it alone.
        bounds (`torch.Tensor` of shape `[C]`): Radius `eps >= 0` of each class.
        max_dampening (`float`, *optional*, defaults to 1.0):
            Share of the mean gradient that dampening may remove, in (0, 1]. At 1 a class can be silenced.
        direction (`str`, *optional*, defaults to `"class"`):
            `"class"`: one delta per class in the batch, along its mean gradient. `"sample"`: one per sample, along
            the gradient of the sample.
        norm (`str`, *optional*, defaults to `"l2"`): `"l2"` or `"linf"`.
        solver (`str`, *optional*, defaults to `"closed_form"`):
            `"closed_form"`, or `"pgd"`: projected gradient steps that converge to it.
        pgd_steps (`int`, *optional*, defaults to 40): Number of projected steps.
        pgd_step_size (`float`, *optional*, defaults to 1.0):
            Step size; dampening converges for values in (0, 2).

    Returns:
        `torch.Tensor` of shape `[N, C]`: The delta; zero where the gradient is too small to have a direction.

    Example:

    ```python
    >>> import torch
    >>> from lpg_hf.batch import logit_gradient
    >>> labels = torch.tensor([0, 0])
    >>> gradient = logit_gradient(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), labels)
    >>> delta = lpg_delta(gradient, labels, signs=torch.tensor([1.0, 0.0]), bounds=torch.tensor([0.2, 0.0]))
    >>> delta.norm(dim=-1)
    tensor([0.2000, 0.2000])

    ```
    """
    signs, bounds = signs.to(gradient), bounds.to(gradient)
    if direction == "class":
        segment = class_segments(labels)
        target = segment_means(gradient, segment)
        sign, bound = per_segment(labels, segment, signs, bounds)
    else:
        target = gradient
        sign, bound = per_sample(labels, signs, bounds)

    # A direction needs a length that rounding has not eaten.
    length = target.norm(dim=-1, keepdim=True)
    sign, bound = sign[:, None], bound[:, None] * (length > torch.finfo(gradient.dtype).eps)

    if solver == "pgd":
        delta = _projected_gradient(target, sign, bound, max_dampening, norm, pgd_steps, pgd_step_size)
    elif norm == "l2":
        radius = torch.where(sign > 0, bound, torch.minimum(bound, max_dampening * length))
        factor = sign * radius / length.clamp(min=torch.finfo(gradient.dtype).tiny)
        # The means are new memory, the gradient belongs to the caller.
        in_place = direction == "class" and not target.requires_grad
        delta = target.mul_(factor) if in_place else target * factor
    else:
        delta = torch.where(
            sign > 0, _largest_zero_sum(target, bound), _project_zero_sum_box(-max_dampening * target, bound)
        )
        delta = delta * sign.abs()
    return delta.index_select(0, segment) if direction == "class" else delta


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
            Share of the mean gradient of a class that dampening may remove, in (0, 1].
        direction (`str`, *optional*, defaults to `"class"`): `"class"` (mean gradient of the class) or `"sample"`.
        norm (`str`, *optional*, defaults to `"l2"`): `"l2"` or `"linf"`.
        solver (`str`, *optional*, defaults to `"closed_form"`): `"closed_form"` or `"pgd"`, which converges to it.
        warmup_steps (`int`, *optional*, defaults to 0): Optimizer steps without perturbation at the start.
        signs (`Sequence[int]`, *optional*): For `"fixed"`: +1, -1 or 0 for each class.
        bounds (`Sequence[float]`, *optional*): For `"fixed"`: radius of each class; `epsilon` for all when left out.
        sync (`bool`, *optional*, defaults to `False`):
            Whether class means run over the micro-batches of all processes. With P processes of N samples each step
            then moves P N C numbers and waits for the slowest process. Without it every process uses its own means.

    Raises:
        ValueError: If an argument is out of its range, or `signs` or `bounds` do not fit the strategy or the classes.

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

    @returns_new_memory
    def delta(self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
        signs, bounds = self.signs_and_bounds(statistics)
        labels, own = batch.labels, slice(None)
        if self.sync and self.direction == "class" and is_distributed():
            gradient, labels, own = gather_samples(gradient, labels)
        delta = lpg_delta(gradient, labels, signs, bounds, self.max_dampening, self.direction, self.norm, self.solver)
        return delta[own]


def _largest_zero_sum(target: Tensor, bound: Tensor) -> Tensor:
    """
    Maximizer of `<target, delta>` with `|delta_j| <= bound` and sum zero: +bound on the larger half, - on the other.

    Equal entries share their part, so that the result does not depend on the order of the classes.
    """
    num_classes = target.shape[-1]
    half = num_classes // 2

    def sum_of_signs(count: Tensor) -> Tensor:
        """Over the `count` largest entries."""
        return count.clamp(max=half) - (count - (num_classes - half)).clamp(min=0)

    ordered = target.sort(-1).values
    target = target.contiguous()
    larger = num_classes - torch.searchsorted(ordered, target, right=True, out_int32=True)
    at_least_as_large = num_classes - torch.searchsorted(ordered, target, out_int32=True)
    return bound * (sum_of_signs(at_least_as_large) - sum_of_signs(larger)) / (at_least_as_large - larger)


def _project_zero_sum_box(point: Tensor, bound: Tensor) -> Tensor:
    """Nearest point with `|delta_j| <= bound` and sum zero: `clip(point - nu)`, with nu found by bisection."""
    low = point.min(-1, keepdim=True).values - bound
    high = point.max(-1, keepdim=True).values + bound
    for _ in range(64):
        middle = (low + high) / 2
        too_large = (point - middle).clamp(-bound, bound).sum(-1, keepdim=True) > 0
        low, high = torch.where(too_large, middle, low), torch.where(too_large, high, middle)
    return (point - (low + high) / 2).clamp(-bound, bound)


def _projected_gradient(
    target: Tensor, sign: Tensor, bound: Tensor, max_dampening: float, norm: str, steps: int, step_size: float
) -> Tensor:
    """Projected ascent or descent on `||target + delta||^2 / 2` from zero; dampening aims at its capped target."""
    project = project_l2_ball if norm == "l2" else _project_zero_sum_box
    target = torch.where(sign > 0, target, max_dampening * target)
    delta = torch.zeros_like(target)
    for _ in range(steps):
        delta = project(delta + sign * step_size * (target + delta), bound)
    return delta
