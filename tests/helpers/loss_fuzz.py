"""
Thousands of calls of LPGLoss: chains, kinds of logits, class counts, sizes and labels in all combinations.

Each call must give the right gradient, by slow formulas in float64, or an error that names what is wrong. Run as a
script, it tries all of them and prints how many of each there were.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import reference
import torch
from torch import Tensor
from torch.nn import functional as F

from lpg_hf import LPGLoss


CHAINS: list[list[str]] = [
    [],
    ["auto"],
    ["lpg"],
    ["lpg(direction='sample', norm='linf')"],
    ["lpl"],
    ["logit_clipping"],
    ["logit_clipping(quantile=0.9)"],
    ["logit_noise(sigma=0.3, seed=4)"],
    ["label_smoothing"],
    ["label_smoothing(alpha=-0.3, target='prior')"],
    ["class_weighting"],
    ["class_weighting(weights='effective', beta=0.9)"],
    ["logit_adjustment"],
    ["logit_adjustment(tau=0.5, learned=(0.1, 0.9), target='evaluation')"],
    ["focal_loss"],
    ["focal_loss(gamma=0.5)"],
    ["generalized_cross_entropy"],
    ["class_relative_dampening"],
    ["class_weighting", "logit_clipping(max_norm=0.5)"],
    ["auto", "label_smoothing"],
    ["focal_loss", "lpg(epsilon=0.3)", "logit_clipping"],
    ["generalized_cross_entropy", "label_smoothing(alpha=0.2)", "logit_adjustment"],
]
LOGITS = [
    "normal",
    "confident",
    "huge",
    "tiny",
    "equal",
    "float64",
    "float16",
    "bfloat16",
    "int64",
    "not contiguous",
    "without gradient",
    "-inf",
    "inf",
    "nan",
]
COUNTS = ["none", "balanced", "long tail", "absent"]
SIZES = [(1, 2), (16, 7)]
LABELS = ["valid", "some ignored", "all ignored", "out of range"]
DTYPES = {"float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64}
SCALES = {"confident": 30.0, "huge": 1e30, "tiny": 1e-30, "equal": 0.0, "float16": 300.0, "int64": 10.0}
#: Relative to the length of a sample's gradient, and absolute where numbers underflow.
TOLERANCES = {torch.float64: (1e-9, 1e-300), torch.float32: (1e-4, 1e-30)}
HALF_TOLERANCES = {torch.float16: (2e-3, 2e-7), torch.bfloat16: (1e-2, 1e-30)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call."""

    chain: tuple[str, ...]
    kind: str
    counts: str
    size: tuple[int, int]
    labels: str

    def make(self) -> tuple[Tensor, Tensor, list[int] | None]:
        """Logits, labels and class counts."""
        num_samples, num_classes = self.size
        generator = torch.Generator().manual_seed(hash_of(self.kind, self.labels, str(self.size)))
        logits = torch.randn(num_samples, num_classes, dtype=torch.float64, generator=generator)
        labels = torch.randint(num_classes, (num_samples,), generator=generator)
        logits = (logits * SCALES.get(self.kind, 2.0)).to(DTYPES.get(self.kind, torch.float32))
        if self.kind in ("-inf", "inf", "nan"):
            logits[-1, -1] = float(self.kind)
        if self.kind == "not contiguous":
            logits = torch.stack([logits, logits], -1)[..., 0]
        if self.labels == "some ignored":
            labels[: (num_samples + 1) // 2] = -100
        elif self.labels == "all ignored":
            labels[:] = -100
        elif self.labels == "out of range":
            labels[-1] = [num_classes, -1, 10**6][hash_of(self.kind) % 3]
        counts = {
            "none": None,
            "balanced": [10] * num_classes,
            "long tail": [10**12, *[1000] * (num_classes - 2), 1],
            "absent": [100, *[10] * (num_classes - 2), 0],
        }
        return logits, labels, counts[self.counts]


def hash_of(*texts: str) -> int:
    """The same number in every process."""
    return sum(ord(letter) * (31**place % 997) for place, letter in enumerate("|".join(texts)))


def all_cases() -> Iterator[Case]:
    for chain, *rest in itertools.product(CHAINS, LOGITS, COUNTS, SIZES, LABELS):
        yield Case(tuple(chain), *rest)


def outcome(case: Case) -> str:
    """`"right"`, `"named"` if an error says what is wrong, or `"silent: ..."` with what came out."""
    logits, labels, counts = case.make()
    requires_grad = case.kind not in ("without gradient", "int64")
    logits.requires_grad_(requires_grad)
    loss_fn = LPGLoss(case.size[1], list(case.chain), counts)
    try:
        loss = loss_fn(logits, labels)
    except ValueError as error:
        named = {
            "`logits` must be of floating point": case.kind == "int64",
            "`labels` must lie in": case.labels == "out of range",
        }
        return "named" if any(named[text] for text in named if text in str(error)) else f"silent: {error}"
    if requires_grad:
        loss.backward()
    try:
        loss_fn.telemetry()
    except FloatingPointError:
        return "named" if _has_reason(case, logits.detach(), labels, logits.grad) else "silent: a false alarm"
    if case.labels == "out of range" or case.kind == "int64":
        return "silent: nothing said"
    return _compare(case, loss.detach(), logits, labels, counts)


def _has_reason(case: Case, logits: Tensor, labels: Tensor, gradient: Tensor) -> bool:
    """Whether there is something that is not finite."""
    is_labeled = labels >= 0
    return bool((~logits[is_labeled].isfinite()).any() or (~gradient[is_labeled].isfinite()).any())


def _compare(case: Case, loss: Tensor, logits: Tensor, labels: Tensor, counts: list[int] | None) -> str:
    z, y = logits.detach().double().numpy(), labels.tolist()
    divisor = max(sum(label >= 0 for label in y), 1)
    value = -sum(_log_softmax(row)[label] for row, label in zip(z, y, strict=True) if label >= 0) / divisor
    if math.isnan(value) and not case.chain:  # cross-entropy itself shows it
        return "named" if loss.isnan() else f"silent: loss {loss}"
    relative, absolute = TOLERANCES[torch.promote_types(logits.dtype, torch.float32)]
    if loss != value and not abs(loss.item() - value) <= relative * abs(value) + 1e-6:
        return f"silent: loss {loss} instead of {value}"
    if logits.grad is None:
        return "right"
    if not case.chain:  # what `torch` makes of it, NaN of ignored samples included
        twin = logits.detach().clone().requires_grad_()
        (F.cross_entropy(twin.to(loss.dtype), labels, reduction="sum") / divisor).backward()
        return (
            "right" if torch.equal(twin.grad.nan_to_num(7.0), logits.grad.nan_to_num(7.0)) else "silent: not torch's"
        )
    expected = expected_gradient(case, z, y, counts)
    relative, absolute = HALF_TOLERANCES.get(logits.dtype, (relative, absolute))
    actual = logits.grad.double().numpy()
    if expected is None:  # random: what can be said of it
        base = reference.logit_gradient(np.where(np.isnan(z), 0.0, z), y) / divisor
        is_right = np.isfinite(actual).all() and (actual[[label < 0 for label in y]] == 0).all()
        is_right &= (np.abs((actual - base).sum(1)) < 1e-2).all() and np.abs(actual - base).max() < 2.0
        return "right" if is_right else f"silent: {actual}"
    expected, sizes = (values / divisor for values in expected)
    error = np.abs(actual - expected).max(1)
    # A gradient that is the small difference of larger ones is right up to their rounding.
    rounding = 8 * torch.finfo(torch.promote_types(logits.dtype, torch.float32)).eps * sizes
    if any("focal_loss" in entry for entry in case.chain):  # a power of 1 - p, whose rounding at p = 1 it enlarges
        rounding += 1e-3 * np.abs(reference.logit_gradient(z, y)).max(1) / divisor
    is_right = error <= relative * np.abs(expected).max(1) + rounding + absolute
    return "right" if is_right.all() else f"silent: {actual[~is_right][0]} instead of {expected[~is_right][0]}"


def expected_gradient(
    case: Case, z: np.ndarray, y: list[int], counts: list[int] | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """
    The gradient of the first step in per-sample units, by slow formulas, and the largest entries on the way to it.
    `None` for random ones.
    """
    num_classes = case.size[1]
    total = [10] * num_classes if counts is None else counts
    prior = [count / sum(total) for count in total]
    z = np.where(np.array(y)[:, None] < 0, 0.0, z)
    base = reference.logit_gradient(z, y)
    gradient, smallest = (
        base.copy(),
        float(torch.finfo(torch.promote_types(DTYPES.get(case.kind, torch.float32), torch.float32)).eps),
    )
    chain = [part for entry in case.chain for part in _methods(entry, case.chain)]
    sizes, scale = np.abs(gradient).max(1), np.ones((len(y), 1))
    for name, options in chain:
        before = gradient.copy()
        if name == "logit_noise":
            return None
        if name == "logit_adjustment":
            gradient += scale * _adjustment(z, y, prior, **options)
        elif name in ("lpg", "lpl"):
            epsilon = options.pop("epsilon", {"lpg": 0.1, "lpl": 1.0}[name])
            signs, bounds = reference.frequency_signs_and_bounds(prior, epsilon)
            if name == "lpg" and "norm" in options:
                gradient += _lpg_of_samples(gradient, y, signs, bounds, smallest, case.kind == "float64")
            elif name == "lpg":
                gradient += reference.lpg_delta(gradient, y, signs, bounds, 0.5, smallest=smallest, **options)
            else:
                gradient += _lpl(z, y, signs, bounds, smallest)
        elif name == "logit_clipping":
            length = np.maximum(np.linalg.norm(gradient, axis=1, keepdims=True), 1e-300)
            factor = np.minimum(options["max_norm"] / length, 1.0)
            gradient, scale = gradient * factor, scale * factor
        elif name == "label_smoothing":
            target = np.array(prior) if options["target"] == "prior" else np.full(num_classes, 1 / num_classes)
            for i, label in enumerate(y):
                if label >= 0:
                    gradient[i] += options["alpha"] * (np.eye(num_classes)[label] - target)
                    sizes[i] = max(sizes[i], abs(options["alpha"]))
        else:
            factor = _weights(name, options, z, y, prior, counts)[:, None]
            gradient, scale = gradient * factor, scale * factor
        if name not in ("logit_clipping", "class_weighting", "focal_loss", "generalized_cross_entropy"):  # these add
            sizes = np.maximum(sizes, np.abs(gradient - before).max(1))
        else:
            sizes *= np.abs(gradient).max(1) / np.maximum(np.abs(before).max(1), 1e-300)
    return gradient, np.maximum(sizes, np.abs(gradient).max(1))


def _methods(entry: str, chain: tuple[str, ...]) -> list[tuple[str, dict]]:
    """What an entry of `CHAINS` stands for, with the arguments that its formula needs."""
    adjustment = ("logit_adjustment", {"tau": 1.0, "by_weights": True, "power": 2 / 3})
    if entry == "auto":
        smoothing = [("label_smoothing", {"alpha": -0.1, "target": "uniform"})] if len(chain) > 1 else []
        prior = [("label_smoothing", {"alpha": 0.1, "target": "prior"})] if len(chain) > 1 else []
        return [adjustment, *smoothing, *prior]
    return {
        "lpg": [("lpg", {})],
        "lpg(epsilon=0.3)": [("lpg", {"epsilon": 0.3})],
        "lpg(direction='sample', norm='linf')": [("lpg", {"direction": "sample", "norm": "linf"})],
        "lpl": [("lpl", {})],
        "logit_clipping": [("logit_clipping", {"max_norm": 0.3})],
        "logit_clipping(max_norm=0.5)": [("logit_clipping", {"max_norm": 0.5})],
        "logit_clipping(quantile=0.9)": [("logit_clipping", {"max_norm": math.sqrt(2)})],
        "logit_noise(sigma=0.3, seed=4)": [("logit_noise", {})],
        "label_smoothing": [("label_smoothing", {"alpha": 0.1, "target": "uniform"})],
        "label_smoothing(alpha=0.2)": [("label_smoothing", {"alpha": 0.2, "target": "uniform"})],
        "label_smoothing(alpha=-0.3, target='prior')": [("label_smoothing", {"alpha": -0.3, "target": "prior"})],
        "class_weighting": [("class_weighting", {})],
        "class_weighting(weights='effective', beta=0.9)": [("class_weighting", {"beta": 0.9})],
        "logit_adjustment": [("logit_adjustment", {"tau": 1.0, "by_weights": False, "power": 0.0})],
        "logit_adjustment(tau=0.5, learned=(0.1, 0.9), target='evaluation')": [
            ("logit_adjustment", {"tau": 0.5, "by_weights": True, "power": 2 / 3})
        ],
        "focal_loss": [("focal_loss", {"gamma": 2.0})],
        "focal_loss(gamma=0.5)": [("focal_loss", {"gamma": 0.5})],
        "generalized_cross_entropy": [("generalized_cross_entropy", {"q": 0.7})],
        "class_relative_dampening": [],  # nothing in the first epoch
    }[entry]


def _adjustment(
    z: np.ndarray, y: list[int], prior: list[float], tau: float, by_weights: bool, power: float
) -> np.ndarray:
    present = [share for share in prior if share > 0]
    target = [max(share, min(present)) ** power for share in prior]
    return reference.logit_adjustment_delta(z, y, prior, tau, float(by_weights), target)


def _weights(
    name: str, options: dict, z: np.ndarray, y: list[int], prior: list[float], counts: list[int] | None
) -> np.ndarray:
    """The weight of each sample; 1 for ignored ones."""
    present = [share > 0 for share in prior]
    if name == "class_weighting":
        of_class = np.array([1 / (sum(present) * share) if share > 0 else 0.0 for share in prior])
        if "beta" in options:
            numbers = [max(share * sum(counts or [0]), 1.0) for share in prior]
            of_class = np.array(
                [1 / (1 - options["beta"] ** n) if p else 0.0 for n, p in zip(numbers, present, strict=True)]
            )
            of_class *= sum(present) / of_class.sum()
        return np.array([of_class[label] if label >= 0 else 1.0 for label in y])
    weights = []
    for row, label in zip(z, y, strict=True):
        log_p = _log_softmax(row)[label] if label >= 0 else 0.0
        p, rest = math.exp(log_p), -math.expm1(log_p)
        if label < 0:
            weights.append(1.0)
        elif name == "focal_loss":
            gamma = options["gamma"]
            # d/dz of (1 - p)^gamma (-log p), as a factor of the gradient of -log p.
            ratio = p * log_p / rest if rest > 0 and p > 0 else (-1.0 if p > 0 else 0.0)
            weights.append(rest**gamma * (1 - gamma * ratio))
        else:
            weights.append(p ** options["q"])
    return np.array(weights)


def _lpg_of_samples(
    gradient: np.ndarray, y: list[int], signs: np.ndarray, bounds: np.ndarray, smallest: float, is_double: bool
) -> np.ndarray:
    """LPG of each sample in the box. Equal entries share what the largest and the smallest half of them get."""
    delta = np.zeros(gradient.shape)
    if not is_double:  # which makes more of them equal
        gradient = gradient.astype(np.float32).astype(np.float64)
    for i, label in enumerate(y):
        if label < 0 or np.linalg.norm(gradient[i]) <= smallest:
            continue
        delta[i] = reference.best_in_ball(gradient[i], signs[label], bounds[label], 0.5, "linf", smallest)
        if signs[label] > 0:
            for value in set(gradient[i].tolist()):
                equal = gradient[i] == value
                delta[i, equal] = delta[i, equal].mean()
    return delta


def _lpl(z: np.ndarray, y: list[int], signs: np.ndarray, bounds: np.ndarray, smallest: float) -> np.ndarray:
    delta = np.zeros(z.shape)
    for c in {label for label in y if label >= 0}:
        members = [i for i, label in enumerate(y) if label == c]
        shift = np.zeros(z.shape[1])
        for _ in range(5):
            mean = reference.logit_gradient(z[members] + shift, [c] * len(members)).mean(0)
            length = np.linalg.norm(mean)
            if length > smallest:
                shift = shift + signs[c] * 0.5 * bounds[c] * mean / length
            if np.linalg.norm(shift) > bounds[c]:
                shift *= bounds[c] / np.linalg.norm(shift)
        of_class = [c] * len(members)
        delta[members] = reference.logit_gradient(z[members] + shift, of_class) - reference.logit_gradient(
            z[members], of_class
        )
    return delta


def _log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row - row.max()
    return shifted - math.log(np.exp(shifted).sum())


if __name__ == "__main__":
    torch.set_num_threads(1)
    tally: Counter[str] = Counter()
    for case in all_cases():
        with np.errstate(all="ignore"):
            found = outcome(case)
        tally[found.split(":")[0]] += 1
        if found.startswith("silent"):
            print(case, found)
    print(f"tried {sum(tally.values())}, {dict(tally)}")
