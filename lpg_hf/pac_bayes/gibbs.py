"""The randomised classifier: which parameters get noise, how it is drawn, and how often the draws are wrong."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce, send_to_device
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, default_data_collator
from transformers.trainer_utils import RemoveColumnsCollator

from ..data import LABEL_COLUMNS
from ..loss import IGNORE_INDEX, logits_of
from .rows import row_fingerprint


SCOPES = ("trained", "head", "lora")

# Streams of draws: none of one is among those of another.
SELECTION, CERTIFICATION, EVALUATION = range(3)
_STREAM_NAMES = ("selection", "certification", "evaluation")
_DRAWS_PER_STREAM = 2**28

_LORA_NAMES = ("lora_", "modules_to_save.")


@dataclass(frozen=True)
class GibbsError:
    """
    Error of the randomised classifier on a data set, the mean over draws of the weights.

    Attributes:
        overall (`float`): Share of wrong answers.
        per_class (`tuple[float, ...]`): The same among the samples of each class; `nan` for a class without samples.
        balanced (`float`): Mean of the classes' errors; `nan` if one is.
        draws (`tuple[float, ...]`): Overall error of every draw.
    """

    overall: float
    per_class: tuple[float, ...]
    balanced: float
    draws: tuple[float, ...]


def gibbs_error(
    model: nn.Module,
    dataset: Dataset,
    *,
    sigma: float,
    scope: str = "trained",
    num_draws: int = 100,
    data_collator: Callable | None = None,
    batch_size: int = 64,
    seed: int = 0,
    disable_tqdm: bool = False,
) -> GibbsError:
    """
    Error of a model whose weights carry Gaussian noise: what a certificate speaks of, on any data set.

    Args:
        model (`torch.nn.Module`): Classifier of `transformers`; it stays as it is.
        dataset: Map-style data set, as the Trainer takes it.
        sigma (`float`): Standard deviation of the noise, at least 0, as in [`Certificate.sigma`].
        scope, data_collator, batch_size, disable_tqdm: As for [`certify`].
        num_draws (`int`, *optional*, defaults to 100): Draws of the weights.
        seed (`int`, *optional*, defaults to 0): Of the draws, which are none of those that [`certify`] takes.

    Returns:
        [`GibbsError`]

    Raises:
        ValueError: If `scope` names no parameter, or a label is out of range.
    """
    loader = make_loader(model, dataset, data_collator, batch_size)
    noise = WeightNoise(model, parameters_in_scope(model, scope), seed)
    with evaluating(model):
        class_counts = count_labels(model, loader)
        wrong = count_wrong(noise, loader, len(class_counts), [sigma], num_draws, EVALUATION, disable_tqdm)[0]
    draws = wrong.sum(-1) / class_counts.sum()
    per_class = (wrong / class_counts).mean(0)
    return GibbsError(draws.mean().item(), tuple(per_class.tolist()), per_class.mean().item(), tuple(draws.tolist()))


# Parameters


def parameters_in_scope(model: nn.Module, scope: str) -> list[str]:
    """Names of the parameters that get noise."""
    if scope not in SCOPES:
        raise ValueError(f"`scope` must be one of {', '.join(SCOPES)}; found {scope!r}.")
    if scope == "trained":
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    elif scope == "lora":
        names = [name for name, _ in model.named_parameters() if any(part in name for part in _LORA_NAMES)]
    else:
        backbone = _find_backbone(model)
        if backbone is None:
            raise ValueError(
                f"`scope` 'head' needs a model with a base model inside, and {type(model).__name__} is none. Freeze "
                "what is not the head with `requires_grad_(False)` before training, and use 'trained'."
            )
        in_backbone = {id(parameter) for parameter in backbone.parameters()}
        names = [name for name, parameter in model.named_parameters() if id(parameter) not in in_backbone]
    if not names:
        raise ValueError(
            f"`scope` {scope!r} names no parameter of {type(model).__name__}: `trained` are those that require a "
            "gradient, `head` those outside the base model, `lora` adapters of peft and modules saved beside them."
        )
    return names


def pretrained_model(model: nn.Module) -> nn.Module:
    """The model of `transformers` inside a wrapper such as that of peft; the model itself if there is none."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def _find_backbone(model: nn.Module) -> nn.Module | None:
    """The base model of a model of `transformers` with a head."""
    inner = pretrained_model(model)
    has_head = isinstance(inner, PreTrainedModel) and inner.base_model is not inner
    return inner.base_model if has_head else None


