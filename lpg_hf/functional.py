"""Every perturbation as a formula: pure functions from tensors to the delta they add to the logit gradient.

Conventions, the same for all of them:

- `gradient`, `logits`: `[N, C]`, floating point. Gradients are in per-sample units (before any division by the batch
  size), so a cross-entropy gradient has norm at most `sqrt(2)` and a bound means the same at every batch size.
- `labels`: `[N]`, integers in `[0, C)`, or -100 for a sample that is ignored and gets a delta of zero.
- The returned delta has the shape and dtype of the gradient. (`smooth_labels` returns the gradient with its delta,
  which takes a matrix less.) Nothing here synchronises host and device, and nothing needs more memory than a few
  `[N, C]` matrices.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


__all__ = [
    "class_weight",
    "class_weight_delta",
    "clip_delta",
    "clip_weight",
    "dampening_compensation",
    "dampening_gate",
    "focal_delta",
    "focal_weight",
    "gce_delta",
    "gce_weight",
    "label_smoothing_delta",
    "logit_adjustment_delta",
    "logit_gradient",
    "lpg_delta",
    "lpl_delta",
    "noise_delta",
    "relative_dampening_delta",
    "relative_dampening_weight",
    "relative_prior",
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
    return balance_label_entry_(logits.softmax(-1), labels)


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
    signs, bounds = signs.to(gradient), bounds.to(gradient)
    if direction == "class":
        segment = _class_segments(labels)
        target = _segment_means(gradient, segment)
        sign, bound = _per_segment(labels, segment, signs, bounds)
    else:
        target = gradient
        sign, bound = _per_sample(labels, signs, bounds)

    # A direction needs a length that rounding has not eaten.
    length = target.norm(dim=-1, keepdim=True)
    sign, bound = sign[:, None], bound[:, None] * (length > torch.finfo(gradient.dtype).eps)

    if solver == "pgd":
        delta = _projected_gradient(target, sign, bound, max_dampening, norm, pgd_steps, pgd_step_size)
    elif norm == "l2":
        radius = torch.where(sign > 0, bound, torch.minimum(bound, max_dampening * length))
        factor = sign * radius / length.clamp(min=torch.finfo(gradient.dtype).tiny)
        # The means are new memory, the gradient is the caller's.
        is_ours = direction == "class" and not target.requires_grad
        delta = (target.mul_ if is_ours else target.mul)(factor)
    else:
        delta = torch.where(
            sign > 0, _largest_zero_sum(target, bound), _project_zero_sum_box(-max_dampening * target, bound)
        )
        delta = delta * sign.abs()
    return delta.index_select(0, segment) if direction == "class" else delta


def relative_dampening_weight(
    logits: Tensor,
    labels: Tensor,
    own_probability: Tensor,
    relative_confidence: Tensor,
    contradiction: Tensor,
    power: float | Tensor = 2.0,
    learned: tuple[float, float] = (0.1, 0.5),
    contradicted: tuple[float, float] = (0.02, 0.08),
    gate: Tensor | None = None,
    compensated: bool = False,
) -> Tensor:
    r"""
    Weight of each sample under class-relative dampening: `min(1, rho_i / rhobar_c) ^ (power gamma_c)`.

    `rho_i = p_{i,c} / max_j p_ij` says how far the model believes the label of sample i, `rhobar_c` how far it
    believes that class as a whole. `gamma_c` is the product of two gates in [0, 1], see [`dampening_gate`]. A sample
    as good as the mean of its class, and every sample of a class with a closed gate, has weight 1.

    Source: ours.

    Args:
        logits (`torch.Tensor` of shape `[N, C]`): The model's own logits.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        own_probability (`torch.Tensor` of shape `[C]`): Running mean of `p_{i,c}` over the samples of class c.
        relative_confidence (`torch.Tensor` of shape `[C]`): Running mean of `rho_i`.
        contradiction (`torch.Tensor` of shape `[C]`): Running share of samples that the model contradicts.
        power (`float` or scalar `torch.Tensor`, *optional*, defaults to 2.0): Strength of the dampening, at least 0.
        learned (`tuple[float, float]`, *optional*, defaults to `(0.1, 0.5)`): Where the first gate opens and is open.
        contradicted (`tuple[float, float]`, *optional*, defaults to `(0.02, 0.08)`): The same for the second gate.
        gate (`torch.Tensor` of shape `[C]`, *optional*): `gamma_c`, where it is known already.
        compensated (`bool`, *optional*, defaults to `False`): Multiply with [`dampening_compensation`].

    Returns:
        `torch.Tensor` of shape `[N]`: Weights in [0, 1]; compensated, in [0, 2].
    """
    if gate is None:
        gate = dampening_gate(own_probability, contradiction, learned, contradicted)
    classes = labels.clamp(min=0)
    relative = (logits.gather(-1, classes[:, None])[:, 0] - logits.amax(-1)).exp()
    weight = dampening_weight_of_batch(relative, classes, relative_confidence, contradiction, power, gate, compensated)
    return weight.masked_fill(labels < 0, 1.0)


def dampening_weight_of_batch(
    relative: Tensor,
    classes: Tensor,
    relative_confidence: Tensor,
    contradiction: Tensor,
    power: float | Tensor,
    gate: Tensor,
    compensated: bool,
) -> Tensor:
    """
    The [`relative_dampening_weight`] from what is known of a batch: `relative` is `rho_i`, `classes` are the labels,
    both arbitrary for ignored samples, and so is the weight.
    """
    class_confidence = relative_confidence[classes].clamp(min=torch.finfo(relative.dtype).tiny)
    weight = (relative / class_confidence).clamp(max=1) ** (power * gate[classes])
    return weight * dampening_compensation(contradiction, gate)[classes] if compensated else weight


def dampening_gate(
    own_probability: Tensor,
    contradiction: Tensor,
    learned: tuple[float, float] = (0.1, 0.5),
    contradicted: tuple[float, float] = (0.02, 0.08),
) -> Tensor:
    """
    Where class-relative dampening acts, `gamma_c`: on classes that have been learned (the mean own probability rises
    through the interval `learned`) and of which the model confidently contradicts a share (`contradiction` rises
    through `contradicted`).

    Source: ours. The arguments are those of [`relative_dampening_weight`].

    Returns:
        `torch.Tensor` of shape `[C]`: The product of the two gates, in [0, 1].
    """
    return ramp(own_probability, *learned) * ramp(contradiction, *contradicted)


def dampening_compensation(contradiction: Tensor, gate: Tensor) -> Tensor:
    """
    What the weights of a class are multiplied with so that it keeps its share of the gradient under class-relative
    dampening, `1 / max(1 - gamma_c k_c, 1/2)`: what the contradicted share `k_c` loses, the rest of the class gets.

    Source: ours.

    Args:
        contradiction (`torch.Tensor` of shape `[C]`): Running share of samples that the model contradicts, `k_c`.
        gate (`torch.Tensor` of shape `[C]`): How far dampening acts on the class, `gamma_c`.

    Returns:
        `torch.Tensor` of shape `[C]`: Factors in [1, 2]. A class that is contradicted as a whole is left dampened.

    Example:

    ```python
    >>> import torch
    >>> dampening_compensation(torch.tensor([0.0, 0.2, 0.9]), gate=torch.ones(3))
    tensor([1.0000, 1.2500, 2.0000])

    ```
    """
    return (1 - gate * contradiction).clamp(min=0.5).reciprocal()


def relative_dampening_delta(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    own_probability: Tensor,
    relative_confidence: Tensor,
    contradiction: Tensor,
    power: float | Tensor = 2.0,
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
    return _rescale(gradient, weight)


def clip_weight(gradient: Tensor, max_norm: float | Tensor) -> Tensor:
    """The factor `min(1, M/||g_i||)` of [`clip_delta`], of shape `[N]`. The arguments are the same."""
    return (max_norm / gradient.norm(dim=-1)).clamp(max=1)


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
    return _rescale(gradient, clip_weight(gradient, max_norm))


def logit_adjustment_delta(
    logits: Tensor,
    labels: Tensor,
    prior: Tensor,
    tau: float | Tensor = 1.0,
    weight_share: float | Tensor = 0.0,
) -> Tensor:
    r"""
    Logit adjustment, `softmax(z + tau log pi) - softmax(z)`: the tail pulls harder, the head less.

    With a `weight_share` a of `tau` given to weights, `w_y (softmax(z + (1 - a) tau log pi) - onehot(y)) - g` with
    `w_c` proportional to `pi_c^(-a tau)` and 1 on average: whatever a is, the expected gradient is zero at the same
    logits, `log p(y|x) - tau log pi_y`.

    Source: Menon et al., Long-tail learning via logit adjustment (ICLR 2021), who also show what pairs of offsets and
    weights are consistent; at `tau = 1` the balanced softmax of Ren et al. (NeurIPS 2020). A class without samples is
    given the prior of the rarest class that has some (ours: a prior of zero would stop the model from ever learning to
    leave that class out).

    Args:
        logits (`torch.Tensor` of shape `[N, C]`): The model's own logits.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        prior (`torch.Tensor` of shape `[C]`): Share of each class in the training set, not negative.
        tau (`float` or scalar `torch.Tensor`, *optional*, defaults to 1.0): Strength; 0 gives a delta of zero.
        weight_share (`float` or scalar `torch.Tensor`, *optional*, defaults to 0.0):
            Share of `tau` that weights take over from the offsets, in [0, 1].

    Returns:
        `torch.Tensor` of shape `[N, C]`: The delta; rows sum to zero. Where a class is rarer than the largest by more
        than `1e30 ** (1 / tau)` it is that of `1e30 ** (1 / tau)`.
    """
    base, own_probability = logit_gradient(logits, labels), _own_log_probability(logits, labels).exp()
    return adjustment_delta_of_batch(
        base, labels.clamp(min=0), own_probability, prior, -relative_prior(prior).log(), tau, weight_share
    )


def adjustment_delta_of_batch(
    base: Tensor,
    classes: Tensor,
    own_probability: Tensor,
    prior: Tensor,
    log_rarity: Tensor,
    tau: float | Tensor,
    weight_share: float | Tensor,
) -> Tensor:
    """
    The [`logit_adjustment_delta`] from what is known of a batch and a prior: `base` is the [`logit_gradient`],
    `classes` are the labels and `own_probability` is `p_{i,y}`, 0 and 1 for ignored samples (whose gradient is zero),
    and `log_rarity` is minus the logarithm of the [`relative_prior`].
    """
    log_rarity = log_rarity.to(base)
    given_to_weights = tau * weight_share
    # `exp`, since a compiler may repeat it for each sample. The bound keeps the sums below from underflow.
    factors = (log_rarity * (given_to_weights - tau)).exp().clamp(min=1e-30)
    weights = (log_rarity * given_to_weights).exp()
    weights = weights / (weights @ prior.to(base))
    # softmax(z + tau log pi) is proportional to p pi^tau, and off the label the gradient is p.
    index, p = classes[:, None], own_probability[:, None]
    own, adjusted = base.gather(-1, index), (base * factors).scatter_(-1, index, 0.0)
    others = adjusted.sum(-1, keepdim=True)
    # The sum of p is 1 up to rounding, which cancels like this where tau is 0.
    scale = weights[index] * (p - own) / torch.addcmul(others, p, factors[index])
    return adjusted.mul_(scale).scatter_(-1, index, -scale * others).sub_(base)


def relative_prior(prior: Tensor) -> Tensor:
    """
    How frequent each class is beside the largest one; a class without samples counts as the rarest one that has some.

    Args:
        prior (`torch.Tensor` of shape `[C]`): Share of each class in the training set, not negative.

    Returns:
        `torch.Tensor` of shape `[C]`: In (0, 1].

    Example:

    ```python
    >>> import torch
    >>> relative_prior(torch.tensor([0.8, 0.2, 0.0]))
    tensor([1.0000, 0.2500, 0.2500])

    ```
    """
    smallest = torch.where(prior > 0, prior, torch.inf).min()
    return prior.clamp(min=smallest) / prior.max()


def class_weight(labels: Tensor, weights: Tensor) -> Tensor:
    """The factor `w_c` of [`class_weight_delta`], of shape `[N]`; 1 for ignored samples. `weights` is `[C]`."""
    return torch.where(labels >= 0, weights[labels.clamp(min=0)], 1.0)


def class_weight_delta(gradient: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    r"""
    Class weighting, `(w_c - 1) g_i`: what `weight=` does in a summed cross-entropy.

    Args:
        gradient (`torch.Tensor` of shape `[N, C]`): Gradients left by the methods before.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        weights (`torch.Tensor` of shape `[C]`): Weight of each class, not negative.

    Returns:
        `torch.Tensor` of shape `[N, C]`: The delta.

    Example:

    ```python
    >>> import torch
    >>> class_weight_delta(torch.tensor([[0.4, -0.4]]), torch.tensor([1]), torch.tensor([1.0, 3.0]))
    tensor([[ 0.8000, -0.8000]])

    ```
    """
    return _rescale(gradient, class_weight(labels, weights.to(gradient)))


def label_smoothing_delta(gradient: Tensor, labels: Tensor, alpha: float, target: Tensor | None = None) -> Tensor:
    r"""
    Label smoothing, `alpha (onehot(y) - t)` with `t = 1/C` unless said: the constant pull away from the label.

    Source: Szegedy et al., Rethinking the Inception architecture (CVPR 2016); a `target` of class frequencies is the
    unigram smoothing of Pereyra et al., Regularizing neural networks by penalizing confident output distributions
    (2017), a negative `alpha` the negative smoothing of Wei et al., To smooth or not? (ICML 2022).

    Args:
        gradient (`torch.Tensor` of shape `[N, C]`): Only its shape and dtype are used.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        alpha (`float`): Share of the target that is spread, below 1.
        target (`torch.Tensor` of shape `[C]`, *optional*):
            Distribution over which it is spread, with sum 1; uniform if not given.

    Returns:
        `torch.Tensor` of shape `[N, C]`: The delta, of norm `|alpha| ||onehot(y) - t||`; rows sum to zero.

    Example:

    ```python
    >>> import torch
    >>> label_smoothing_delta(torch.zeros(1, 4), torch.tensor([0]), alpha=0.4)
    tensor([[ 0.3000, -0.1000, -0.1000, -0.1000]])

    ```
    """
    share = alpha * (labels >= 0).to(gradient)
    return smooth_labels(torch.zeros_like(gradient), labels.clamp(min=0), share, target)


def smooth_labels(
    gradient: Tensor, classes: Tensor, share: Tensor, target: Tensor | None = None, in_place: bool = False
) -> Tensor:
    """
    A gradient with the [`label_smoothing_delta`], for which no matrix is made: `classes` are the labels and `share` is
    alpha, `[N]`, both 0 for ignored samples.
    """
    share = share[:, None]
    if target is None:
        smoothed = (gradient.sub_ if in_place else gradient.sub)(share / gradient.shape[-1])
    else:
        smoothed = (gradient.addcmul_ if in_place else gradient.addcmul)(share, target.to(gradient), value=-1)
    return smoothed.scatter_add_(-1, classes[:, None], share)


def focal_weight(
    logits: Tensor, labels: Tensor, gamma: float = 2.0, own_log_probability: Tensor | None = None
) -> Tensor:
    """The factor `f` of [`focal_delta`], of shape `[N]`; 1 for ignored samples. The arguments are the same."""
    log_p = _own_log_probability(logits, labels) if own_log_probability is None else own_log_probability
    rest = -torch.expm1(log_p)
    # p log p / (1 - p) tends to -1 as p tends to 1.
    ratio = torch.where(rest > 0, log_p.exp() * log_p / torch.where(rest > 0, rest, 1.0), -1.0)
    return torch.where(labels >= 0, rest**gamma * (1 - gamma * ratio), 1.0)


def focal_delta(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    gamma: float = 2.0,
    own_log_probability: Tensor | None = None,
) -> Tensor:
    r"""
    Focal loss, `(f - 1) g_i` with `f = (1 - p)^gamma - gamma (1 - p)^(gamma - 1) p log p` and `p = p_{i,y}`.

    Source: Lin et al., Focal loss for dense object detection (ICCV 2017); written as a factor on the gradient, ours.

    Args:
        gradient (`torch.Tensor` of shape `[N, C]`): Gradients left by the methods before.
        logits (`torch.Tensor` of shape `[N, C]`): The model's own logits.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        gamma (`float`, *optional*, defaults to 2.0): How fast well-fitted samples fade, at least 0.
        own_log_probability (`torch.Tensor` of shape `[N]`, *optional*): `log p_{i,y}`, where it is known already.

    Returns:
        `torch.Tensor` of shape `[N, C]`: The delta. The factor can exceed 1 (it is at most `1 + gamma`).
    """
    return _rescale(gradient, focal_weight(logits, labels, gamma, own_log_probability))


def gce_weight(logits: Tensor, labels: Tensor, q: float = 0.7, own_log_probability: Tensor | None = None) -> Tensor:
    """The factor `p^q` of [`gce_delta`], of shape `[N]`; 1 for ignored samples. The arguments are the same."""
    log_p = _own_log_probability(logits, labels) if own_log_probability is None else own_log_probability
    return torch.where(labels >= 0, (q * log_p).exp(), 1.0)


def gce_delta(
    gradient: Tensor, logits: Tensor, labels: Tensor, q: float = 0.7, own_log_probability: Tensor | None = None
) -> Tensor:
    r"""
    Generalized cross-entropy, `(p^q - 1) g_i` with `p = p_{i,y}`: what the model does not believe pulls less.

    Source: Zhang and Sabuncu, Generalized cross entropy loss for training deep neural networks with noisy labels
    (NeurIPS 2018), whose loss is `(1 - p^q) / q`.

    Args:
        gradient (`torch.Tensor` of shape `[N, C]`): Gradients left by the methods before.
        logits (`torch.Tensor` of shape `[N, C]`): The model's own logits.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        q (`float`, *optional*, defaults to 0.7): 0 is cross-entropy, 1 the mean absolute error; in [0, 1].
        own_log_probability (`torch.Tensor` of shape `[N]`, *optional*): `log p_{i,y}`, where it is known already.

    Returns:
        `torch.Tensor` of shape `[N, C]`: The delta.
    """
    return _rescale(gradient, gce_weight(logits, labels, q, own_log_probability))


def noise_delta(noise: Tensor, labels: Tensor, sigma: float) -> Tensor:
    r"""
    Logit-gradient noise, `sigma` times standard Gaussian noise, projected on the plane of rows that sum to zero.

    Source: ours, after Neelakantan et al., Adding gradient noise improves learning for very deep networks (2015), who
    add it to the parameters' gradient.

    Args:
        noise (`torch.Tensor` of shape `[N, C]`): Independent draws from N(0, 1).
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        sigma (`float`): Standard deviation before the projection, at least 0.

    Returns:
        `torch.Tensor` of shape `[N, C]`: The delta; its squared norm has mean `(C - 1) sigma^2`.
    """
    return zero_ignored_((noise - noise.mean(-1, keepdim=True)).mul_(sigma), labels)


def lpl_delta(
    logits: Tensor,
    labels: Tensor,
    signs: Tensor,
    bounds: Tensor,
    steps: int = 5,
    step_share: float = 0.5,
    base_gradient: Tensor | None = None,
) -> Tensor:
    r"""
    Logit perturbation (LPL), `softmax(z_i + d_c) - softmax(z_i)`: one `d_c` per class that raises or lowers its loss.

    `d_c` starts at zero and takes `steps` projected steps of length `step_share * bound` along the class's mean logit
    gradient at `z + d_c`, uphill for `sign = +1` and downhill for -1, inside the l2 ball of radius `bound`.

    Source: Li et al., Logit perturbation (AAAI 2022); the ball, the normalised step and its length are ours.

    Args:
        logits (`torch.Tensor` of shape `[N, C]`): The model's own logits.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        signs (`torch.Tensor` of shape `[C]`): +1 amplifies a class, -1 dampens it, 0 leaves it alone.
        bounds (`torch.Tensor` of shape `[C]`): Radius of each class's `d_c`, at least 0, in logits.
        steps (`int`, *optional*, defaults to 5): Number of projected steps.
        step_share (`float`, *optional*, defaults to 0.5): Length of a step as a share of the radius.
        base_gradient (`torch.Tensor` of shape `[N, C]`, *optional*):
            The [`logit_gradient`] of the same logits and labels, where it is known already.

    Returns:
        `torch.Tensor` of shape `[N, C]`: The delta, of norm at most `bound / 2`; rows sum to zero.
    """
    segment = _class_segments(labels)
    sign, bound = (row[:, None] for row in _per_segment(labels, segment, signs.to(logits), bounds.to(logits)))
    base = logit_gradient(logits, labels) if base_gradient is None else base_gradient
    gradient, shift = base, torch.zeros_like(logits)
    for _ in range(steps):
        mean = _segment_means(gradient, segment)
        length = mean.norm(dim=-1, keepdim=True)
        has_direction = length > torch.finfo(logits.dtype).eps
        step = torch.where(has_direction, sign * step_share * bound / torch.where(has_direction, length, 1.0), 0.0)
        shift = _project_l2_ball(mean.mul_(step).add_(shift), bound)
        gradient = logit_gradient(shift.index_select(0, segment).add_(logits), labels)
    # Off the label, the two gradients are softmax(z + d) and softmax(z).
    return balance_label_entry_(gradient - base, labels)


def _rescale(gradient: Tensor, weight: Tensor) -> Tensor:
    """What a weight per sample changes: `(weight - 1) gradient`."""
    return (weight - 1)[:, None] * gradient


def _own_log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """`log p_{i,y}`, `[N]`; 0 for ignored samples."""
    own = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return own.masked_fill(labels < 0, 0.0)


def balance_label_entry_(matrix: Tensor, labels: Tensor) -> Tensor:
    """Sets each row's entry of the label to minus the sum of the others, in place; ignored samples' rows to zero."""
    return zero_ignored_(balance_entry_(matrix, labels.clamp(min=0)), labels)


def balance_entry_(matrix: Tensor, classes: Tensor) -> Tensor:
    """Sets one entry of each row, in place, to minus the sum of the others."""
    index = classes[:, None]
    matrix.scatter_(-1, index, 0.0)
    return matrix.scatter_(-1, index, -matrix.sum(-1, keepdim=True))


def zero_ignored_(matrix: Tensor, labels: Tensor, bits: Tensor | None = None) -> Tensor:
    """
    Sets the rows of ignored samples to zero in place, whatever is in them: NaN and infinity, too. `bits` are the
    [`labelled_bits`], where they are known already.
    """
    if torch.compiler.is_compiling():
        return matrix.masked_fill_((labels < 0)[:, None], 0.0)
    # By the bits: on the CPU four times as fast as `masked_fill_` with a mask of one entry per row.
    bits = labelled_bits(matrix, labels >= 0) if bits is None else bits
    matrix.view(bits.dtype).bitwise_and_(bits)
    return matrix


def labelled_bits(matrix: Tensor, labelled: Tensor) -> Tensor:
    """All bits set for the samples that are `labelled`, and none for the others, `[N, 1]`, as wide as the matrix's."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[matrix.element_size()]
    return -labelled.to(integer)[:, None]


