"""Loads drawn weights into a model as a checkpoint is loaded, and puts everything back afterwards."""

from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor, nn


class LoadedWeights:
    """
    Loads weights into a model so that nothing computed from other weights survives.

    Some modules keep what they compute from their weights, such as the attention biases of LeViT. They drop it when
    training starts or when a checkpoint is loaded, so both happen here. This way of setting the weights is slow, and
    the reference for every faster one.

    On leaving the context, the weights, the buffers, and what modules keep are those of the model again.

    Args:
        model (`torch.nn.Module`): The model, in evaluation mode.
        weights (`Mapping[str, torch.Tensor]`): Copies of the parameters that will be replaced, by their name.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]):
        self._model = model
        self._weights = weights
        parameters = dict(model.named_parameters())
        self._parameters = {name: parameters[name] for name in weights}
        self._buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]] = []

    def __enter__(self) -> "LoadedWeights":
        self._buffers = [
            (module, name, buffer, None if buffer is None else buffer.clone())
            for module in self._model.modules()
            for name, buffer in module._buffers.items()
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A forward pass may have written to buffers, or replaced them.
        for module, name, buffer, content in self._buffers:
            if buffer is not None and content is not None:
                buffer.copy_(content)
            module._buffers[name] = buffer
        self.load(self._weights)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Loads weights of the same names, and leaves the model in evaluation mode."""
        self._model.train()
        self._model.load_state_dict(dict(weights), strict=False)
        for name, weight in weights.items():
            # A hook may rename what is loaded.
            self._parameters[name].copy_(weight)
        # Autocast keeps its casts of the parameters until its context ends, whatever is written to them meanwhile.
        torch.clear_autocast_cache()
        self._model.eval()


def same_logits(first: Tensor, second: Tensor) -> bool:
    """Whether two matrices of logits are the same, bit for bit; NaN is the same as NaN."""
    return torch.allclose(first, second, rtol=0.0, atol=0.0, equal_nan=True)
