"""The Gibbs error: how often the classifier with noise on its weights is wrong, over many draws."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import reduce, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..batch import IGNORE_INDEX
from ..weights_hash import weights_hash
from .checks import check_processes_agree
from .drawn_logits import DrawnLogits
from .loaded_weights import LoadedWeights
from .loading import FingerprintingCollator, MapStyleDataset, count_labels, make_loader, split_labels
from .scope import device_of, parameters_in_scope
from .stale_weights import check_noise_reaches_logits
from .weight_noise import EVALUATION, STREAM_NAMES, WeightNoise


@dataclass(frozen=True)
class GibbsError:
    """
    Error of the randomized classifier on a data set, averaged over draws of the weights.

    Attributes:
        overall (`float`): Share of wrong predictions.
        per_class (`tuple[float, ...]`): Share among the samples of each class; `nan` for a class without samples.
        balanced (`float`): Mean of the classes' errors; `nan` if one of them is.
        draws (`tuple[float, ...]`): Overall error of every draw.
    """

    overall: float
    per_class: tuple[float, ...]
    balanced: float
    draws: tuple[float, ...]


def gibbs_error(
    model: nn.Module,
    dataset: MapStyleDataset,
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
    Measures the error of a classifier with Gaussian noise on its weights, which is the error that [`certify`] bounds.

    Args:
        model (`torch.nn.Module`): Classifier of `transformers`. At the end it is as before.
        dataset: Map-style data set, as for the Trainer.
        sigma (`float`): Standard deviation of the noise, at least 0, such as [`Certificate.sigma`].
        scope (`str`, *optional*, defaults to `"trained"`): Parameters that get noise, as for [`certify`].
        num_draws (`int`, *optional*, defaults to 100): Draws of the weights.
        data_collator (`Callable`, *optional*): As for [`certify`].
        batch_size (`int`, *optional*, defaults to 64): Rows per forward pass.
        seed (`int`, *optional*, defaults to 0): Seed of the draws. [`certify`] never uses the same draws.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide the progress bar.

    Returns:
        [`GibbsError`]

    Raises:
        ValueError: If `scope` selects no parameter, a label is out of range, a module goes on with values of old
            weights, or processes have different weights or rows.
    """
    collator = FingerprintingCollator(model, data_collator)
    loader = make_loader(dataset, collator, batch_size)
    noise = WeightNoise(model, parameters_in_scope(model, scope), seed)
    model_hash = weights_hash(model)
    with evaluation_mode(model), LoadedWeights(model, noise.weights) as loaded:
        class_counts, inputs = count_labels(model, loader)
        check_processes_agree(model_hash, collator.take_reading(), sigma, scope, num_draws, batch_size, seed)
        check_noise_reaches_logits(noise, loaded, inputs)
        drawn = DrawnLogits(noise, loaded)
        errors = count_errors(drawn, loader, len(class_counts), [sigma], num_draws, EVALUATION, disable_tqdm)[0]
    draws = errors.sum(-1) / class_counts.sum()
    per_class = (errors / class_counts).mean(0)
    return GibbsError(draws.mean().item(), tuple(per_class.tolist()), per_class.mean().item(), tuple(draws.tolist()))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients. Afterwards every module is back in its own mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # Writes to tensors of the inference mode are not counted, and what is remembered relies on the count.
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        # Parents come first. By `train`, which some modules override to drop or restore what evaluation left in them.
        for module, is_training in modes.items():
            if module.training != is_training:
                module.train(is_training)
        for module, is_training in modes.items():
            module.training = is_training


def count_errors(
    drawn: DrawnLogits,
    loader: DataLoader,
    num_labels: int,
    sigmas: Sequence[float],
    num_draws: int,
    stream: int,
    disable_tqdm: bool,
) -> Tensor:
    """
    Counts the wrong predictions of each draw at each scale, class by class.

    The data are read once, whatever the number of draws. No draw is stored; its noise is drawn again for every batch.
    Under Accelerate each process takes every n-th draw on all data, so the result does not depend on the number of
    processes. A prediction from logits with a NaN is wrong.

    Args:
        drawn ([`DrawnLogits`]): Logits of a model in evaluation mode.
        loader (`torch.utils.data.DataLoader`): Batches with labels in [0, `num_labels`) or -100.
        num_labels (`int`): Number of classes C.
        sigmas (`Sequence[float]` of length m): Scales. A draw has the same `z` at all of them.
        num_draws (`int`): Number of draws K.
        stream (`int`): Stream that the draws come from.
        disable_tqdm (`bool`): Whether to hide the progress bar.

    Returns:
        `torch.Tensor` of shape `[m, K, C]`: Counts in float64, on the CPU, the same on every process.
    """
    state = PartialState()
    draws = range(state.process_index, num_draws, state.num_processes)
    noise, device = drawn.noise, device_of(drawn.noise.model)
    errors = torch.zeros(len(sigmas), num_draws, num_labels, dtype=torch.float64, device=device)
    progress = tqdm(
        total=len(loader) * len(draws) * len(sigmas),
        desc=f"{STREAM_NAMES[stream]} draws",
        disable=disable_tqdm or not state.is_main_process,
    )
    with progress:
        for batch in loader:
            inputs, labels = split_labels(send_to_device(batch, device))
            valid_mask = labels != IGNORE_INDEX
            check_weights = noise.noisy_weights(noise.sample(stream, state.process_index), max(sigmas))
            with drawn.on_batch(inputs, check_weights) as logits_at:
                for draw in draws:
                    z = noise.sample(stream, draw)
                    for row, sigma in enumerate(sigmas):
                        logits = logits_at(noise.noisy_weights(z, sigma))
                        is_wrong = (logits.argmax(-1) != labels) | logits.isnan().any(-1)
                        errors[row, draw].scatter_add_(0, labels.clamp(min=0), (is_wrong & valid_mask).double())
                        progress.update()
    return reduce(errors.to(state.device), "sum").cpu()
