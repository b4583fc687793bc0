"""ClassShiftMixin: fits a trained model to data with other class shares."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..class_shares import check_shares
from ..loss import LPGLoss


class ClassShiftMixin(Trainer):
    """Adds `shift_class_shares` to a [`~transformers.Trainer`] whose loss knows the class shares of its logits."""

    # What the bias of the head was moved to since the last training.
    _lpg_shifted_shares: Tensor | None = None

    def _lpg_built_loss(self) -> LPGLoss | None:
        """The perturbed loss of the last training, if there is one."""
        raise NotImplementedError

    def shift_class_shares(self, shares: Sequence[float]) -> None:
        r"""
        Moves the bias of the model's head so that its probabilities fit data with other class shares.

        `auto` trains the logits for class shares a third of the way from those of the evaluation to all classes alike.
        With the true shares of the data, probabilities are calibrated and accuracy is best; with all classes alike,
        balanced accuracy is. One training serves them all. By Bayes' rule, the logits move by
        `log(shares) - log(pi_out)` for the shares `pi_out` that they were trained for.

        Args:
            shares (`Sequence[float]`): Share of each class, up to a factor. A class with 0 counts as the rarest other.

        Raises:
            ValueError: Before training, if the shares do not fit the number of classes, or if the model has no head
                with a bias.

        Example:

        ```python
        >>> from tempfile import mkdtemp
        >>> from datasets import Dataset
        >>> from lpg_hf import LPGTrainer
        >>> from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments

        >>> images = [[[[0.0] * 8] * 8] * 3] * 6
        >>> dataset = Dataset.from_dict({"pixel_values": images, "label": [0, 0, 0, 0, 1, 1]})
        >>> model = ResNetForImageClassification(ResNetConfig(num_labels=2, hidden_sizes=[8], depths=[1]))
        >>> args = TrainingArguments(mkdtemp(), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=1)
        >>> trainer = LPGTrainer(model=model, args=args, train_dataset=dataset, eval_shares=[0.5, 0.5])
        >>> _ = trainer.train()
        {...}
        >>> bias = model.classifier[-1].bias.detach().clone()
        >>> trainer.shift_class_shares([0.9, 0.1])
        >>> print([round(value, 3) for value in (model.classifier[-1].bias - bias).tolist()])
        [1.099, -1.099]

        ```
        """
        loss = self._lpg_built_loss()
        if loss is None:
            raise ValueError("The class shares that the logits are trained for are not known: call `train()` first.")
        wanted = check_shares("shares", shares, loss.num_labels)
        wanted = wanted.clamp(min=wanted[wanted > 0].min())
        trained = loss.statistics.log_output_shares
        before = trained if self._lpg_shifted_shares is None else self._lpg_shifted_shares.log()
        bias = head_bias(self.accelerator.unwrap_model(self.model), loss.num_labels)
        shift = wanted.log().to(before) - before
        with torch.no_grad():
            bias.add_((shift - shift.mean()).to(bias))
        self._lpg_shifted_shares = wanted


def head_bias(model: nn.Module, num_labels: int) -> Tensor:
    """The bias of the layer that makes the logits: the last linear or convolutional one with an output per class."""
    heads = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
        and module.weight.shape[:1] == (num_labels,)
        and "original_module" not in name.split(".")  # the untrained copy that PEFT keeps
    ]
    name, head = heads[-1] if heads else ("", None)
    if head is None or head.bias is None:
        found = f"{name!r} has none" if name else "there is no layer with an output per class"
        raise ValueError(
            f"The head of {type(model).__name__} has no bias that could be moved: {found}. Add `log(shares) - "
            "trainer.lpg_loss.statistics.log_output_shares` to its logits instead."
        )
    return head.bias
