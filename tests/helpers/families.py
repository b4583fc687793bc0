"""Tiny models of the families that people fine-tune, one row each, built from configurations alone."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import reference
import torch
from tiny import NUM_LABELS
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from lpg_hf import LPG, LogitAdjustment, LogitClipping


TEXT, IMAGE, AUDIO = (
    AutoModelForSequenceClassification,
    AutoModelForImageClassification,
    AutoModelForAudioClassification,
)
VOCABULARY, PAD = 32, 0
COUNTS = [55, 25, 15, 5]
# Names of the attention projections of all families, of which LoRA adapts those that a model has.
ATTENTION = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "query_proj", "value_proj", "Wqkv", "c_attn")


@dataclass(frozen=True)
class Family:
    """
    One model type: how to make it tiny, which settings are rates of dropout or masking, which modules LoRA adapts
    (none: peft cannot).
    """

    auto_class: type
    model_type: str
    config: dict
    dropout: tuple[str, ...]
    head: str = "classifier"
    input_shape: tuple[int, ...] = (3, 16, 16)
    lora: tuple[str, ...] = ATTENTION


TRANSFORMER = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 16}
ENCODER = TRANSFORMER | {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "pad_token_id": PAD}
DECODER = ENCODER | {"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
VISION = TRANSFORMER | {"image_size": 16, "patch_size": 8}
BERT_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")

FAMILIES = {
    "bert": Family(TEXT, "bert", ENCODER, BERT_DROPOUT),
    "distilbert": Family(
        TEXT,
        "distilbert",
        {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 16,
            "pad_token_id": PAD,
            "dim": 16,
            "hidden_dim": 32,
            "n_layers": 2,
            "n_heads": 2,
        },
        ("dropout", "attention_dropout", "seq_classif_dropout"),
    ),
    "roberta": Family(TEXT, "roberta", ENCODER, BERT_DROPOUT),
    "deberta-v2": Family(
        TEXT,
        "deberta-v2",
        ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 16},
        (*BERT_DROPOUT, "pooler_dropout"),
    ),
    "modernbert": Family(
        TEXT,
        "modernbert",
        ENCODER | {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
        ("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout"),
    ),
    "electra": Family(TEXT, "electra", ENCODER | {"embedding_size": 8}, BERT_DROPOUT),
    "gpt2": Family(
        TEXT,
        "gpt2",
        {
            "vocab_size": VOCABULARY,
            "n_positions": 16,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": PAD,
        },
        ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        head="score",
    ),
    "llama": Family(TEXT, "llama", DECODER, ("attention_dropout",), head="score"),
    "qwen2": Family(TEXT, "qwen2", DECODER, ("attention_dropout",), head="score"),
    "vit": Family(IMAGE, "vit", VISION, BERT_DROPOUT),
    "swin": Family(
        IMAGE,
        "swin",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4},
        (*BERT_DROPOUT, "drop_path_rate"),
    ),
    "dinov2": Family(IMAGE, "dinov2", VISION, (*BERT_DROPOUT, "drop_path_rate")),
    "deit": Family(IMAGE, "deit", VISION | {"architectures": ["DeiTForImageClassification"]}, BERT_DROPOUT),
    "resnet": Family(
        IMAGE,
        "resnet",
        {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"},
        (),
        lora=("convolution",),
    ),
    "convnext": Family(
        IMAGE,
        "convnext",
        {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
        ("drop_path_rate",),
        lora=("pwconv1", "pwconv2"),
    ),
    "mobilenet_v2": Family(
        IMAGE,
        "mobilenet_v2",
        {"depth_multiplier": 0.1, "finegrained_output": True, "expand_ratio": 2.0},
        ("classifier_dropout_prob",),
        input_shape=(3, 32, 32),
        lora=(),  # its `tf_padding` reads `stride`, which peft's wrapper of a convolution does not have
    ),
    "efficientnet": Family(
        IMAGE,
        "efficientnet",
        {
            "width_coefficient": 0.25,
            "depth_coefficient": 0.25,
            "in_channels": [32, 16],
            "out_channels": [16, 24],
            "kernel_sizes": [3, 3],
            "strides": [1, 2],
            "num_block_repeats": [1, 2],
            "expand_ratios": [1, 6],
            "hidden_dim": 320,  # 1280 times the width
            "initializer_range": 0.3,  # with less, features vanish on the way, and the head would need weights of 1e12
        },
        ("dropout_rate", "drop_connect_rate"),
        lora=("expand_conv", "project_conv"),
    ),
    "wav2vec2": Family(
        AUDIO,
        "wav2vec2",
        TRANSFORMER
        | {
            "conv_dim": (8, 8),
            "conv_kernel": (4, 4),
            "conv_stride": (4, 4),
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "classifier_proj_size": 8,
            "apply_spec_augment": False,
        },
        (
            "hidden_dropout",
            "attention_dropout",
            "feat_proj_dropout",
            "final_dropout",
            "activation_dropout",
            "layerdrop",
        ),
        input_shape=(128,),
    ),
    "audio-spectrogram-transformer": Family(
        AUDIO,
        "audio-spectrogram-transformer",
        TRANSFORMER | {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8},
        BERT_DROPOUT,
        input_shape=(16, 8),
    ),
}

# In transformers 5.23 the others read attributes of their backbone's output, which is then a tuple.
TUPLES_BY_CONFIG = {"bert", "distilbert", "roberta", "deberta-v2", "electra", "resnet", "mobilenet_v2", "efficientnet"}


def make_family(name: str, *, exact: bool = False, seed: int = 0) -> PreTrainedModel:
    """
    A tiny model with rates of dropout of 0.1. `exact`: float64, all rates 0, BatchNorm frozen, and logits large enough
    that every method has something to do.
    """
    family = FAMILIES[name]
    torch.manual_seed(seed)
    rates = dict.fromkeys(family.dropout, 0.0 if exact else 0.1)
    settings = family.config | rates | {"num_labels": NUM_LABELS}
    model = family.auto_class.from_config(AutoConfig.for_model(family.model_type, **settings))
    if exact:
        model = model.double()
        fill_tokens(model)
        calibrate(model, make_family_batch(name, 32, seed=1, dtype=torch.float64))
    return model


def fill_tokens(model: PreTrainedModel) -> None:
    """Tokens that start at zero make a LayerNorm divide by next to nothing: gradients of 1e5."""
    for name, parameter in model.named_parameters():
        if name.endswith(("token", "position_embeddings")) and not parameter.any():
            nn.init.normal_(parameter, std=0.005)


@torch.no_grad()
def calibrate(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    """Freezes BatchNorm with the statistics of a batch, and gives its logits a standard deviation of 2."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    spread = model.train()(**inputs_of(batch), return_dict=True).logits.std(0).mean()
    for norm in norms:
        norm.eval()
        norm.train = lambda mode=True, norm=norm: norm
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    assert head.out_features == NUM_LABELS
    head.weight.mul_(2 / spread)
    if head.bias is not None:  # older transformers, 5.12 among them, do not start a ResNet's at zero
        head.bias.zero_()


