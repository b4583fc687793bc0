"""How the rows of a certificate set reach the model: in a fixed order, with a fingerprint of every row."""

import inspect
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import default_data_collator
from transformers.trainer_utils import RemoveColumnsCollator

from ..batch import IGNORE_INDEX, logits_of
from ..data import LABEL_COLUMNS
from .fingerprints import half_precisions, row_fingerprint
from .scope import device_of, find_pretrained_model
from .sketches import Sketch, Sketcher


class MapStyleDataset(Protocol):
    """Rows by number: a `datasets.Dataset`, a `torch.utils.data.Dataset` with a length, or a list of dictionaries."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Reading:
    """
    One reading of a data set.

    Attributes:
        rows (`list[str]`): Fingerprints of the rows, labels included.
        batches (`list[str]`): Fingerprints of what the collator made of them.
    """

    rows: list[str]
    batches: list[str]


class FingerprintingCollator:
    """
    Collates rows after dropping the columns that the model does not take, as the Trainer does, and fingerprints them.

    Args:
        model (`torch.nn.Module`): Its forward decides which columns stay.
        collator (`Callable`, *optional*): Defaults to [`~transformers.default_data_collator`].

    Attributes:
        inputs (`list[str]`): Fingerprints of the rows since the last [`~FingerprintingCollator.take_reading`], without
            their labels.
        sketches (`list[Sketch | None]`): Sketches of these rows.
        half_precisions (`set[torch.dtype]`): Half precisions that the rows came in.
        seen_columns (`set[str]`): Input columns of the rows.
    """

    def __init__(self, model: nn.Module, collator: Callable | None = None):
        columns = [*inspect.signature(find_pretrained_model(model).forward).parameters, *LABEL_COLUMNS]
        self.inputs: list[str] = []
        self.sketches: list[Sketch | None] = []
        self.half_precisions: set[torch.dtype] = set()
        self.seen_columns: set[str] = set()
        self._reading = Reading([], [])
        self._sketcher = Sketcher()
        self._columns = set(columns)
        self._collate = RemoveColumnsCollator(default_data_collator if collator is None else collator, columns)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        for row in rows:
            inputs, whole = self.fingerprint_row(row)
            self._reading.rows.append(whole)
            self.inputs.append(inputs)
            self.sketches.append(self.sketch_row(row))
            self.half_precisions |= half_precisions({name: row[name] for name in self.input_columns(row)})
        self.seen_columns = self.input_columns(rows[0])
        batch = self._collate(rows)
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.ndim > 0 and len(labels) > len(rows):
            raise ValueError(
                f"`data_collator` made {len(labels)} labels of {len(rows)} rows. Several views of one row are not "
                "independent, and would count as so many rows. Certify with a collator that makes one entry of a row."
            )
        self._reading.batches.append(row_fingerprint(batch))
        return batch

    def input_columns(self, row: Mapping[str, object]) -> set[str]:
        """Columns of a row that the model takes, without the labels."""
        return set(row) & (self._columns - set(LABEL_COLUMNS))

    def fingerprint_inputs(self, row: Mapping[str, object], precision: torch.dtype = torch.float32) -> str:
        """Fingerprint of a row without its labels, see [`row_fingerprint`]."""
        return row_fingerprint({name: row[name] for name in self.input_columns(row)}, precision)

    def fingerprint_row(self, row: Mapping[str, object]) -> tuple[str, str]:
        """Fingerprints of a row without its labels and with them."""
        inputs = self.fingerprint_inputs(row)
        return inputs, inputs + row_fingerprint({name: row[name] for name in LABEL_COLUMNS if name in row})

    def sketch_row(self, row: Mapping[str, object]) -> Sketch | None:
        """Sketch of a row without its labels, see [`Sketcher`]."""
        return self._sketcher.sketch({name: row[name] for name in self.input_columns(row)})

    def take_reading(self) -> Reading:
        """Returns what was read since the last call, and forgets it."""
        reading, self._reading, self.inputs, self.sketches = self._reading, Reading([], []), [], []
        return reading


def make_loader(dataset: MapStyleDataset, collator: FingerprintingCollator, batch_size: int) -> DataLoader:
    """
    Batches in the order of the data set.

    Raises:
        ValueError: If the data set is empty or a stream.
    """
    if not isinstance(dataset, Sized):
        raise ValueError(
            "The data set must be map-style (with a length, and rows by number), because it is read several times in "
            f"the same order; found {type(dataset).__name__}. Load a stream into a `datasets.Dataset` first."
        )
    if len(dataset) == 0:
        raise ValueError("The data set must have rows; found an empty one. Check its split and filters.")
    # Without a generator of its own, a loader takes a number from the global random state at every pass.
    return DataLoader(cast(Dataset, dataset), batch_size=batch_size, collate_fn=collator, generator=torch.Generator())


def split_labels(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """
    Splits a batch into its inputs and its labels `[N]`.

    Raises:
        ValueError: If labels are missing, or are not one integer per sample.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels", None)
    if labels is None:
        raise ValueError(f"The data set has no labels; the collator returned {sorted(inputs)}. Add a column `labels`.")
    if labels.is_floating_point() or labels.numel() != len(labels):
        raise ValueError(
            f"Labels must be one integer per sample; found {labels.dtype} of shape {list(labels.shape)}. Certificates "
            "are for classifiers with a single label."
        )
    return inputs, labels.reshape(-1).long()


def count_labels(model: nn.Module, loader: DataLoader) -> tuple[Tensor, dict[str, Tensor]]:
    """
    Reads all rows once and counts the samples of each class.

    Args:
        model (`torch.nn.Module`): The width of its logits on the first batch is the number of classes C.
        loader (`torch.utils.data.DataLoader`): From [`make_loader`].

    Returns:
        `tuple[torch.Tensor, dict]`: Counts `[C]` in float64, on the CPU, ignored labels left out. Then the inputs of
        the first batch, on the model's device.

    Raises:
        ValueError: If a label is out of range, or all labels are ignored.
    """
    first_inputs: dict[str, Tensor] = {}
    num_labels, found = 0, []
    for batch in loader:
        inputs, labels = split_labels(batch)
        found.append(labels.cpu())
        if num_labels == 0:
            first_inputs = send_to_device(inputs, device_of(model))
            num_labels = logits_of(model(**first_inputs)).shape[-1]
    labels = torch.cat(found)
    labels = labels[labels != IGNORE_INDEX]
    if len(labels) == 0:
        raise ValueError(
            f"The data set has no labeled sample; all labels are {IGNORE_INDEX}. Use rows whose labels are known."
        )
    if labels.min() < 0 or labels.max() >= num_labels:
        raise ValueError(
            f"Labels must lie in [0, {num_labels}), the width of the model's logits, or be {IGNORE_INDEX}; found "
            f"{labels.min().item()} to {labels.max().item()}. Check `num_labels` of the model and the label column."
        )
    return torch.bincount(labels, minlength=num_labels).double(), first_inputs
