"""What one run of cifar_gpu.py is: its settings, how they are read from a line, and the schedule they give."""

import ast
import math
import re
from dataclasses import dataclass, fields, replace

import torch
from cifar_data import NUM_LABELS, VIEWS, check_task
from cifar_networks import NETWORKS
from torch import Tensor

from lpg_hf import LPGLoss


#: Plain cross-entropy, which does without LPGLoss.
CROSS_ENTROPY = "ce"
#: Short names of chains.
CHAINS = {"auto": ["auto"], "la": ["logit_adjustment"], "gce": ["generalized_cross_entropy"]}


@dataclass(frozen=True)
class RunSettings:
    """
    The settings of one run.

    Args:
        task (`str`): See [`check_task`].
        network (`str`): One of [`NETWORKS`].
        method (`str`): `"ce"`, one of [`CHAINS`], or methods of [`LPGLoss`], with `+` between them.
        epochs (`int`): Passes over the training images.
        seed (`int`): Of weights, batches, crops, and where there is chance in the task, of the task.
        num_train (`int`, *optional*): The first training images only.
        learning_rate (`float`): The largest one.
        momentum (`float`): Of Nesterov.
        weight_decay (`float`): On all parameters.
        batch_size (`int`): Images per step.
        warmup_epochs (`float`): Epochs in which the learning rate rises.
        warmup_steps (`int`, *optional*): The same in steps, in place of `warmup_epochs`.

    Raises:
        ValueError: If task, network or method are unknown, or a number is out of range.
    """

    task: str
    network: str
    method: str
    epochs: int
    seed: int = 0
    num_train: int | None = None
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    warmup_epochs: float = 2.0
    warmup_steps: int | None = None

    def __post_init__(self):
        check_task(self.task)
        if self.network not in NETWORKS:
            raise ValueError(f"Unknown network {self.network!r}. The known ones are {', '.join(NETWORKS)}.")
        for name in ("epochs", "batch_size", "num_train"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1; found {value!r}.")
        for name in ("learning_rate", "momentum", "weight_decay", "warmup_epochs", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be at least 0; found {value!r}.")
        if self.chain is not None:
            LPGLoss(NUM_LABELS, self.chain)  # raises where a method is unknown

    @property
    def chain(self) -> list[str] | None:
        """The chain of LPGLoss; `None` for cross-entropy."""
        if self.method == CROSS_ENTROPY:
            return None
        return CHAINS.get(self.method) or re.split(rf"\+{_OUTSIDE_PARENTHESES}", self.method)

    def __str__(self) -> str:
        """The line that [`read_run`] reads, with all options that differ from the usual ones."""
        parts = [self.task, self.network, self.method, str(self.epochs)]
        for option in fields(self)[4:]:
            value = getattr(self, option.name)
            if value != option.default:
                parts.append(f"{option.name}={value}")
        return ":".join(parts)


_OUTSIDE_PARENTHESES = r"(?![^()]*\))"


def read_run(text: str, defaults: dict[str, float | None]) -> RunSettings:
    """
    Reads `task:network:method:epochs`, and options such as `:seed=1:num_train=20000` behind them.

    Args:
        text (`str`): The line.
        defaults (`dict[str, float | None]`): Options that it need not name.

    Raises:
        ValueError: If it cannot be read, or [`RunSettings`] refuses it.
    """
    required, *options = re.split(rf":(?=[^:()]*=){_OUTSIDE_PARENTHESES}", text)
    parts = re.split(rf":{_OUTSIDE_PARENTHESES}", required)
    if len(parts) != 4 or not parts[3].isdigit():
        raise ValueError(
            f"Cannot read the run {text!r}. Write task:network:method:epochs, such as worst:resnet18:auto:36, and "
            "options such as :seed=1:num_train=20000 behind it."
        )
    values = dict(defaults)
    known = [option.name for option in fields(RunSettings)[4:]]
    for option in options:
        name, _, value = option.partition("=")
        if name not in known:
            raise ValueError(f"The run {text!r} has the unknown option {name!r}. The known ones: {', '.join(known)}.")
        try:
            values[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"The option {option!r} of the run {text!r} must be a number.") from error
    return replace(RunSettings(*parts[:3], int(parts[3])), **values)


def batch_plan(num_rows: int, settings: RunSettings) -> tuple[Tensor, Tensor]:
    """
    Which rows each step sees and how they are cropped, for the whole run. It depends on the seed and not on method,
    network or device.

    Every row comes once per epoch. A batch that an epoch does not fill goes on with the next one; only what the last
    epoch leaves is dropped.

    Args:
        num_rows (`int`): Training rows, n.
        settings ([`RunSettings`]): Their epochs, batch size and seed.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Positions among the rows, and views for [`crop_and_flip`],
        `[steps, batch_size]` each.

    Raises:
        ValueError: If the rows do not fill a batch.
    """
    if num_rows < settings.batch_size:
        raise ValueError(f"{settings}: {num_rows} training rows do not fill a batch of {settings.batch_size}.")
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.cat([torch.randperm(num_rows, generator=generator) for _ in range(settings.epochs)])
    steps = len(order) // settings.batch_size
    shape = (steps, settings.batch_size)
    return order[: math.prod(shape)].view(shape), torch.randint(VIEWS, shape, generator=generator)


def epoch_ends(num_rows: int, settings: RunSettings) -> list[int]:
    """The number of steps after each epoch."""
    return [num_rows * (epoch + 1) // settings.batch_size for epoch in range(settings.epochs)]


def learning_rates(num_rows: int, settings: RunSettings) -> Tensor:
    """
    The learning rate of each step, `[steps]`: half a cosine over the whole run, times a linear warm-up.

    Args:
        num_rows (`int`): Training rows, n.
        settings ([`RunSettings`]): The settings.
    """
    total = epoch_ends(num_rows, settings)[-1]
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = round(settings.warmup_epochs * num_rows / settings.batch_size)
    step = torch.arange(total, dtype=torch.float64)
    rise = ((step + 1) / max(warmup, 1)).clamp(max=1)
    return (settings.learning_rate * rise * (1 + torch.cos(math.pi * step / total)) / 2).float()
