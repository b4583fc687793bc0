"""Steps whose gradient is not finite: skipped without harm, or the end of the training."""

import logging

import pytest
import torch
from clients import exact_bert, make_args, token_rows, warnings_of, weights_of
from torch.nn import functional as F
from transformers import BertForSequenceClassification, PrinterCallback

from lpg_hf import LPGTrainer


CHAIN = ["logit_adjustment", "class_relative_dampening(learned=(0.0, 0.01), evidence=(0.0, 0.001))"]


class BadOnce(BertForSequenceClassification):
    """The logits of one training step are NaN."""

    def __init__(self, config):
        super().__init__(config)
        self.calls = 0

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask=attention_mask, labels=labels)
        self.calls += self.training
        if self.training and self.calls == self.bad_call:
            outputs.logits = outputs.logits * torch.nan
            outputs.loss = F.cross_entropy(outputs.logits, labels)
        return outputs


class SkipsBadSteps(torch.optim.SGD):
    """Does what a gradient scaler does under fp16."""

    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(gradient.isfinite().all() for gradient in gradients):
            return super().step(closure)
        return None


def train(path, optimizer_class, *, rows=None, has_scaler=False, bad_call=4, **args):
    model = exact_bert(BadOnce)
    model.bad_call = bad_call
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    settings = {"max_steps": 8, "logging_steps": 1, "train_sampling_strategy": "sequential"}
    trainer = LPGTrainer(
        model=model,
        args=make_args(path, **(settings | args)),
        train_dataset=token_rows() if rows is None else rows,
        optimizers=(optimizer, schedule),
        perturbations=CHAIN,
        class_counts=[24, 10, 6, 4],
    )
    trainer.remove_callback(PrinterCallback)
    if has_scaler:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=False)
    trainer.train()
    return trainer


@pytest.mark.parametrize("logging_steps", [1, 500])
def test_a_skipped_step_is_told_once_and_training_goes_on(logging_steps, tmp_path, caplog):
    trainer = train(tmp_path, SkipsBadSteps, logging_steps=logging_steps)
    assert trainer.state.global_step == 8
    assert weights_of(trainer).isfinite().all()
    (message,) = warnings_of(caplog)
    assert "The logits of step 4, or their gradient" in message and "skipped the step" in message


def test_under_a_scaler_the_warning_waits_for_the_end(tmp_path, caplog):
    """It skips steps by design, mostly at the start."""
    seen = []

    class Watched(logging.Handler):
        def emit(self, record):
            if record.levelno >= logging.WARNING:
                seen.append(trainer_state["step"])

    trainer_state = {"step": 0}

    class Counts(SkipsBadSteps):
        def step(self, closure=None):
            trainer_state["step"] += 1
            return super().step(closure)

    handler = Watched()
    logging.getLogger("lpg_hf").addHandler(handler)
    try:
        train(tmp_path, Counts, has_scaler=True)
    finally:
        logging.getLogger("lpg_hf").removeHandler(handler)
    assert seen == [8]


def test_statistics_leave_a_skipped_step_out(tmp_path):
    """All means are those of a training without its batch."""
    rows = token_rows()
    with_bad = train(tmp_path, SkipsBadSteps, rows=rows)
    good = rows.select([row for row in range(len(rows)) if not 12 <= row < 16])
    without = train(tmp_path, SkipsBadSteps, rows=good, max_steps=7, bad_call=0)
    assert torch.equal(weights_of(with_bad), weights_of(without))
    ours, theirs = with_bad.lpg_loss.statistics, without.lpg_loss.statistics
    assert torch.equal(ours._running, theirs._running)
    # Classes of the bad batch leave it out as a whole.
    assert torch.equal(ours._epoch_sums, theirs._epoch_sums)


def test_weights_that_are_not_finite_end_the_training(tmp_path):
    with pytest.raises(FloatingPointError, match="logits of step 4, or"):
        train(tmp_path, torch.optim.SGD)
    with pytest.raises(FloatingPointError, match="logits of step 4, or"):
        train(tmp_path, torch.optim.SGD, logging_steps=500)
