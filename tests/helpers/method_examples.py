"""
The table that drives the shared tests: one entry for every method of the registry.

A new method needs its file, its line in `registry.py` and its entry here. Then it is tested by
`perturbations/test_every_method.py` and `test_registry.py` (shapes, dtypes, ignored samples, bounds, chains, `repr`),
`test_methods_in_training.py` (resuming, accumulation, bfloat16), `test_overhead.py` and `test_precision.py`.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lpg_hf.batch import LogitBatch
from lpg_hf.perturbations import (
    LPG,
    LPL,
    METHODS,
    SAM,
    ClassRelativeDampening,
    ClassWeighting,
    FocalLoss,
    GeneralizedCrossEntropy,
    GradientClipping,
    GradientNoise,
    LabelSmoothing,
    LogitAdjustment,
    LogitClipping,
    LogitNoise,
    LogitPerturbation,
    Perturbation,
)
from lpg_hf.statistics import ClassStatistics


#: Method, batch and statistics to the largest norm that the delta of each sample may have, `[N]` or a number, if the
#: method comes first in its chain.
Bound = Callable[[LogitPerturbation, LogitBatch, ClassStatistics], Tensor | float]


@dataclasses.dataclass
class MethodExamples:
    """
    Args:
        variants: For C classes, methods that have every argument off its default in at least one of them.
        training:
            Texts with which the method does something within a few steps of a tiny training (dampening in its second
            epoch), and with which it has all the state that it can have. The first one is trained in more settings
            than the others.
        idle_at_first: Those of them that need a statistic or a bound and leave the first step alone.
        bound: The bound on the deltas, for methods at the logits.
    """

    variants: Callable[[int], list[Perturbation]]
    training: list[str]
    idle_at_first: tuple[str, ...] = ()
    bound: Bound | None = None


def signs(num_classes: int) -> list[int]:
    return ([1, 0, -1, 1, -1] * num_classes)[:num_classes]


def radii(num_classes: int) -> list[float]:
    return [0.1 * (1 + c % 5) for c in range(num_classes)]


def norm_of_gradient(batch: LogitBatch) -> Tensor:
    return batch.gradient.norm(dim=-1)


def lpg_bound(method: LPG, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
    _, bounds = method.signs_and_bounds(statistics)
    return bounds[batch.classes] * (math.sqrt(batch.logits.shape[1]) if method.norm == "linf" else 1.0)


def logit_adjustment_bound(method: LogitAdjustment, batch: LogitBatch, statistics: ClassStatistics) -> float:
    offset = method.log_correction(statistics)
    ratio = (offset.max() - offset.min()).exp().item()
    # Weights lie between 1 / ratio and ratio, and both gradients have one negative entry, that of the label.
    return math.sqrt(2) * (math.tanh(math.log(ratio) / 4) if method.learned is None else ratio)


def clipping_bound(method: LogitClipping, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
    largest = (method.max_norm or 0.3) if method.quantile is None else method.bounds[batch.classes]
    return (norm_of_gradient(batch) - largest).clamp(min=0)


def label_smoothing_bound(method: LabelSmoothing, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
    num_classes = batch.logits.shape[1]
    target = statistics.prior if method.target == "prior" else torch.full((num_classes,), 1 / num_classes)
    return abs(method.alpha) * (torch.eye(num_classes).to(target) - target).norm(dim=-1)[batch.classes]


def class_weighting_bound(method: ClassWeighting, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
    weights = method.class_weights(statistics)[batch.classes]
    return math.sqrt(2) * (weights - 1).abs() * (1 - batch.label_prob)


TABLE = {
    "lpg": MethodExamples(
        variants=lambda n: [
            LPG("fixed", 0.3, 0.25, "sample", "linf", "closed_form", 3, signs=signs(n), bounds=radii(n), sync=True),
            LPG("fixed", signs=signs(n)),
            LPG("accuracy"),
            *(LPG(direction=direction, norm=norm) for direction in ("class", "sample") for norm in ("l2", "linf")),
            LPG(solver="pgd", warmup_steps=1),
        ],
        training=["lpg(epsilon=0.4)", "lpg(epsilon=0.4, direction='sample', norm='linf')"],
        bound=lpg_bound,
    ),
    "class_relative_dampening": MethodExamples(
        variants=lambda n: [
            ClassRelativeDampening(power=1.5, learned=(0.2, 0.6), evidence=(0.01, 0.5)),
        ],
        # A higher power would multiply the rounding of bfloat16.
        training=["class_relative_dampening(power=1.0, learned=(0.0, 0.01), evidence=(0.0, 0.001))"],
        idle_at_first=("class_relative_dampening(power=1.0, learned=(0.0, 0.01), evidence=(0.0, 0.001))",),
        # Weights lie in [0, 2].
        bound=lambda method, batch, statistics: norm_of_gradient(batch),
    ),
    "lpl": MethodExamples(
        variants=lambda n: [LPL("fixed", 0.5, steps=3, warmup_steps=2, signs=signs(n), bounds=radii(n))],
        training=["lpl(epsilon=2.0, steps=3)"],
        bound=lambda method, batch, statistics: method.signs_and_bounds(statistics)[1][batch.classes] / 2,
    ),
    "logit_clipping": MethodExamples(
        variants=lambda n: [LogitClipping(max_norm=0.7), LogitClipping(quantile=0.9)],
        training=["logit_clipping(quantile=0.2)", "logit_clipping(max_norm=0.5)"],
        idle_at_first=("logit_clipping(quantile=0.2)",),
        bound=clipping_bound,
    ),
    "logit_noise": MethodExamples(
        variants=lambda n: [LogitNoise(sigma=0.3, seed=4)],
        training=["logit_noise(sigma=0.3, seed=4)"],
        # The chance that a norm is larger is below exp(-50).
        bound=lambda method, batch, statistics: method.sigma * (math.sqrt(batch.logits.shape[1]) + 10),
    ),
    "label_smoothing": MethodExamples(
        variants=lambda n: [LabelSmoothing(alpha=0.3, target="prior"), LabelSmoothing(-0.2)],
        training=["label_smoothing(alpha=0.3)"],
        bound=label_smoothing_bound,
    ),
    "class_weighting": MethodExamples(
        variants=lambda n: [
            ClassWeighting([0.5, 1.0, 2.0, 0.0, 3.0] + [2.0] * (n - 5), beta=0.9),
            ClassWeighting("effective", beta=0.9),
        ],
        training=["class_weighting(weights='effective', beta=0.9)", "class_weighting(weights={0: 0.25})"],
        bound=class_weighting_bound,
    ),
    "logit_adjustment": MethodExamples(
        variants=lambda n: [
            LogitAdjustment(tau=0.5, learned=(0.1, 0.9)),
            LogitAdjustment(tau=0.5, target="evaluation"),
            LogitAdjustment(0.5),
        ],
        training=["logit_adjustment(tau=1.5)"],
        bound=logit_adjustment_bound,
    ),
    "focal_loss": MethodExamples(
        variants=lambda n: [FocalLoss(gamma=1.5)],
        training=["focal_loss(gamma=1.5)"],
        bound=lambda method, batch, statistics: math.sqrt(2) * max(1, method.gamma),
    ),
    "generalized_cross_entropy": MethodExamples(
        variants=lambda n: [GeneralizedCrossEntropy(q=0.4)],
        training=["generalized_cross_entropy(q=0.5)"],
        bound=lambda method, batch, statistics: (
            math.sqrt(2) * (1 - batch.label_prob**method.q) * (1 - batch.label_prob)
        ),
    ),
    "sam": MethodExamples(
        variants=lambda n: [SAM(rho=0.2, adaptive=True, interval=3)],
        training=["sam(rho=0.02)", "sam(rho=0.1, adaptive=True)"],
    ),
    "gradient_clipping": MethodExamples(
        variants=lambda n: [
            GradientClipping(max_norm=0.5),
            GradientClipping(max_value=0.5),
            GradientClipping(percentile=20),
        ],
        training=[
            "gradient_clipping(percentile=10)",
            "gradient_clipping(max_norm=0.2)",
            "gradient_clipping(max_value=0.5)",
        ],
        idle_at_first=("gradient_clipping(percentile=10)",),
    ),
    "gradient_noise": MethodExamples(
        variants=lambda n: [GradientNoise(eta=0.1, gamma=0.6, seed=5)],
        training=["gradient_noise(eta=0.02, gamma=1.0, seed=4)"],
    ),
}

#: By name, with their defaults.
LOGIT_METHODS = [name for name, method in METHODS.items() if issubclass(method, LogitPerturbation)]
#: The first of each method is trained in more settings than the others.
FIRST_IN_TRAINING = [examples.training[0] for examples in TABLE.values()]
ALL_IN_TRAINING = [text for examples in TABLE.values() for text in examples.training]
IDLE_AT_FIRST = {text for examples in TABLE.values() for text in examples.idle_at_first}


def variants(num_classes: int = 5) -> list[Perturbation]:
    """Every method with every argument off its default in one of them; at least five classes."""
    return [method for examples in TABLE.values() for method in examples.variants(num_classes)]


def logit_variants(num_classes: int = 5) -> list[LogitPerturbation]:
    """Those of [`variants`] that act at the logits."""
    return [method for method in variants(num_classes) if isinstance(method, LogitPerturbation)]
