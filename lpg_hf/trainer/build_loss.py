"""Builds the LPGLoss of a training from the settings of its Trainer."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

from ..class_names import find_class_indices
from ..loss import LPGLoss
from ..perturbations import ClassWeighting, LabelSmoothing, LogitPerturbation, Perturbation, build_chain
from .compilation import is_compiled, replays_graphs
from .eval_shares import EvalShares, find_eval_shares
from .start_line import start_line


def build_loss(
    trainer: Trainer,
    chain: Sequence[str | Perturbation],
    num_labels: int,
    class_counts: Sequence[int] | None,
    counts_source: str,
    eval_shares: EvalShares,
    loss_corrects: bool,
) -> tuple[LPGLoss, str]:
    """
    Builds the perturbed loss of a training.

    Args:
        trainer ([`~transformers.Trainer`]): Its label smoothing, compilation and class names are used.
        chain (`Sequence[str | Perturbation]`): The chain as the user wrote it.
        num_labels (`int`): Number of classes.
        class_counts (`Sequence[int]`, *optional*): Training samples of each class. `None` if they are being counted.
        counts_source (`str`): Where these counts come from.
        eval_shares (`str`, `Sequence[float]` or `Mapping`): The class shares of the evaluation, as the user gave them.
        loss_corrects (`bool`): Whether the user's loss corrects the class imbalance.

    Returns:
        `tuple[LPGLoss, str]`: The loss, and the line that says what it does.
    """
    base_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    outside: list[LogitPerturbation] = []
    if trainer.label_smoother is not None:
        epsilon = trainer.label_smoother.epsilon
        base_loss = partial(F.cross_entropy, reduction="none", label_smoothing=epsilon)
        # With a factor of 1 no label is left to learn, and `auto` has nothing to take into account.
        outside = [LabelSmoothing(epsilon)] if epsilon < 1 else []
    if loss_corrects:
        outside.append(ClassWeighting())
    methods = build_chain(chain, outside)
    model = trainer.accelerator.unwrap_model(trainer.model)
    class_indices = find_class_indices(num_labels, trainer.train_dataset, model)
    shares, shares_source = find_eval_shares(
        eval_shares, trainer.eval_dataset, num_labels, class_indices, trainer.args.label_names
    )
    for method in logit_methods(methods):
        method.use_label_names(class_indices)
    loss = LPGLoss(num_labels, logit_methods(methods), class_counts, base_loss, shares, managed=True)
    loss.smooths_labels = trainer.label_smoother is not None and trainer.compute_loss_func is None
    if loss_corrects:
        loss.statistics.add_correction(ClassWeighting().log_correction)
    # Another base loss is differentiated by autograd on the way, which a compiled loss cannot do. Where compilation
    # makes CUDA graphs, the loss has its own: what it keeps from step to step must not lie where the next run writes.
    accelerator = trainer.accelerator
    if is_compiled(accelerator) and not replays_graphs(accelerator) and base_loss is None:
        loss.compile(**accelerator.state.dynamo_plugin.to_kwargs())
    return loss, start_line(chain, methods, class_counts, counts_source, shares_source)


def logit_methods(methods: Iterable[object]) -> list[LogitPerturbation]:
    """The methods that perturb the gradient at the logits."""
    return [method for method in methods if isinstance(method, LogitPerturbation)]
