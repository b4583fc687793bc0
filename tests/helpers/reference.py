"""
Slow references for the tests: float64 NumPy and plain loops, written from the formulas and not from the library.

Only the constants of class-relative dampening and of its evidence are those of the library.
"""

import math

import numpy as np

from lpg_hf.noise_evidence import ENOUGH_ERRORS, ENOUGH_RISE, EXCESS, SETTLED
from lpg_hf.perturbations.class_relative_dampening import LEAST_WEIGHT


IGNORED = -100


def softmax(logits):
    probabilities = np.zeros(np.shape(logits))
    for i, row in enumerate(np.asarray(logits, dtype=np.float64)):
        powers = [math.exp(value - max(row)) for value in row]
        probabilities[i] = [power / math.fsum(powers) for power in powers]
    return probabilities


def logit_gradient(logits, labels):
    """`p - onehot(y)`, with the label's entry as minus the sum of the others; zero for ignored samples."""
    gradient = np.zeros(np.shape(logits))
    for i, label in enumerate(labels):
        if label == IGNORED:
            continue
        gradient[i] = softmax(logits[i : i + 1])[0]
        gradient[i, label] = -math.fsum(p for j, p in enumerate(gradient[i]) if j != label)
    return gradient


def lpg_delta(gradient, labels, signs, bounds, max_dampening=1.0, direction="class", norm="l2", smallest=2.0**-52):
    """One delta per class present (or per sample); zero where the mean gradient is no longer than `smallest`."""
    gradient = np.asarray(gradient, dtype=np.float64)
    delta = np.zeros(gradient.shape)
    for c in range(len(signs)):
        members = [i for i, label in enumerate(labels) if label == c]
        groups = [members] if direction == "class" else [[i] for i in members]
        for group in groups:
            if not group:
                continue
            mean = sum(gradient[i] for i in group) / len(group)
            best = best_in_ball(mean, signs[c], bounds[c], max_dampening, norm, smallest)
            for i in group:
                delta[i] = best
    return delta


def best_in_ball(mean, sign, bound, max_dampening=1.0, norm="l2", smallest=0.0):
    """Amplify: farthest `mean + delta`. Dampen: nearest `max_dampening mean + delta` to zero. Within the ball."""
    length = math.sqrt(math.fsum(value**2 for value in mean))
    if sign == 0 or length <= smallest:
        return np.zeros(len(mean))
    if norm == "l2":
        radius = bound if sign > 0 else -min(bound, max_dampening * length)
        return np.array([radius * value / length for value in mean])
    if sign > 0:
        return largest_zero_sum(mean, bound)
    return project_zero_sum_box([-max_dampening * value for value in mean], bound)


def largest_zero_sum(mean, bound):
    """+bound on the larger half of the entries, -bound on the smaller half, 0 on the median of an odd number."""
    ascending = sorted(range(len(mean)), key=lambda j: (mean[j], -j))
    half = len(mean) // 2
    delta = np.zeros(len(mean))
    for j in ascending[:half]:
        delta[j] = -bound
    for j in ascending[len(mean) - half :]:
        delta[j] = bound
    return delta


def project_zero_sum_box(point, bound):
    """
    Nearest delta with `|delta_j| <= bound` and sum zero, exactly.

    It is `clip(point - nu)` for the nu that makes the sum zero. The sum is linear in nu between the values where some
    entry reaches the box: sort these, find the two between which the sum changes sign, interpolate.
    """

    def clipped(nu):
        return np.array([min(max(value - nu, -bound), bound) for value in point])

    kinks = sorted([value - bound for value in point] + [value + bound for value in point])
    left = max((nu for nu in kinks if math.fsum(clipped(nu)) >= 0), default=kinks[0])
    right = min((nu for nu in kinks if math.fsum(clipped(nu)) <= 0), default=kinks[-1])
    at_left, at_right = math.fsum(clipped(left)), math.fsum(clipped(right))
    share = at_left / (at_left - at_right) if at_left > at_right else 0.0
    return clipped(left + share * (right - left))


