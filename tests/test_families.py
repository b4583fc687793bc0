"""LPGTrainer on every family of models: what must hold for a classifier, whatever it is made of."""

import logging

import numpy as np
import pytest
import reference
import torch
from families import (
    CHAIN,
    COUNTS,
    FAMILIES,
    TEXT,
    inputs_of,
    make_family,
    make_family_batch,
    reference_gradients,
    return_tuples,
)
from tiny import NUM_LABELS, flat_parameters, make_trainer, split
from transformers import Trainer

from lpg_hf import LPGTrainer


LEARNING_RATE = 2.0**-7
ONE_STEP = {"optim": "sgd", "learning_rate": LEARNING_RATE, "max_grad_norm": 0.0}

every_family = pytest.mark.parametrize("name", FAMILIES)
families_with_lora = pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.lora])


# The one-word swap


@every_family
def test_trains_with_auto_evaluates_saves_and_reloads(name, tmp_path, caplog):
    batches = split(make_family_batch(name, 32), [8] * 4)
    trainer = make_trainer(
        LPGTrainer,
        make_family(name),
        batches,
        tmp_path,
        args={"per_device_eval_batch_size": 1},
        class_counts=COUNTS,
        eval_dataset=batches[:2],
    )
    before = flat_parameters(trainer.model).clone()
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        trainer.train()
    assert not [record for record in caplog.records if record.name.startswith("lpg_hf")]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4 and all(log["lpg/delta_ratio"] > 0.01 for log in logs)
    assert (flat_parameters(trainer.model) - before).abs().max() > 0.01

    trainer.save_model(str(tmp_path / "model"))
    reloaded = FAMILIES[name].auto_class.from_pretrained(tmp_path / "model").eval()
    untrained = make_family(name)
    untrained(**batches[0])
    assert reloaded.config.problem_type == untrained.config.problem_type
    with torch.no_grad():
        expected = torch.cat([trainer.model.eval()(**inputs_of(batch)).logits for batch in batches[:2]])
        logits = torch.cat([reloaded(**inputs_of(batch)).logits for batch in batches[:2]])
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    loss = sum(cross_entropy(reloaded, batch) for batch in batches[:2]) / 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-5)


@torch.no_grad()
def cross_entropy(model, batch):
    """From the logits alone, in float64."""
    probabilities = reference.softmax(model(**inputs_of(batch)).logits.numpy())
    own = probabilities[range(len(probabilities)), batch["labels"].numpy()]
    return -np.log(own).mean()


# The gradient


@every_family
def test_parameter_gradient_is_the_reference(name, tmp_path):
    batch = make_family_batch(name, 7, dtype=torch.float64)
    model = make_family(name, exact=True)
    check_gradient(model, split(batch, [3, 4]), tmp_path)


def check_gradient(model, micro_batches, path):
    """One SGD step over two micro-batches against `sum_i J_i^T (g_i + delta_i) / N`, deltas from the formulas."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in parameters]
    expected, unperturbed = reference_gradients(model, parameters, micro_batches)
    assert (expected - unperturbed).norm() > 0.1 * unperturbed.norm()

    args = ONE_STEP | {"gradient_accumulation_steps": len(micro_batches)}
    trainer = make_trainer(LPGTrainer, model, micro_batches, path, args=args, perturbations=CHAIN, class_counts=COUNTS)
    trainer.train()
    assert trainer.state.global_step == 1
    steps = zip(before, parameters, strict=True)
    gradient = torch.cat([(old - new.detach()).flatten() for old, new in steps]) / LEARNING_RATE
    assert gradient.dtype == torch.float64
    # DeBERTa converts its logits to float32 for its own loss, which the deltas join.
    tolerance = 1e-6 if model.config.model_type == "deberta-v2" else 1e-9
    torch.testing.assert_close(gradient, expected, rtol=0, atol=tolerance * expected.abs().max().item())


# Evaluation


@every_family
def test_prediction_is_the_trainers_and_changes_nothing(name, tmp_path):
    batches = split(make_family_batch(name, 32), [8] * 4)
    args = {"per_device_eval_batch_size": 1}
    ours = make_trainer(LPGTrainer, make_family(name), batches, tmp_path, args=args, class_counts=COUNTS)
    ours.train()
    state = {key: tensor.clone() for key, tensor in ours.lpg_loss.state_dict().items()}
    pending = ours.lpg_loss.statistics._pending.clone()
    plain = make_trainer(Trainer, ours.model, batches, tmp_path, args=args)
    for _ in range(2):
        prediction, expected = ours.predict(batches), plain.predict(batches)
        assert logits_of(prediction).shape == (32, NUM_LABELS)
        assert (logits_of(prediction) == logits_of(expected)).all()
        assert prediction.metrics["test_loss"] == expected.metrics["test_loss"]
    assert ours.lpg_loss.statistics.steps == 4
    assert all(torch.equal(state[key], tensor) for key, tensor in ours.lpg_loss.state_dict().items())
    assert torch.equal(ours.lpg_loss.statistics._pending, pending)


def logits_of(prediction):
    """Some models return hidden states as well."""
    return prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions


@every_family
def test_tuple_outputs_train_and_evaluate_as_dict_outputs(name, tmp_path):
    batches = split(make_family_batch(name, 32), [8] * 4)

    def train(model):
        trainer = make_trainer(
            LPGTrainer,
            model,
            batches,
            tmp_path,
            args={"per_device_eval_batch_size": 1},
            class_counts=COUNTS,
        )
        trainer.train()
        prediction = trainer.predict(batches)
        return trainer, torch.from_numpy(logits_of(prediction)), prediction.metrics["test_loss"]

    with_dicts, logits, loss = train(make_family(name))
    model = make_family(name)
    return_tuples(name, model)
    assert isinstance(model.eval()(**batches[0]), tuple)
    with_tuples, tuple_logits, tuple_loss = train(model)
    assert torch.equal(flat_parameters(with_tuples.model), flat_parameters(with_dicts.model))
    assert torch.equal(with_tuples.lpg_loss.statistics._running, with_dicts.lpg_loss.statistics._running)
    assert torch.equal(tuple_logits, logits) and tuple_loss == loss


# LoRA


def make_lora(name, *, exact=False):
    peft = pytest.importorskip("peft")
    family = FAMILIES[name]
    config = peft.LoraConfig(
        task_type="SEQ_CLS" if family.auto_class is TEXT else None,
        r=2,
        target_modules=list(family.lora),
        modules_to_save=[family.head],
        init_lora_weights=False,  # not the usual zeros, which would leave half of the gradient zero
    )
    return peft.get_peft_model(make_family(name, exact=exact), config)


@families_with_lora
def test_lora_trains_adapters_and_head_only(name, tmp_path):
    model = make_lora(name)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    trainer = make_trainer(
        LPGTrainer, model, split(make_family_batch(name, 32), [8] * 4), tmp_path, class_counts=COUNTS
    )
    trainer.train()
    assert trainer.state.log_history[0]["lpg/delta_ratio"] > 0.01
    moved = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert moved == {key for key in before if "lora_" in key or "modules_to_save" in key}
    assert moved and {key.split(".lora_")[1][0] for key in moved if ".lora_" in key} == {"A", "B"}


@families_with_lora
def test_lora_parameter_gradient_is_the_reference(name, tmp_path):
    model = make_lora(name, exact=True).double()
    check_gradient(model, split(make_family_batch(name, 7, dtype=torch.float64), [3, 4]), tmp_path)
