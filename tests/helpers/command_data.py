"""Tiny models and data for `lpg-hf train`; the class shows in every row."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    ViTImageProcessor,
    set_seed,
)


WORDS = {"red": "rose", "green": "grass", "blue": "sky"}
COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
NAMES = sorted(WORDS)
TRAIN_ROWS, EVAL_ROWS = 36, 12
QUIET = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--dataloader_pin_memory", "false"]


def words(*values: object) -> list[str]:
    """A command line."""
    return list(map(str, values))


def label_of(row: int) -> str:
    return list(WORDS)[row % 3]


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def text_rows(number: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    fill = ["a", "the", "one", "some"]
    return [
        {"text": f"{rng.choice(fill)} {WORDS[label_of(row)]} {rng.choice(fill)}", "label": label_of(row)}
        for row in range(number)
    ]


def write_images(folder: Path, number: int) -> Path:
    rng = np.random.default_rng(0)
    for row in range(number):
        pixels = np.clip(COLORS[label_of(row)] + rng.integers(-30, 30, (12, 16, 3)), 0, 255).astype(np.uint8)
        path = folder / label_of(row) / f"{row:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def write_videos(folder: Path, number: int) -> Path:
    """Animations of four frames, which get brighter."""
    rng = np.random.default_rng(0)
    for row in range(number):
        path = folder / label_of(row) / f"{row:02}.gif"
        path.parent.mkdir(parents=True, exist_ok=True)
        colors = [np.array(COLORS[label_of(row)]) * (frame + 1) / 4 for frame in range(4)]
        pixels = [np.clip(color + rng.integers(-20, 20, (12, 16, 3)), 0, 255).astype(np.uint8) for color in colors]
        frames = [Image.fromarray(values) for values in pixels]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    return folder


def video_model(folder: Path) -> Path:
    size = {"height": 8, "width": 8}
    VideoMAEImageProcessor(size={"shortest_edge": 8}, crop_size=size).save_pretrained(folder)
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = VideoMAEConfig(image_size=8, patch_size=8, num_frames=4, tubelet_size=2, num_labels=3, **sizes)
    VideoMAEForVideoClassification(config).save_pretrained(folder)
    return folder


def text_model(folder: Path, **config) -> Path:
    words = ["[PAD]", "[UNK]", "a", "the", "one", "some", *WORDS.values()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    fast.save_pretrained(folder)
    set_seed(0)
    settings = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": 0.0,
        "initializer_range": 0.3,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 3,
    }
    BertForSequenceClassification(BertConfig(**settings | config)).save_pretrained(folder)
    return folder


def image_model(folder: Path) -> Path:
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    set_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(folder)
    return folder


def audio_model(folder: Path) -> Path:
    ASTFeatureExtractor(max_length=16, num_mel_bins=16, mean=-4.0, std=4.0).save_pretrained(folder)
    set_seed(0)
    config = ASTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=16,
        num_mel_bins=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=8,
    )
    ASTForAudioClassification(config).save_pretrained(folder)
    return folder