def dampening_weight(
    logits,
    labels,
    label_prob,
    confidence_ratio,
    decidedness,
    noise_evidence,
    memorizing,
    power=2.0,
    learned=(0.05, 0.3),
    evidence=(1.0, 2.0),
    offset=None,
    gate=None,
):
    """
    `max(l_c, min(1, rho_i / R_c^(2 - d_c)) ^ (power (1 + 2 s_c) gamma_c))`, `rho_i` at the logits plus an offset per
    class; 1 for ignored samples and for a class never seen. The sharpness `s_c` is the larger of `d_c` and m / 2,
    the least weight `l_c` in proportion to `(1 - s_c)^2`. A gate that was open once, `gate`, stays open.
    """
    offset = [0.0] * len(label_prob) if offset is None else offset
    gate = [0.0] * len(label_prob) if gate is None else gate
    weights = []
    for row, label in zip(np.asarray(logits, dtype=np.float64), labels, strict=True):
        if label == IGNORED or confidence_ratio[label] == 0:
            weights.append(1.0)
            continue
        judged = [z + shift for z, shift in zip(row, offset, strict=True)]
        rho = math.exp(judged[label] - max(judged))
        opened = max(gate[label], dampening_gate(label_prob[label], noise_evidence, learned, evidence))
        reference = confidence_ratio[label] ** (2 - decidedness[label])
        sharpness = max(decidedness[label], memorizing / 2)
        least = LEAST_WEIGHT * (1 - sharpness) ** 2
        weights.append(max(min(1.0, rho / reference) ** (power * (1 + 2 * sharpness) * opened), least))
    return np.array(weights)


def dampening_gate(label_prob, noise_evidence, learned=(0.05, 0.3), evidence=(1.0, 2.0)):
    """The class has been learned, and an epoch has given evidence of wrong labels."""
    return ramp(label_prob, *learned) * ramp(noise_evidence, *evidence)


def error_share(error_rate, confidence_ratio):
    """Share of all samples that are contradicted, over the mean belief that labels lack."""
    return error_rate / max(1 - confidence_ratio, 2.0**-52)


def fit_excess(logits, label):
    """`q_y - sum_j q_j^2` of one sample."""
    probabilities = softmax([logits])[0]
    return probabilities[label] - math.fsum(q * q for q in probabilities)


def ramp(value, start, end):
    if value <= start:
        return 0.0
    if value >= end:
        return 1.0
    return (value - start) / (end - start)


def dampening_delta(gradient, weights):
    return np.array([[(w - 1) * entry for entry in row] for w, row in zip(weights, gradient, strict=True)])


def clip_delta(gradient, max_norm):
    """Shortens the gradients longer than `max_norm` to it."""
    delta = np.zeros(np.shape(gradient))
    for i, row in enumerate(np.asarray(gradient, dtype=np.float64)):
        length = math.sqrt(math.fsum(value**2 for value in row))
        if length > max_norm:
            delta[i] = [value * (max_norm / length) - value for value in row]
    return delta


def logit_adjustment_delta(logits, labels, prior, tau=1.0, weight_share=0.0, target=None):
    """
    `w_y (softmax(z + (1 - a) b) - onehot(y)) - g` with `b = tau (log pi - log target)` for a weight share a, weights
    of mean 1 over the samples; an absent class has the smallest prior of the classes present. The default target is
    uniform.
    """
    target = [1.0] * len(prior) if target is None else target
    smallest = min(share for share in prior if share > 0)
    filled = [share if share > 0 else smallest for share in prior]
    b = [tau * (math.log(share) - math.log(wanted)) for share, wanted in zip(filled, target, strict=True)]
    weights = [math.exp(-weight_share * value) for value in b]
    mean = sum(weight * share for weight, share in zip(weights, prior, strict=True))
    offset = [(1 - weight_share) * value for value in b]
    adjusted = np.array([[z + shift for z, shift in zip(row, offset, strict=True)] for row in logits])
    weight = np.array([[weights[label] / mean if label >= 0 else 0.0] for label in labels])
    return weight * logit_gradient(adjusted, labels) - logit_gradient(np.asarray(logits), labels)


def relative_pull(gradient, logits, labels):
    """`max(g_y / (p_y - 1), 0)` of each sample, `[N, 1]`; 0 for ignored samples."""
    own = [
        0.0 if label < 0 or full[label] == 0 else max(row[label] / full[label], 0.0)
        for row, full, label in zip(gradient, logit_gradient(np.asarray(logits), labels), labels, strict=True)
    ]
    return np.array(own)[:, None]


