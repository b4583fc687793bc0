r"""
Fine-tunes a video classifier on labels that are noisy, imbalanced, or both. Copy this file and change what you like.

    python examples/video_classification.py                   # nothing is downloaded: moving digits, a small VideoMAE
    python examples/video_classification.py --model_name_or_path MCG-NJU/videomae-base \
        --train_dir train --test_dir test --label_noise 0 --learning_rate 5e-5 --num_train_epochs 4

The folders need one folder per class, with animations (GIF, WebP); `read` is the place for another decoder, such as
PyAV for MP4 files. All arguments of `LPGConfig` and `TrainingArguments` work.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    AutoImageProcessor,
    AutoModelForVideoClassification,
    HfArgumentParser,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    set_seed,
)

from lpg_hf import LPGConfig, LPGTrainer
from lpg_hf.data import add_label_noise, class_counts, make_long_tailed
from lpg_hf.metrics import make_compute_metrics


@dataclass
class ScriptArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Model; without one, a small VideoMAE."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder to train on; without one, moving digits."})
    test_dir: str | None = field(default=None, metadata={"help": "Folder to evaluate on."})
    label_noise: float = field(default=0.3, metadata={"help": "Share of labels to make wrong, to try it out."})
    imbalance_ratio: float = field(default=1.0, metadata={"help": "Cut the training rows to a long tail, likewise."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser([ScriptArguments, LPGConfig])
    # What fits the small model. For a pretrained one pass --learning_rate 5e-5.
    parser.set_defaults(output_dir="video-output", learning_rate=2e-3, num_train_epochs=10, warmup_steps=0.1)
    parser.set_defaults(per_device_train_batch_size=16, remove_unused_columns=False)  # files are read row by row
    parser.set_defaults(save_strategy="no", eval_strategy="epoch", logging_strategy="epoch", report_to=["none"])
    script, args = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)

    # 1. Data: the path of each video, and a label column of the type ClassLabel.
    folders = {"train": script.train_dir, "test": script.test_dir}
    if script.train_dir is None:
        folders = write_moving_digits(Path(args.output_dir))
    dataset = DatasetDict({split: list_files(folder) for split, folder in folders.items() if folder is not None})
    if "test" not in dataset:
        dataset = dataset["train"].train_test_split(0.2, seed=args.seed)
    # One list of names for both splits. A class that only the test split has is an error.
    names = sorted(set(dataset["train"]["label"]))
    dataset = dataset.cast_column("label", ClassLabel(names=names))
    train = dataset["train"]
    if script.imbalance_ratio > 1:
        train = make_long_tailed(train, script.imbalance_ratio, seed=args.seed)
    if script.label_noise > 0:
        train = add_label_noise(train, script.label_noise, seed=args.seed)

    # 2. Model.
    classes = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    if script.model_name_or_path is None:
        size = {"height": 16, "width": 16}
        processor = VideoMAEImageProcessor(size={"shortest_edge": 16}, crop_size=size)
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        config = VideoMAEConfig(image_size=16, patch_size=8, num_frames=8, tubelet_size=2, **sizes, **classes)
        model = VideoMAEForVideoClassification(config)
    else:
        processor = AutoImageProcessor.from_pretrained(script.model_name_or_path)
        model = AutoModelForVideoClassification.from_pretrained(script.model_name_or_path, **classes)

    def to_inputs(batch: dict[str, list]) -> dict[str, object]:
        videos = [read(path, model.config.num_frames) for path in batch["video"]]
        return {"pixel_values": processor(videos, return_tensors="pt")["pixel_values"], "labels": batch["label"]}

    # 3. Training. `--perturbations none` is the plain Trainer.
    trainer = LPGTrainer(
        model=model,
        args=args,
        train_dataset=train.with_transform(to_inputs),
        eval_dataset=dataset["test"].with_transform(to_inputs),
        processing_class=processor,
        compute_metrics=make_compute_metrics(class_counts(train)),
    )
    trainer.train()
    trainer.save_model()

    # 4. Results: metrics, and the videos whose labels are most likely wrong.
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    for issue in trainer.label_issues().select(range(5)):
        row, suggested = train[issue["row"]], names[issue["suggested_label"]]
        print(f"{row['video']} is labeled {names[row['label']]!r}; rather {suggested!r}?")
    return metrics


def list_files(folder: str) -> Dataset:
    paths = sorted(path for path in Path(folder).glob("*/*") if path.is_file())
    return Dataset.from_dict({"video": list(map(str, paths)), "label": [path.parent.name for path in paths]})


def read(path: str, num_frames: int) -> list[np.ndarray]:
    """Frames at equal distances, each of shape `[H, W, 3]`."""
    frames = []
    with Image.open(path) as video:
        for position in np.linspace(0, video.n_frames - 1, num_frames).round().astype(int).tolist():
            video.seek(position)
            frames.append(np.asarray(video.convert("RGB")))
    return frames


def write_moving_digits(folder: Path) -> dict[str, str]:
    """scikit-learn's digits, which move through eight frames in one of four directions: that is the label."""
    shifts = {"down": (1, 0), "left": (0, -1), "right": (0, 1), "up": (-1, 0)}
    for index, digit in enumerate(load_digits().images[:1000]):
        label = list(shifts)[index % 4]
        frame = np.zeros((16, 16), dtype=np.uint8)
        frame[4:12, 4:12] = digit * 15.9
        frames = [
            Image.fromarray(np.roll(frame, (step * shifts[label][0], step * shifts[label][1]), axis=(0, 1)))
            for step in range(-4, 4)
        ]
        path = folder / ("test" if index % 5 == 0 else "train") / label / f"{index:04}.gif"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames[0].save(path, save_all=True, append_images=frames[1:])
    return {split: str(folder / split) for split in ("train", "test")}


if __name__ == "__main__":
    main()
