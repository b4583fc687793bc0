"""What every method must do in training, alone and in a chain with LPG; `method_examples.py` has the methods."""

import functools
import gc
import math

import pytest
import torch
from method_examples import ALL_IN_TRAINING, FIRST_IN_TRAINING, IDLE_AT_FIRST
from tiny import (
    flat_parameters,
    make_batch,
    make_confident_model,
    make_model,
    make_noisy_batch,
    make_trainer,
    split,
)
from transformers import TrainerCallback

from lpg_hf import LPGConfig, LPGTrainer
from lpg_hf.perturbations import parse_perturbation


COUNTS = [55, 25, 15, 5]
#: Methods whose delta depends on how the batch of a step is composed: invariant 6 leaves them out.
DEPENDS_ON_THE_BATCH = [text for text in ALL_IN_TRAINING if parse_perturbation(text).depends_on_split]

every_model = pytest.mark.parametrize("name", ["bert", "vit"])
alone_and_in_a_chain = pytest.mark.parametrize("lpg", [None, "lpg(epsilon=0.2)"], ids=["alone", "after lpg"])


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Every training ends with a garbage collection, which outlasts a tiny one: it looks at all of torch."""
    gc.collect()
    gc.freeze()


def every(examples):
    return pytest.mark.parametrize("method", examples)


def chain_of(method, lpg):
    return [method] if lpg is None else [lpg, method]


def telemetry_name(method, lpg):
    name = parse_perturbation(method).name
    return f"{name}_2" if lpg is not None and name == "lpg" else name


# Checkpoints


class SaveAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == self.step


def all_state(trainer):
    state = {f"methods.{name}": tensor for name, tensor in trainer._lpg_parameter_methods.state_dict().items()}
    return state | {f"loss.{name}": tensor for name, tensor in trainer.lpg_loss.state_dict().items()}


@every(FIRST_IN_TRAINING)
@alone_and_in_a_chain
@every_model
def test_training_resumed_in_the_middle_of_an_epoch_is_the_uninterrupted_one(name, lpg, method, tmp_path):
    """Bit for bit, with dropout, accumulation, and AdamW."""
    batches = split(make_batch(name, 64), [8] * 8)

    def train(path, callback, model, resume=None):
        trainer = make_trainer(
            LPGTrainer,
            model,
            batches,
            path,
            args={"gradient_accumulation_steps": 2, "num_train_epochs": 2},
            perturbations=chain_of(method, lpg),
            class_counts=COUNTS,
            callbacks=[callback],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(tmp_path, SaveAt(3), make_model(name))
    checkpoint = str(tmp_path / "checkpoint-3")
    # transformers 5.23 saves a ViT under its former names, which resuming alone does not find (nor does Trainer).
    model = type(whole.model).from_pretrained(checkpoint) if name == "vit" else make_model(name)
    resumed = train(tmp_path / "resumed", SaveAt(None), model, checkpoint)
    assert whole.state.global_step == resumed.state.global_step == 8
    assert torch.equal(flat_parameters(whole.model), flat_parameters(resumed.model))
    expected, actual = all_state(whole), all_state(resumed)
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, actual[key]), key


# Accumulation


def train_split(name, chain, sizes, path):
    trainer = make_trainer(
        LPGTrainer,
        make_confident_model(name),
        split(make_noisy_batch(name, 32, dtype=torch.float64), sizes),
        path,
        args={
            "optim": "sgd",
            "learning_rate": 0.1,
            "max_grad_norm": 0.0,
            "gradient_accumulation_steps": len(sizes) // 2,
            "num_train_epochs": 2,  # dampening acts in the second one
        },
        perturbations=chain,
        class_counts=COUNTS,
    )
    trainer.train()
    assert trainer.state.global_step == 4
    return trainer


@every([text for text in ALL_IN_TRAINING if text not in DEPENDS_ON_THE_BATCH])
@pytest.mark.parametrize("lpg", [None, "lpg(epsilon=0.2, direction='sample')"], ids=["alone", "after lpg"])
@every_model
def test_four_micro_batches_train_what_one_batch_trains(name, lpg, method, tmp_path):
    whole = train_split(name, chain_of(method, lpg), [16] * 2, tmp_path)
    parts = train_split(name, chain_of(method, lpg), [3, 5, 2, 6] * 2, tmp_path)
    torch.testing.assert_close(flat_parameters(parts.model), flat_parameters(whole.model), rtol=0, atol=1e-9)
    expected, actual = all_state(whole), all_state(parts)
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, rtol=0, atol=1e-9, msg=key)


@every(DEPENDS_ON_THE_BATCH)
def test_what_is_left_out_above_does_depend_on_the_split(method, tmp_path):
    whole = train_split("bert", [method], [16] * 2, tmp_path)
    parts = train_split("bert", [method], [3, 5, 2, 6] * 2, tmp_path)
    assert (flat_parameters(parts.model) - flat_parameters(whole.model)).abs().max() > 1e-4


# One step's gradient, and what is logged of it


class RecordGradients(TrainerCallback):
    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        self.gradients.append(torch.cat([gradient.flatten() for gradient in gradients]).double())


@functools.cache
def gradients_and_logs(name, chain, dtype, bf16, path, is_dampening=False):
    """
    Three steps of a model that stands still while statistics and bounds move: their gradients in one row.

    Dampening needs a second epoch, and samples of a class that differ. The others get the model with less rounding.
    """
    record = RecordGradients()
    trainer = make_trainer(
        LPGTrainer,
        make_confident_model(name, dtype=dtype, centered=0.5 * is_dampening),
        split(make_noisy_batch(name, 72, dtype=dtype), [40, 22, 10]),
        path,
        args_class=LPGConfig,
        args={
            "optim": "sgd",
            "learning_rate": 0.0,
            "max_grad_norm": 0.0,
            "num_train_epochs": 1 + is_dampening,
            "bf16": bf16,
            "log_perturbations": True,
        },
        perturbations=list(chain),
        class_counts=COUNTS,
        callbacks=[record],
    )
    trainer.train()
    assert len(record.gradients) == 3 * (1 + is_dampening)
    return torch.cat(record.gradients), [log for log in trainer.state.log_history if "loss" in log]


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def dtype_of_reference(method):
    # A draw of random numbers depends on the dtype: noise has its reference in float32, as the gradients of autocast.
    return torch.float32 if "noise" in method else torch.float64


def dampens(method):
    return "dampening" in method


@every(ALL_IN_TRAINING)
@alone_and_in_a_chain
@every_model
def test_gradient_under_bfloat16_autocast_is_that_of_float64(name, lpg, method, output_dir):
    chain, dtype = tuple(chain_of(method, lpg)), dtype_of_reference(method)

    def gradients(chain, dtype, autocast=False):
        return gradients_and_logs(name, chain, dtype, autocast, output_dir, dampens(method))[0]

    expected, without = gradients(chain, dtype), gradients(chain[:-1], dtype)
    # What the forward pass rounds is in both. A method that removes a part of the gradient removes less of that.
    rounding = (gradients(chain[:-1], torch.float32, autocast=True) - without).norm() / without.norm()
    error = (gradients(chain, torch.float32, autocast=True) - expected).norm() / expected.norm()
    assert 0 < error < max(2**-7, 1.5 * rounding)
    assert (expected - without).norm() / expected.norm() > 2**-6  # the method does something


@every(ALL_IN_TRAINING)
@alone_and_in_a_chain
@every_model
def test_the_norm_of_every_delta_is_logged(name, lpg, method, output_dir):
    chain = tuple(chain_of(method, lpg))
    _, logs = gradients_and_logs(name, chain, dtype_of_reference(method), False, output_dir, dampens(method))
    norms = [log[f"lpg/{telemetry_name(method, lpg)}/delta_norm"] for log in logs]
    assert len(norms) == 3 * (1 + dampens(method))
    assert all(math.isfinite(norm) and norm >= 0 for norm in norms)
    if method in IDLE_AT_FIRST:
        assert norms[0] < 0.02 < max(norms)
    else:
        assert min(norms) > 1e-3
