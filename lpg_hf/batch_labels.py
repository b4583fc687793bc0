"""Where a batch has its labels: under `labels`, or under the one name that the user has given."""

from collections.abc import Mapping, Sequence
from typing import Any


def labels_of(batch: object, label_names: Sequence[str] | None = None) -> Any:
    """
    The labels of a batch, of any type.

    Args:
        batch: The batch. Only a mapping has labels.
        label_names (`Sequence[str]`, *optional*):
            The `label_names` of the `TrainingArguments`. Several names, as in question answering, are no name of class
            labels. Nor is a name that the Trainer guesses: any argument of the model with `label` in it may be one.

    Returns:
        What the batch has under `labels`, or else under the only name; `None` if it has neither.

    Example:

    ```python
    >>> batch = {"target": [0, 1]}
    >>> labels_of(batch), labels_of(batch, ["target"]), labels_of(batch | {"labels": [2, 3]}, ["target"])
    (None, [0, 1], [2, 3])

    ```
    """
    # A dict is asked for first: that takes no call, and this is asked for several times in a step.
    if type(batch) is not dict and not isinstance(batch, Mapping):
        return None
    labels = batch.get("labels")
    if labels is None and (name := only_name(label_names)) is not None:
        labels = batch.get(name)
    return labels


def only_name(label_names: Sequence[str] | None) -> str | None:
    """The name that stands alone; `None` if there is none, or more than one."""
    return label_names[0] if label_names is not None and len(label_names) == 1 else None