def ramp(value: Tensor, start: float, end: float) -> Tensor:
    """0 up to `start`, 1 from `end` on, linear between."""
    return ((value - start) / (end - start)).clamp(0, 1)


def _class_segments(labels: Tensor) -> Tensor:
    """Numbers the classes present 0, 1, ... and returns each sample's number: `unique` without a synchronisation."""
    ordered, order = labels.sort()
    starts_class = F.pad(ordered[1:] != ordered[:-1], (1, 0))
    return torch.zeros_like(labels).scatter_(0, order, starts_class.cumsum(0))


def _per_sample(labels: Tensor, *values: Tensor) -> list[Tensor]:
    """The value of each sample's class, `[N]`; 0 for ignored samples."""
    return [torch.where(labels >= 0, value[labels.clamp(min=0)], 0.0) for value in values]


def _per_segment(labels: Tensor, segment: Tensor, *values: Tensor) -> list[Tensor]:
    """The value of segment s's class in entry s, `[N]`."""
    return [torch.zeros_like(value).scatter_(0, segment, value) for value in _per_sample(labels, *values)]


def _segment_means(gradient: Tensor, segment: Tensor) -> Tensor:
    """Mean gradient of segment s in row s, `[N, C]`: a batch of N has at most N classes, whatever C is."""
    sums = torch.zeros_like(gradient).index_add_(0, segment, gradient)
    sizes = torch.zeros_like(gradient[:, 0]).index_add_(0, segment, torch.ones_like(gradient[:, 0]))
    return sums.div_(sizes.clamp(min=1)[:, None])


def _largest_zero_sum(target: Tensor, bound: Tensor) -> Tensor:
    """
    Maximiser of `<target, delta>` with `|delta_j| <= bound` and sum zero: +bound on the larger half, - on the other.

    Equal entries share what falls to them, so that the result does not depend on the order of the classes.
    """
    num_classes = target.shape[-1]
    half = num_classes // 2

    def sum_of_signs(count: Tensor) -> Tensor:
        """Of the `count` largest entries."""
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
