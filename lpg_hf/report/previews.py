"""Previews of training rows: the thumbnail of an image, the beginning of a text, the file name of a recording."""

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Audio, Dataset, Image

from ..data.pixels import as_rgb
from ..data.row_texts import is_text
from ..safe_text import snippet


if TYPE_CHECKING:
    from PIL.Image import Image as Picture


THUMBNAIL_SIZE = 96
MODEL_INPUTS = ("pixel_values", "input_ids")


def preview(dataset: Any, row: int, tokenizer: Any = None) -> dict[str, str]:
    """
    Shows a row as `{"image": data URI}` or `{"text": snippet}`. The result is empty if there is nothing to see.

    Args:
        dataset: The training set.
        row (`int`): The index of the row.
        tokenizer (*optional*): Decodes rows that have nothing but tokens, if it has a method `decode`.

    Example:

    ```python
    >>> preview([{"text": "the first row", "label": 0}], 0)
    {'text': 'the first row'}

    ```
    """
    item, features = _raw_item(dataset, row)
    if not isinstance(item, Mapping):
        return {}
    for name, value in item.items():
        if isinstance(features.get(name), Audio):
            return {"text": snippet(value["path"])} if value and value["path"] else {}
        if isinstance(features.get(name), Image) or hasattr(value, "thumbnail"):
            image = _decoded(value)
            return {} if image is None else {"image": _data_uri(image)}
    texts = [value for name, value in item.items() if isinstance(value, str) and is_text(features.get(name))]
    if texts:
        return {"text": snippet(max(texts, key=len))}
    if "pixel_values" in item:
        image = _image_of(item["pixel_values"])
        return {} if image is None else {"image": _data_uri(image)}
    if "input_ids" in item and hasattr(tokenizer, "decode"):
        return {"text": snippet(tokenizer.decode(item["input_ids"], skip_special_tokens=True))}
    return {}


def _raw_item(dataset: Any, row: int) -> tuple[Any, dict[str, Any]]:
    """The row before transforms, which may crop, normalize or drop the image or the text."""
    if not isinstance(dataset, Dataset):
        return dataset[row], {}
    # Other columns stay out: decoding a video takes long, and more packages.
    features = dict(dataset.features)
    seen = [name for name in features if name in MODEL_INPUTS or isinstance(features[name], Audio | Image)]
    shown = [*seen, *(name for name in features if name not in seen and is_text(features[name]))]
    if not shown:
        return {}, features
    dataset = dataset.with_format(None).select_columns(shown)
    for name in shown:
        if isinstance(features[name], Audio | Image):
            dataset = dataset.cast_column(name, type(features[name])(decode=False))
    return dataset[row], features


def _decoded(value: Any) -> "Picture | None":
    """The image, decoded from the bytes or the path of its file if needed; `None` if there is none."""
    if not isinstance(value, Mapping):
        return value
    try:
        return Image().decode_example(value)
    except (OSError, ValueError):  # the file has moved, or is not an image
        return None


def _image_of(pixels: object) -> "Picture | None":
    """The image of `pixel_values` `[channels, height, width]`, scaled to the full range; `None` for other shapes."""
    from PIL import Image as PILImage

    array = torch.as_tensor(np.asarray(pixels), dtype=torch.float32)
    if array.ndim != 3 or array.shape[0] not in (1, 3):
        return None
    low, high = array.min(), array.max()
    array = ((array - low) / (high - low).clamp(min=1e-12) * 255).round().byte()
    return PILImage.fromarray(array.permute(1, 2, 0).squeeze(-1).numpy())


def _data_uri(image: "Picture") -> str:
    from PIL import Image as PILImage

    image = as_rgb(image)
    # Small pictures keep their pixels when the page enlarges them.
    scale = THUMBNAIL_SIZE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), PILImage.Resampling.NEAREST if scale > 1 else PILImage.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
