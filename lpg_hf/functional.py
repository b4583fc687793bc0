"""Every perturbation as a formula: pure functions from tensors to the delta they add to the logit gradient.

Conventions, the same for all of them:

- `gradient`, `logits`: `[N, C]`, floating point. Gradients are in per-sample units (before any division by the batch
  size), so a cross-entropy gradient has norm at most `sqrt(2)` and a bound means the same at every batch size.
- `labels`: `[N]`, integers in `[0, C)`, or -100 for a sample that is ignored and gets a delta of zero.
- The returned delta has the shape and dtype of the gradient. Nothing here synchronises host and device, and nothing
  needs more memory than a few `[N, C]` matrices.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


__all__ = [
    "clip_delta",
    "logit_adjustment_delta",
    "logit_gradient",
    "lpg_delta",
    "relative_dampening_delta",
    "relative_dampening_weight",
]


def logit_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    r"""
    Gradient of the summed cross-entropy at the logits, `softmax(z) - onehot(y)`.

    The entry of the label is computed as minus the sum of the others: `p_y - 1` would lose it as soon as `p_y` rounds
    to 1 (a margin of 17 in float32), and with it the direction of the gradient.

    Args:
        logits (`torch.Tensor` of shape `[N, C]`): The model's logits.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.

    Returns:
        `torch.Tensor` of shape `[N, C]`: One gradient per sample; rows sum to zero.

    Example:

    ```python
    >>> import torch
    >>> logit_gradient(torch.zeros(1, 4), torch.tensor([2]))
    tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]])

    ```
    """
    return _balance_label_entry(logits.softmax(-1), labels)


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
    `-min(eps, kappa ||m||) m/||m||` with `kappa = max_dampening`. In l_inf the delta is also held to sum zero (an
    unconstrained one would carry no information from the gradients: it is constant for hard labels).

    Source: the class-wise perturbation is the paper's (Gradient Perturbation: Learning to Perturb Gradients for
    Adaptive Training, arXiv 2605.29494), the cap `max_dampening`, the sample direction and the zero-sum l_inf form are
    ours.

    Args:
        gradient (`torch.Tensor` of shape `[N, C]`): Gradients left by the methods before.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        signs (`torch.Tensor` of shape `[C]`): +1 amplifies a class, -1 dampens it, 0 leaves it alone.
        bounds (`torch.Tensor` of shape `[C]`): Radius `eps >= 0` of each class.
        max_dampening (`float`, *optional*, defaults to 1.0):
            Share of the mean gradient that dampening may remove, in (0, 1]; at 1 a class can be silenced.
        direction (`str`, *optional*, defaults to `"class"`):
            `"class"`: one delta per class present in the batch, along its mean gradient; `"sample"`: one per sample,
            along its own.
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
    >>> labels = torch.tensor([0, 0])
    >>> gradient = logit_gradient(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), labels)
    >>> delta = lpg_delta(gradient, labels, signs=torch.tensor([1.0, 0.0]), bounds=torch.tensor([0.2, 0.0]))
    >>> delta.norm(dim=-1)
    tensor([0.2000, 0.2000])

    ```
    """
    labelled = labels >= 0
    classes = labels.clamp(min=0)
    sign = signs[classes] * labelled
    bound = bounds[classes] * labelled

    if direction == "class":
        segment = _class_segments(labels)
        target = _segment_means(gradient, segment)
        sign = torch.zeros_like(sign).scatter_(0, segment, sign)
        bound = torch.zeros_like(bound).scatter_(0, segment, bound)
    else:
        target = gradient

    # A direction needs a length that rounding has not eaten.
    length = target.norm(dim=-1, keepdim=True)
    sign, bound = sign[:, None], bound[:, None] * (length > torch.finfo(gradient.dtype).eps)

    if solver == "pgd":
        delta = _projected_gradient(target, sign, bound, max_dampening, norm, pgd_steps, pgd_step_size)
    elif norm == "l2":
        radius = torch.where(sign > 0, bound, torch.minimum(bound, max_dampening * length))
        delta = sign * radius * target / length.clamp(min=torch.finfo(gradient.dtype).tiny)
    else:
        delta = torch.where(
            sign > 0, _largest_zero_sum(target, bound), _project_zero_sum_box(-max_dampening * target, bound)
        )
        delta = delta * sign.abs()
    return delta[segment] if direction == "class" else delta


