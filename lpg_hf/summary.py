"""TrainingSummary: the plain data from which report and model card are made."""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from .perturbations import Perturbation


@dataclass(frozen=True)
class Unavailable:
    """
    Takes the place of what a summary does not have.

    Attributes:
        reason (`str`): Why it is missing, as a sentence for the reader of the report.
    """

    reason: str


@dataclass(frozen=True)
class Evaluation:
    """
    What the model makes of its evaluation set.

    Attributes:
        name (`str`): The data set as the user wrote it, for instance `"eval_dataset"`.
        labels (`np.ndarray` of shape `[N]`): Class indices of the labeled rows.
        probabilities (`np.ndarray` of shape `[N, C]`): Predicted class probabilities of the same rows.
    """

    name: str
    labels: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True)
class TrainingSummary:
    """
    What a training was and what came out of it, without the trainer.

    Attributes:
        model_name (`str`): The class of the model.
        output_dir (`str`): The output folder of the training.
        num_steps (`int`): Optimizer steps so far.
        active_perturbations (`tuple[Perturbation, ...]`): The methods that act on this model, in their order.
        changed_settings (`dict[str, object]`):
            The fields of [`LPGConfig`] that differ from their defaults; empty for plain
            [`~transformers.TrainingArguments`].
        norms (`list[dict[str, float]]`):
            The mean norms of the gradient and of the deltas at each log, with its `step` and `epoch`.
        class_names (`list[str]`, *optional*): `None` if the model is not a single-label classifier.
        class_counts (`list[int]`, *optional*): Training rows of each class. `None` without a perturbed loss.
        class_accuracy (`list[float]`, *optional*):
            Running training accuracy of each class. `None` if the perturbed loss has not seen a step.
        class_signs (`list[int]`, *optional*):
            1 for a class that is amplified at the last step, -1 for a dampened one, 0 for neither. `None` if no method
            has a sign and a bound per class.
        class_bounds (`list[float]`, *optional*): Bound on the delta of each class; `None` like `class_signs`.
        label_issues (`datasets.Dataset` or [`Unavailable`]): The table of [`LPGTrainer.label_issues`].
        evaluation ([`Evaluation`] or [`Unavailable`]): Labels and predictions of the evaluation set.
    """

    model_name: str
    output_dir: str
    num_steps: int
    active_perturbations: tuple[Perturbation, ...]
    changed_settings: dict[str, object]
    norms: list[dict[str, float]]
    class_names: list[str] | None
    class_counts: list[int] | None
    class_accuracy: list[float] | None
    class_signs: list[int] | None
    class_bounds: list[float] | None
    label_issues: Dataset | Unavailable
    evaluation: Evaluation | Unavailable
