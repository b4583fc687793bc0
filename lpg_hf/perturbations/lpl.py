"""LPL: class-level perturbations of the logits, found by projected gradient steps on the loss."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import LogitBatch, balance_label_entry_, logit_gradient, zero_ignored_
from ..statistics import ClassStatistics
from .checks import check_count
from .ops import class_segments, per_segment, project_l2_ball, segment_means
from .strategy import ClassLevelPerturbation


def lpl_delta(batch: LogitBatch, signs: Tensor, bounds: Tensor, steps: int = 5, step_share: float = 0.5) -> Tensor:
    r"""
    Logit perturbation (LPL), `softmax(z_i + d_c) - softmax(z_i)`: one `d_c` per class that raises or lowers its loss.

    `d_c` starts at zero and takes `steps` projected steps of length `step_share * bound` along the mean logit gradient
    of the class at `z + d_c`, uphill for `sign = +1` and downhill for -1, inside the l2 ball of radius `bound`.

    Source: Li et al., Logit perturbation (AAAI 2022). The ball, the normalized step and its length are ours.

    Args:
        batch ([`LogitBatch`]): The micro-batch.
        signs (`torch.Tensor` of shape `[C]`): +1 amplifies a class, -1 dampens it, 0 leaves it alone.
        bounds (`torch.Tensor` of shape `[C]`): Radius of the `d_c` of each class, at least 0, in logits.
        steps (`int`, *optional*, defaults to 5): Number of projected steps.
        step_share (`float`, *optional*, defaults to 0.5): Length of a step as a share of the radius.

    Returns:
        `torch.Tensor` of shape `[N, C]`: The delta, of norm at most `bound / 2`; rows sum to zero.
    """
    logits, labels = batch.logits, batch.labels
    segment = class_segments(labels)
    sign, bound = (row[:, None] for row in per_segment(labels, segment, signs.to(logits), bounds.to(logits)))
    gradient, shift = batch.gradient, torch.zeros_like(logits)
    for _ in range(steps):
        mean = segment_means(gradient, segment)
        length = mean.norm(dim=-1, keepdim=True)
        has_direction = length > torch.finfo(logits.dtype).eps
        step = torch.where(has_direction, sign * step_share * bound / torch.where(has_direction, length, 1.0), 0.0)
        shift = project_l2_ball(mean.mul_(step).add_(shift), bound)
        gradient = logit_gradient(shift.index_select(0, segment).add_(logits), labels)
    # Off the label, the two gradients are softmax(z + d) and softmax(z).
    delta = gradient - batch.gradient
    balance_label_entry_(delta, batch.classes[:, None])
    return zero_ignored_(delta, labels, batch.valid_mask)


class LPL(ClassLevelPerturbation):
    r"""
    Logit perturbation: a shift of the logits per class raises the loss of some classes and lowers it for others.

    The strategy gives every class a sign and a radius, see [`ClassLevelPerturbation`].

    Level: class.
    Formula: `delta = softmax(z + d_c) - softmax(z)`, `d_c` from projected steps on the loss of class c, max or min.
    Helps: long tails (the tail is amplified); it switches itself off on well-fitted samples, where LPG does not.
    Hurts: label noise, which amplification amplifies.
    Cost: O(k NC), k steps with a softmax each.
    Source: Li et al., Logit perturbation (AAAI 2022); the ball and the normalized step are ours.

    Args:
        strategy (`str`, *optional*, defaults to `"frequency"`): `"frequency"`, `"accuracy"` or `"fixed"`.
        epsilon (`float`, *optional*, defaults to 1.0): Largest radius of a `d_c`, at least 0, in logits.
        steps (`int`, *optional*, defaults to 5): Number of projected steps, at least 1.
        warmup_steps (`int`, *optional*, defaults to 0): Optimizer steps without perturbation at the start.
        signs (`Sequence[int]`, *optional*): For `"fixed"`: +1, -1 or 0 for each class.
        bounds (`Sequence[float]`, *optional*): For `"fixed"`: radius of each class; `epsilon` for all when left out.

    Raises:
        ValueError: If an argument is out of its range, or `signs` or `bounds` do not fit the strategy or the classes.

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

    def delta(self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
        signs, bounds = self.signs_and_bounds(statistics)
        return lpl_delta(batch, signs, bounds, self.steps)
