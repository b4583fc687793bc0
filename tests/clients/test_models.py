"""Scripts with models and losses of their own that look like classifiers with cross-entropy, and are none."""

import numpy as np
import pytest
import torch
from clients import exact_bert, run, warnings_of, weights_of
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import BertForMultipleChoice, Trainer

from lpg_hf import LPGLoss, LPGTrainer


CLIPPING = ["logit_clipping(max_norm=0.1)"]


class Perceptron(nn.Module):
    """`ignored` is the label that its loss leaves out, `first` the smallest one."""

    def __init__(self, num_outputs=4, *, ignored=-100, first=0, detaches=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, num_outputs)).double()
        self.other = nn.Linear(6, num_outputs).double()
        self.ignored, self.first, self.detaches = ignored, first, detaches

    def forward(self, values, labels=None):
        logits = self.layers(values.double())
        outputs = {"logits": logits.detach() if self.detaches else logits, "other": self.other(values.double())}
        if labels is None:
            return outputs
        return {"loss": F.cross_entropy(logits, labels - self.first, ignore_index=self.ignored)} | outputs


def rows(labels):
    values = np.random.default_rng(0).normal(size=(len(labels), 6)) + np.array(labels)[:, None]
    return Dataset.from_dict({"values": values.tolist(), "label": labels})


