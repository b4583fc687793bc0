"""The models of the benchmark, and how each is trained: with one optimizer, until it memorizes or not that far."""

from dataclasses import dataclass

import torch
from accuracy_data import FEATURES, PIXELS, PROCESSED, Source
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.resnet.modeling_resnet import ResNetConvLayer


OPTIMIZERS = {"sgd": "sgd", "adamw": "adamw_torch"}
PACES = ("memorize", "slow")
MLP, RESNET, RESNET32, VIT = "mlp", "resnet", "resnet32", "vit"
FINE_TUNING = "fine-tuning"


@dataclass(frozen=True)
class Recipe:
    """How one model is trained; the same for every method."""

    learning_rate: float
    epochs: int
    batch_size: int
    hidden_size: int | None = None


# Found on training-side data of the digits and banking77 (README.md): `memorize` fits a good part of 40 % wrong
# labels, `slow` hardly begins to.
RECIPES = {
    (MLP, "sgd", "memorize"): Recipe(0.2, 20, 128, 256),
    (MLP, "sgd", "slow"): Recipe(0.1, 10, 128, 64),
    (MLP, "adamw", "memorize"): Recipe(1e-2, 20, 128, 256),
    (MLP, "adamw", "slow"): Recipe(3e-3, 10, 128, 64),
    (RESNET, "sgd", "memorize"): Recipe(0.1, 40, 64),
    (RESNET, "sgd", "slow"): Recipe(0.02, 10, 64),
    (RESNET, "adamw", "memorize"): Recipe(2e-3, 40, 64),
    (RESNET, "adamw", "slow"): Recipe(5e-4, 10, 64),
    (RESNET32, "sgd", "memorize"): Recipe(0.1, 30, 128),
    (RESNET32, "sgd", "slow"): Recipe(0.02, 15, 128),
    (RESNET32, "adamw", "memorize"): Recipe(2e-3, 30, 128),
    (RESNET32, "adamw", "slow"): Recipe(5e-4, 15, 128),
    (VIT, "sgd", "memorize"): Recipe(0.1, 60, 64),
    (VIT, "sgd", "slow"): Recipe(0.02, 20, 64),
    (VIT, "adamw", "memorize"): Recipe(1e-3, 60, 64),
    (VIT, "adamw", "slow"): Recipe(3e-4, 20, 64),
    (FINE_TUNING, "sgd", "memorize"): Recipe(3e-2, 10, 32),
    (FINE_TUNING, "sgd", "slow"): Recipe(1e-2, 4, 32),
    (FINE_TUNING, "adamw", "memorize"): Recipe(1e-4, 10, 32),
    (FINE_TUNING, "adamw", "slow"): Recipe(5e-5, 4, 32),
}


def recipe(model: str, optimizer: str, pace: str) -> Recipe:
    family = model if model in (MLP, RESNET, RESNET32, VIT) else FINE_TUNING
    return RECIPES[family, optimizer, pace]


def feed_of(model: str) -> str:
    """What a model takes: features, pixels, or what the processor of its checkpoint makes."""
    return {MLP: FEATURES, RESNET: PIXELS, RESNET32: PIXELS, VIT: PIXELS}.get(model, PROCESSED)


class MLPConfig(PreTrainedConfig):
    """One hidden layer on vectors of `input_size` numbers."""

    model_type = "feature_mlp"

    def __init__(self, input_size: int = 64, hidden_size: int = 256, **kwargs):
        super().__init__(**kwargs)
        self.input_size = input_size
        self.hidden_size = hidden_size


class MLPForSequenceClassification(PreTrainedModel):
    """The head that is trained on frozen features, as a model that Trainer takes."""

    config_class = MLPConfig

    def __init__(self, config: MLPConfig):
        super().__init__(config)
        self.hidden = nn.Linear(config.input_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    def forward(self, features: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.classifier(F.relu(self.hidden(features)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def build_model(name: str, source: Source, hidden_size: int | None, seed: int) -> PreTrainedModel:
    """A model with the weights that belong to `seed`."""
    set_seed(seed)
    labels = {"num_labels": source.num_labels}
    if name == MLP:
        return MLPForSequenceClassification(
            MLPConfig(input_size=source.inputs["features"].shape[1], hidden_size=hidden_size, **labels)
        )
    if name in (RESNET, RESNET32):
        return _small_image_resnet(source.inputs["pixel_values"].shape[1], 1 if name == RESNET else 5, labels)
    if name == VIT:
        channels, size = source.inputs["pixel_values"].shape[1:3]
        config = ViTConfig(
            image_size=size,
            patch_size=max(size // 8, 1),
            num_channels=channels,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **labels,
        )
        return ViTForImageClassification(config)
    auto = AutoModelForSequenceClassification if "input_ids" in source.inputs else AutoModelForImageClassification
    return auto.from_pretrained(name, dtype=torch.float32, ignore_mismatched_sizes=True, **labels)


def _small_image_resnet(num_channels: int, depth: int, labels: dict[str, int]) -> ResNetForImageClassification:
    """The ResNet of He et al. for small images: three stages from 16 to 64 channels; depth 5 makes it ResNet-32."""
    config = ResNetConfig(
        num_channels=num_channels,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[depth] * 3,
        layer_type="basic",
        **labels,
    )
    model = ResNetForImageClassification(config)
    # The usual stem shrinks images to a quarter, which small ones do not survive.
    model.resnet.embedder.embedder = ResNetConvLayer(num_channels, config.embedding_size, kernel_size=3, stride=1)
    model.resnet.embedder.pooler = nn.Identity()
    model.resnet.embedder.apply(model._init_weights)
    return model
