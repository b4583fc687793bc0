r"""
Fine-tunes a classifier of recordings on labels that are noisy, imbalanced, or both. Copy this file and change it.

    python examples/audio_classification.py                   # nothing is downloaded: tones, a small transformer
    python examples/audio_classification.py --model_name_or_path facebook/wav2vec2-base \
        --train_dir train --test_dir test --label_noise 0 --learning_rate 3e-5 --num_train_epochs 5

The folders need one folder per class. All arguments of `LPGConfig` and `TrainingArguments` work. soundfile decodes the
recordings (wav, flac, ogg, mp3); `load_dataset("audiofolder")` does the same where torchcodec is installed.
"""

from dataclasses import dataclass, field
from pathlib import Path

import make_tones
import numpy as np
import soundfile
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from scipy.signal import resample_poly
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    HfArgumentParser,
    set_seed,
)

from lpg_hf import LPGConfig, LPGTrainer
from lpg_hf.data import add_label_noise, class_counts, make_long_tailed
from lpg_hf.metrics import make_compute_metrics


@dataclass
class ScriptArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Model; without one, a small AST."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder to train on; without one, tones."})
    test_dir: str | None = field(default=None, metadata={"help": "Folder to evaluate on."})
    max_seconds: float = field(default=5.0, metadata={"help": "Training takes a random part of longer recordings."})
    label_noise: float = field(default=0.3, metadata={"help": "Share of labels to make wrong, to try it out."})
    imbalance_ratio: float = field(default=1.0, metadata={"help": "Cut the training rows to a long tail, likewise."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser([ScriptArguments, LPGConfig])
    # What fits the small model. For a pretrained one pass --learning_rate 3e-5.
    parser.set_defaults(output_dir="audio-output", learning_rate=2e-3, num_train_epochs=20, warmup_steps=0.1)
    parser.set_defaults(per_device_train_batch_size=16, remove_unused_columns=False)  # files are read row by row
    parser.set_defaults(save_strategy="no", eval_strategy="epoch", logging_strategy="epoch", report_to=["none"])
    script, args = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)

    # 1. Data: the path of each recording, and a label column of the type ClassLabel.
    folders = {"train": script.train_dir, "test": script.test_dir}
    if script.train_dir is None:
        make_tones.main(["--output_dir", str(args.output_dir)])
        folders = {split: f"{args.output_dir}/{split}" for split in ("train", "test")}
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
        extractor = ASTFeatureExtractor(max_length=48, num_mel_bins=64, mean=-4.0, std=4.0)
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        config = ASTConfig(max_length=48, num_mel_bins=64, patch_size=16, **sizes, **classes)
        model = ASTForAudioClassification(config)
    else:
        extractor = AutoFeatureExtractor.from_pretrained(script.model_name_or_path)
        model = AutoModelForAudioClassification.from_pretrained(script.model_name_or_path, **classes)

    def to_inputs(batch: dict[str, list], is_training: bool) -> dict[str, list]:
        waves = [read(path, extractor.sampling_rate) for path in batch["audio"]]
        if is_training:
            waves = [random_part(wave, int(script.max_seconds * extractor.sampling_rate)) for wave in waves]
        inputs = extractor(waves, sampling_rate=extractor.sampling_rate)
        return {name: list(values) for name, values in inputs.items()} | {"labels": batch["label"]}

    # 3. Training. `--perturbations none` is the plain Trainer.
    trainer = LPGTrainer(
        model=model,
        args=args,
        train_dataset=train.with_transform(lambda batch: to_inputs(batch, is_training=True)),
        eval_dataset=dataset["test"].with_transform(lambda batch: to_inputs(batch, is_training=False)),
        processing_class=extractor,
        compute_metrics=make_compute_metrics(class_counts(train)),
    )
    trainer.train()
    trainer.save_model()

    # 4. Results: metrics, and the recordings whose labels are most likely wrong.
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    for issue in trainer.label_issues().select(range(5)):
        row, suggested = train[issue["row"]], names[issue["suggested_label"]]
        print(f"{row['audio']} is labeled {names[row['label']]!r}; rather {suggested!r}?")
    return metrics


def list_files(folder: str) -> Dataset:
    paths = sorted(path for path in Path(folder).glob("*/*") if path.is_file())
    return Dataset.from_dict({"audio": list(map(str, paths)), "label": [path.parent.name for path in paths]})


def read(path: str, rate: int) -> np.ndarray:
    """The mean of the channels at the sampling rate of the model, shape `[T]`."""
    samples, found_rate = soundfile.read(path, dtype="float32", always_2d=True)
    wave = samples.mean(axis=1)
    return wave if found_rate == rate else resample_poly(wave, rate, found_rate).astype("float32")


def random_part(wave: np.ndarray, length: int) -> np.ndarray:
    start = torch.randint(max(1, len(wave) - length + 1), ()).item()
    return wave[start : start + length]


if __name__ == "__main__":
    main()
