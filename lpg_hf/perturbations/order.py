"""The order of a chain: what weights samples stands behind the logit adjustment."""

import logging
from collections.abc import Sequence

from .base import Perturbation, SampleReweighting
from .logit_adjustment import LogitAdjustment


logger = logging.getLogger(__name__)


def warn_of_order(methods: Sequence[Perturbation]) -> None:
    """
    Warns of methods that weight samples in front of a logit adjustment.

    Its delta does not depend on the gradient that it gets. Behind a weight it is added in full, also to samples whose
    own gradient has lost its size, and there it outweighs the labels.

    Args:
        methods (`Sequence[Perturbation]`): The chain.
    """
    positions = [position for position, method in enumerate(methods) if isinstance(method, LogitAdjustment)]
    in_front = [method for method in methods[: max(positions, default=0)] if isinstance(method, SampleReweighting)]
    if in_front:
        right = sorted(methods, key=lambda method: any(method is other for other in in_front))
        logger.warning(
            f"{in_front} in front of {methods[positions[-1]]!r} does not weight its delta, which costs accuracy. "
            f"The right order is {right}: `auto` stands for an adjustment and dampening, behind which other weights "
            "go. An adjustment of your own goes in front of `auto`."
        )
