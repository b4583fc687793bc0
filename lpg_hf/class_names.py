"""What classes are called: in the data, or else by the model."""

from torch import nn

from .data.labels import label_names
from .safe_text import unique_names


def find_class_names(num_labels: int, dataset: object, model: nn.Module) -> list[str]:
    """
    Names the classes as the data set does, or else as the model does. Names that occur twice get their number.

    Args:
        num_labels (`int`): Number of classes.
        dataset: Rows with labels. A [`~datasets.Dataset`] may have a column of the type `ClassLabel`.
        model (`torch.nn.Module`): The model, unwrapped. Its config may have `id2label`.

    Example:

    ```python
    >>> from datasets import ClassLabel, Dataset, Features
    >>> dataset = Dataset.from_dict({"label": [0, 1]}, features=Features({"label": ClassLabel(names=["ant", "bee"])}))
    >>> find_class_names(2, dataset, nn.Linear(1, 2))
    ['ant', 'bee']
    >>> find_class_names(2, None, nn.Linear(1, 2))
    ['0', '1']

    ```
    """
    names = label_names(dataset)
    if len(names) < num_labels:
        config = getattr(model, "config", None)
        id2label = getattr(config, "id2label", None) or {}
        names = [str(id2label.get(label, label)) for label in range(num_labels)]
    return unique_names(names[:num_labels])


def find_class_indices(num_labels: int, dataset: object, model: nn.Module) -> dict[str, int]:
    """
    The index of every name that a class goes by, in the data or in the model's config. Where the two disagree, those
    of the data count, whose labels are trained on.

    Args:
        num_labels, dataset, model: As for [`find_class_names`].

    Example:

    ```python
    >>> from datasets import ClassLabel, Dataset, Features
    >>> from transformers import BertConfig, BertModel
    >>> dataset = Dataset.from_dict({"label": [0, 1]}, features=Features({"label": ClassLabel(names=["ant", "bee"])}))
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    >>> model = BertModel(BertConfig(id2label={0: "bee", 1: "wasp"}, label2id={"bee": 0, "wasp": 1}, **sizes))
    >>> find_class_indices(2, dataset, model)
    {'bee': 1, 'wasp': 1, 'ant': 0}

    ```
    """
    config = getattr(model, "config", None)
    indices: dict[str, int] = dict(getattr(config, "label2id", None) or {})
    # transformers does not derive `label2id` from an `id2label` that was set.
    for source in (None, dataset):
        indices |= {name: index for index, name in enumerate(find_class_names(num_labels, source, model))}
    return indices