# Data


class FingerprintingCollator:
    """A collator that drops what the model does not take, as the Trainer's, and keeps a fingerprint of each row."""

    def __init__(self, collator: Callable, columns: Sequence[str]):
        self.collate = RemoveColumnsCollator(collator, columns)
        self.columns = set(columns)
        self.inputs: list[str] = []
        self.rows: list[str] = []

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        for row in rows:
            self.rows.append(row_fingerprint({name: value for name, value in row.items() if name in self.columns}))
            self.inputs.append(self.fingerprint_inputs(row))
        self.seen_columns = self.input_columns(rows[0])
        return self.collate(rows)

    def input_columns(self, row: Mapping) -> set[str]:
        """The columns of a row that the model takes, but for the labels."""
        return set(row) & (self.columns - set(LABEL_COLUMNS))

    def fingerprint_inputs(self, row: Mapping) -> str:
        return row_fingerprint({name: row[name] for name in self.input_columns(row)})

    def take_rows(self) -> list[str]:
        """Fingerprints of the rows since the last call, labels included."""
        rows, self.rows, self.inputs = self.rows, [], []
        return rows


def make_loader(model: nn.Module, dataset: Dataset, collator: Callable | None, batch_size: int) -> DataLoader:
    """Batches in the order of the data set, with only those columns that the model takes."""
    if not isinstance(dataset, Sized):
        raise ValueError(
            "The data set must be map-style, with a length and rows by number, so that it can be read again in the "
            f"same order; found {type(dataset).__name__}."
        )
    if len(dataset) == 0:
        raise ValueError("The data set is empty. Check its split and filters.")
    columns = [*inspect.signature(pretrained_model(model).forward).parameters, *LABEL_COLUMNS]
    collator = FingerprintingCollator(default_data_collator if collator is None else collator, columns)
    # Without a generator of its own a loader takes a number from the global random state at every pass.
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collator, generator=torch.Generator())


def split_labels(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of a batch, and its labels as `[N]`."""
    inputs = dict(batch)
    labels = inputs.pop("labels", None)
    if labels is None:
        raise ValueError(f"The data set has no labels: the collator returned {sorted(inputs)}. Add a column `labels`.")
    if labels.is_floating_point() or labels.numel() != len(labels):
        raise ValueError(
            f"Labels must be one integer per sample, as a classifier's; found {labels.dtype} of shape "
            f"{list(labels.shape)}."
        )
    return inputs, labels.reshape(-1).long()


def count_labels(model: nn.Module, loader: DataLoader) -> Tensor:
    """Reads all rows once. Returns the samples of each class, `[C]` in float64, C being the width of the logits."""
    num_labels, found = None, []
    for batch in loader:
        inputs, labels = split_labels(batch)
        found.append(labels.cpu())
        if num_labels is None:
            num_labels = logits_of(model(**send_to_device(inputs, _device(model)))).shape[-1]
    labels = torch.cat(found)
    labels = labels[labels != IGNORE_INDEX]
    if len(labels) == 0:
        raise ValueError(f"The data set has no labelled sample: all labels are {IGNORE_INDEX}.")
    if labels.min() < 0 or labels.max() >= num_labels:
        raise ValueError(
            f"Labels must lie in [0, {num_labels}), the width of the model's logits, or be {IGNORE_INDEX}; found "
            f"{labels.min().item()} to {labels.max().item()}."
        )
    return torch.bincount(labels, minlength=num_labels).double()


# Draws


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training


class WeightNoise:
    """
    Draws of the weights, `w + sigma z` with `z` standard normal, by their number.

    The draws of all streams have seeds of their own, which are not those that a training with `set_seed` uses: a model
    initialised with the same numbers as the noise would not be independent of it.

    Args:
        model (`torch.nn.Module`): It stays as it is.
        names (`Sequence[str]`): Parameters that get noise.
        seed (`int`): Of all draws.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], seed: int):
        self.model = model
        parameters = dict(model.named_parameters())
        self.weights = {name: parameters[name].detach() for name in names}
        self._noisy = {id(parameters[name]) for name in names}
        self._base = int(np.random.SeedSequence(seed).generate_state(1)[0])
        # Reused, since a generator of torch is slow to make.
        self._generator = torch.Generator(_device(model))

    def sample(self, stream: int, draw: int) -> dict[str, Tensor]:
        """The noise `z` of a draw, in float32 or float64; the same for the same number, on devices of one kind."""
        # The CPU's generator looks at 32 bits.
        self._generator.manual_seed((self._base + stream * _DRAWS_PER_STREAM + draw) % 2**32)
        return {
            name: torch.randn(
                weight.shape,
                generator=self._generator,
                device=self._generator.device,
                dtype=torch.promote_types(weight.dtype, torch.float32),
            ).to(weight.device)
            for name, weight in self.weights.items()
        }

    def shifted(self, noise: Mapping[str, Tensor], sigma: float) -> dict[str, Tensor]:
        """The drawn weights, rounded to the type that the model has."""
        return {name: (w + sigma * noise[name]).to(w.dtype) for name, w in self.weights.items()}

    def fixed_backbone(self) -> nn.Module | None:
        """The base model, if it gets no noise: its output is then the same for all draws."""
        backbone = _find_backbone(self.model)
        return None if backbone is None or self._noisy & set(map(id, backbone.parameters())) else backbone


