"""Class weights as a perturbation, without a weighted loss."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..batch import LogitBatch
from ..statistics import ClassStatistics
from .base import SampleReweighting
from .checks import check


class ClassWeighting(SampleReweighting):
    r"""
    Class weighting: every class pulls with its own weight.

    Level: class.
    Formula: `delta = (w_c - 1) g`.
    Helps: imbalanced data with models that are far from fitting all of it.
    Hurts: models that fit all of it (where weights change little but the noise); rare classes with wrong labels.
    Cost: O(NC).
    Source: classic; the effective number is from Cui et al., Class-balanced loss (CVPR 2019).

    Args:
        weights (`str`, `Sequence[float]` or `Mapping`, *optional*, defaults to `"balanced"`):
            `"balanced"`: `n / (K n_c)` for n samples in K classes; `"effective"`: `(1 - beta) / (1 - beta^n_c)`,
            scaled to sum to K; a weight per class, as a list or by label name or index (1 for those left out).
        beta (`float`, *optional*, defaults to 0.999): For `"effective"`, in [0, 1).

    Raises:
        ValueError: If a weight is negative or infinite, all are 0, `beta` is out of range, or names or length do not
            fit.

    Example:

    ```python
    >>> ClassWeighting({"spam": 5.0})
    class_weighting(weights={'spam': 5.0})

    ```
    """

    name = "class_weighting"
    _weights: Tensor

    def __init__(self, weights: str | Sequence[float] | Mapping[str | int, float] = "balanced", beta: float = 0.999):
        super().__init__()
        if isinstance(weights, str):
            check(
                weights in ("balanced", "effective"), "weights", weights, "'balanced', 'effective', a list or a dict"
            )
        else:
            values = list(weights.values() if isinstance(weights, Mapping) else weights)
            check(all(value >= 0 for value in values), "weights", weights, "at least 0 for each class")
            check(all(value < math.inf for value in values), "weights", weights, "finite for each class")
        check(0 <= beta < 1, "beta", beta, "in [0, 1)")
        self.weights = weights
        self.beta = beta
        self._label_names: Mapping[str, int] = {}

    def use_label_names(self, label_names: Mapping[str, int]) -> None:
        self._label_names = label_names

    def setup(self, num_labels: int) -> None:
        if isinstance(self.weights, str):
            return
        if isinstance(self.weights, Mapping):
            weights = torch.ones(num_labels, dtype=torch.float64)
            for key, weight in self.weights.items():
                weights[self._class_index(key, num_labels)] = weight
        else:
            check(
                len(self.weights) == num_labels,
                "weights",
                self.weights,
                f"one weight for each of {num_labels} classes",
            )
            weights = torch.as_tensor(self.weights, dtype=torch.float64)
        check(bool((weights > 0).any()), "weights", self.weights, "above 0 for one class at least")
        self.register_buffer("_weights", weights, persistent=False)

    def weight(self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
        weights = self.class_weights(statistics).to(gradient)
        return weights[batch.classes]

    def class_weights(self, statistics: ClassStatistics) -> Tensor:
        """The weight of every class, `[C]`; 0 for classes without samples where the weights come from the counts."""
        if not isinstance(self.weights, str):
            return self._weights
        prior = statistics.prior
        present = prior > 0
        if self.weights == "balanced":
            return torch.where(present, 1 / (present.sum() * prior), 0.0)
        # The prior times the samples, not the counts: while these are being taken, the prior says how to read them.
        counts = (prior * statistics.class_counts.sum()).clamp(min=1)
        # 1 / (1 - beta^n), whose difference would lose its digits for a beta near 1.
        log_beta = math.log(self.beta) if self.beta > 0 else -math.inf
        weights = torch.where(present, -1 / torch.expm1(counts * log_beta), 0.0)
        return weights * present.sum() / weights.sum()

    def log_correction(self, statistics: ClassStatistics) -> Tensor:
        log_weights = self.class_weights(statistics).to(statistics.prior).log()
        log_rarity = statistics.prior_terms.log_rarity
        # Of a class with weight 0 the logits learn no share. As in a prior, it counts as the rarest of the others.
        has_weight = log_weights.isfinite()
        smallest = torch.where(has_weight, log_weights - log_rarity, torch.inf).min()
        return torch.where(has_weight, log_weights, smallest + log_rarity)

    def _class_index(self, key: str | int, num_labels: int) -> int:
        index = self._label_names.get(key, key) if isinstance(key, str) else key
        if not isinstance(index, int) or not 0 <= index < num_labels:
            known = ", ".join(map(repr, self._label_names)) or "no names (LPGTrainer takes them from data and model)"
            raise ValueError(
                f"`weights` has the key {key!r}, which does not name a class. Use an index in [0, {num_labels}) or a "
                f"label name. Known names: {known}."
            )
        return index
