"""Images of any mode with 8 bits per color."""

from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from PIL.Image import Image as Picture


def as_rgb(image: "Picture") -> "Picture":
    """
    The image in red, green and blue. 16 bits become 8, whereas Pillow alone cuts them off at 255: nearly all is white.

    Args:
        image (`PIL.Image.Image`): An image of any mode.

    Raises:
        ValueError: If its pixels have 32 bits and are no numbers from 0 to 255.

    Example:

    ```python
    >>> from PIL import Image
    >>> as_rgb(Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16))).tobytes().hex(" ", 3)
    '000000 010101 ffffff'

    ```
    """
    from PIL import Image as PILImage

    if image.mode.startswith("I;16"):
        image = PILImage.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        low, high = np.asarray(image).min(), np.asarray(image).max()
        is_share = image.mode == "F" and 0 < high <= 1
        if is_share or not (low >= 0 and high <= 255):
            raise ValueError(
                f"its pixels are numbers from {low:g} to {high:g} (mode {image.mode!r}), and which number is white is "
                "not known: save it with 8 or 16 bits"
            )
    return image.convert("RGB")
