"""CheckpointMixin: the parts of a training that a checkpoint holds, saved and restored where the Trainer does."""

from collections.abc import Sequence

from accelerate.logging import get_logger
from transformers import Trainer

from ..perturbations import Perturbation
from ..perturbations.observers import PerturbationObserver
from .checkpoint import STATE_FILE, SavedState, Stateful, load_state, save_state
from .managed_loss import ManagedLoss
from .parameter_methods import ParameterMethods
from .perturbation_log import PerturbationLog


logger = get_logger(__name__)


class CheckpointMixin(Trainer):
    """Saves and restores the state of the perturbations of a [`~transformers.Trainer`]."""

    _lpg_managed: ManagedLoss
    _lpg_parameter_methods: ParameterMethods
    _lpg_observers: Sequence[PerturbationObserver]
    _lpg_perturbation_log: PerturbationLog
    _lpg_saved_state: SavedState | None

    @property
    def _lpg_perturbs_logits(self) -> bool:
        """Whether the model is a classifier whose logits are perturbed."""
        raise NotImplementedError

    def _lpg_save_rows(self, output_dir: str) -> None:
        """Saves the records of the training rows."""
        raise NotImplementedError

    def _lpg_load_rows(self, checkpoint: str) -> None:
        """Restores the records of the training rows."""
        raise NotImplementedError

    def _lpg_observers_by_prefix(self) -> dict[str, Stateful]:
        names = [type(observer).__name__ for observer in self._lpg_observers]
        numbers = [names[:position].count(name) for position, name in enumerate(names)]
        prefixes = [f"observer.{name}.{number}" for name, number in zip(names, numbers, strict=True)]
        return dict(zip(prefixes, self._lpg_observers, strict=True))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Stateful callbacks have a JSON state, which cannot hold tensors, and `on_save` comes when the checkpoint is
        # complete already. https://github.com/huggingface/transformers/pull/29666, unchanged in 5.24
        super()._save_optimizer_and_scheduler(output_dir)
        parts = self._lpg_observers_by_prefix()
        chains: dict[str, Sequence[Perturbation]] = {}
        facts = {"num_processes": self.accelerator.num_processes, "num_labels": 0, "step": self.state.global_step}
        if self._lpg_perturbs_logits:
            parts["loss"], chains["loss"] = self._lpg_managed, self._lpg_managed.methods
            parts["imbalance"] = self._lpg_managed.watch
            facts["num_labels"] = self._lpg_managed.loss.num_labels
        if len(self._lpg_parameter_methods) > 0:
            parts["parameters"] = self._lpg_parameter_methods
            chains["parameters"] = self._lpg_parameter_methods.methods
        if self._lpg_perturbation_log.norms:
            parts["log"] = self._lpg_perturbation_log
        if parts and self.args.should_save:
            requested = {"loss": self._lpg_managed.requested} if self._lpg_perturbs_logits else {}
            save_state(output_dir, parts, chains, requested, facts)
        self._lpg_save_rows(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._lpg_load_rows(checkpoint)
        saved = self._lpg_saved_state = load_state(checkpoint)
        if saved is None:
            if self._lpg_managed.has_methods or len(self._lpg_parameter_methods) > 0 or self._lpg_observers:
                logger.warning(
                    f"{checkpoint} has no {STATE_FILE}: it was written with `save_only_model`, or without "
                    "perturbations. Their state (class statistics, counters, lengths) starts anew."
                )
            return
        saved.check_step(self.state.global_step)
        for prefix, observer in self._lpg_observers_by_prefix().items():
            saved.restore(observer, prefix)
        saved.restore(self._lpg_perturbation_log, "log")
        saved.check_chain("parameters", self._lpg_parameter_methods.methods, self.accelerator.num_processes)
        saved.restore(self._lpg_parameter_methods, "parameters")
        if not self._lpg_managed.has_methods:
            saved.check_chain("loss", [], self.accelerator.num_processes)