def relative_dampening_weight(
    logits: Tensor,
    labels: Tensor,
    own_probability: Tensor,
    relative_confidence: Tensor,
    contradiction: Tensor,
    power: float = 2.0,
    learned: tuple[float, float] = (0.1, 0.5),
    contradicted: tuple[float, float] = (0.02, 0.08),
) -> Tensor:
    r"""
    Weight of each sample under class-relative dampening: `min(1, rho_i / rhobar_c) ^ (power gamma_c)`.

    `rho_i = p_{i,c} / max_j p_ij` says how far the model believes the label of sample i, `rhobar_c` how far it
    believes that class as a whole. `gamma_c` is the product of two gates in [0, 1]: the class has been learned (its
    mean own probability rises through the interval `learned`) and the model confidently contradicts a share of it
    (`contradiction` rises through `contradicted`). A sample as good as the mean of its class, and every sample of a
    class with a closed gate, has weight 1.

    Source: ours.

    Args:
        logits (`torch.Tensor` of shape `[N, C]`): The model's own logits.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        own_probability (`torch.Tensor` of shape `[C]`): Running mean of `p_{i,c}` over the samples of class c.
        relative_confidence (`torch.Tensor` of shape `[C]`): Running mean of `rho_i`.
        contradiction (`torch.Tensor` of shape `[C]`): Running share of samples that the model contradicts.
        power (`float`, *optional*, defaults to 2.0): Strength of the dampening, at least 0.
        learned (`tuple[float, float]`, *optional*, defaults to `(0.1, 0.5)`): Where the first gate opens and is open.
        contradicted (`tuple[float, float]`, *optional*, defaults to `(0.02, 0.08)`): The same for the second gate.

    Returns:
        `torch.Tensor` of shape `[N]`: Weights in [0, 1].
    """
    gate = _ramp(own_probability, *learned) * _ramp(contradiction, *contradicted)
    classes = labels.clamp(min=0)
    confidence = _relative_confidence(logits, classes)
    class_confidence = relative_confidence[classes].clamp(min=torch.finfo(logits.dtype).tiny)
    weight = (confidence / class_confidence).clamp(max=1) ** (power * gate[classes])
    return torch.where(labels >= 0, weight, 1.0)


def relative_dampening_delta(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    own_probability: Tensor,
    relative_confidence: Tensor,
    contradiction: Tensor,
    power: float = 2.0,
    learned: tuple[float, float] = (0.1, 0.5),
    contradicted: tuple[float, float] = (0.02, 0.08),
) -> Tensor:
    """
    Class-relative dampening, `(w_i - 1) g_i` with the weights of [`relative_dampening_weight`].

    Source: ours. The arguments are those of [`relative_dampening_weight`], after the `gradient` `[N, C]`.

    Returns:
        `torch.Tensor` of shape `[N, C]`: The delta, of norm at most `(1 - w_i) ||g_i||`.
    """
    weight = relative_dampening_weight(
        logits, labels, own_probability, relative_confidence, contradiction, power, learned, contradicted
    )
    return (weight - 1)[:, None] * gradient


def clip_delta(gradient: Tensor, max_norm: float | Tensor) -> Tensor:
    r"""
    Logit-gradient clipping, `(min(1, M/||g_i||) - 1) g_i`: no sample pulls harder than `M`.

    Source: the rule is that of Menon et al., Can gradient clipping mitigate label noise? (ICLR 2020), at the logits.

    Args:
        gradient (`torch.Tensor` of shape `[N, C]`): Gradients left by the methods before.
        max_norm (`float` or `torch.Tensor` of shape `[N]`): The largest l2 norm M of a sample's gradient.

    Returns:
        `torch.Tensor` of shape `[N, C]`: The delta, of norm `max(||g_i|| - M, 0)`.

    Example:

    ```python
    >>> import torch
    >>> gradient = torch.tensor([[3.0, -3.0], [0.1, -0.1]])
    >>> (gradient + clip_delta(gradient, 0.5)).norm(dim=-1)
    tensor([0.5000, 0.1414])

    ```
    """
    length = gradient.norm(dim=-1)
    return ((max_norm / length).clamp(max=1) - 1)[:, None] * gradient


