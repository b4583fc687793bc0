"""ResumableTrainer: works around what stops transformers' Trainer from resuming exactly. It does not know of LPG."""

import inspect
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput
from transformers.utils import SAFE_WEIGHTS_NAME

from .complete_checkpoints import is_damaged, last_complete_checkpoint
from .output_lock import sole_writer


class ResumableTrainer(Trainer):
    """
    A [`~transformers.Trainer`] that resumes from the newest complete checkpoint. Incomplete checkpoints are skipped.

    Every override works around a behavior that transformers 5.24 still has. Remove it when the oldest supported
    version no longer needs it.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Trains as [`~transformers.Trainer.train`] does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                The folder of a complete checkpoint, or `True` for the newest complete one in `output_dir`.
            args, kwargs: The other arguments of [`~transformers.Trainer.train`].

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: Steps, mean loss and metrics of the training.

        Raises:
            ValueError: If the checkpoint is damaged, or if there is no complete one.
            RuntimeError: If another training writes its checkpoints to `output_dir`.
            FileNotFoundError: If a folder holds a model, but not the state of a training, as `save_model` writes it.
        """
        # `Trainer` of 5.24 resumes from the newest folder even if it is incomplete, and fails.
        # https://github.com/huggingface/transformers/issues/35782, requested in issues/35525
        # Where there is nothing to resume from, its own messages say so.
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir)) or True
        elif resume_from_checkpoint and is_damaged(resume_from_checkpoint):
            raise ValueError(
                f"{resume_from_checkpoint} is not a complete checkpoint: its {TRAINER_STATE_NAME} is damaged. Pass an "
                "older checkpoint, or `resume_from_checkpoint=True` for the newest complete one."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # Checkpoints of 5.24 go straight into their folders, and old ones are deleted by their names: two trainings
        # with one `output_dir` mix theirs without a word. No upstream thread.
        if self.args.save_strategy == SaveStrategy.NO:
            return super()._inner_training_loop(*args, **kwargs)
        with sole_writer(self._get_output_dir(kwargs.get("trial")), self.accelerator):
            return super()._inner_training_loop(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # 5.24 writes straight into the final folder. If an earlier run left a `trainer_state.json` there, which is
        # written last, an interrupted save would look complete. A temporary folder, as in
        # https://github.com/huggingface/transformers/pull/27820, would make this needless.
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # In 5.24 the main process writes `trainer_state.json` without waiting for the random states of the others, so
        # a checkpoint could look complete without them. No upstream thread; pull/11620 fixed the opposite race.
        self.accelerator.wait_for_everyone()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The loop of 5.24 compares `global_step` with `max_steps` only after a step. If the checkpoint was written at
        # the last step, within an epoch, the resumed training would take one step too many. No upstream thread.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._lpg_reload_renamed_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._lpg_reload_renamed_weights(self.state.best_model_checkpoint)

    def _lpg_reload_renamed_weights(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            reload_renamed_weights(self.accelerator.unwrap_model(self.model), checkpoint)


def reload_renamed_weights(model: nn.Module, checkpoint: str | Path) -> None:
    """
    Loads the weights of a checkpoint that are not found under the names of the model's parameters.

    transformers 5.24 saves some models (ViT among them) under older names. Its Trainer looks for the names of the
    parameters, warns, and continues with fresh weights. `from_pretrained` finds them, but it makes only models whose
    constructor needs no more than a config. Others stay as the Trainer left them.
    https://github.com/huggingface/transformers/issues/43701 and issues/48805 are open.

    Args:
        model (`torch.nn.Module`): The model, unwrapped.
        checkpoint (`str` or `Path`): The folder of the checkpoint.
    """
    path = Path(checkpoint) / SAFE_WEIGHTS_NAME
    if not isinstance(model, PreTrainedModel) or not path.is_file():
        return
    try:
        inspect.signature(type(model)).bind(model.config)
    except TypeError:  # the constructor needs more than a config
        return
    with safe_open(path, framework="pt") as file:
        saved = set(file.keys())
    state = model.state_dict(keep_vars=True)
    # A tied weight is saved once, under one of its names.
    found = {id(tensor) for name, tensor in state.items() if name in saved}
    missing = [name for name, tensor in state.items() if name not in saved and id(tensor) not in found]
    if not missing or saved.issubset(state):
        return
    found_model: Any = type(model).from_pretrained(
        checkpoint, config=model.config, dtype=model.dtype, ignore_mismatched_sizes=True, output_loading_info=True
    )
    saved_model, info = found_model
    loaded = saved_model.state_dict()
    not_loaded = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    renamed = {name: loaded[name] for name in missing if name in loaded and name not in not_loaded}
    model.load_state_dict(renamed, strict=False)
