"""Training steps and calls of `compute_loss` by others: callbacks, micro-batches in pieces, steps by hand."""

import pytest
import torch
from clients import (
    OPEN_GATES,
    assert_dampened,
    confident_bert,
    distance,
    exact_bert,
    few_rows,
    make_args,
    run,
    token_rows,
    warnings_of,
)
from tiny import class_means
from torch.utils.checkpoint import checkpoint
from transformers import PrinterCallback, Trainer, TrainerCallback, default_data_collator

from lpg_hf import LPGTrainer


CHAIN = ["logit_adjustment", "logit_clipping(max_norm=0.3)"]


class LooksAtLoss(TrainerCallback):
    """Takes the loss and the gradient of a batch in train mode after every step."""

    def __init__(self):
        self.trainer = None
        self.looks = []

    def on_step_end(self, args, state, control, model, **kwargs):
        batch = default_data_collator([self.trainer.train_dataset[row] for row in range(8)])
        model.train()
        saved = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        loss = self.trainer.compute_loss(model, batch)
        loss.backward()
        self.looks.append((loss.item(), model.classifier.weight.grad.clone()))
        for parameter, gradient in zip(model.parameters(), saved, strict=True):
            parameter.grad = gradient


def run_with_look(trainer_class, path, accumulation=1, **kwargs):
    look = LooksAtLoss()
    args = make_args(path, gradient_accumulation_steps=accumulation)
    trainer = trainer_class(model=confident_bert(), args=args, train_dataset=few_rows(), callbacks=[look], **kwargs)
    trainer.remove_callback(PrinterCallback)
    look.trainer = trainer
    trainer.train()
    return trainer, look.looks


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("chain", [CHAIN, OPEN_GATES, [], ["sam(rho=0.05)"]], ids=["fixed", "running", "none", "sam"])
def test_a_callback_gets_the_plain_loss_and_changes_nothing(chain, accumulation, tmp_path):
    looked_at, looks = run_with_look(LPGTrainer, tmp_path, accumulation, perturbations=chain)
    args = {"gradient_accumulation_steps": accumulation}
    alone = run(LPGTrainer, confident_bert(), tmp_path, few_rows(), args=args, perturbations=chain)
    assert distance(looked_at, alone) == 0
    if chain:
        ours, theirs = (trainer.lpg_loss for trainer in (looked_at, alone))
        if ours is not None:
            assert torch.equal(class_means(ours), class_means(theirs))
            assert torch.equal(ours.statistics.seen_counts, theirs.statistics.seen_counts)
    if chain == OPEN_GATES:
        assert_dampened(alone)
    # The last look is at the trained weights: a plain Trainer sees the same there.
    batch = default_data_collator([looked_at.train_dataset[row] for row in range(8)])
    looked_at.model.train()
    expected = Trainer(model=looked_at.model, args=make_args(tmp_path)).compute_loss(looked_at.model, batch)
    looked_at.model.zero_grad()
    expected.backward()
    assert looks[-1][0] == expected.item()
    assert torch.equal(looks[-1][1], looked_at.model.classifier.weight.grad)


