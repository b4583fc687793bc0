"""Values of TrainingArguments that would end a training late, or without a message for the shell."""

import math
from collections.abc import Callable

import numpy as np
from transformers import EvalPrediction
from transformers.integrations import get_reporting_integration_callbacks

from ..config import LPGConfig
from .closest import closest


NUM_SEEDS = 2**32  # of NumPy's generator
# What the Trainer adds to the metrics of an evaluation.
OF_EVERY_EVALUATION = ("loss", "runtime", "samples_per_second", "steps_per_second")


def check_training_arguments(args: LPGConfig) -> None:
    """
    Raises:
        ValueError: If a value is out of range, or there is nothing of that name to report to.
    """
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` is {getattr(args, name)}, but must be at least 1.")
    for name in ("seed", "data_seed"):
        seed = getattr(args, name)
        if seed is not None and not 0 <= seed < NUM_SEEDS:
            raise ValueError(f"`--{name}` is {seed}, but must be in 0 to {NUM_SEEDS - 1}.")
    if not 0 <= args.learning_rate < math.inf:
        raise ValueError(
            f"`--learning_rate` is {args.learning_rate}, but must be a finite number of at least 0. Common ones are "
            "1e-5 to 1e-3."
        )
    try:
        get_reporting_integration_callbacks(args.report_to)
    except ValueError as error:
        raise ValueError(f"`--report_to`: {error} Pass none to report to nothing.") from error


def check_best_metric(
    args: LPGConfig, compute_metrics: Callable[[EvalPrediction], dict[str, float]], num_labels: int
) -> None:
    """
    Raises:
        ValueError: If the checkpoints are to be compared by a metric that no evaluation has. The Trainer would find
            out at the first one.
    """
    if args.metric_for_best_model is None or args.eval_strategy == "no":
        return
    known = [*compute_metrics(EvalPrediction(np.eye(num_labels), np.arange(num_labels))), *OF_EVERY_EVALUATION]
    name = args.metric_for_best_model.removeprefix("eval_")
    if name not in known:
        raise ValueError(
            f"`--metric_for_best_model` is {args.metric_for_best_model!r}: {closest('metric', name, known)} An "
            f"evaluation has {', '.join(known)}."
        )
