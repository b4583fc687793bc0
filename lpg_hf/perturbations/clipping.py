"""Clipping: no sample pulls harder than a bound."""

from torch import Tensor

from ..functional import clip_delta
from ..statistics import ClassStatistics
from .base import LogitPerturbation, check


class LogitClipping(LogitPerturbation):
    r"""
    Logit-gradient clipping, `delta = (min(1, M/||g_i||) - 1) g_i`: bounds the pull of each sample, wrong labels
    included.

    Source: Menon et al., Can gradient clipping mitigate label noise? (ICLR 2020), applied at the logits.

    Args:
        max_norm (`float`, *optional*, defaults to 0.3):
            The bound M, above 0, in units of a sample's logit gradient (whose norm is at most `sqrt(2)`).

    Raises:
        ValueError: If `max_norm` is not positive.

    Example:

    ```python
    >>> LogitClipping(0.5)
    logit_clipping(max_norm=0.5)

    ```
    """

    name = "logit_clipping"
    rescales = True

    def __init__(self, max_norm: float = 0.3):
        super().__init__()
        check(max_norm > 0, "max_norm", max_norm, "positive")
        self.max_norm = max_norm

    def delta(self, gradient: Tensor, logits: Tensor, labels: Tensor, statistics: ClassStatistics) -> Tensor:
        return clip_delta(gradient, self.max_norm)
