"""Tiny models and data sets in folders with the names that the published commands of transformers use."""

import io
import json
from pathlib import Path

import numpy as np
import soundfile
from command_data import NAMES, WORDS, image_model, text_model, write_images
from datasets import Audio, ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from tiny import WAV2VEC2
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification, set_seed


def make_all(root: Path) -> None:
    """Everything that the commands name, seen from the folder `root`."""
    text_model(root / "google-bert" / "bert-base-uncased")
    image_model(root / "google" / "vit-base-patch16-224-in21k")
    speech_model(root / "facebook" / "wav2vec2-base")
    make_reviews(root / "amazon_reviews_multi")
    make_topics(root / "reuters21578")
    make_recordings(root / "superb", "label", "ks")
    make_recordings(root / "common_language", "language", None)
    make_beans(root / "beans")
    write_images(root / "images", 24)


def write_splits(folder: Path, rows: dict[str, Dataset], config: str | None) -> None:
    """Parquet files, and the card that names them where the data set has a config."""
    folder.mkdir(parents=True)
    for split, dataset in rows.items():
        dataset.to_parquet(folder / f"{split}.parquet")
    if config is not None:
        files = [{"split": split, "path": f"{split}.parquet"} for split in rows]
        configs = json.dumps([{"config_name": config, "data_files": files}])
        (folder / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")


def make_reviews(folder: Path) -> None:
    """One to three stars: the word that tells them is in the title, in the body, or in the category."""

    def row(number: int) -> dict:
        stars = number % 3
        parts = ["a", "the", "one"]
        parts[number // 3 % 3] = WORDS[NAMES[stars]]
        return {"stars": 1 + stars, "review_title": parts[0], "review_body": parts[1], "product_category": parts[2]}

    sizes = {"train": 90, "validation": 18, "test": 9}
    write_splits(
        folder, {split: Dataset.from_list([row(n) for n in range(size)]) for split, size in sizes.items()}, "en"
    )


def make_topics(folder: Path) -> None:
    rows = [{"text": "a rose", "topics": ["flowers"]}, {"text": "grass", "topics": ["lawns", "flowers"]}]
    splits = ("train", "test", "unused")
    write_splits(folder, {split: Dataset.from_list(rows) for split in splits}, "ModApte")


def make_recordings(folder: Path, label: str, config: str | None) -> None:
    """Noise that is loud in one class."""

    def recordings(number: int, seed: int) -> Dataset:
        rng = np.random.default_rng(seed)
        rows = {"audio": [], label: [row % 2 for row in range(number)]}
        for row in range(number):
            file = io.BytesIO()
            soundfile.write(file, rng.normal(0, (0.3, 0.02)[row % 2], 4_000), 16_000, format="WAV")
            rows["audio"].append({"bytes": file.getvalue(), "path": None})
        dataset = Dataset.from_dict(rows).cast_column("audio", Audio(decode=False))
        return dataset.cast_column(label, ClassLabel(names=["loud", "soft"]))

    write_splits(folder, {"train": recordings(32, 0), "validation": recordings(8, 1)}, config)


def make_beans(folder: Path) -> None:
    names = ["angular_leaf_spot", "bean_rust", "healthy"]
    features = Features({"image": Image(), "image_file_path": Value("string"), "labels": ClassLabel(names=names)})

    def leaves(number: int, seed: int) -> Dataset:
        rng = np.random.default_rng(seed)
        colors = [(190, 190, 40), (150, 80, 20), (30, 160, 40)]
        pixels = [colors[row % 3] + rng.integers(-25, 25, (16, 16, 3)) for row in range(number)]
        images = [PILImage.fromarray(values.astype(np.uint8)) for values in pixels]
        paths = [f"{row}.jpg" for row in range(number)]
        rows = {"image": images, "image_file_path": paths, "labels": [row % 3 for row in range(number)]}
        return Dataset.from_dict(rows, features=features)

    write_splits(folder, {"train": leaves(36, 0), "validation": leaves(9, 1), "test": leaves(9, 2)}, None)


def speech_model(folder: Path) -> Path:
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    set_seed(0)
    Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**WAV2VEC2)).save_pretrained(folder)
    return folder