class RunningStatistics:
    """
    Running means per class, moved once by each optimizer step with weight n / (n + 20); means of epochs per class;
    and what the rows of whole epochs say about wrong labels.
    """

    def __init__(self, num_classes):
        self.counts = np.zeros(num_classes)
        self.accuracy = np.zeros(num_classes)
        self.label_prob = np.zeros(num_classes)
        self.mean_weight = np.ones(num_classes)
        self.confidence_ratio = np.zeros(num_classes)
        self.last_label_prob = np.zeros(num_classes)
        self.noise_evidence = self.memorizing = 0.0
        self._square = np.zeros(num_classes)
        self._settled_errors = []
        self._epoch = []

    def update(self, logits, labels, weights=None, offset=None, fitted_offset=None):
        """One whole optimizer step: all its micro-batches, of all processes."""
        offset, fitted_offset = (
            np.zeros(len(self.counts)) if shift is None else np.asarray(shift) for shift in (offset, fitted_offset)
        )
        weights = [1.0] * len(labels) if weights is None else weights
        for c in range(len(self.counts)):
            rows = [row for row, label in zip(logits, labels, strict=True) if label == c]
            members = [softmax([row])[0] for row in rows]
            n = len(members)
            if n == 0:
                continue
            self._move("accuracy", c, n, [int(np.argmax(p)) == c for p in members])
            self._move("label_prob", c, n, [p[c] for p in members])
            self._move("mean_weight", c, n, [w for w, label in zip(weights, labels, strict=True) if label == c])
            for row in rows:
                judged = softmax([row + offset])[0]
                self._epoch.append((c, judged[c] / max(judged), fit_excess(row + fitted_offset, c)))
            self.counts[c] += n

    @property
    def decidedness(self):
        """Variance of the confidence ratio, relative to that of a coin with the same mean."""
        largest = [r * (1 - r) for r in self.confidence_ratio]
        values = zip(self._square, self.confidence_ratio, largest, strict=True)
        return np.array([min(max((s - r * r) / m, 0), 1) if m > 0 else 0.0 for s, r, m in values])

    @property
    def dampening_terms(self):
        """The arguments of `dampening_weight` behind the labels, up to the memorizing."""
        means = self.last_label_prob, self.confidence_ratio, self.decidedness
        return *means, self.noise_evidence, self.memorizing

    def end_epoch(self):
        for c in {c for c, _, _ in self._epoch}:
            ratios = [ratio for label, ratio, _ in self._epoch if label == c]
            sums = sum(ratios), sum(ratio**2 for ratio in ratios)
            is_first = self.confidence_ratio[c] == 0
            for means, total in zip((self.confidence_ratio, self._square), sums, strict=True):
                new = total / len(ratios)
                means[c] = new if is_first else (means[c] + new) / 2
            self.last_label_prob[c] = self.label_prob[c]
        if self._epoch:
            self._look_for_noise([ratio for _, ratio, _ in self._epoch], [excess for _, _, excess in self._epoch])
        self._epoch = []

    def _look_for_noise(self, ratios, excesses):
        n = len(ratios)
        error = sum(ratio < 0.1 for ratio in ratios) / n
        share = error_share(error, math.fsum(ratios) / n)
        memorizing = ramp(math.fsum(excesses) / n, *EXCESS)
        evidence = error * share**2 * (1 + memorizing) / ENOUGH_ERRORS
        if self._settled_errors:
            rise = error - min(self._settled_errors)
            evidence = max(evidence, rise / (ENOUGH_RISE + math.sqrt(error / n)))
        if self.noise_evidence < 1:
            self.memorizing = max(self.memorizing, memorizing)
        self.noise_evidence = max(self.noise_evidence, evidence)
        self._settled_errors += [error] if share >= SETTLED else []

    def _move(self, name, c, n, values, inertia=20):
        running = getattr(self, name)
        running[c] = (n * (sum(values) / n) + inertia * running[c]) / (n + inertia)


def running_prior(counts):
    """Prior of classes that are being counted: ten samples more of each."""
    return np.array([count + 10 for count in counts]) / sum(count + 10 for count in counts)


def frequency_signs_and_bounds(prior, epsilon):
    """`a_c = mean(log pi) - log pi_c` over the classes present: amplify `a_c > 0`, `eps_c = eps |a_c| / max|a|`."""
    present = [c for c, share in enumerate(prior) if share > 0]
    mean = math.fsum(math.log(prior[c]) for c in present) / len(present)
    rarity = {c: mean - math.log(prior[c]) for c in present}
    largest = max(abs(value) for value in rarity.values())
    signs, bounds = np.zeros(len(prior)), np.zeros(len(prior))
    if largest < 1e-9:  # balanced up to rounding
        return signs, bounds
    for c, value in rarity.items():
        signs[c], bounds[c] = np.sign(value), epsilon * abs(value) / largest
    return signs, bounds


def accuracy_signs_and_bounds(prior, accuracy, epsilon):
    """Classes present below the mean running accuracy are amplified: `eps_c = eps |mean - q_c|`."""
    present = [c for c, share in enumerate(prior) if share > 0]
    mean = math.fsum(accuracy[c] for c in present) / len(present)
    signs, bounds = np.zeros(len(prior)), np.zeros(len(prior))
    for c in present:
        signs[c], bounds[c] = np.sign(mean - accuracy[c]), epsilon * abs(mean - accuracy[c])
    return signs, bounds
