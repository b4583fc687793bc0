"""LPGTrainer on a GPU against itself on the CPU, and against the plain Trainer on the GPU."""

import copy
import math

import pytest
import torch
from gpu import (
    COUNTS,
    losses_of,
    needs_cuda,
    needs_device,
    relative_distance,
    train,
    trainer_for,
    weights_of,
)
from tiny import class_means, flat_parameters, make_batch, make_model, split
from transformers import Trainer

from lpg_hf import LPGTrainer


pytestmark = needs_device

AUTO, WITH_SAM = ["auto"], ["auto", "sam(rho=0.05)"]
# Gates that are open from the second epoch on: with its own, `auto` might not dampen in a short test.
OPEN = ["logit_adjustment", "class_relative_dampening(learned=(0.0, 0.01), evidence=(0.0, 0.001))"]
every_model = pytest.mark.parametrize("name", ["bert", "vit", "resnet"])


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def batches_of(name, sizes=(8,) * 10, dtype=torch.float32):
    return split(make_batch(name, sum(sizes), dtype=dtype), list(sizes))


# Exactly


@pytest.mark.parametrize("chain", [AUTO, OPEN, WITH_SAM], ids=["auto", "open gates", "sam"])
@every_model
def test_twenty_steps_in_float64_are_those_of_the_cpu(name, chain, tmp_path):
    model, batches = make_model(name, exact=True), batches_of(name, dtype=torch.float64)
    ours, expected = (
        train(model, batches, tmp_path, on_device=on_device, perturbations=chain) for on_device in (True, False)
    )
    torch.testing.assert_close(weights_of(ours), weights_of(expected), rtol=0, atol=1e-9)
    assert losses_of(ours) == pytest.approx(losses_of(expected), abs=1e-6)
    plain = train(model, batches, tmp_path, trainer_class=Trainer)
    assert (weights_of(ours) - weights_of(plain)).abs().max() > 1e-3


@every_model
def test_no_perturbations_is_the_trainer_bit_for_bit(name, tmp_path, deterministic):
    model, batches = make_model(name), batches_of(name)
    ours, plain = (
        train(model, batches, tmp_path, trainer_class=trainer_class, perturbations=[])
        for trainer_class in (LPGTrainer, Trainer)
    )
    assert torch.equal(weights_of(ours), weights_of(plain)) and losses_of(ours) == losses_of(plain)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_accumulation_does_not_change_the_training(name, tmp_path):
    """Uneven micro-batches included."""
    model, batch = make_model(name, exact=True), make_batch(name, 32, dtype=torch.float64)
    whole, accumulated = (
        train(
            model,
            split(batch, sizes),
            tmp_path,
            args={"gradient_accumulation_steps": len(sizes) // 4},
            perturbations=OPEN,
        )
        for sizes in ([8] * 4, [3, 5] * 4)
    )
    assert accumulated.state.global_step == 8
    torch.testing.assert_close(weights_of(accumulated), weights_of(whole), rtol=0, atol=1e-9)


@pytest.mark.parametrize("step", [7, 10, 14], ids=["first epoch", "between", "second epoch"])
@pytest.mark.parametrize("chain", [OPEN, WITH_SAM], ids=["logits", "sam"])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(chain, step, tmp_path, deterministic):
    model, batches = make_model("bert"), batches_of("bert")  # with dropout
    args = {"optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": step}
    whole = train(model, batches, tmp_path / "whole", args=args, perturbations=chain)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
    resumed = train(model, batches, tmp_path / "resumed", args=args, perturbations=chain, resume=checkpoint)
    assert resumed.state.global_step == 20
    assert torch.equal(weights_of(resumed), weights_of(whole))
    for name, tensor in whole.lpg_loss.state_dict().items():
        assert torch.equal(resumed.lpg_loss.state_dict()[name], tensor), name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("chain", [AUTO, WITH_SAM], ids=["logits", "sam"])
def test_gradient_checkpointing_changes_nothing(chain, tmp_path):
    model, batches = make_model("bert", exact=True), batches_of("bert")
    args = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    ours, expected = (train(model, batches, tmp_path, args=a, perturbations=chain) for a in (args, None))
    torch.testing.assert_close(weights_of(ours), weights_of(expected), rtol=0, atol=1e-9)


def test_label_issues_are_those_of_the_cpu(tmp_path):
    """Rows and their numbers travel past the card; the sums stay on it."""
    batch, model = make_batch("vit", 48, dtype=torch.float64), make_model("vit", exact=True)
    batch["labels"][5] = (batch["labels"][5] + 1) % 4
    rows = [{name: values[row] for name, values in batch.items()} for row in range(48)]

    def collate(items):
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    tables = []
    for on_device in (True, False):
        args = {"per_device_train_batch_size": 8, "num_train_epochs": 3}
        start = copy.deepcopy(model)
        trainer = trainer_for(start, rows, tmp_path, on_device=on_device, args=args, perturbations=AUTO)
        trainer.data_collator = collate
        trainer.train()
        tables.append(trainer.label_issues())
    ours, expected = tables
    assert set(ours["visits"][:]) == {3} and ours["row"][0] == expected["row"][0]
    by_row = [dict(zip(table["row"][:], table["score"][:], strict=True)) for table in tables]
    assert by_row[0] == pytest.approx(by_row[1], abs=1e-6)


# Mixed precision


@pytest.mark.parametrize("chain", [AUTO, WITH_SAM], ids=["logits", "sam"])
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=needs_cuda)])
@every_model
def test_mixed_precision_is_no_further_from_float32_than_trainers(name, precision, chain, tmp_path):
    batches = batches_of(name)
    # Above these rates, and in single runs of the ResNet, what rounding began is chance: runs drift apart.
    rate = {"learning_rate": 0.001 if name == "resnet" else 0.01}
    distances = []
    for seed in range(4 if name == "resnet" else 1):
        model = make_model(name, exact=True, seed=seed).float()
        ours, ours_full, plain, plain_full = (
            train(model, batches, tmp_path, trainer_class=trainer_class, args=rate | a, perturbations=chain)
            for trainer_class in (LPGTrainer, Trainer)
            for a in ({precision: True}, {})
        )
        assert all(map(math.isfinite, losses_of(ours)))
        pairs = (ours, ours_full), (plain, plain_full), (ours, plain)
        distances.append([relative_distance(*pair, model) for pair in pairs])
        assert ours.lpg_loss.statistics.steps == 20
    our_error, error_of_trainer, effect = torch.tensor(distances).square().mean(0).sqrt()
    assert our_error < max(2.5 * error_of_trainer, 0.02)
    assert effect > 2 * our_error  # it did perturb


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_model_loaded_in_bfloat16_learns(name, tmp_path):
    model, batches = make_model(name).to(torch.bfloat16), batches_of(name, (16,) * 15, torch.bfloat16)
    trainer = train(model, batches, tmp_path, args={"bf16": True, "learning_rate": 0.1}, perturbations=AUTO)
    losses = losses_of(trainer)
    assert all(map(math.isfinite, losses)) and sum(losses[-5:]) < sum(losses[:5])
    assert next(trainer.model.parameters()).dtype == torch.bfloat16
    assert trainer.lpg_loss.statistics._running.dtype == torch.float32


