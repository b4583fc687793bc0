"""Callbacks that observe the perturbations of a training: any number of them, of any kind."""

import pytest
import torch
from tiny import flat_parameters, make_batch, make_model, make_trainer, split
from transformers import TrainerCallback

from lpg_hf import LPGTrainer
from lpg_hf.pac_bayes import PathLength
from lpg_hf.perturbations.observers import PerturbationObserver


class SumOfDeltas(TrainerCallback):
    """Adds up the absolute perturbation of every `interval`-th step, in a user's way."""

    def __init__(self, interval=1):
        self.interval, self.starts, self.is_due = interval, 0, False

    def on_step_begin(self, args, state, control, **kwargs):
        self.is_due = state.global_step % self.interval == 0

    def start(self, accelerator):
        self.starts += 1
        self.total = torch.zeros(())

    def add_perturbation(self, logits, gradient, loss_scale):
        assert logits.requires_grad and logits.shape == gradient.shape
        self.total += gradient.abs().sum()

    def report(self):
        return {f"deltas_{self.interval}": self.total.item()}

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, tensors):
        self.total = tensors["total"]


def make_observed(tmp_path, callbacks, **kwargs):
    return make_trainer(
        LPGTrainer,
        make_model("bert", exact=True),
        split(make_batch("bert", 48, dtype=torch.float64), [8] * 6),
        tmp_path,
        args={"save_strategy": "steps", "save_steps": 4},
        perturbations=["logit_clipping(max_norm=0.5)"],
        callbacks=callbacks,
        **kwargs,
    )


def test_several_observers_see_the_steps_that_they_ask_for(tmp_path):
    observers = [SumOfDeltas(), PathLength(interval=1), SumOfDeltas(interval=2)]
    assert all(isinstance(observer, PerturbationObserver) for observer in observers)
    trainer = make_observed(tmp_path, observers)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    every, second = ([log[f"deltas_{interval}"] for log in logs] for interval in (1, 2))
    steps = [b - a for a, b in zip([0.0, *every], every, strict=False)]
    assert min(steps) > 0 and logs[-1]["lpg/perturbation_path"] > 0
    assert second[-1] == pytest.approx(sum(steps[::2]), rel=1e-6)
    # At construction, and when the training starts.
    assert observers[0].starts == 2
    unobserved = make_observed(tmp_path, [])
    unobserved.train()
    assert torch.equal(flat_parameters(trainer.model), flat_parameters(unobserved.model))


def test_observers_of_one_class_resume_with_their_own_state(tmp_path):
    def observers():
        return [SumOfDeltas(interval=1), PathLength(interval=1), SumOfDeltas(interval=3)]

    whole = make_observed(tmp_path, observers())
    whole.train()
    resumed = make_observed(tmp_path, observers())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    last_logs = [[log for log in trainer.state.log_history if "loss" in log][-1] for trainer in (whole, resumed)]
    assert last_logs[0] == last_logs[1]
    assert last_logs[0]["deltas_1"] > last_logs[0]["deltas_3"] > 0