def choices():
    """The right one of three texts."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 30, (24, 3, 6))
    return Dataset.from_dict({"input_ids": tokens.tolist(), "label": rng.choice(3, 24, p=[0.6, 0.3, 0.1]).tolist()})


def ordinal_loss(outputs, labels, num_items_in_batch=None):
    """CORAL: an output for each threshold between two grades."""
    logits = outputs["logits"]
    is_above = (labels[:, None] > torch.arange(logits.shape[1])).to(logits)
    return F.binary_cross_entropy_with_logits(logits, is_above, reduction="sum") / len(labels)


def contrastive_loss(outputs, labels, num_items_in_batch=None):
    """Supervised contrastive: the outputs are embeddings."""
    embeddings = F.normalize(outputs["logits"], dim=-1)
    similarity = (embeddings @ embeddings.T / 0.1).fill_diagonal_(-1e9)
    is_pair = (labels[:, None] == labels).double().fill_diagonal_(0.0)
    return -(similarity.log_softmax(-1) * is_pair).sum() / is_pair.sum().clamp(min=1)


def loss_of_other(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs["other"], labels)


def adapted():
    return get_peft_model(exact_bert(BertForMultipleChoice), LoraConfig(target_modules=["query", "value"])).double()


def compiled():
    return torch.compile(exact_bert(BertForMultipleChoice), backend="eager")


LABELS = ([0, 0, 0, 1, 0, 2, 1, 3] * 3)[::-1]
GRADES = [label + (label == 3) for label in LABELS]
# The model, the data, the loss if it is the user's, and what the warning says.
CASES = {
    "detached logits": (lambda: Perceptron(detaches=True), rows(LABELS), None, "no gradient"),
    "-1 for no label": (lambda: Perceptron(ignored=-1), rows([-1, *LABELS[1:]] * 2), None, "down to -1"),
    "labels from 1 on": (lambda: Perceptron(first=1), rows([label + 1 for label in LABELS]), None, "up to 4"),
    "choices under LoRA": (adapted, choices(), None, "own choices"),
    "choices, compiled": (compiled, choices(), None, "own choices"),
    "ordinal regression": (lambda: Perceptron(4), rows(GRADES), ordinal_loss, "up to 4"),
    "few grades": (lambda: Perceptron(4), rows(LABELS), ordinal_loss, "not that of a loss of classes"),
    "embeddings": (lambda: Perceptron(16), rows(LABELS), contrastive_loss, "not that of a loss of classes"),
    "another output": (Perceptron, rows(LABELS), loss_of_other, "does not depend on the `logits`"),
    "detached, own loss": (lambda: Perceptron(detaches=True), rows(LABELS), loss_of_other, "no gradient"),
}
# All samples of an epoch in one step, so that the first one shows what is special.
SETTINGS = {"per_device_train_batch_size": 24, "remove_unused_columns": False}


@pytest.mark.parametrize("case", CASES)
def test_what_only_looks_like_a_classifier_trains_as_with_trainer_and_is_told_once(case, tmp_path, caplog):
    make, data, loss, reason = CASES[case]
    plain = run(Trainer, make(), tmp_path, data, args=SETTINGS, compute_loss_func=loss)
    ours = run(LPGTrainer, make(), tmp_path, data, args=SETTINGS, compute_loss_func=loss)
    (message,) = warnings_of(caplog)
    assert reason in message and "perturbations=[]" in message
    assert ("compute_loss_func" in message.partition(reason)[2]) == (loss is None)  # no cure that is there already
    assert torch.equal(weights_of(ours), weights_of(plain))


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("few grades", "embeddings")])
def test_methods_asked_for_by_name_raise(case, tmp_path):
    make, data, loss, reason = CASES[case]
    with pytest.raises(ValueError, match=f"{reason}.*Asked for"):
        run(LPGTrainer, make(), tmp_path, data, args=SETTINGS, compute_loss_func=loss, perturbations=CLIPPING)


def test_whoever_names_methods_knows_what_the_logits_are(tmp_path, caplog):
    options = {"args": SETTINGS | {"max_steps": 1}, "compute_loss_func": contrastive_loss}
    plain = run(Trainer, Perceptron(16), tmp_path, rows(LABELS), **options)
    ours = run(LPGTrainer, Perceptron(16), tmp_path, rows(LABELS), perturbations=CLIPPING, **options)
    assert not torch.equal(weights_of(ours), weights_of(plain))
    assert not [message for message in warnings_of(caplog) if "classifier" in message]


def test_a_later_batch_with_a_label_that_the_model_ignores_trains_as_with_trainer(tmp_path, caplog):
    """The others are perturbed."""
    labels = [0, 1, 2, 3, 0, 0, 1, 1, 0, -1, 2, -1, 3, 2, 0, 0]
    lpg_loss = LPGLoss(4, CLIPPING)

    class Reference(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            is_odd = (inputs["labels"] < 0).any()
            return outputs["loss"] if is_odd else lpg_loss(outputs, inputs["labels"])

    args = {"train_sampling_strategy": "sequential", "max_steps": 8}
    model, data = Perceptron(ignored=-1), rows(labels)
    ours = run(LPGTrainer, model, tmp_path, data, args=args, perturbations=CLIPPING)
    counts, told = warnings_of(caplog)
    assert "are not known" in counts and "label -1 in row 9" in counts
    assert "A batch of step 3 cannot be perturbed: its labels reach down to -1" in told
    expected = run(Reference, Perceptron(ignored=-1), tmp_path, data, args=args)
    plain = run(Trainer, Perceptron(ignored=-1), tmp_path, data, args=args)
    torch.testing.assert_close(weights_of(ours), weights_of(expected), rtol=0, atol=1e-12)
    assert (weights_of(ours) - weights_of(plain)).abs().max() > 1e-3


class OnlyLogits(Perceptron):
    """A module of PyTorch, which returns nothing else."""

    def forward(self, values):
        return self.layers(values.double())


def mean_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs if isinstance(outputs, torch.Tensor) else outputs["logits"], labels)


@pytest.mark.parametrize("chain", [CLIPPING, []], ids=["clipping", "none"])
def test_a_model_that_returns_a_tensor_trains_as_one_with_names(chain, tmp_path):
    options = {"args": {"remove_unused_columns": False}, "compute_loss_func": mean_loss}
    ours = run(LPGTrainer, OnlyLogits(), tmp_path, rows(LABELS), perturbations=chain, **options)
    expected = run(LPGTrainer, Perceptron(), tmp_path, rows(LABELS), perturbations=chain, **options)
    plain = run(Trainer, OnlyLogits(), tmp_path, rows(LABELS), **options)
    assert torch.equal(weights_of(ours), weights_of(expected))
    assert torch.equal(weights_of(ours), weights_of(plain)) == (chain == [])
