"""Scripts with a training step of their own: adversarial noise on the embeddings (FGM), with and without `super()`."""

import pytest
import torch
from clients import (
    OPEN_GATES,
    assert_dampened,
    confident_bert,
    distance,
    exact_bert,
    few_rows,
    losses_of,
    run,
    token_rows,
    warnings_of,
    weights_of,
)
from tiny import class_means
from transformers import Trainer

from lpg_hf import LPGTrainer


CHAIN = ["logit_adjustment", "logit_clipping(max_norm=0.3)"]


class FGM:
    """Moves the embeddings along their gradient, and back."""

    def __init__(self, model, epsilon):
        self.weight, self.epsilon = model.get_input_embeddings().weight, epsilon

    def attack(self):
        self.backup = self.weight.data.clone()
        norm = self.weight.grad.norm()
        if norm > 0:
            self.weight.data.add_(self.epsilon * self.weight.grad / norm)

    def restore(self):
        self.weight.data = self.backup


def fgm_on_top(base, epsilon):
    """The step of the base class, and a second backward pass at the shifted embeddings."""

    class FGMTrainer(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            fgm = FGM(model, epsilon)
            fgm.attack()
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                adversarial = self.compute_loss(model, inputs)
            self.accelerator.backward(adversarial)
            fgm.restore()
            return loss

    return FGMTrainer


def fgm_anew(base, epsilon, divides=True):
    """A step written anew, as scripts from before `num_items_in_batch` have it."""

    class FGMTrainer(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            inputs = self._prepare_inputs(inputs)
            loss = self.one_pass(model, inputs)
            if epsilon > 0:
                fgm = FGM(model, epsilon)
                fgm.attack()
                self.one_pass(model, inputs)
                fgm.restore()
            return loss

        def one_pass(self, model, inputs):
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs)
            if divides and self.args.gradient_accumulation_steps > 1:
                loss = loss / self.args.gradient_accumulation_steps
            self.accelerator.backward(loss)
            return loss.detach()

    return FGMTrainer


ACCUMULATIONS = pytest.mark.parametrize("accumulation", [1, 2])


def settings(accumulation):
    # The sixth step would have one micro-batch alone, which the scripts divide all the same.
    return {"max_steps": 5} | {
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 8 // accumulation,
    }


# `fgm_on_top` calls LPGTrainer's step, which under accumulation takes the mean that Trainer's misses for BERT.
@pytest.mark.parametrize(("script", "accumulation"), [(fgm_on_top, 1), (fgm_anew, 1), (fgm_anew, 2)])
def test_fgm_without_perturbations_is_that_of_trainer(script, accumulation, tmp_path, caplog):
    args = settings(accumulation)
    plain = run(script(Trainer, 0.5), exact_bert(), tmp_path, args=args)
    ours = run(script(LPGTrainer, 0.5), exact_bert(), tmp_path, args=args, perturbations=[])
    assert torch.equal(weights_of(ours), weights_of(plain))
    assert losses_of(ours) == pytest.approx(losses_of(plain), abs=1e-6)
    assert not warnings_of(caplog)
    assert distance(plain, run(Trainer, exact_bert(), tmp_path, args=args)) > 1e-3


@ACCUMULATIONS
@pytest.mark.parametrize("chain", [CHAIN, OPEN_GATES], ids=["fixed", "running"])
def test_a_step_written_anew_is_perturbed_or_told_that_it_is_not(chain, accumulation, tmp_path, caplog):
    """With noise of size zero and one pass, it is the step of the base class."""
    args = settings(accumulation)
    rows = token_rows((12, 6, 4, 2))  # three whole steps an epoch
    script = run(fgm_anew(LPGTrainer, 0.0), confident_bert(), tmp_path, rows, args=args, perturbations=chain)
    messages = warnings_of(caplog)
    expected = run(LPGTrainer, confident_bert(), tmp_path, rows, args=args, perturbations=chain)
    plain = run(Trainer, confident_bert(), tmp_path, rows, args=args)
    if messages:
        assert len(messages) == 1 and "training_step" in messages[0]
        assert distance(script, plain) < 1e-9
    else:
        assert distance(script, expected) < 1e-9
        torch.testing.assert_close(class_means(script.lpg_loss), class_means(expected.lpg_loss), rtol=0, atol=1e-12)
        if chain == OPEN_GATES:
            assert_dampened(expected)


@pytest.mark.parametrize("script", [fgm_on_top, fgm_anew])
def test_both_passes_of_fgm_are_perturbed(script, tmp_path, caplog):
    """Noise of size zero repeats the pass, so the gradient is twice that of the base class."""
    tiny = 1e-30
    ours = run(script(LPGTrainer, tiny), exact_bert(), tmp_path, perturbations=CHAIN)
    messages = warnings_of(caplog)
    double = run(LPGTrainer, exact_bert(), tmp_path, args={"learning_rate": 0.2}, perturbations=CHAIN)
    if messages:
        assert len(messages) == 1 and "training_step" in messages[0]
        double = run(Trainer, exact_bert(), tmp_path, args={"learning_rate": 0.2})
    assert distance(ours, double) < 1e-9


@pytest.mark.parametrize("script", [fgm_on_top, fgm_anew])
def test_statistics_see_each_sample_of_fgm_once(script, tmp_path):
    """The means are those of the clean passes alone."""
    ours = run(script(LPGTrainer, 1e-30), exact_bert(), tmp_path, few_rows(), perturbations=CHAIN)
    double = run(LPGTrainer, exact_bert(), tmp_path, few_rows(), args={"learning_rate": 0.2}, perturbations=CHAIN)
    assert ours.lpg_loss.statistics.steps == 6 and ours.lpg_loss.statistics.epochs == 1
    torch.testing.assert_close(class_means(ours.lpg_loss), class_means(double.lpg_loss), rtol=0, atol=1e-9)
    assert sum(ours.label_issues()["visits"]) == sum(double.label_issues()["visits"])


@pytest.mark.parametrize("method", ["gradient_clipping(max_norm=0.01)", "sam(rho=0.5)"])
def test_methods_of_the_parameters_act_in_a_step_written_anew_or_it_is_told_that_they_do_not(method, tmp_path, caplog):
    script = run(fgm_anew(LPGTrainer, 0.0), exact_bert(), tmp_path, perturbations=[method])
    messages = warnings_of(caplog)
    expected = run(LPGTrainer, exact_bert(), tmp_path, perturbations=[method])
    plain = run(Trainer, exact_bert(), tmp_path)
    assert distance(expected, plain) > 1e-4
    if messages:
        assert len(messages) == 1 and "training_step" in messages[0]
        assert torch.equal(weights_of(script), weights_of(plain))
    else:
        assert distance(script, expected) < 1e-9
