r"""
Fine-tunes a model on recordings with one label each.

A model and a data set of the hub:

    lpg-hf train audio --model_name_or_path facebook/wav2vec2-base \
        --dataset_name superb/superb --dataset_config_name ks --do_train --do_eval --output_dir output

A model and recordings on this machine (wav, flac, ogg, mp3), one folder per class:

    lpg-hf train audio --model_name_or_path path/to/model --train_dir train \
        --validation_dir test --do_train --do_eval --output_dir output

On several GPUs write `accelerate launch -m lpg_hf.commands` in the place of `lpg-hf`.
Recordings are decoded by soundfile, and resampled to what the model was trained on. No ffmpeg is needed.
"""

import io
import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from datasets import Audio, Dataset, DatasetDict
from scipy.signal import resample_poly
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

from .arguments import Arguments, FolderArguments
from .load_data import TRAIN
from .media_files import cast_to_files, check_files, load_labeled_files
from .task import ClassificationTask


DECODING_ERRORS = (OSError, RuntimeError)
# Feature extractors look at windows of 25 ms, as the convolutions of Wav2Vec2 do. Of less, some make an error, others
# no frame at all, or NaN.
MIN_SECONDS = 0.025
# The names of the formats, and what else files of OGG and AIFF are called.
SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats()} | {".opus", ".oga", ".aif"}


@dataclass
class AudioArguments(FolderArguments):
    audio_column_name: str = field(
        default="audio", metadata={"help": "Column of the recordings, or of paths to them."}
    )
    max_length_seconds: float = field(
        default=20.0, metadata={"help": "Training takes a random part of so many seconds of longer recordings."}
    )
    freeze_feature_encoder: bool = field(
        default=True,
        metadata={"help": "Whether the convolutions of a pretrained model like Wav2Vec2 keep their weights."},
    )
    attention_mask: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the model is told which samples are padding (default: what its files say).",
            "nargs": "?",
            "const": True,
        },
    )


class AudioClassification(ClassificationTask):
    description = __doc__
    kind = "audio"
    name = "audio-classification"
    data_class = AudioArguments
    auto_model = AutoModelForAudioClassification
    auto_processor = AutoFeatureExtractor
    default_model = "facebook/wav2vec2-base"

    def processor_settings(self, data: AudioArguments) -> dict[str, Any]:
        return {} if data.attention_mask is None else {"return_attention_mask": data.attention_mask}

    def load_folder(self, folder: str, cache_dir: str | None) -> Dataset:
        return load_labeled_files(folder, cache_dir, "audio", SUFFIXES, "recordings")

    def check(self, splits: DatasetDict, data: AudioArguments) -> DatasetDict:
        if not MIN_SECONDS <= data.max_length_seconds < math.inf:
            raise ValueError(
                f"`--max_length_seconds` is {data.max_length_seconds}, but must be a finite number of at least "
                f"{MIN_SECONDS}, the window of speech models."
            )
        # `datasets` decodes with torchcodec, which needs ffmpeg on the machine.
        return cast_to_files(splits, data, "audio_column_name", data.audio_column_name, Audio(decode=False))

    def prepare(self, dataset: Dataset, split: str, processor: Any, data: AudioArguments) -> Dataset:
        rate = processor.sampling_rate
        max_length = round(data.max_length_seconds * rate)

        check_files(dataset, split, data.audio_column_name, find_damage)

        def to_inputs(batch: dict[str, list]) -> dict[str, list]:
            waves = [decode(recording, rate) for recording in batch[data.audio_column_name]]
            if split == TRAIN:
                waves = [random_part(wave, max_length) for wave in waves]
            inputs = processor(waves, sampling_rate=rate)
            inputs = {name: list(values) for name, values in inputs.items()}
            return inputs | ({"labels": batch["labels"]} if "labels" in batch else {})

        return dataset.with_transform(to_inputs)

    def adapt(self, model: Any, arguments: Arguments, processor: Any) -> None:
        data: Any = arguments.data
        is_pretrained = arguments.model.model_name_or_path is not None
        # Models on spectrograms have no such encoder.
        if is_pretrained and data.freeze_feature_encoder and hasattr(model, "freeze_feature_encoder"):
            model.freeze_feature_encoder()


def find_damage(recording: dict | None) -> str | None:
    """What is wrong with a file, as far as its header tells."""
    if recording is None or (recording["path"] is None and recording["bytes"] is None):
        return "A recording is missing (None)"
    if recording["bytes"] is None and not Path(recording["path"]).exists():
        return f"{describe(recording)} is not there"
    try:
        info = soundfile.info(source_of(recording))
    except DECODING_ERRORS as error:
        return f"{describe(recording)} cannot be decoded ({error})"
    return find_short(recording, info.frames, info.samplerate)


def find_short(recording: dict, samples: int, rate: int) -> str | None:
    if samples < MIN_SECONDS * rate:
        return (
            f"{describe(recording)} is too short ({samples} samples at {rate} per second, but {MIN_SECONDS} s are "
            "needed, the window of speech models)"
        )
    return None


def describe(recording: dict) -> str:
    if recording["path"] is None:
        return f"The recording without a file name ({len(recording['bytes'])} bytes)"
    return f"The recording {recording['path']}"


def source_of(recording: dict) -> str | io.BytesIO:
    return recording["path"] if recording["bytes"] is None else io.BytesIO(recording["bytes"])


def decode(recording: dict, rate: int) -> np.ndarray:
    """
    The mean of the channels, resampled to `rate` per second, as float32 of shape `[T]`.

    Raises:
        ValueError: If it is no recording, damaged or too short; names the file.
    """
    try:
        samples, found_rate = soundfile.read(source_of(recording), dtype="float32", always_2d=True)
    except DECODING_ERRORS as error:
        raise ValueError(f"{describe(recording)} cannot be decoded ({error}). Repair or remove it.") from error
    if short := find_short(recording, len(samples), found_rate):
        raise ValueError(f"{short}. Remove it, or pad it with silence.")
    if not np.isfinite(samples).all():
        raise ValueError(f"{describe(recording)} has samples that are NaN or infinite. Repair or remove it.")
    wave = samples.mean(axis=1)
    if found_rate == rate:
        return wave
    ratio = Fraction(rate, found_rate)
    return resample_poly(wave, ratio.numerator, ratio.denominator).astype(np.float32)


def random_part(wave: np.ndarray, max_length: int) -> np.ndarray:
    """PyTorch's generator decides, which the Trainer seeds and restores."""
    start = torch.randint(max(1, len(wave) - max_length + 1), ()).item()
    return wave[start : start + max_length]