def return_tuples(name: str, model: PreTrainedModel) -> None:
    """By its configuration; where the model's own forward cannot cope with that, by the argument of forward."""
    if name in TUPLES_BY_CONFIG:
        model.config.return_dict = False
    else:
        model.forward = partial(model.forward, return_dict=False)


def make_family_batch(
    name: str, size: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Inputs and imbalanced labels, the class visible in the inputs; texts are padded to the right."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor(COUNTS) / 100, size, replacement=True, generator=generator)
    if family.auto_class is TEXT:
        input_ids = torch.randint(3, VOCABULARY, (size, 8), generator=generator)
        input_ids[:, 1] = labels + 3
        lengths = torch.randint(4, 9, (size, 1), generator=generator)
        attention_mask = (torch.arange(8) < lengths).long()
        input_ids = torch.where(attention_mask == 1, input_ids, PAD)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    values = torch.randn(size, *family.input_shape, generator=generator, dtype=torch.float64)
    values = values + labels.view(-1, *[1] * len(family.input_shape))
    return {("pixel_values" if family.auto_class is IMAGE else "input_values"): values.to(dtype), "labels": labels}


def inputs_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}


CHAIN = [LogitAdjustment(1.0), LPG("frequency", epsilon=0.3, max_dampening=0.5), LogitClipping(0.9)]


def perturbed_by_chain(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `CHAIN` makes of the logit gradient of a micro-batch, from the formulas, and that gradient itself."""
    prior = np.array(COUNTS) / 100
    unperturbed = reference.logit_gradient(logits, labels)
    g = unperturbed + reference.logit_adjustment_delta(logits, labels, prior)
    g = g + reference.lpg_delta(g, labels, *reference.frequency_signs_and_bounds(prior, 0.3), max_dampening=0.5)
    return g + reference.clip_delta(g, 0.9), unperturbed


def reference_gradients(
    model: nn.Module, parameters: list[nn.Parameter], micro_batches: list[dict[str, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Of the perturbed and the unperturbed loss, flattened: `sum_i J_i^T (g_i + delta_i) / N` and `sum_i J_i^T g_i / N`,
    the Jacobians by autograd of the logits alone.
    """
    num_samples = sum(len(batch["labels"]) for batch in micro_batches)
    totals = [0.0, 0.0]
    for batch in micro_batches:
        logits = model.train()(**inputs_of(batch)).logits
        cotangents = perturbed_by_chain(logits.detach().double().numpy(), batch["labels"].numpy())
        for i, cotangent in enumerate(cotangents):
            vector = torch.from_numpy(cotangent / num_samples).to(logits)
            rows = torch.autograd.grad(logits, parameters, vector, retain_graph=True, allow_unused=True)
            rows = [torch.zeros_like(p) if row is None else row for row, p in zip(rows, parameters, strict=True)]
            totals[i] = totals[i] + torch.cat([row.double().flatten() for row in rows])
    return totals[0], totals[1]
