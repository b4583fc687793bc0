"""Autocast as a GPU has it, for the families that `test_autocast_loss.py` simulates on the CPU."""

import logging

import pytest
import torch
from autocast import SEEDS, SIMULATED, RecordGradients, gradient_at_the_logits, unsure
from families import CHAIN, make_family, make_family_batch, perturbed_by_chain
from gpu import COUNTS, needs_cuda, needs_device, train, trainer_for
from transformers import Trainer

from lpg_hf import LPGTrainer
from lpg_hf.trainer.parameter_methods import gradient_scale


pytestmark = needs_device

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
every_precision = pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=needs_cuda)])


def gradient_of_a_step(trainer_class, model, batch, path, precision=None, **kwargs):
    """The parameters' gradient in float64 on the CPU, and the trainer. The Trainer unscales it to log its norm."""
    record = RecordGradients()
    args = {"learning_rate": 0.0, "num_train_epochs": 1} | ({} if precision is None else {precision: True})
    trainer = train(model, [batch], path, trainer_class=trainer_class, args=args, callbacks=[record], **kwargs)
    return record.gradient.cpu(), trainer


@every_precision
@pytest.mark.parametrize("name", SIMULATED)
def test_auto_perturbs_under_autocast(name, precision, tmp_path, caplog):
    """The gradient is no further from float64's than 1.5 times the Trainer's."""
    errors, effects = {Trainer: [], LPGTrainer: []}, []
    for seed in SEEDS:
        batch = make_family_batch(name, 16, seed=seed)
        exact_batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        exact = {}
        for trainer_class in (Trainer, LPGTrainer):
            # Between those of the training and all alike: a correction that shows, and does not add to the rounding.
            kwargs = {"eval_shares": [count**0.5 for count in COUNTS]} if trainer_class is LPGTrainer else {}
            model = unsure(name, seed)
            with caplog.at_level(logging.WARNING, logger="lpg_hf"):
                exact[trainer_class], _ = gradient_of_a_step(trainer_class, model, exact_batch, tmp_path, **kwargs)
                half, trainer = gradient_of_a_step(trainer_class, model.float(), batch, tmp_path, precision, **kwargs)
            errors[trainer_class].append((half - exact[trainer_class]).norm())
        assert trainer.lpg_loss.statistics.steps == 1
        effects.append((exact[LPGTrainer] - exact[Trainer]).norm())
    assert not [record for record in caplog.records if record.name.startswith("lpg_hf")]
    ours, trainers = (torch.stack(errors[trainer_class]).norm() for trainer_class in (LPGTrainer, Trainer))
    assert ours < 1.5 * trainers
    assert torch.stack(effects).norm() > 10 * ours


@every_precision
@pytest.mark.parametrize("name", [name for name in SIMULATED if name != "gpt2"])
def test_the_gradient_at_the_logits_is_the_perturbed_one(name, precision, tmp_path):
    """It is `g + delta` of those logits, to the rounding of bfloat16."""
    batch, model = make_family_batch(name, 16), make_family(name, exact=True).float()
    args = {"learning_rate": 0.0, precision: True}
    trainer = trainer_for(model, [batch], tmp_path, args=args, perturbations=CHAIN)
    logits, gradient = gradient_at_the_logits(model, trainer.train)
    assert logits.dtype == gradient.dtype == DTYPES[precision]
    logits = logits.double().cpu()
    gradient = gradient.double().cpu() / gradient_scale(trainer.accelerator)
    expected, unperturbed = perturbed_by_chain(logits.numpy(), batch["labels"].numpy())
    expected, unperturbed = torch.from_numpy(expected) / 16, torch.from_numpy(unperturbed) / 16
    assert (gradient - expected).norm() < 2.0**-7 * expected.norm()
    assert (gradient - unperturbed).norm() > 0.2 * expected.norm()
