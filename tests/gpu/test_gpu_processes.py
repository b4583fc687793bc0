"""Several processes or several cards: two processes on one card, FSDP2, DataParallel."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import train_exact
from gpu import COUNTS, DEVICE, SGD, needs_cuda, needs_device, needs_two_cards, weights_of
from tiny import flat_parameters, make_batch, make_model, make_trainer
from transformers import Trainer, default_data_collator

from lpg_hf import LPGTrainer


pytestmark = needs_device

WATCHDOG_SECONDS = 120
OPEN = ["logit_adjustment", "class_relative_dampening(learned=(0.0, 0.01), evidence=(0.0, 0.001))"]
ON_CPU = {"use_cpu": DEVICE == "cpu"}
CARDS = max(torch.cuda.device_count(), 1)


def launch(job, processes, output_dir, cards=1):
    """Starts `train_exact.py` several times. With fewer cards than processes they share them, as gloo allows."""
    output_dir.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    started = [
        subprocess.Popen(
            [sys.executable, train_exact.__file__, json.dumps([job]), str(output_dir)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank % cards)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=WATCHDOG_SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    (result,) = torch.load(output_dir / "results.pt", map_location="cpu")
    return result


def assert_same(result, expected, keys=("parameters", "means", "losses")):
    for key in keys:
        actual, wanted = (torch.as_tensor(r[key]).double().cpu() for r in (result, expected))
        # Losses are logged in float32.
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-6 if key == "losses" else 1e-9, msg=key)


@pytest.mark.parametrize(("name", "accumulation", "sizes"), [("convnext", 1, [8] * 10), ("bert", 2, [3, 5, 1, 7] * 5)])
def test_two_processes_on_one_card_train_like_one(name, accumulation, sizes, tmp_path):
    """The sums travel over gloo, as tensors of the card."""
    job = {"model": name, "perturbations": OPEN, "ignored": [0, 1, 40]}
    args = SGD | ON_CPU
    alone = train_exact.train(job | {"sizes": [16] * 5, "args": args}, tmp_path / "alone")
    args |= {"gradient_accumulation_steps": accumulation, "ddp_backend": "gloo"}
    together = launch(job | {"sizes": sizes, "args": args}, 2, tmp_path / "together")
    assert together["processes"] == 2 and alone["steps"] == together["steps"] == 10
    assert_same(together, alone)


def test_label_issues_of_two_processes_on_one_card_are_those_of_one(tmp_path):
    job = {"model": "vit", "perturbations": OPEN, "sizes": [64], "is_map": True}
    args = SGD | ON_CPU
    alone = train_exact.train(job | {"args": args | {"per_device_train_batch_size": 16}}, tmp_path / "alone")
    args |= {"per_device_train_batch_size": 8, "ddp_backend": "gloo"}
    together = launch(job | {"args": args}, 2, tmp_path / "together")
    scores = [dict(zip(r["issues"]["row"], r["issues"]["score"], strict=True)) for r in (together, alone)]
    assert set(scores[0]) == set(range(64)) and scores[0] == pytest.approx(scores[1], abs=1e-6)


# FSDP2


# NCCL wants a card for each process. Accelerate does not shard on the CPU.
FSDP_PROCESSES = min(CARDS, 2)
LAYERS = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["BertLayer"]}
FSDP2 = {"fsdp": True, "fsdp_config": {"fsdp_version": 2, **LAYERS}, "use_cpu": False}


@needs_cuda
def test_fsdp2_trains_what_one_process_trains(tmp_path):
    job = {"model": "bert", "perturbations": OPEN}
    alone = train_exact.train(job | {"sizes": [16] * 5, "args": SGD | {"use_cpu": False}}, tmp_path / "alone")
    sizes = [16 // FSDP_PROCESSES] * (5 * FSDP_PROCESSES)
    job |= {"sizes": sizes, "args": SGD | FSDP2}
    sharded = launch(job, FSDP_PROCESSES, tmp_path / "sharded", FSDP_PROCESSES)
    assert sharded["processes"] == FSDP_PROCESSES and sharded["steps"] == 10
    assert_same(sharded, alone)


@needs_cuda
def test_fsdp2_and_a_method_of_the_parameters_is_refused(tmp_path):
    job = {"model": "bert", "perturbations": ["sam"], "sizes": [8] * 4, "args": SGD | FSDP2}
    with pytest.raises(AssertionError, match="sam\\(\\) needs whole gradients and parameters"):
        launch(job, FSDP_PROCESSES, tmp_path / "sharded", FSDP_PROCESSES)


# DataParallel


@needs_two_cards
@pytest.mark.parametrize("chain", [[], OPEN], ids=["none", "open gates"])
def test_data_parallel_trains_what_one_card_trains(chain, tmp_path):
    batch = make_batch("vit", 96, dtype=torch.float64)
    rows = [{name: values[row] for name, values in batch.items()} for row in range(96)]

    def train(trainer_class, cards, **kwargs):
        args = SGD | {"use_cpu": False, "per_device_train_batch_size": 16 // cards}
        model = make_model("vit", exact=True)
        trainer = make_trainer(trainer_class, model, rows, tmp_path, args=args, **kwargs)
        trainer.args._n_gpu, trainer.data_collator = cards, default_data_collator
        trainer.train()
        return trainer

    kwargs = {"perturbations": chain, "class_counts": COUNTS}
    ours, alone = (train(LPGTrainer, cards, **kwargs) for cards in (2, 1))
    assert isinstance(ours.model_wrapped, torch.nn.DataParallel)
    torch.testing.assert_close(weights_of(ours), weights_of(alone), rtol=0, atol=1e-9)
    plain = train(Trainer, 2)
    if chain == []:
        assert torch.equal(weights_of(ours), weights_of(plain))
    else:
        assert (weights_of(ours) - weights_of(plain)).abs().max() > 1e-3
        assert (weights_of(ours) - flat_parameters(make_model("vit", exact=True))).abs().max() > 1e-3
