"""Finds models whose logits of a row depend on the other rows of its batch."""

from collections.abc import Mapping

from torch import Tensor, nn

from ..batch import logits_of
from .scope import fork_random_state


# Kernels round differently for batches of other sizes: half precision, also under logits that are float32 again, by up
# to a few percent. Statistics of the batch change much more.
_TOLERANCE = 0.05


def check_rows_do_not_mix(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """
    Refuses a model that predicts otherwise for the first eighth of a batch if the other rows are gone.

    Its errors on rows of one batch are not independent. Inputs that do not all have one entry per row are not divided,
    and a model that draws at random is not compared.

    Args:
        model (`torch.nn.Module`): In evaluation mode.
        inputs (`Mapping[str, torch.Tensor]`): Inputs of one batch.

    Raises:
        ValueError: If the logits differ by more than 5 % of the largest one.
    """
    lengths = {len(value) if isinstance(value, Tensor) and value.ndim > 0 else None for value in inputs.values()}
    num_rows = lengths.pop() if len(lengths) == 1 else None
    if num_rows is None or num_rows < 2:
        return
    few = max(1, num_rows // 8)
    with fork_random_state(model):
        whole, again = (logits_of(model(**inputs)).clone() for _ in range(2))
        alone = logits_of(model(**{name: value[:few] for name, value in inputs.items()}))
    tolerance = _TOLERANCE * whole.abs().max()
    is_random = (whole - again).abs().max() > tolerance
    if not is_random and (difference := (whole[:few] - alone).abs().max()) > tolerance:
        raise ValueError(
            f"The logits of a row depend on the other rows of its batch (they differ by {difference.item():.3g}), so "
            "the errors of these rows are not independent, and cannot be bounded. Normalize each row by itself or by "
            "fixed statistics, or certify with `batch_size=1`."
        )
