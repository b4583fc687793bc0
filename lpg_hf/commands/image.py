r"""
Fine-tunes a model on images with one label each.

A model and a data set of the hub:

    lpg-hf train image --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name AI-Lab-Makerere/beans --image_column_name image --label_column_name labels \
        --do_train --do_eval --output_dir output

A model and images on this machine, one folder per class:

    lpg-hf train image --model_name_or_path path/to/model --train_dir train \
        --validation_dir test --do_train --do_eval --output_dir output

On several GPUs write `accelerate launch -m lpg_hf.commands` in the place of `lpg-hf`.
"""

import io
import math
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, Image, load_dataset
from datasets.utils.file_utils import is_local_path
from PIL import Image as PILImage
from PIL import ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor

from ..data.pixels import as_rgb
from .arguments import FolderArguments
from .load_data import FOLDER_CURE, TRAIN, raise_without_rows, shorten
from .media_files import cast_to_files, check_files
from .task import ClassificationTask


@dataclass
class ImageArguments(FolderArguments):
    image_column_name: str = field(default="image", metadata={"help": "Column of the images, or of paths to them."})
    min_crop_area: float = field(
        default=0.08,
        metadata={
            "help": "Training sees a random part of every image, of at least this share of its area; 1 for all of it."
        },
    )
    random_flip: bool = field(
        default=True, metadata={"help": "Whether training mirrors every other image, left to right."}
    )


class ImageClassification(ClassificationTask):
    description = __doc__
    kind = "image"
    name = "image-classification"
    data_class = ImageArguments
    auto_model = AutoModelForImageClassification
    auto_processor = AutoImageProcessor
    default_model = "google/vit-base-patch16-224-in21k"

    def load_folder(self, folder: str, cache_dir: str | None) -> Dataset:
        # `datasets` would leave their classes out without a word.
        if links := sorted(path.name for path in Path(folder).rglob("*") if path.is_symlink() and path.is_dir()):
            raise ValueError(
                f"{folder} has links to folders, which are not followed: {shorten(links)}. Put the folders themselves "
                "there, or pass a CSV file with the paths of the images and their labels."
            )
        try:
            return load_dataset("imagefolder", data_dir=escape(folder), split="train", cache_dir=cache_dir)
        except ValueError as error:
            raise_without_rows(error, f"There are no images in {folder}. {FOLDER_CURE}")

    def check(self, splits: DatasetDict, data: ImageArguments) -> DatasetDict:
        if not 0 < data.min_crop_area <= 1:
            raise ValueError(f"`--min_crop_area` is {data.min_crop_area}, but must be in (0, 1].")
        # Decoded here rather than by `datasets`, whose error does not say which image it is.
        return cast_to_files(splits, data, "image_column_name", data.image_column_name, Image(decode=False))

    def prepare(self, dataset: Dataset, split: str, processor: BaseImageProcessor, data: ImageArguments) -> Dataset:
        check_files(dataset, split, data.image_column_name, find_damage)

        def to_inputs(batch: dict[str, list]) -> dict[str, list]:
            images = [decode(image) for image in batch[data.image_column_name]]
            if split == TRAIN:
                images = [augment(image, data) for image in images]
            inputs = dict(processor(images, return_tensors="pt"))
            return inputs | ({"labels": batch["labels"]} if "labels" in batch else {})

        return dataset.with_transform(to_inputs)


DECODING_ERRORS = (OSError, ValueError, TypeError, SyntaxError, PILImage.DecompressionBombError)


def find_damage(image: dict | None) -> str | None:
    """What is wrong with a file, as far as its header and its check sums tell."""
    if image is None or (image["path"] is None and image["bytes"] is None):
        return describe(None)
    if image["bytes"] is None and not is_local_path(image["path"]):
        return None
    try:
        with PILImage.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])) as opened:
            opened.verify()
        if opened.mode in ("I", "F"):  # few images are, and their pixels decide
            as_rgb(Image().decode_example(image))
    except DECODING_ERRORS as error:
        return f"{describe(image)} cannot be decoded ({error})"
    return None


def decode(image: dict) -> PILImage.Image:
    """
    Raises:
        ValueError: If it is no image, or damaged; names the file.
    """
    try:
        return as_rgb(Image().decode_example(image))
    except DECODING_ERRORS as error:
        raise ValueError(f"{describe(image)} cannot be decoded ({error}). Repair or remove it.") from error


def describe(image: dict | None) -> str:
    if image is None:
        return "A missing image (None)"
    size = "" if image["bytes"] is None else f" of {len(image['bytes'])} bytes"
    return f"The image {image['path'] or 'without a file name'}{size}"


def augment(image: PILImage.Image, data: ImageArguments) -> PILImage.Image:
    """A random part of the image with sides of at most 4 : 3, mirrored in every other case."""
    image = image.crop(random_box(*image.size, data.min_crop_area))
    return ImageOps.mirror(image) if data.random_flip and torch.rand(()) < 0.5 else image


def random_box(width: int, height: int, min_area: float) -> tuple[int, int, int, int]:
    """
    Left, top, right, bottom of a part of the image: its share of the area uniform in `[min_area, 1]`, the ratio of its
    sides log-uniform in `[3 / 4, 4 / 3]`, its position uniform. The whole image where ten draws do not fit in it.

    PyTorch's generator decides, which the Trainer seeds and restores.
    """
    for _ in range(10 if min_area < 1 else 0):
        share, ratio, x, y = torch.rand(4).tolist()
        area = (min_area + (1 - min_area) * share) * width * height
        root = math.exp((2 * ratio - 1) * math.log(4 / 3) / 2)
        w, h = max(1, round(math.sqrt(area) * root)), max(1, round(math.sqrt(area) / root))
        if w <= width and h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height
