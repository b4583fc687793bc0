"""
Mixed precision as it is on a GPU, and terms that a model adds to its loss.

Under CUDA's autocast `cross_entropy` takes logarithms in the dtype of the logits and averages in float32. Accelerate
then converts the outputs to float32. Autocast on the CPU keeps the whole loss in float32, so the tests do it by hand.
"""

import copy
import logging

import pytest
import torch
from autocast import SEEDS, SIMULATED, RecordGradients, gradient_at_the_logits, unsure
from families import CHAIN, COUNTS, make_family, make_family_batch, perturbed_by_chain
from tiny import flat_parameters, make_trainer, split
from torch.nn import functional as F
from transformers import BertForSequenceClassification, Trainer

from lpg_hf import LPGTrainer


SGD = {"optim": "sgd", "learning_rate": 2.0**-4, "max_grad_norm": 0.0}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def cuda_cross_entropy(input, target, label_smoothing=0.0, **kwargs):
    assert label_smoothing == 0
    with torch.autocast("cpu", enabled=False):
        return F.nll_loss(F.log_softmax(input, -1, dtype=input.dtype).float(), target, **kwargs)


@pytest.fixture(params=DTYPES)
def cuda_autocast(request, monkeypatch):
    """Gives a model the forward pass that it has under CUDA's autocast."""
    dtype = DTYPES[request.param]
    plain = F.cross_entropy

    def cross_entropy(input, target, **kwargs):
        return (cuda_cross_entropy if input.dtype == dtype else plain)(input, target, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)

    def wrap(model):
        forward = model.forward

        def autocast_forward(*args, **kwargs):
            with torch.autocast("cpu", dtype):
                outputs = forward(*args, **kwargs)
            return type(outputs)({k: v.float() if k in ("loss", "logits") else v for k, v in outputs.items()})

        model.forward = autocast_forward
        return model

    wrap.dtype = dtype
    return wrap


def gradient_of_a_step(trainer_class, model, batch, path, **kwargs):
    record = RecordGradients()
    make_trainer(trainer_class, model, [batch], path, args=SGD, callbacks=[record], **kwargs).train()
    return record.gradient


@pytest.mark.parametrize("name", SIMULATED)
def test_it_perturbs_under_cuda_autocast(name, cuda_autocast, tmp_path, caplog):
    """The gradient is as near to the exact one as the Trainer's, up to the rounding of a second term."""
    errors, effects = {Trainer: [], LPGTrainer: []}, []
    for seed in SEEDS:
        batch = make_family_batch(name, 16, seed=seed)
        exact_batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        exact = {}
        for trainer_class in (Trainer, LPGTrainer):
            # Between those of the training and all alike: a correction that shows, and does not add to the rounding.
            shares = {"class_counts": COUNTS, "eval_shares": [count**0.5 for count in COUNTS]}
            kwargs = shares if trainer_class is LPGTrainer else {}
            model = unsure(name, seed)
            with caplog.at_level(logging.WARNING, logger="lpg_hf"):
                half = gradient_of_a_step(
                    trainer_class, cuda_autocast(copy.deepcopy(model).float()), batch, tmp_path, **kwargs
                )
                exact[trainer_class] = gradient_of_a_step(trainer_class, model, exact_batch, tmp_path, **kwargs)
            errors[trainer_class].append((half - exact[trainer_class]).norm())
        effects.append((exact[LPGTrainer] - exact[Trainer]).norm())
    assert not caplog.records
    ours, trainers = (torch.stack(errors[trainer_class]).norm() for trainer_class in (LPGTrainer, Trainer))
    assert ours < 1.5 * trainers
    assert torch.stack(effects).norm() > 10 * ours


