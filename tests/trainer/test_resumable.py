"""The best model and resumed weights of models whose checkpoints have other names than their parameters."""

import pytest
import torch
from clients import make_args
from text_cases import text_dataset
from tiny import make_model
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    T5Config,
    T5ForSequenceClassification,
    Trainer,
)

from lpg_hf import LPGTrainer
from lpg_hf.trainer.resumable import reload_renamed_weights


class Extra(BertPreTrainedModel):
    """Its constructor needs more than a config, so `from_pretrained(folder)` cannot make it."""

    def __init__(self, config, classes):
        super().__init__(config)
        self.bert = BertModel(config)
        self.classifier = nn.Linear(config.hidden_size, classes)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        logits = self.classifier(self.bert(input_ids, attention_mask=attention_mask).pooler_output)
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


def tiny_bart():
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"vocab_size": 30, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 4, "eos_token_id": 3}
    return BartForSequenceClassification(BartConfig(**size, **heads, **tokens, num_labels=2, forced_eos_token_id=3))


def tiny_t5():
    size = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    tokens = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    return T5ForSequenceClassification(T5Config(**size, **tokens, num_labels=2))


def with_extra_argument():
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return Extra(BertConfig(**size, vocab_size=30, max_position_embeddings=16), classes=2)


MODELS = {"bart": tiny_bart, "t5": tiny_t5, "extra": with_extra_argument}


@pytest.mark.parametrize("name", MODELS)
def test_the_best_model_comes_back_as_with_trainer(name, tmp_path):
    """Tied weights are saved once, under one of their names."""
    dataset = text_dataset([0, 1] * 8)
    args = make_args(
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # not the last one
    )
    states = []
    for trainer_class in (Trainer, LPGTrainer):
        torch.manual_seed(0)
        options = {} if trainer_class is Trainer else {"perturbations": []}
        trainer = trainer_class(
            model=MODELS[name](), args=args, train_dataset=dataset, eval_dataset=dataset, **options
        )
        trainer.train()
        assert trainer.state.best_global_step < 4
        states.append(trainer.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("name", MODELS)
def test_resuming_starts_from_the_saved_weights(name, tmp_path):
    dataset = text_dataset([0, 1] * 8)
    args = make_args(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    torch.manual_seed(0)
    LPGTrainer(model=MODELS[name](), args=args, train_dataset=dataset).train()
    torch.manual_seed(1)
    resumed = LPGTrainer(model=MODELS[name](), args=args, train_dataset=dataset)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.manual_seed(2)
    reference = Trainer(model=MODELS[name](), args=args, train_dataset=dataset)
    reference._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    weights = reference.model.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in resumed.model.state_dict().items())


def test_renamed_weights_are_loaded(tmp_path):
    """transformers saves ViT under older names than its parameters have."""
    saved, model = make_model("vit", seed=0), make_model("vit", seed=1)
    saved.save_pretrained(tmp_path)
    trainer = LPGTrainer(model=model, args=make_args(tmp_path))
    trainer._load_from_checkpoint(str(tmp_path))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in saved.state_dict().items())


def test_the_file_alone_decides_what_is_missing(tmp_path):
    """Weights that were found under their own names stay."""
    saved, model = make_model("bert", seed=0), make_model("bert", seed=1)
    saved.save_pretrained(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reload_renamed_weights(model, tmp_path)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
