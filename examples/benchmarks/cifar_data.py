"""CIFAR-10 and CIFAR-10N as arrays, and the tasks that are made of them: human noise, symmetric noise, long tails."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from lpg_hf.data import add_label_noise, make_long_tailed


NUM_LABELS = 10
IMAGE_SIZE = 32
PADDING = 4
# Places of a crop, each with its mirror image.
VIEWS = 2 * (2 * PADDING + 1) ** 2
# Of the pixels of the training set, from 0 to 255.
MEAN = (125.3, 123.0, 113.9)
STD = (63.0, 62.1, 66.7)

#: Tasks with labels that are in the file, and the array that has them.
LABEL_ARRAYS = {"clean": "y", "aggregate": "aggre", "random1": "rand1", "worst": "worse"}


@dataclass(frozen=True)
class Cifar:
    """
    The data set on one device.

    Attributes:
        train_images (`torch.Tensor` of shape `[N, 40, 40, 3]`): Normalized, with a margin of zeros.
        test_images (`torch.Tensor` of shape `[M, 32, 32, 3]`): Normalized.
        labels (`dict[str, np.ndarray]`): The labels of the training images by task, `[N]` each.
        test_labels (`np.ndarray` of shape `[M]`): The clean labels of the test images.
    """

    train_images: Tensor
    test_images: Tensor
    labels: dict[str, np.ndarray]
    test_labels: np.ndarray


@dataclass(frozen=True)
class Task:
    """
    What is trained on.

    Attributes:
        rows (`np.ndarray` of shape `[n]`): The training images that take part, as positions in the data set.
        labels (`np.ndarray` of shape `[n]`): Their labels.
        is_wrong (`np.ndarray` of shape `[n]`): Which of the labels are wrong.
    """

    rows: np.ndarray
    labels: np.ndarray
    is_wrong: np.ndarray

    @property
    def class_counts(self) -> list[int]:
        return np.bincount(self.labels, minlength=NUM_LABELS).tolist()


def load_cifar(path: str, device: torch.device, num_test: int | None = None) -> Cifar:
    """
    Reads the file that the docstring of cifar_gpu.py describes.

    Args:
        path (`str`): The npz file.
        device (`torch.device`): Where the images go.
        num_test (`int`, *optional*): Keep the first test images only.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If arrays are missing, or do not fit together.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`data` is {path!r}, which is not a file. See the docstring for how to make it.")
    with np.load(path) as file:
        missing = [name for name in ("x", *LABEL_ARRAYS.values(), "yt") if name not in file.files]
        if missing:
            raise ValueError(f"{path!r} has no array {missing[0]!r}; found {', '.join(file.files)}.")
        images, test_labels = file["x"], file["yt"].astype(np.int64)[:num_test]
        labels = {task: file[name].astype(np.int64) for task, name in LABEL_ARRAYS.items()}
        num_train, total_test = len(labels["clean"]), len(file["yt"])
    expected = (num_train + total_test, IMAGE_SIZE, IMAGE_SIZE, 3)
    if images.shape != expected or images.dtype != np.uint8:
        raise ValueError(
            f"The array 'x' of {path!r} must be uint8 of shape {expected}, the training images before the test "
            f"images; found {images.dtype} of shape {images.shape}."
        )
    for name, values in {**labels, "test": test_labels}.items():
        if len(values) != num_train and name != "test":
            raise ValueError(f"{path!r} has {len(values)} labels {name!r} for {num_train} training images.")
        if values.min() < 0 or values.max() >= NUM_LABELS:
            raise ValueError(f"The labels {name!r} of {path!r} must lie in [0, {NUM_LABELS}).")
    margin = (0, 0, PADDING, PADDING, PADDING, PADDING)
    return Cifar(
        # The margin is zero after normalization.
        F.pad(normalized(images[:num_train], device), margin),
        normalized(images[num_train:][:num_test], device),
        labels,
        test_labels,
    )


def normalized(images: np.ndarray, device: torch.device) -> Tensor:
    """Pixels from 0 to 255 as float32 of mean 0 and standard deviation 1 per channel, the channels last."""
    pixels = torch.from_numpy(images).to(device, torch.float32)
    return pixels.sub_(torch.tensor(MEAN, device=device)).div_(torch.tensor(STD, device=device))


def check_task(name: str) -> None:
    """
    Raises:
        ValueError: If there is no such task.
    """
    match = re.fullmatch(r"(sym|lt)(\d+)", name)
    if name in LABEL_ARRAYS or (match and (0 < int(match[2]) < 100 if match[1] == "sym" else int(match[2]) > 1)):
        return
    raise ValueError(
        f"Unknown task {name!r}. The known ones are {', '.join(LABEL_ARRAYS)}, symR (R % of the labels are replaced, "
        "such as sym40) and ltF (a long tail with F times as many images in the largest class, such as lt100)."
    )


def make_task(cifar: Cifar, name: str, seed: int, num_train: int | None = None) -> Task:
    """
    The rows and labels of a task.

    Args:
        cifar ([`Cifar`]): The data set.
        name (`str`): See [`check_task`].
        seed (`int`): Of the symmetric noise, and of the choice of rows of a long tail.
        num_train (`int`, *optional*): Keep the first training images only, before noise and long tail.

    Raises:
        ValueError: If the name is unknown, or there are fewer training images than `num_train`.
    """
    check_task(name)
    clean = cifar.labels["clean"]
    if num_train is not None and not 0 < num_train <= len(clean):
        raise ValueError(f"`num_train` must lie in [1, {len(clean)}]; found {num_train}.")
    rows, clean = np.arange(len(clean))[:num_train], clean[:num_train]
    if name.startswith("lt"):
        table = Dataset.from_dict({"row": rows, "labels": clean})
        rows = np.array(make_long_tailed(table, int(name[2:]), seed=seed)["row"])
        clean = clean[rows]
        return Task(rows, clean, np.zeros(len(rows), dtype=bool))
    if name.startswith("sym"):
        table = add_label_noise(Dataset.from_dict({"labels": clean}), int(name[3:]) / 100, seed=seed)
        labels = np.array(table["labels"])
    else:
        labels = cifar.labels[name][:num_train]
    return Task(rows, labels, labels != clean)


def crop_and_flip(images: Tensor, rows: Tensor, views: Tensor) -> Tensor:
    """
    Random crops and mirror images, as a few operations on the device that a CUDA graph can hold.

    Args:
        images (`torch.Tensor` of shape `[N, 40, 40, 3]`): Images with their margin.
        rows (`torch.Tensor` of shape `[B]`): Which of them.
        views (`torch.Tensor` of shape `[B]`):
            From 0 to `VIEWS - 1`: the place of the crop, row by row, times two, plus one for the mirror image.

    Returns:
        `torch.Tensor` of shape `[B, 3, 32, 32]`: The images, in the memory format `channels_last`.
    """
    places, offsets = 2 * PADDING + 1, torch.arange(IMAGE_SIZE, device=images.device)
    place, is_mirrored = views // 2, (views % 2 == 1)[:, None]
    y = (place // places)[:, None] + offsets
    x = (place % places)[:, None] + torch.where(is_mirrored, IMAGE_SIZE - 1 - offsets, offsets)
    return images[rows[:, None, None], y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
