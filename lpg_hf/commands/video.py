r"""
Fine-tunes a model on videos with one label each.

A model of the hub and videos on this machine, one folder per class:

    lpg-hf train video --model_name_or_path MCG-NJU/videomae-base --train_dir train \
        --validation_dir test --do_train --do_eval --output_dir output

On several GPUs write `accelerate launch -m lpg_hf.commands` in the place of `lpg-hf`.
Animations (gif, webp, png) are decoded by Pillow, all other videos by PyAV (`pip install av`).
"""

import io
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Video
from PIL import Image as PILImage
from transformers import AutoImageProcessor, AutoModelForVideoClassification, PretrainedConfig

from ..data.pixels import as_rgb
from .arguments import FolderArguments
from .media_files import cast_to_files, check_files, load_labeled_files
from .task import ClassificationTask


ANIMATIONS = {".gif", ".webp", ".png", ".apng"}
SUFFIXES = {*ANIMATIONS, ".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg"}
# PyAV's errors are of these, too.
DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError)


@dataclass
class VideoArguments(FolderArguments):
    video_column_name: str = field(default="video", metadata={"help": "Column of the videos, or of paths to them."})
    num_frames: int | None = field(
        default=None,
        metadata={"help": "Frames of each video, at equal distances (default: as many as the model takes)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"`--num_frames` is {self.num_frames}, but must be at least 1.")


class VideoClassification(ClassificationTask):
    description = __doc__
    kind = "video"
    name = "video-classification"
    data_class = VideoArguments
    auto_model = AutoModelForVideoClassification
    auto_processor = AutoImageProcessor

    def load_folder(self, folder: str, cache_dir: str | None) -> Dataset:
        return load_labeled_files(folder, cache_dir, "video", SUFFIXES, "videos")

    def complete(self, data: VideoArguments, config: PretrainedConfig) -> None:
        if data.num_frames is None:
            settings = config.to_dict()
            data.num_frames = settings.get("num_frames") or settings.get("frames_per_clip") or 16

    def check(self, splits: DatasetDict, data: VideoArguments) -> DatasetDict:
        return cast_to_files(splits, data, "video_column_name", data.video_column_name, Video(decode=False))

    def prepare(self, dataset: Dataset, split: str, processor: Any, data: VideoArguments) -> Dataset:
        check_files(dataset, split, data.video_column_name, find_damage)
        num_frames = data.num_frames
        assert num_frames is not None  # `complete` has set it

        def to_inputs(batch: dict[str, list]) -> dict[str, list]:
            videos = [list(decode(video, num_frames)) for video in batch[data.video_column_name]]
            inputs = dict(processor(videos, return_tensors="pt"))
            return inputs | ({"labels": batch["labels"]} if "labels" in batch else {})

        return dataset.with_transform(to_inputs)


def find_damage(video: dict | None) -> str | None:
    """What is wrong with a file, as far as its beginning tells."""
    if video is None or (video["path"] is None and video["bytes"] is None):
        return "A video is missing (None)"
    if video["bytes"] is None and not Path(video["path"]).exists():
        return f"{describe(video)} is not there"
    if not is_animation(video) and find_spec("av") is None:
        return f"{describe(video)} is no animation, and other videos need PyAV (run `pip install av`)"
    try:
        decode(video, 1)
    except DECODING_ERRORS as error:
        return f"{describe(video)} cannot be decoded ({error})"
    return None


def describe(video: dict) -> str:
    return f"The video {video['path'] or 'without a file name'}"


def source_of(video: dict) -> str | io.BytesIO:
    return video["path"] if video["bytes"] is None else io.BytesIO(video["bytes"])


def is_animation(video: dict) -> bool:
    """By its name, or else by its first bytes."""
    if video["path"] is not None:
        return Path(video["path"]).suffix.lower() in ANIMATIONS
    beginning = video["bytes"][:12]
    return beginning.startswith((b"GIF8", b"\x89PNG")) or beginning[8:] == b"WEBP"


def decode(video: dict, num_frames: int) -> np.ndarray:
    """
    Frames at equal distances, the first and the last among them, as uint8 of shape `[num_frames, H, W, 3]`. A video
    with fewer frames repeats some.
    """
    if not is_animation(video):
        return decode_stream(video, num_frames)
    with PILImage.open(source_of(video)) as image:
        total = getattr(image, "n_frames", 1)
        frames = {}
        for position in positions(total, num_frames):
            image.seek(position)
            frames[position] = np.asarray(as_rgb(image))
    return np.stack([frames[position] for position in positions(total, num_frames)])


def decode_stream(video: dict, num_frames: int) -> np.ndarray:
    """The same by PyAV."""
    import av

    # Else the type of a container for reading depends on whether PyAV is there.
    open_file: Any = av.open
    with open_file(source_of(video)) as container:
        total = sum(1 for _ in container.decode(video=0))
    wanted = positions(total, num_frames)
    with open_file(source_of(video)) as container:
        decoded = enumerate(container.decode(video=0))
        frames = {position: frame.to_ndarray(format="rgb24") for position, frame in decoded if position in wanted}
    return np.stack([frames[position] for position in wanted])


def positions(total: int, number: int) -> list[int]:
    """
    Which of `total` frames stand for a video.

    Example:

    ```python
    >>> positions(10, 4), positions(2, 4)
    ([0, 3, 6, 9], [0, 0, 1, 1])

    ```
    """
    return np.linspace(0, total - 1, number).round().astype(int).tolist()
