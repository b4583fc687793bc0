"""Tiny models of every family under test, with batches made for them."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from lpg_hf import LPGLoss


NUM_LABELS = 4
TEXT, IMAGE, AUDIO = "text", "image", "audio"

TRANSFORMER = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 16}
WAV2VEC2 = TRANSFORMER | {
    "conv_dim": (8, 8),
    "conv_kernel": (4, 4),
    "conv_stride": (4, 4),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
}


def _with_small_head(model: nn.Module) -> nn.Module:
    """Older transformers, 5.12 among them, leave the larger initial weights of PyTorch in the head of a ResNet."""
    for module in model.classifier.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return model


MODELS: dict[str, tuple[str, Callable[[float], nn.Module]]] = {
    "bert": (
        TEXT,
        lambda dropout: BertForSequenceClassification(
            BertConfig(
                **TRANSFORMER,
                vocab_size=30,
                max_position_embeddings=16,
                num_labels=NUM_LABELS,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
        ),
    ),
    "distilbert": (
        TEXT,
        lambda dropout: DistilBertForSequenceClassification(
            DistilBertConfig(
                vocab_size=30,
                max_position_embeddings=16,
                dim=16,
                hidden_dim=32,
                n_layers=1,
                n_heads=2,
                num_labels=NUM_LABELS,
                dropout=dropout,
                attention_dropout=dropout,
                seq_classif_dropout=dropout,
            )
        ),
    ),
    "vit": (
        IMAGE,
        lambda dropout: ViTForImageClassification(
            ViTConfig(**TRANSFORMER, image_size=8, patch_size=4, num_labels=NUM_LABELS, hidden_dropout_prob=dropout)
        ),
    ),
    "resnet": (
        IMAGE,
        lambda dropout: _with_small_head(
            ResNetForImageClassification(
                ResNetConfig(
                    embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=NUM_LABELS
                )
            )
        ),
    ),
    "convnext": (
        IMAGE,
        lambda dropout: ConvNextForImageClassification(
            ConvNextConfig(
                hidden_sizes=[8, 8],
                depths=[1, 1],
                num_stages=2,
                patch_size=2,
                image_size=8,
                num_labels=NUM_LABELS,
                drop_path_rate=dropout,
            )
        ),
    ),
    "wav2vec2": (
        AUDIO,
        lambda dropout: Wav2Vec2ForSequenceClassification(
            Wav2Vec2Config(
                **WAV2VEC2,
                num_labels=NUM_LABELS,
                hidden_dropout=dropout,
                attention_dropout=dropout,
                feat_proj_dropout=dropout,
                final_dropout=dropout,
                activation_dropout=dropout,
            )
        ),
    ),
}


def make_model(name: str, *, exact: bool = False, seed: int = 0) -> nn.Module:
    """
    A tiny model. `exact`: float64, no dropout and BatchNorm frozen, so that equalities hold to rounding, with a head
    that makes it confident (and often wrong), so that every method has something to do.
    """
    torch.manual_seed(seed)
    model = MODELS[name][1](0.0 if exact else 0.1)
    if exact:
        model = model.double()
        with torch.no_grad():
            for parameter in model.classifier.parameters():
                parameter.mul_(30)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                module.train = lambda mode=True, module=module: module
    return model


def make_batch(name: str, size: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Inputs and imbalanced labels, the class visible in the inputs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor([0.55, 0.25, 0.15, 0.05]), size, replacement=True, generator=generator)
    kind = MODELS[name][0]
    if kind == TEXT:
        input_ids = torch.randint(0, 30, (size, 6), generator=generator)
        input_ids[:, 1] = labels + 1
        return {"input_ids": input_ids, "labels": labels}
    shape = (size, 3, 8, 8) if kind == IMAGE else (size, 64)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) + labels.view(-1, *[1] * (len(shape) - 1))
    return {("pixel_values" if kind == IMAGE else "input_values"): values.to(dtype), "labels": labels}


def make_confident_model(name: str, *, dtype: torch.dtype = torch.float64, centered: float = 1.0) -> nn.Module:
    """
    An exact model that looks at its inputs, and is often wrong with confidence. `centered` in [0, 1] says how much of
    what all samples have in common is taken from its logits: with all of it taken, it is wrong about some samples of a
    class more than about others, which is what dampening acts on, but rounding counts for more.
    """
    model = make_model(name, exact=True)
    with torch.no_grad():
        for parameter in model.base_model.parameters():
            # Frozen BatchNorm does not undo the factor, which would explode from layer to layer.
            parameter.mul_(5 if parameter.ndim > 1 and name != "resnet" else 1)
        logits = model.train()(**make_batch(name, 72, dtype=torch.float64)).logits
        *_, bias = model.classifier.parameters()
        bias.sub_(centered * logits.mean(0))
        spread = (logits - centered * logits.mean(0)).std()
        for parameter in model.classifier.parameters():
            parameter.mul_(1.2 / spread)
    return model.to(dtype)


def make_noisy_batch(name: str, size: int, *, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A batch in which a third of the labels is that of the next class."""
    batch = make_batch(name, size, dtype=dtype)
    batch["labels"][::3] = (batch["labels"][::3] + 1) % NUM_LABELS
    return batch


def split(batch: dict[str, torch.Tensor], sizes: list[int]) -> list[dict[str, torch.Tensor]]:
    """Cuts a batch into consecutive pieces of the given sizes."""
    pieces = [
        dict(zip(batch, parts, strict=True)) for parts in zip(*[v.split(sizes) for v in batch.values()], strict=True)
    ]
    return pieces


def make_trainer(
    trainer_class: type[Trainer],
    model: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    output_dir: object,
    *,
    args_class: type[TrainingArguments] = TrainingArguments,
    args: dict | None = None,
    **kwargs,
) -> Trainer:
    """A trainer whose data loader hands out the ready-made micro-batches in their order, one per forward pass."""
    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 1,
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    return trainer_class(
        model=model,
        args=args_class(**(settings | (args or {}))),
        train_dataset=batches,
        data_collator=lambda rows: rows[0],
        **kwargs,
    )


def flat_parameters(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def class_means(loss: LPGLoss) -> torch.Tensor:
    """All that a loss has measured of each class: running means, sums of this epoch, and means of those before."""
    statistics = loss.statistics
    return torch.cat([statistics._running, statistics._epoch_sums, statistics._epoch_means])