def logit_adjustment_delta(logits: Tensor, labels: Tensor, prior: Tensor, tau: float | Tensor = 1.0) -> Tensor:
    r"""
    Logit adjustment, `softmax(z + tau log pi) - softmax(z)`: the tail pulls harder, the head less.

    Source: Menon et al., Long-tail learning via logit adjustment (ICLR 2021); at `tau = 1` the balanced softmax of
    Ren et al. (NeurIPS 2020). A class without samples is given the prior of the rarest class that has some (ours: a
    prior of zero would stop the model from ever learning to leave that class out).

    Args:
        logits (`torch.Tensor` of shape `[N, C]`): The model's own logits.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        prior (`torch.Tensor` of shape `[C]`): Share of each class in the training set, not negative.
        tau (`float` or scalar `torch.Tensor`, *optional*, defaults to 1.0): Strength; 0 gives a delta of zero.

    Returns:
        `torch.Tensor` of shape `[N, C]`: The delta; rows sum to zero.
    """
    present = torch.where(prior > 0, prior, torch.inf)
    offset = tau * torch.where(prior > 0, prior, present.min()).log()
    return _balance_label_entry((logits + offset).softmax(-1) - logits.softmax(-1), labels)


def _balance_label_entry(matrix: Tensor, labels: Tensor) -> Tensor:
    """Sets each row's entry of the label to minus the sum of the others; rows of ignored samples become zero."""
    index = labels.clamp(min=0)[:, None]
    matrix = matrix.scatter(-1, index, 0.0)
    matrix = matrix.scatter(-1, index, -matrix.sum(-1, keepdim=True))
    return torch.where(labels[:, None] >= 0, matrix, 0.0)


def _relative_confidence(logits: Tensor, classes: Tensor) -> Tensor:
    """`p_c / max_j p_j` of each sample, `[N]`."""
    own = logits.gather(-1, classes[:, None])[:, 0]
    return (own - logits.max(-1).values).exp()


def _ramp(value: Tensor, start: float, end: float) -> Tensor:
    """0 up to `start`, 1 from `end` on, linear between."""
    return ((value - start) / (end - start)).clamp(0, 1)


def _class_segments(labels: Tensor) -> Tensor:
    """Numbers the classes present 0, 1, ... and returns each sample's number: `unique` without a synchronisation."""
    ordered, order = labels.sort()
    starts_class = F.pad(ordered[1:] != ordered[:-1], (1, 0))
    return torch.zeros_like(labels).scatter_(0, order, starts_class.cumsum(0))


def _segment_means(gradient: Tensor, segment: Tensor) -> Tensor:
    """Mean gradient of segment s in row s, `[N, C]`: a batch of N has at most N classes, whatever C is."""
    sums = torch.zeros_like(gradient).index_add_(0, segment, gradient)
    sizes = torch.zeros_like(gradient[:, 0]).index_add_(0, segment, torch.ones_like(gradient[:, 0]))
    return sums / sizes.clamp(min=1)[:, None]


def _largest_zero_sum(target: Tensor, bound: Tensor) -> Tensor:
    """Maximiser of `<target, delta>` with `|delta_j| <= bound` and sum zero: +bound on the larger half."""
    num_classes = target.shape[-1]
    rank = target.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    half = num_classes // 2
    return bound * ((rank < half).to(target.dtype) - (rank >= num_classes - half).to(target.dtype))


def _project_zero_sum_box(point: Tensor, bound: Tensor) -> Tensor:
    """Nearest point with `|delta_j| <= bound` and sum zero: `clip(point - nu)`, with nu found by bisection."""
    low = point.min(-1, keepdim=True).values - bound
    high = point.max(-1, keepdim=True).values + bound
    for _ in range(64):
        middle = (low + high) / 2
        too_large = (point - middle).clamp(-bound, bound).sum(-1, keepdim=True) > 0
        low, high = torch.where(too_large, middle, low), torch.where(too_large, high, middle)
    return (point - (low + high) / 2).clamp(-bound, bound)


def _project_l2_ball(point: Tensor, bound: Tensor) -> Tensor:
    return point * (bound / point.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(point.dtype).tiny)).clamp(max=1)


def _projected_gradient(
    target: Tensor, sign: Tensor, bound: Tensor, max_dampening: float, norm: str, steps: int, step_size: float
) -> Tensor:
    """Projected ascent or descent on `||target + delta||^2 / 2` from zero; dampening aims at its capped target."""
    project = _project_l2_ball if norm == "l2" else _project_zero_sum_box
    target = torch.where(sign > 0, target, max_dampening * target)
    delta = torch.zeros_like(target)
    for _ in range(steps):
        delta = project(delta + sign * step_size * (target + delta), bound)
    return delta
