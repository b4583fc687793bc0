"""
Draws what every method does to the gradient: the field of `-g` and of `-(g + delta)` on the simplex of three classes.

    python examples/gradient_field.py --output_file gradient_field.png

Each point is a prediction `p` for a sample of class 1 (the lower left corner); its arrow is the direction in which
the sample pulls its logits. All points together are one batch of that class, which is what class-level methods look
at. The methods for parameters are shown where the logits of a sample are the parameters.
"""

from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor
from transformers import HfArgumentParser

from lpg_hf.batch import LogitBatch, logit_gradient
from lpg_hf.perturbations import (
    LPG,
    LPL,
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
from lpg_hf.perturbations import METHODS as REGISTRY
from lpg_hf.statistics import ClassStatistics


# The corners of the simplex: class 1 (the label) lower left, class 2 lower right, class 3 on top.
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])
COUNTS = [700, 250, 50]
FIXED = {"strategy": "fixed", "signs": [-1, 0, 0]}

METHODS: list[tuple[str, Perturbation]] = [
    ("LPG, amplify", LPG("fixed", epsilon=0.4, signs=[1, 0, 0])),
    ("LPG, dampen", LPG(**FIXED, epsilon=0.4)),
    ("class-relative dampening", ClassRelativeDampening()),
    ("LPL, amplify", LPL("fixed", epsilon=1.5, signs=[1, 0, 0])),
    ("logit clipping", LogitClipping(0.5)),
    ("logit noise", LogitNoise(0.15)),
    ("label smoothing", LabelSmoothing(0.3)),
    ("class weighting, w = 0.5", ClassWeighting([0.5, 1.0, 1.0])),
    ("logit adjustment (head class)", LogitAdjustment()),
    ("focal loss", FocalLoss(2.0)),
    ("generalized cross-entropy", GeneralizedCrossEntropy(0.7)),
    ("SAM", SAM(rho=1.0)),
    ("gradient clipping", GradientClipping(max_norm=0.5)),
    ("gradient noise", GradientNoise(eta=0.02)),
]
SHOWN = {method.name for _, method in METHODS}
METHODS += [(name.replace("_", " "), REGISTRY[name]()) for name in REGISTRY if name not in SHOWN]
COLUMNS = 5


@dataclass
class FieldArguments:
    output_file: str = field(default="gradient_field.png", metadata={"help": "Where the picture goes."})
    points: int = field(default=9, metadata={"help": "Points along an edge of the simplex."})


def simplex_grid(points: int) -> Tensor:
    """Probabilities `[N, 3]`, evenly spread and away from the edges, where logits are infinite."""
    steps = [(i, j) for i in range(points) for j in range(points - i)]
    inner = torch.tensor([[i, j, points - 1 - i - j] for i, j in steps], dtype=torch.float64)
    return (inner + 0.35) / (inner + 0.35).sum(-1, keepdim=True)


def trained_statistics() -> ClassStatistics:
    """Classes that have been learned, and evidence that some of their labels are wrong."""
    statistics = ClassStatistics(3, COUNTS).double()
    statistics.label_prob.fill_(0.8)
    statistics.last_label_prob.fill_(0.8)
    statistics.confidence_ratio.fill_(0.85)
    statistics.noise_evidence.fill_(2.0)
    return statistics


def perturbed_gradient(method: Perturbation, logits: Tensor, labels: Tensor) -> Tensor:
    gradient = logit_gradient(logits, labels)
    if isinstance(method, LogitPerturbation):
        method.setup(num_labels=3)
        method.double()
        return gradient + method.delta(gradient, LogitBatch(logits, labels), trained_statistics())
    return torch.cat([perturbed_parameter(method, row[None], labels[:1]) for row in logits])


def perturbed_parameter(method: Perturbation, logits: Tensor, labels: Tensor) -> Tensor:
    """The gradient of a model whose parameters are the logits of one sample."""
    parameter = torch.nn.Parameter(logits.clone())
    gradient = logit_gradient(logits, labels)
    if isinstance(method, SAM):
        with method.shifted(torch.nn.Module(), [parameter], [gradient]):
            return logit_gradient(parameter.detach(), labels)
    parameter.grad = gradient.clone()
    method.perturb_([parameter])
    return parameter.grad


def draw(axes: Axes, title: str, probabilities: Tensor, plain: Tensor, perturbed: Tensor) -> None:
    corners = np.vstack([CORNERS, CORNERS[:1]])
    axes.plot(*corners.T, color="0.8", linewidth=1, zorder=0)
    points = probabilities.numpy() @ CORNERS
    style = {"angles": "xy", "scale_units": "xy", "scale": 9, "zorder": 2}
    axes.quiver(*points.T, *(-plain.numpy() @ CORNERS).T, color="0.7", width=0.012, **style)
    axes.quiver(*points.T, *(-perturbed.numpy() @ CORNERS).T, color="tab:blue", width=0.007, **style)
    axes.set_title(title, fontsize=10)
    axes.set_aspect("equal")
    axes.axis("off")


def draw_legend(axes: Axes) -> None:
    axes.axis("off")
    for height, color, label in ((0.62, "0.7", "$-g$"), (0.42, "tab:blue", r"$-(g + \delta)$")):
        axes.annotate("", (0.45, height), (0.15, height), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2})
        axes.text(0.5, height, label, va="center", fontsize=13)
    axes.text(0.15, 0.22, "label: lower left corner", fontsize=9)


def main() -> None:
    (arguments,) = HfArgumentParser(FieldArguments).parse_args_into_dataclasses()
    probabilities = simplex_grid(arguments.points)
    logits, labels = probabilities.log(), torch.zeros(len(probabilities), dtype=torch.int64)
    plain = logit_gradient(logits, labels)

    rows = -(-(1 + len(METHODS)) // COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(3 * COLUMNS, 2.8 * rows), layout="constrained")
    draw_legend(grid.flat[0])
    for axes in grid.flat[1 + len(METHODS) :]:
        axes.axis("off")
    for axes, (title, method) in zip(grid.flat[1:], METHODS, strict=False):
        draw(axes, title, probabilities, plain, perturbed_gradient(method, logits, labels))
    figure.savefig(arguments.output_file, dpi=110)
    print(f"Picture: {arguments.output_file}")


if __name__ == "__main__":
    main()
