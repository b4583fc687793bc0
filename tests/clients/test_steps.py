"""Scripts with a training step of their own: adversarial noise on the embeddings (FGM), with and without `super()`."""

import pytest
import torch
from clients import distance, exact_bert, losses_of, run, warnings_of, weights_of
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


@pytest.mark.parametrize("script", [fgm_on_top, fgm_anew])
def test_fgm_without_perturbations_is_that_of_trainer(script, tmp_path, caplog):
    plain = run(script(Trainer, 0.5), exact_bert(), tmp_path)
    ours = run(script(LPGTrainer, 0.5), exact_bert(), tmp_path, perturbations=[])
    assert torch.equal(weights_of(ours), weights_of(plain))
    assert losses_of(ours) == pytest.approx(losses_of(plain), abs=1e-6)
    assert not warnings_of(caplog)
    assert distance(plain, run(Trainer, exact_bert(), tmp_path)) > 1e-3


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
