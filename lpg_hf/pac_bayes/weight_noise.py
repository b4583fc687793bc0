"""Gaussian noise on the weights: draws that are reproducible by their number."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .scope import device_of, find_backbone


# Streams of draws. No draw of one stream occurs in another.
SELECTION, CERTIFICATION, EVALUATION = range(3)
STREAM_NAMES = ("selection", "certification", "evaluation")
_DRAWS_PER_STREAM = 2**28


class WeightNoise:
    """
    Draws of the weights, `w + sigma z` with `z` standard normal.

    Every draw of every stream has a seed of its own, and none of these seeds is a small integer that a training passes
    to `set_seed`. A model that was initialized with the same random numbers as the noise would depend on it.

    Args:
        model (`torch.nn.Module`): It is not modified.
        names (`Sequence[str]`): Parameters that get noise.
        seed (`int`): All draws follow from it.

    Attributes:
        weights (`dict[str, torch.Tensor]`): Copies of the parameters that get noise, without it.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], seed: int):
        self.model = model
        parameters = dict(model.named_parameters())
        self.weights = {name: parameters[name].detach().clone() for name in names}
        self._noisy_ids = {id(parameters[name]) for name in names}
        self._base = int(np.random.SeedSequence(seed).generate_state(1)[0])
        # Reused, because generators of torch are slow to construct.
        self._generator = torch.Generator(device_of(model))

    def sample(self, stream: int, draw: int) -> dict[str, Tensor]:
        """The noise `z` of a draw, in float32 or float64. One number gives one draw on all devices of one kind."""
        # The CPU's generator reads only 32 bits.
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

    def noisy_weights(self, noise: Mapping[str, Tensor], sigma: float) -> dict[str, Tensor]:
        """The drawn weights, rounded to the dtype of the model."""
        return {name: (w + sigma * noise[name]).to(w.dtype) for name, w in self.weights.items()}

    def noise_free_backbone(self) -> nn.Module | None:
        """The base model if none of its parameters gets noise. Its inputs may still depend on the draw."""
        backbone = find_backbone(self.model)
        if backbone is None or self._noisy_ids & set(map(id, backbone.parameters())):
            return None
        return backbone
