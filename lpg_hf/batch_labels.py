"""Where a batch has its labels: under `labels`, or under the one name that the Trainer was told."""

from collections.abc import Mapping, Sequence
from typing import Any


def labels_of(batch: object, label_names: Sequence[str] = ()) -> Any:
    """
    The labels of a batch, of any type.

    Args:
        batch: The batch. Only a mapping has labels.
        label_names (`Sequence[str]`, *optional*):
            The `label_names` of the Trainer. Several names, as in question answering, are no name of class labels.

    Returns:
        What the batch has under `labels`, or else under the only name; `None` if it has neither.

    Example:

    ```python
    >>> batch = {"target": [0, 1]}
    >>> labels_of(batch), labels_of(batch, ["target"]), labels_of(batch | {"labels": [2, 3]}, ["target"])
    (None, [0, 1], [2, 3])

    ```
    """
    if not isinstance(batch, Mapping):
        return None
    labels = batch.get("labels")
    return batch.get(label_names[0]) if labels is None and len(label_names) == 1 else labels