class InPieces(LPGTrainer):
    """Takes each micro-batch in two pieces, to save memory."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        total = 0.0
        for piece in (slice(0, 2), slice(2, None)):
            part = {name: values[piece] for name, values in inputs.items()}
            loss = self.compute_loss(model, part) / 2
            self.accelerator.backward(loss)
            total = total + loss.detach()
        return total


@pytest.mark.parametrize("chain", [CHAIN, OPEN_GATES], ids=["fixed", "running"])
def test_statistics_count_every_piece_of_a_micro_batch(chain, tmp_path, caplog):
    pieces = run(InPieces, confident_bert(), tmp_path, few_rows(), perturbations=chain)
    expected = run(LPGTrainer, confident_bert(), tmp_path, few_rows(), perturbations=chain)
    assert distance(pieces, expected) < 1e-12
    assert torch.equal(pieces.lpg_loss.statistics.seen_counts, expected.lpg_loss.statistics.seen_counts)
    torch.testing.assert_close(class_means(pieces.lpg_loss), class_means(expected.lpg_loss), rtol=0, atol=1e-12)
    if chain == OPEN_GATES:
        assert_dampened(expected)
    assert not warnings_of(caplog)


class InPiecesTwice(LPGTrainer):
    """Looks at each piece again, before the next one."""

    recomputes = False

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        total = 0.0
        for piece in (slice(0, 2), slice(2, None)):
            part = {name: values[piece] for name, values in inputs.items()}

            def look(tokens, part=part):
                return self.compute_loss(model, part | {"input_ids": tokens}) / 2

            if self.recomputes:
                loss = checkpoint(look, part["input_ids"], use_reentrant=False)
            else:
                loss = (look(part["input_ids"]) + look(part["input_ids"])) / 2
            self.accelerator.backward(loss)
            total = total + loss.detach()
        return total


class Recomputing(InPiecesTwice):
    recomputes = True


@pytest.mark.parametrize("cls", [InPiecesTwice, Recomputing])
def test_statistics_count_a_piece_once_that_is_looked_at_again(cls, tmp_path):
    """Both for R-Drop in pieces and where the loss of a piece is computed anew in the backward pass."""
    expected = run(InPieces, confident_bert(), tmp_path, few_rows(), perturbations=OPEN_GATES)
    again = run(cls, confident_bert(), tmp_path, few_rows(), perturbations=OPEN_GATES)
    assert torch.equal(again.lpg_loss.statistics.seen_counts, expected.lpg_loss.statistics.seen_counts)
    torch.testing.assert_close(class_means(again.lpg_loss), class_means(expected.lpg_loss), rtol=0, atol=1e-12)
    assert distance(again, expected) < 1e-12
    assert_dampened(expected)


class WrittenAnew(Trainer):
    """A step that divides the loss itself where it has to."""

    passes_count = True

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs, steps = self._prepare_inputs(inputs), self.args.gradient_accumulation_steps
        if self.passes_count:
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        else:
            loss = self.compute_loss(model, inputs) / steps
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize("passes_count", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_written_anew_gets_a_loss_of_trainers_scale(passes_count, smoothing, accumulation, tmp_path):
    """With a method that changes nothing, it is the same script with Trainer."""
    args = {"gradient_accumulation_steps": accumulation, "label_smoothing_factor": smoothing, "max_steps": 5}

    def trained(bases, **options):
        script = type("Script", bases, {"passes_count": passes_count})
        return run(script, exact_bert(), tmp_path, args=args, **options)

    plain = trained((WrittenAnew,))
    ours = trained((WrittenAnew, LPGTrainer), perturbations=["logit_adjustment(tau=0.0)"])
    assert distance(ours, plain) < 1e-9
    assert distance(plain, run(Trainer, exact_bert(), tmp_path, args=args | {"max_steps": 1})) > 1e-4


@pytest.mark.parametrize("passes_count", [True, False])
@pytest.mark.parametrize("chain", [CHAIN, []], ids=["chain", "none"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_repeated_within_one_call_has_the_weight_of_one(passes_count, chain, accumulation, tmp_path):
    """R-Drop by concatenation; without dropout, both halves are alike."""

    class Repeats(LPGTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            twice = {name: torch.cat([values, values]) for name, values in inputs.items()}
            count = num_items_in_batch if passes_count else None
            return super().compute_loss(model, twice, return_outputs, count)

    args = {"gradient_accumulation_steps": accumulation}
    repeated = run(Repeats, exact_bert(), tmp_path, args=args, perturbations=chain)
    assert distance(repeated, run(LPGTrainer, exact_bert(), tmp_path, args=args, perturbations=chain)) < 1e-12


def test_a_step_in_eval_mode_is_perturbed(tmp_path):
    """Scripts that freeze dropout or batch normalization switch the model to eval mode in their step."""

    class Evaluates(LPGTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.eval()
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            return loss.detach()

    ours = run(Evaluates, exact_bert(), tmp_path, perturbations=CHAIN)
    assert distance(ours, run(LPGTrainer, exact_bert(), tmp_path, perturbations=CHAIN)) < 1e-12


def test_an_adversarial_pass_does_not_see_the_first_pass_statistics_twice_in_telemetry(tmp_path):
    class Twice(LPGTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.compute_loss(model, self._prepare_inputs(inputs)).mul(0.0).backward()
            return loss

    twice = run(Twice, exact_bert(), tmp_path, perturbations=CHAIN)
    once = run(LPGTrainer, exact_bert(), tmp_path, perturbations=CHAIN)
    logs = [
        [log["lpg/delta_ratio"] for log in trainer.state.log_history if "loss" in log] for trainer in (twice, once)
    ]
    assert logs[0] == pytest.approx(logs[1], abs=1e-12)


def test_a_training_step_set_on_the_trainer_is_used_and_stays(tmp_path):
    trainer = LPGTrainer(model=exact_bert(), args=make_args(tmp_path), train_dataset=token_rows(), perturbations=CHAIN)
    calls, own = [], trainer.training_step

    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    trainer.training_step = counted
    trainer.train()
    assert len(calls) == 6 and trainer.training_step is counted
    assert trainer.lpg_loss.statistics.steps == 6


def test_the_trainer_is_as_before_when_training_fails(tmp_path):
    class Fails(LPGTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            raise RuntimeError("stop")

    trainer = Fails(model=exact_bert(), args=make_args(tmp_path), train_dataset=token_rows())
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    assert "training_step" not in vars(trainer)
    batch = default_data_collator([trainer.train_dataset[row] for row in range(4)])
    trainer.model.train()
    plain = Trainer(model=trainer.model, args=make_args(tmp_path)).compute_loss(trainer.model, batch)
    assert trainer.compute_loss(trainer.model, batch) == plain


def test_a_step_by_hand_is_perturbed(tmp_path):
    """`training_step` may be called without `train`, as custom loops do."""
    trainers = [
        LPGTrainer(model=exact_bert(), args=make_args(tmp_path), train_dataset=token_rows(), perturbations=CHAIN)
        for _ in range(2)
    ]
    batch = default_data_collator([trainers[0].train_dataset[row] for row in range(4)])
    trainers[0].current_gradient_accumulation_steps = 1  # the loop of the Trainer sets it
    trainers[0].training_step(trainers[0].model, dict(batch))
    perturbed = trainers[0].lpg_loss(trainers[1].model(**batch), batch["labels"])
    perturbed.backward()
    for by_hand, expected in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        torch.testing.assert_close(by_hand.grad, expected.grad, rtol=0, atol=1e-12)
