r"""
Fine-tunes an image classifier on labels that are noisy, imbalanced, or both. Copy this file and change what you like.

    python examples/image_classification.py                   # nothing is downloaded: digits, a small ResNet
    python examples/image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --train_dir train --test_dir test --label_noise 0 --learning_rate 2e-5 --num_train_epochs 3

The folders need one folder per class. All arguments of `LPGConfig` and `TrainingArguments` work.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from lpg_hf import LPGConfig, LPGTrainer
from lpg_hf.data import add_label_noise, class_counts, make_long_tailed
from lpg_hf.metrics import make_compute_metrics


@dataclass
class ScriptArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Model; without one, a small ResNet."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder to train on; without one, digits."})
    test_dir: str | None = field(default=None, metadata={"help": "Folder to evaluate on."})
    flip: bool = field(default=False, metadata={"help": "Mirror every other image; not good for digits."})
    label_noise: float = field(default=0.3, metadata={"help": "Share of labels to make wrong, to try it out."})
    imbalance_ratio: float = field(default=1.0, metadata={"help": "Cut the training rows to a long tail, likewise."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser([ScriptArguments, LPGConfig])
    # What fits the small model. For a pretrained one pass --learning_rate 2e-5.
    parser.set_defaults(output_dir="image-output", learning_rate=2e-3, num_train_epochs=12)
    parser.set_defaults(per_device_train_batch_size=32, remove_unused_columns=False)  # images are read row by row
    parser.set_defaults(save_strategy="no", eval_strategy="epoch", logging_strategy="epoch", report_to=["none"])
    script, args = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)

    # 1. Data: the folders become a label column of the type ClassLabel.
    folders = {"train": script.train_dir, "test": script.test_dir}
    if script.train_dir is None:
        folders = write_digits(Path(args.output_dir))
    files = {split: f"{folder}/**" for split, folder in folders.items() if folder is not None}
    dataset = load_dataset("imagefolder", data_files=files)
    if "test" not in dataset:
        dataset = dataset["train"].train_test_split(0.2, seed=args.seed)
    names = dataset["train"].features["label"].names
    train = dataset["train"]
    if script.imbalance_ratio > 1:
        train = make_long_tailed(train, script.imbalance_ratio, seed=args.seed)
    if script.label_noise > 0:
        train = add_label_noise(train, script.label_noise, seed=args.seed)

    # 2. Model.
    classes = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    if script.model_name_or_path is None:
        processor = ViTImageProcessor(size={"height": 32, "width": 32})
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
        model = ResNetForImageClassification(ResNetConfig(**sizes, **classes))
    else:
        processor = AutoImageProcessor.from_pretrained(script.model_name_or_path)
        model = AutoModelForImageClassification.from_pretrained(script.model_name_or_path, **classes)

    def to_inputs(batch: dict[str, list], is_training: bool) -> dict[str, object]:
        images = [image.convert("RGB") for image in batch["image"]]
        if is_training and script.flip:
            images = [ImageOps.mirror(image) if torch.rand(()) < 0.5 else image for image in images]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": batch["label"]}

    # 3. Training. `--perturbations none` is the plain Trainer.
    trainer = LPGTrainer(
        model=model,
        args=args,
        train_dataset=train.with_transform(lambda batch: to_inputs(batch, is_training=True)),
        eval_dataset=dataset["test"].with_transform(lambda batch: to_inputs(batch, is_training=False)),
        processing_class=processor,
        compute_metrics=make_compute_metrics(class_counts(train)),
    )
    trainer.train()
    trainer.save_model()

    # 4. Results: metrics, and the images whose labels are most likely wrong.
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    for issue in trainer.label_issues().select(range(5)):
        label, suggested = names[train[issue["row"]]["label"]], names[issue["suggested_label"]]
        print(f"row {issue['row']} is labeled {label!r}; rather {suggested!r}?")
    return metrics


def write_digits(folder: Path) -> dict[str, str]:
    """scikit-learn's handwritten digits as PNG files, one folder per digit."""
    digits = load_digits()
    for index, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("test" if index % 5 == 0 else "train") / str(digit) / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).save(path)
    return {split: str(folder / split) for split in ("train", "test")}


if __name__ == "__main__":
    main()