# Compiled


@needs_cuda
@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune"], ids=str)
def test_a_compiled_training_is_the_uncompiled(mode, tmp_path):
    torch._dynamo.reset()
    model, batches = make_model("vit", exact=True).float(), batches_of("vit")
    args = {"torch_compile": True} | ({} if mode is None else {"torch_compile_mode": mode})
    compiled, eager = (train(model, batches, tmp_path, args=a, perturbations=OPEN) for a in (args, None))
    assert (weights_of(eager) - flat_parameters(model).double()).norm() > 1e-2
    torch.testing.assert_close(weights_of(compiled), weights_of(eager), rtol=0, atol=1e-4)
    means = [class_means(trainer.lpg_loss).cpu() for trainer in (compiled, eager)]
    torch.testing.assert_close(*means, rtol=0, atol=1e-3)  # sums over an epoch among them
    assert compiled.lpg_loss.statistics.class_counts.tolist() == COUNTS


@needs_cuda
@pytest.mark.parametrize("chain", [["sam(rho=0.05)"], WITH_SAM, []], ids=["sam", "auto and sam", "none"])
def test_what_is_kept_of_a_model_of_cuda_graphs_is_not_overwritten(chain, tmp_path):
    """Two passes in one step, accumulation, and losses that are logged later."""
    torch._dynamo.reset()
    model, batches = make_model("vit", exact=True).float(), batches_of("vit")
    args = {"gradient_accumulation_steps": 2, "logging_steps": 5}
    graphs = args | {"torch_compile": True, "torch_compile_mode": "reduce-overhead"}
    compiled, eager = (train(model, batches, tmp_path, args=a, perturbations=chain) for a in (graphs, args))
    assert (weights_of(eager) - flat_parameters(model).double()).norm() > 1e-2
    torch.testing.assert_close(weights_of(compiled), weights_of(eager), rtol=0, atol=1e-4)
    assert losses_of(compiled) == pytest.approx(losses_of(eager), abs=1e-3)
