"""`lpg-hf train KIND`: one training of a text, image, audio or video classifier."""

import sys
from importlib.util import find_spec

from .closest import closest
from .parser import expand_config, parse_arguments
from .run import run
from .task import ClassificationTask


KINDS = ("text", "image", "audio", "video")
# Packages that lpg_hf itself does without, by their name in Python and at `pip install`.
NEEDED = {"text": {}, "image": {"PIL": "pillow"}, "audio": {"soundfile": "soundfile"}, "video": {"PIL": "pillow"}}
HELP = """\
usage: lpg-hf train {text,image,audio,video} [CONFIG.yaml] --output_dir FOLDER [--argument VALUE ...]

Trains a model on texts, images, recordings or videos with one label each, with the arguments of the examples of
transformers and all of its TrainingArguments. `lpg-hf train text` alone shows the arguments that matter.
"""


def load_task(kind: str) -> ClassificationTask:
    """
    Raises:
        ImportError: If a package for this kind of data is not installed.
    """
    missing = [name for module, name in NEEDED[kind].items() if find_spec(module) is None]
    if missing:
        raise ImportError(f"`lpg-hf train {kind}` needs {', '.join(missing)}. Run `pip install {' '.join(missing)}`.")
    # Each loads packages that the others do without.
    if kind == "text":
        from .text import TextClassification

        return TextClassification()
    if kind == "image":
        from .image import ImageClassification

        return ImageClassification()
    if kind == "audio":
        from .audio import AudioClassification

        return AudioClassification()
    from .video import VideoClassification

    return VideoClassification()


def train(kind: str, argv: list[str]) -> dict[str, float]:
    """
    Trains, evaluates and predicts as the arguments say.

    Args:
        kind (`str`): `text`, `image`, `audio` or `video`.
        argv (`list[str]`): The arguments; nothing at all prints a short help.

    Returns:
        `dict[str, float]`: All metrics, which are also in `all_results.json` of the output folder.

    Raises:
        SystemExit: With status 2 for arguments that are unknown, missing or out of range.
        ValueError, OSError: For arguments that fit neither each other nor data nor model.
        ImportError: If a package for this kind of data is not installed.
    """
    task = load_task(kind)
    arguments = parse_arguments(task.data_class, f"lpg-hf train {kind}", task.description, argv)
    return run(task, arguments, expand_config(argv))


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        raise SystemExit(0 if argv else 2)
    if argv[0] not in KINDS:
        print(f"lpg-hf train: error: {closest('kind of data', argv[0], KINDS)}", file=sys.stderr)
        raise SystemExit(2)
    train(argv[0], argv[1:])
