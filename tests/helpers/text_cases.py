"""A tiny BERT to subclass and configure, with batches, data sets and arguments for it."""

import torch
from datasets import Dataset
from tiny import NUM_LABELS, make_batch, split
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput


class ClassWeightedBert(BertForSequenceClassification):
    def forward(self, input_ids, labels=None):
        logits = super().forward(input_ids=input_ids).logits
        loss = None if labels is None else F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))
        return SequenceClassifierOutput(loss=loss, logits=logits)


def bert(model_class=BertForSequenceClassification, **config):
    torch.manual_seed(0)
    settings = {"num_labels": NUM_LABELS} | config
    return model_class(
        BertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=30,
            max_position_embeddings=16,
            **settings,
        )
    )


def text_batches(make_labels):
    batches = split(make_batch("bert", 32), [8] * 4)
    return [batch | {"labels": make_labels(batch)} for batch in batches]


def text_dataset(labels, column="label"):
    return Dataset.from_dict({"input_ids": [[1, 2, 3]] * len(labels), column: labels})


def plain_args(path, **kwargs):
    return TrainingArguments(
        path, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", **({"max_steps": 2} | kwargs)
    )
