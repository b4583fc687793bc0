"""What a loss has learned: saved, loaded, and handed on to another loss of the same training."""

from collections.abc import Mapping

from torch import Tensor

from ..loss import LPGLoss


_COUNTS = "statistics.class_counts"


def state_of(loss: LPGLoss) -> dict[str, Tensor]:
    """The state of the loss. Counts that were given or read are not part of it: they belong to the data."""
    state = dict(loss.state_dict())
    if loss.statistics.counts_are_given:
        del state[_COUNTS]
    return state


def load_into(loss: LPGLoss, tensors: Mapping[str, Tensor]) -> None:
    """
    Loads what [`state_of`] returned. What is missing, or has another shape, stays as it is. Samples that were counted
    are added only where this run counts as well.
    """
    state = loss.state_dict()
    keeps_counts = loss.statistics.counts_are_given
    for name, value in tensors.items():
        if name in state and state[name].shape == value.shape and not (keeps_counts and name == _COUNTS):
            state[name] = value
    loss.load_state_dict(state)


def hand_on(before: LPGLoss, after: LPGLoss) -> None:
    """Gives a loss with other class counts, or another chain, what the one before has learned."""
    after.to(before.statistics.accuracy)
    learned = {repr(method): method.state_dict() for method in before.perturbations}
    for method in after.perturbations:
        if repr(method) in learned:
            method.load_state_dict(learned[repr(method)])
    # Last: the methods are told what follows from them.
    state = before.statistics.state_dict()
    after.statistics.load_state_dict(state | {"class_counts": after.statistics.class_counts})