@pytest.mark.parametrize("name", [name for name in SIMULATED if name not in ("gpt2",)])
def test_the_gradient_at_half_precision_logits_is_the_perturbed_one(name, cuda_autocast, tmp_path):
    batch = make_family_batch(name, 16)
    model = cuda_autocast(make_family(name, exact=True).float())
    kwargs = {"perturbations": CHAIN, "class_counts": COUNTS}
    logits, gradient = gradient_at_the_logits(
        model, lambda: gradient_of_a_step(LPGTrainer, model, batch, tmp_path, **kwargs)
    )
    assert logits.dtype == gradient.dtype == cuda_autocast.dtype
    expected, unperturbed = perturbed_by_chain(logits.double().numpy(), batch["labels"].numpy())
    expected = torch.from_numpy(expected) / 16
    assert (gradient.double() - expected).norm() < 2.0**-7 * expected.norm()
    assert (gradient.double() - torch.from_numpy(unperturbed) / 16).norm() > 0.2 * expected.norm()


CLASS_WEIGHTS = torch.tensor([0.8, 1.0, 1.2, 1.4])


class Weighted(BertForSequenceClassification):
    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        if labels is not None:
            output.loss = F.cross_entropy(output.logits, labels, weight=CLASS_WEIGHTS)
        return output


def test_class_weights_are_seen_under_cuda_autocast(cuda_autocast, tmp_path):
    model = Weighted(make_family("bert").config)
    trainer = make_trainer(LPGTrainer, cuda_autocast(model), [make_family_batch("bert", 16)], tmp_path)
    trainer.train()
    assert trainer._lpg_classifier.passed is False


class Auxiliary(BertForSequenceClassification):
    """Adds the squared norm of its embeddings to its loss, from the given call on."""

    starts_at, coefficient = 0, 1.0

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        if labels is not None and self.training:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls > self.starts_at:
                output.loss = output.loss + self.coefficient * self.penalty()
        return output

    def penalty(self):
        return self.bert.embeddings.word_embeddings.weight[3:].square().sum()


def auxiliary(starts_at, coefficient):
    torch.manual_seed(0)
    config = make_family("bert").config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = Auxiliary(config)
    model.starts_at, model.coefficient = starts_at, coefficient
    return model


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_term_that_the_model_adds_later_is_kept(accumulation, tmp_path):
    """With a perturbation that does nothing the training is that of the Trainer, the term included."""
    batches = split(make_family_batch("bert", 32), [8] * 4)
    args = SGD | {"gradient_accumulation_steps": accumulation, "average_tokens_across_devices": False}

    def train(trainer_class, coefficient, **kwargs):
        model = auxiliary(starts_at=2, coefficient=coefficient).double()
        make_trainer(trainer_class, model, batches, tmp_path, args=args, **kwargs).train()
        return flat_parameters(model)

    plain = train(Trainer, 1.0)
    ours = train(LPGTrainer, 1.0, perturbations=["lpg(epsilon=0.0)"])
    without = train(LPGTrainer, 0.0, perturbations=["lpg(epsilon=0.0)"])
    # Trainer adds up micro-batches for models that ignore the count; a sum of the terms is no mean.
    if accumulation == 1:
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    assert (ours - without).abs().max() > 1e-3


def test_a_term_below_half_precision_is_kept(cuda_autocast, tmp_path, caplog):
    """A term that the comparison cannot see under bf16 or fp16, and that has a gradient."""
    batch = make_family_batch("bert", 16)
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        kept, absent = (
            gradient_of_a_step(
                LPGTrainer,
                cuda_autocast(auxiliary(0, coefficient)),
                batch,
                tmp_path,
                perturbations=["lpg(epsilon=0.0)"],
                class_counts=COUNTS,
            )
            for coefficient in (1e-3, 0.0)
        )
    assert not caplog.records
    model = auxiliary(0, 1e-3)
    rows = torch.autograd.grad(1e-3 * model.penalty(), list(model.parameters()), allow_unused=True)
    rows = [torch.zeros_like(p) if row is None else row for row, p in zip(rows, model.parameters(), strict=True)]
    expected = torch.cat([row.double().flatten() for row in rows])
    torch.testing.assert_close(kept - absent, expected, rtol=1e-2, atol=1e-6)