def count_wrong(
    noise: WeightNoise,
    loader: DataLoader,
    num_labels: int,
    sigmas: Sequence[float],
    num_draws: int,
    stream: int,
    disable_tqdm: bool,
) -> Tensor:
    """
    Wrong answers of each draw at each scale, class by class.

    The data are read once however many draws there are, and no draw is kept: its noise is made again for every batch.
    Under Accelerate each process takes every n-th draw on all data, so the result does not depend on their number. An
    answer that is not a number is wrong.

    Args:
        noise ([`WeightNoise`]): Of a model in evaluation mode.
        loader (`torch.utils.data.DataLoader`): Batches with labels in [0, `num_labels`) or -100.
        sigmas (`Sequence[float]` of length m): Scales; a draw has the same noise at all of them, up to the scale.
        num_draws (`int`): K.

    Returns:
        `torch.Tensor` of shape `[m, K, C]`: Counts in float64, on the CPU, the same on every process.
    """
    state = PartialState()
    draws = range(state.process_index, num_draws, state.num_processes)
    model, device, backbone = noise.model, _device(noise.model), noise.fixed_backbone()
    wrong = torch.zeros(len(sigmas), num_draws, num_labels, dtype=torch.float64, device=device)
    progress = tqdm(
        total=len(loader) * len(draws) * len(sigmas),
        desc=f"{_STREAM_NAMES[stream]} draws",
        disable=disable_tqdm or not state.is_main_process,
    )
    with progress:
        for batch in loader:
            inputs, labels = split_labels(send_to_device(batch, device))
            is_labelled = labels != IGNORE_INDEX
            with _remembered(backbone) as rewind:
                for draw in draws:
                    z = noise.sample(stream, draw)
                    for row, sigma in enumerate(sigmas):
                        rewind()
                        logits = logits_of(functional_call(model, noise.shifted(z, sigma), kwargs=inputs))
                        is_wrong = (logits.argmax(-1) != labels) | logits.isnan().any(-1)
                        wrong[row, draw].scatter_add_(0, labels.clamp(min=0), (is_wrong & is_labelled).double())
                        progress.update()
    return reduce(wrong.to(state.device), "sum").cpu()


@contextmanager
def _remembered(backbone: nn.Module | None) -> Iterator[Callable[[], None]]:
    """Within it the backbone runs once and returns the same output again; call what it yields before each forward."""
    if backbone is None:
        yield lambda: None
        return
    forward, outputs, position = backbone.forward, [], 0

    def rewind() -> None:
        nonlocal position
        position = 0

    def remembered_forward(*args, **kwargs):
        nonlocal position
        if position == len(outputs):
            outputs.append(forward(*args, **kwargs))
        position += 1
        # A copy: the layers after it may work in place.
        return copy.deepcopy(outputs[position - 1])

    was_replaced = "forward" in vars(backbone)
    backbone.forward = remembered_forward
    try:
        yield rewind
    finally:
        if was_replaced:
            backbone.forward = forward
        else:
            del backbone.forward


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
