"""Logits under drawn weights, by the fastest way whose logits are those of weights that are really loaded."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import functional_call
from transformers.utils import logging

from ..batch import logits_of
from .loaded_weights import LoadedWeights, same_logits
from .remembered_outputs import RememberedOutputs
from .weight_noise import WeightNoise


logger = logging.get_logger(__name__)

# From fast to certain: swapped weights behind a backbone that runs once, swapped weights, and loaded weights.
_REMEMBERED, _SWAPPED, _LOADED = range(3)
_SLOWER = {_SWAPPED: "The base model runs for every draw", _LOADED: "Every draw is loaded"}


class DrawnLogits:
    """
    Computes logits under drawn weights.

    Swapping the weights in for one forward pass is fast, and so is running a backbone without noise only once. Neither
    is right for every model: a module may keep what it computed from its weights, or take noise on a side way. For
    every batch, one draw is therefore compared with the same draw loaded. From the first difference on, the next
    slower way is taken. The last one loads every draw.

    Args:
        noise ([`WeightNoise`]): Noise of a model in evaluation mode.
        loaded ([`LoadedWeights`]): Of the same model, entered.
    """

    def __init__(self, noise: WeightNoise, loaded: LoadedWeights):
        self.noise = noise
        self._loaded = loaded
        self._backbone = noise.noise_free_backbone()
        self._way = _SWAPPED if self._backbone is None else _REMEMBERED

    @contextmanager
    def on_batch(
        self, inputs: Mapping[str, object], check_weights: Mapping[str, Tensor]
    ) -> Iterator[Callable[[Mapping[str, Tensor]], Tensor]]:
        """
        Context for all draws on one batch.

        Args:
            inputs (`Mapping[str, object]`): Inputs of the model.
            check_weights (`Mapping[str, torch.Tensor]`): Weights of the draw that is compared.

        Yields:
            `Callable`: Computes the logits `[N, C]` from drawn weights.
        """
        expected = self._load_and_run(inputs, check_weights)
        while self._way != _LOADED:
            with self._remembering() as remembered:
                # What is kept or remembered now belongs to the weights without noise.
                self._load_and_run(inputs, self.noise.weights)
                found = self._swap_and_run(inputs, check_weights, remembered)
                if same_logits(found, expected) or self._is_rounding(found, expected, inputs, check_weights):
                    yield lambda weights: self._swap_and_run(inputs, weights, remembered)
                    return
            self._way += 1
            logger.warning(
                f"The logits of {type(self.noise.model).__name__} under swapped weights are not those under loaded "
                "weights, because a module keeps what it computed, or noise passes by the inputs of the base model. "
                f"{_SLOWER[self._way]}, which is slower and changes nothing else."
            )
        yield lambda weights: self._load_and_run(inputs, weights)

    def _is_rounding(
        self, found: Tensor, expected: Tensor, inputs: Mapping[str, object], weights: Mapping[str, Tensor]
    ) -> bool:
        """Whether logits differ as little as those of one draw do on a device that adds up in no fixed order."""
        again = self._load_and_run(inputs, weights)
        variation = (again - expected).abs().max()
        is_small = variation <= torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max()
        return bool(is_small & ((found - expected).abs().max() <= 4 * variation))

    @contextmanager
    def _remembering(self) -> Iterator[RememberedOutputs | None]:
        if self._way != _REMEMBERED or self._backbone is None:
            yield None
            return
        with RememberedOutputs(self._backbone) as remembered:
            yield remembered

    def _swap_and_run(
        self, inputs: Mapping[str, object], weights: Mapping[str, Tensor], remembered: RememberedOutputs | None
    ) -> Tensor:
        if remembered is not None:
            remembered.begin_pass()
        return logits_of(functional_call(self.noise.model, dict(weights), kwargs=dict(inputs)))

    def _load_and_run(self, inputs: Mapping[str, object], weights: Mapping[str, Tensor]) -> Tensor:
        self._loaded.load(weights)
        # The logits of some models lie in memory that the next pass writes to.
        return logits_of(self.noise.model(**inputs)).clone()
