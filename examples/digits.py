"""What the examples on scikit-learn's digits share: the images as `datasets`, a small ResNet, training arguments."""

import numpy as np
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits as load_raw_digits
from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments, set_seed


NUM_LABELS = 10
# The stem of a ResNet shrinks images to a quarter: 8 x 8 would leave 2 x 2, 32 x 32 leaves the 8 x 8 of the data.
IMAGE_SIZE = (32, 32)
BATCH_SIZE = 32


def load_digits(seed: int = 0) -> DatasetDict:
    """1,797 gray images of 10 digits, split 70 : 10 : 20 with the same share of each digit in every part."""
    raw = load_raw_digits()
    images = (raw.images * (255 / 16)).round().astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(NUM_LABELS)])})
    columns = {"image": [PILImage.fromarray(image) for image in images], "label": raw.target}
    dataset = Dataset.from_dict(columns, features=features)

    rest, test = dataset.train_test_split(test_size=0.2, stratify_by_column="label", seed=seed).values()
    train, validation = rest.train_test_split(test_size=0.125, stratify_by_column="label", seed=seed).values()
    return DatasetDict(train=train, validation=validation, test=test)


def to_pixels(batch: dict[str, list]) -> dict[str, list]:
    """The transform of the data sets: images become the `pixel_values` of the model."""
    arrays = [np.asarray(image.resize(IMAGE_SIZE, PILImage.Resampling.BILINEAR)) for image in batch["image"]]
    pixels = torch.from_numpy(np.stack(arrays)[:, None] / np.float32(127.5) - 1)
    return {"pixel_values": list(pixels), "labels": batch["label"]}


def small_resnet(seed: int = 0) -> ResNetForImageClassification:
    """A ResNet of 80,000 parameters with fresh weights, the same for the same seed."""
    set_seed(seed)
    config = ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=NUM_LABELS,
    )
    return ResNetForImageClassification(config)


def training_arguments(
    output_dir: str, seed: int = 0, args_class: type[TrainingArguments] = TrainingArguments, **kwargs
) -> TrainingArguments:
    """Plain arguments: AdamW, one batch size however many processes share it, nothing printed or saved on the way."""
    defaults = {
        "learning_rate": 2e-3,
        "per_device_train_batch_size": BATCH_SIZE // PartialState(cpu=True).num_processes,
        "per_device_eval_batch_size": 512,
        "num_train_epochs": 40,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_find_unused_parameters": False,
    }
    return args_class(output_dir, seed=seed, **(defaults | kwargs))
