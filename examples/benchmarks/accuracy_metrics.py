"""What a trained model is scored with: four metrics on two test sets, after two epochs."""

from itertools import product

import numpy as np
from torch import Tensor
from transformers import EvalPrediction

from lpg_hf.metrics import make_compute_metrics


# As lpg_hf.metrics names them; the first one is what tuning looks at and what the claims are made of.
METRICS = ("balanced_accuracy", "accuracy", "macro_f1", "expected_calibration_error")
LOWER_IS_BETTER = ("expected_calibration_error",)
# The test rows, and those of them that have the class shares of the training rows.
TEST_SETS = ("test", "natural")
# The last epoch, and the one that the validation rows picked.
EPOCHS = ("last", "picked")

MEASURES = tuple("_".join(pair) for pair in product(TEST_SETS, METRICS))
MEASURE = MEASURES[0]
SCORE_COLUMNS = tuple(f"{measure}_{epoch}" for epoch, measure in product(EPOCHS, MEASURES))

_compute_metrics = make_compute_metrics()


def score(logits: Tensor, labels: np.ndarray) -> dict[str, float]:
    """The [`METRICS`] of logits `[N, C]` against clean labels `[N]`, each between 0 and 1."""
    values = _compute_metrics(EvalPrediction(logits.numpy(), labels))
    return {name: values[name] for name in METRICS}


def is_natural(measure: str) -> bool:
    """Whether the test set of a measure has the class shares of the training rows."""
    return measure.startswith("natural_")


def is_lower_better(measure: str) -> bool:
    return measure.endswith(LOWER_IS_BETTER)


def title(measure: str) -> str:
    """How tables write a measure."""
    test_set, _, metric = measure.partition("_")
    return metric.replace("_", " ").replace("f1", "F1") + (", natural test set" if test_set == "natural" else "")
