"""LPGTrainer against the plain Trainer, against hand-written loops, and against itself with the batch split."""

import logging
import re
from functools import partial

import pytest
import reference
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from datasets import Sequence as ListOf
from text_cases import ClassWeightedBert, bert, plain_args, text_batches, text_dataset
from tiny import (
    MODELS,
    NUM_LABELS,
    class_means,
    flat_parameters,
    make_batch,
    make_confident_model,
    make_model,
    make_noisy_batch,
    make_trainer,
    split,
)
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from lpg_hf import LPG, LogitAdjustment, LogitClipping, LPGConfig, LPGLoss, LPGTrainer


COUNTS = [55, 25, 15, 5]
AUTO_WITH_EARLY_GATES = [
    "logit_adjustment(learned=(0.05, 0.2), target='evaluation')",
    "class_relative_dampening(learned=(0.0, 0.01), evidence=(0.0, 0.001))",
]
OPTIMIZERS = {
    "sgd": {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0},
    "sgd-clipped": {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.3},
    "adamw": {"optim": "adamw_torch", "max_grad_norm": 0.0},
    "adamw-clipped": {"optim": "adamw_torch", "max_grad_norm": 0.3},
}


# The one-word swap


@pytest.mark.parametrize("name", MODELS)
def test_no_perturbations_is_the_trainer_bit_for_bit(name, tmp_path):
    batches = split(make_batch(name, 80), [4] * 20)
    plain = make_trainer(Trainer, make_model(name), batches, tmp_path)
    plain.train()
    swapped = make_trainer(LPGTrainer, make_model(name), batches, tmp_path, perturbations=[])
    swapped.train()
    assert plain.state.global_step == 20
    assert torch.equal(flat_parameters(plain.model), flat_parameters(swapped.model))
    assert [log.get("loss") for log in plain.state.log_history] == [
        log.get("loss") for log in swapped.state.log_history
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("perturbation", ["none", "logit_clipping(max_norm=0.5)", "logit_adjustment", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_accumulation_does_not_change_the_training(name, perturbation, optimizer, tmp_path):
    batch, make = make_batch(name, 32, dtype=torch.float64), partial(make_model, exact=True)
    args = {"num_train_epochs": 2} | OPTIMIZERS[optimizer]
    if perturbation == "auto":  # it needs something to dampen, and such models have large gradients
        batch, make = make_noisy_batch(name, 32, dtype=torch.float64), make_confident_model
        args["learning_rate"] = 1e-4

    def train(sizes):
        trainer = make_trainer(
            LPGTrainer,
            make(name),
            split(batch, sizes),
            tmp_path,
            args=args | {"gradient_accumulation_steps": len(sizes) // 2},
            perturbations=_with_early_gates(perturbation),
            class_counts=COUNTS,
        )
        trainer.train()
        assert trainer.state.global_step == 4
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        return flat_parameters(trainer.model), class_means(trainer.lpg_loss), losses

    parameters, statistics, losses = train([16] * 2)
    for sizes in ([4] * 8, [5, 5, 6] * 2):
        split_parameters, split_statistics, split_losses = train(sizes)
        torch.testing.assert_close(split_parameters, parameters, rtol=0, atol=1e-9)
        torch.testing.assert_close(split_statistics, statistics, rtol=0, atol=1e-9)
        torch.testing.assert_close(split_losses, losses, rtol=0, atol=1e-6)


def _with_early_gates(perturbation):
    """`auto` with gates that are open from the second epoch on: its own may stay closed in a short test."""
    return AUTO_WITH_EARLY_GATES if perturbation == "auto" else [perturbation]


@pytest.mark.parametrize("name", MODELS)
def test_early_gates_do_open(name, tmp_path):
    batch = make_noisy_batch(name, 32, dtype=torch.float64)
    trainer = make_trainer(
        LPGTrainer,
        make_confident_model(name),
        split(batch, [16] * 2),
        tmp_path,
        args={"optim": "sgd", "learning_rate": 1e-4, "num_train_epochs": 2},
        perturbations=_with_early_gates("auto"),
        class_counts=COUNTS,
    )
    trainer.train()
    ratios = [line["lpg/class_relative_dampening/delta_norm"] for line in trainer._lpg_norms()]
    assert ratios[:2] == [0, 0] and min(ratios[2:]) > 0.02


def test_empty_chain_under_accumulation_is_the_unaccumulated_trainer(tmp_path):
    batch = make_batch("bert", 64)
    sgd = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    plain = make_trainer(Trainer, make_model("bert", exact=True), split(batch, [16] * 4), tmp_path, args=sgd)
    ours = make_trainer(
        LPGTrainer,
        make_model("bert", exact=True),
        split(batch, [5, 5, 6] * 4),
        tmp_path,
        args=sgd | {"gradient_accumulation_steps": 3},
        perturbations=[],
    )
    plain.train()
    ours.train()
    torch.testing.assert_close(flat_parameters(ours.model), flat_parameters(plain.model), rtol=0, atol=1e-12)


@pytest.mark.parametrize("eval_shares", ["train", [1.0, 1.0, 1.0, 2.0]], ids=str)
@pytest.mark.parametrize(
    "chain", [["auto"], AUTO_WITH_EARLY_GATES, ["lpg(epsilon=0.3)", "logit_clipping(max_norm=0.5)"]]
)
def test_one_loss_three_loops(chain, eval_shares, tmp_path):
    """
    LPGTrainer, the plain Trainer with `compute_loss_func`, and a hand-written loop train the same parameters.

    The counts are those of the data: all of them end an epoch where it ends.
    """
    whole = make_noisy_batch("bert", 80)
    batches, counts = split(whole, [16] * 5), torch.bincount(whole["labels"]).tolist()
    shares = None if eval_shares == "train" else eval_shares
    sgd = {
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 2,
    }

    ours = make_trainer(
        LPGTrainer,
        make_confident_model("bert"),
        batches,
        tmp_path,
        args=sgd,
        perturbations=chain,
        class_counts=counts,
        eval_shares=eval_shares,
    )
    ours.train()

    loss_func = LPGLoss(NUM_LABELS, chain, counts, eval_shares=shares)
    plain = make_trainer(
        Trainer, make_confident_model("bert"), batches, tmp_path, args=sgd, compute_loss_func=loss_func
    )
    plain.train()

    by_hand = make_confident_model("bert").train()
    loss_fn = LPGLoss(NUM_LABELS, chain, counts, eval_shares=shares)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    for batch in batches * 2:
        loss_fn(by_hand(batch["input_ids"]).logits, batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.testing.assert_close(flat_parameters(ours.model), flat_parameters(by_hand), rtol=0, atol=1e-9)
    torch.testing.assert_close(flat_parameters(plain.model), flat_parameters(by_hand), rtol=0, atol=1e-9)
    assert loss_fn.statistics.epochs == 2
    torch.testing.assert_close(loss_func.statistics._epoch_means, loss_fn.statistics._epoch_means, rtol=0, atol=1e-9)
    untouched = flat_parameters(make_confident_model("bert"))
    assert (flat_parameters(by_hand) - untouched).abs().max() > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_parameter_gradient_is_the_reference(name, tmp_path):
    """One SGD step with learning rate 1 moves the parameters by minus `sum_i J_i^T (g_i + delta_i) / N`."""
    batch = make_batch(name, 6, dtype=torch.float64)
    model = make_model(name, exact=True)
    trainer = make_trainer(
        LPGTrainer,
        model,
        split(batch, [2, 4]),
        tmp_path,
        args={"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "gradient_accumulation_steps": 2},
        perturbations=[LogitAdjustment(1.0), LogitClipping(0.5)],
        class_counts=COUNTS,
    )
    before = flat_parameters(model).clone()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model.train()(**inputs).logits
    z, y = logits.detach().numpy(), batch["labels"].numpy()
    g = reference.logit_gradient(z, y)
    g = g + reference.logit_adjustment_delta(z, y, torch.tensor(COUNTS, dtype=torch.float64).numpy() / 100, 1.0)
    g = g + reference.clip_delta(g, 0.5)

    expected = torch.zeros_like(before)
    for i in range(6):
        for c in range(NUM_LABELS):
            rows = torch.autograd.grad(logits[i, c], list(model.parameters()), retain_graph=True, allow_unused=True)
            jacobian = torch.cat(
                [
                    torch.zeros(parameter.numel(), dtype=torch.float64) if row is None else row.flatten()
                    for row, parameter in zip(rows, model.parameters(), strict=True)
                ]
            )
            expected += g[i, c] * jacobian / 6

    trainer.train()
    torch.testing.assert_close(before - flat_parameters(model), expected, rtol=0, atol=1e-10)


# Evaluation


def test_evaluation_is_the_trainers_and_changes_nothing(tmp_path):
    batches = split(make_batch("bert", 64), [16] * 4)
    trainer = make_trainer(
        LPGTrainer, make_model("bert"), batches, tmp_path, class_counts=COUNTS, eval_dataset=batches[:2]
    )
    trainer.train()
    state = {name: tensor.clone() for name, tensor in trainer.lpg_loss.state_dict().items()}
    plain = make_trainer(Trainer, trainer.model, batches, tmp_path, eval_dataset=batches[:2])
    for args in (trainer.args, plain.args):
        args.per_device_eval_batch_size = 1
    ours, theirs = trainer.predict(batches[:2]), plain.predict(batches[:2])
    assert (ours.predictions == theirs.predictions).all()
    assert ours.metrics["test_loss"] == theirs.metrics["test_loss"]
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert all(torch.equal(state[name], tensor) for name, tensor in trainer.lpg_loss.state_dict().items())


def test_the_logged_loss_is_the_unperturbed_one(tmp_path):
    batches = split(make_batch("bert", 16), [16])
    model = make_model("bert", exact=True)
    expected = model.train()(**batches[0]).loss.item()
    trainer = make_trainer(LPGTrainer, model, batches, tmp_path, perturbations=["logit_clipping(max_norm=0.1)"])
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-6)


# The classifier rule


class AuxiliaryLossBert(BertForSequenceClassification):
    def forward(self, input_ids, labels=None):
        output = super().forward(input_ids=input_ids, labels=labels)
        if labels is not None:
            output.loss = output.loss + 0.01 * self.classifier.weight.square().sum() + 0.01
        return output


def zero_head(model):
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    return model


NOT_CLASSIFIERS = {
    "class weights": (lambda: bert(ClassWeightedBert), lambda b: b["labels"], "own loss"),
    "class weights, logits of zero": (lambda: zero_head(bert(ClassWeightedBert)), lambda b: b["labels"], "gradient"),
    "auxiliary loss": (lambda: bert(AuxiliaryLossBert), lambda b: b["labels"], "own loss"),
    "regression on integers": (lambda: bert(num_labels=1), lambda b: b["labels"].float(), "regression"),
    "regression by problem type": (
        lambda: bert(num_labels=1, problem_type="regression"),
        lambda b: b["labels"].float(),
        "regression",
    ),
    "multi-label": (lambda: bert(), lambda b: F.one_hot(b["labels"], 4).float(), "multi_label_classification"),
    "token classification": (
        lambda: bert(BertForTokenClassification),
        lambda b: b["input_ids"] % NUM_LABELS,
        "labels have dtype",
    ),
}


@pytest.mark.parametrize("case", NOT_CLASSIFIERS)
def test_what_is_no_classifier_trains_exactly_as_trainer_with_one_warning(case, tmp_path, caplog):
    build, make_labels, reason = NOT_CLASSIFIERS[case]
    batches = text_batches(make_labels)
    plain, ours = build(), build()
    args = {"num_train_epochs": 2, "gradient_accumulation_steps": 2}
    make_trainer(Trainer, plain, batches, tmp_path, args=args).train()
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        make_trainer(LPGTrainer, ours, batches, tmp_path, args=args).train()
    assert torch.equal(flat_parameters(plain), flat_parameters(ours))
    assert plain.config.problem_type == ours.config.problem_type
    messages = [record.message for record in caplog.records if record.name.startswith("lpg_hf")]
    assert len(messages) == 1
    assert reason in messages[0] and "compute_loss_func" in messages[0] and "perturbations=[]" in messages[0]


@pytest.mark.parametrize("case", NOT_CLASSIFIERS)
def test_perturbations_asked_for_on_no_classifier_raise(case, tmp_path):
    build, make_labels, reason = NOT_CLASSIFIERS[case]
    trainer = make_trainer(LPGTrainer, build(), text_batches(make_labels), tmp_path, perturbations=["logit_clipping"])
    with pytest.raises(ValueError, match=rf"{reason}.*compute_loss_func.*Asked for"):
        trainer.train()


def test_labels_of_integer_regression_in_the_data_set_are_not_taken_for_classes(tmp_path, caplog):
    rows = {"input_ids": [[1, 2, 3]] * 8, "label": [0, 7, 3, 9, 2, 11, 5, 1]}
    args = TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=2)
    plain, ours = bert(num_labels=1), bert(num_labels=1)
    data = Dataset.from_dict(rows).cast_column("label", Value("float32"))
    Trainer(model=plain, args=args, train_dataset=data).train()
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        LPGTrainer(model=ours, args=args, train_dataset=data).train()
    assert torch.equal(flat_parameters(plain), flat_parameters(ours))
    assert len(caplog.records) == 1 and "regression" in caplog.text


def test_labels_of_shape_n_by_1_are_a_classifier(tmp_path):
    batches = split(make_batch("bert", 64), [16] * 4)
    columns = [batch | {"labels": batch["labels"][:, None]} for batch in batches]
    flat, column = make_model("bert"), make_model("bert")
    for model, data in ((flat, batches), (column, columns)):
        trainer = make_trainer(
            LPGTrainer, model, data, tmp_path, perturbations=["logit_clipping(max_norm=0.2)"], class_counts=COUNTS
        )
        trainer.train()
        assert trainer.lpg_loss is not None
    assert torch.equal(flat_parameters(flat), flat_parameters(column))


def test_problem_type_is_the_one_trainer_writes(tmp_path):
    model = make_model("bert")
    make_trainer(LPGTrainer, model, split(make_batch("bert", 16), [16]), tmp_path).train()
    assert model.config.problem_type == "single_label_classification"


# Other base losses


@pytest.mark.parametrize("factor", [0.2, 1.0])
def test_label_smoothing_factor_is_the_base_loss(factor, tmp_path):
    batches = split(make_batch("bert", 64), [16] * 4)
    args = {"label_smoothing_factor": factor, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    ours = make_trainer(
        LPGTrainer,
        make_model("bert", exact=True),
        batches,
        tmp_path,
        args=args,
        perturbations=["logit_clipping(max_norm=100.0)"],
    )
    plain = make_trainer(Trainer, make_model("bert", exact=True), batches, tmp_path, args=args)
    ours.train()
    plain.train()
    torch.testing.assert_close(flat_parameters(ours.model), flat_parameters(plain.model), rtol=0, atol=1e-9)


def test_where_auto_adjusts_logits_a_label_smoothing_factor_spreads_towards_the_class_shares(tmp_path):
    batches = split(make_batch("bert", 64), [16] * 4)
    args = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}

    def trained(perturbations, **more_args):
        model = make_model("bert", exact=True)
        trainer = make_trainer(
            LPGTrainer,
            model,
            batches,
            tmp_path,
            args=args | more_args,
            perturbations=perturbations,
            class_counts=[100, 50, 20, 1],
        )
        trainer.train()
        return flat_parameters(model)

    expected = trained(["label_smoothing(alpha=0.2, target='prior')", "auto"])
    torch.testing.assert_close(trained(["auto"], label_smoothing_factor=0.2), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(trained(["label_smoothing(alpha=0.2)", "auto"]), expected, rtol=0, atol=1e-9)
    assert (trained(["auto"]) - expected).abs().max() > 1e-5


@pytest.mark.parametrize("sizes", [[16] * 4, [5, 5, 6] * 4])
def test_compute_loss_func_is_perturbed_like_a_base_loss(sizes, tmp_path):
    """A user's summed loss over `num_items_in_batch` gives what the same loss per sample gives as `base_loss`."""

    def squared(logits, labels):
        return (logits.softmax(-1) - F.one_hot(labels, NUM_LABELS)).square().sum(-1)

    def compute_loss_func(outputs, labels, num_items_in_batch):
        return squared(outputs.logits, labels).sum() / num_items_in_batch

    args = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "gradient_accumulation_steps": len(sizes) // 4}
    batch = make_batch("bert", 64)
    ours = make_trainer(
        LPGTrainer,
        make_model("bert", exact=True),
        split(batch, sizes),
        tmp_path,
        args=args,
        compute_loss_func=compute_loss_func,
        perturbations=[LogitClipping(0.3)],
    )
    ours.train()

    by_hand = make_model("bert", exact=True).train()
    loss_fn = LPGLoss(NUM_LABELS, [LogitClipping(0.3)], base_loss=squared)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5)
    for step in split(batch, [16] * 4):
        loss_fn(by_hand(step["input_ids"]).logits, step["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(flat_parameters(ours.model), flat_parameters(by_hand), rtol=0, atol=1e-9)


def test_compute_loss_func_that_is_an_lpg_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`compute_loss_func` is an LPGLoss"):
        make_trainer(LPGTrainer, make_model("bert"), [], tmp_path, compute_loss_func=LPGLoss(NUM_LABELS))
    trainer = make_trainer(LPGTrainer, make_model("bert"), split(make_batch("bert", 8), [8]), tmp_path)
    trainer.compute_loss_func = LPGLoss(NUM_LABELS)
    with pytest.raises(ValueError, match="`compute_loss_func` is an LPGLoss"):
        trainer.train()


# Class counts


AUTO = ["logit_adjustment", "class_relative_dampening"]


def test_class_counts_are_read_after_shuffle_select_and_transform(tmp_path):
    dataset = text_dataset([0] * 6 + [1] * 3 + [2] * 2 + [3]).shuffle(seed=0).select(range(10))
    expected = torch.bincount(torch.tensor(dataset["label"]), minlength=4)
    dataset.set_transform(lambda rows: {"input_ids": rows["input_ids"], "label": [0] * len(rows["label"])})
    trainer = LPGTrainer(model=bert(), args=plain_args(tmp_path, remove_unused_columns=False), train_dataset=dataset)
    assert torch.equal(trainer.lpg_loss.statistics.class_counts.long(), expected)


def test_class_counts_argument_wins(tmp_path):
    trainer = LPGTrainer(
        model=bert(), args=plain_args(tmp_path), train_dataset=text_dataset([0, 1, 2, 3]), class_counts=[9, 1, 1, 1]
    )
    assert trainer.lpg_loss.statistics.class_counts.tolist() == [9, 1, 1, 1]
    assert trainer.lpg_loss.statistics.prior[0] == 0.75
    assert [method.name for method in trainer.lpg_loss.perturbations] == AUTO


def test_balanced_data_gets_no_logit_adjustment(tmp_path):
    args = plain_args(tmp_path, logging_steps=1, max_steps=4)
    trainer = LPGTrainer(model=bert(), args=args, train_dataset=text_dataset([0, 1, 2, 3] * 4))
    trainer.train()
    assert [method.name for method in trainer.lpg_loss.perturbations] == AUTO
    assert [line["lpg/logit_adjustment/delta_norm"] for line in trainer._lpg_norms()] == [0.0] * 4


def test_streams_count_and_use_the_prior_after_the_first_epoch(tmp_path):
    labels = [0] * 60 + [1] * 2 + [2] + [3]

    def rows():
        for label in labels:
            yield {"input_ids": [1, 2, 3], "labels": label}

    trainer = LPGTrainer(
        model=bert(),
        args=plain_args(tmp_path, max_steps=12, per_device_train_batch_size=16, logging_steps=1),
        train_dataset=IterableDataset.from_generator(rows),
    )
    trainer.train()
    assert trainer.lpg_loss.statistics.class_counts.tolist() == [180, 6, 3, 3]
    norms = [line["lpg/logit_adjustment/delta_norm"] for line in trainer._lpg_norms()]
    assert norms[:4] == [0.0] * 4  # four steps are an epoch
    assert min(norms[5:]) > 0


# Configuration


def test_config_from_the_command_line(tmp_path):
    (config,) = HfArgumentParser(LPGConfig).parse_args_into_dataclasses(
        [
            "--output_dir",
            str(tmp_path),
            "--perturbations",
            "lpg",
            "logit_clipping(max_norm=0.7)",
            "--lpg_epsilon",
            "0.4",
        ]
    )
    trainer = make_trainer_with(config)
    assert list(map(repr, trainer.lpg_loss.perturbations)) == ["lpg(epsilon=0.4)", "logit_clipping(max_norm=0.7)"]


def make_trainer_with(config, **kwargs):
    return LPGTrainer(model=bert(), args=config, train_dataset=text_dataset([0, 0, 0, 1, 2, 3]), **kwargs)


def test_config_survives_json(tmp_path):
    config = LPGConfig(str(tmp_path), perturbations=["lpg(strategy='accuracy', epsilon=0.2)"], report_to=[])
    (again,) = HfArgumentParser(LPGConfig).parse_dict(
        {"output_dir": str(tmp_path), "perturbations": config.to_dict()["perturbations"]}
    )
    assert again.chain() == config.chain() == ["lpg(strategy='accuracy', epsilon=0.2)"]


@pytest.mark.parametrize("perturbations", [["none"], []])
def test_config_none_means_no_perturbation(perturbations, tmp_path):
    trainer = make_trainer_with(LPGConfig(str(tmp_path), perturbations=perturbations))
    assert len(trainer.lpg_loss.perturbations) == 0


def test_argument_wins_over_config(tmp_path):
    trainer = make_trainer_with(LPGConfig(str(tmp_path)), perturbations=[LPG("accuracy")])
    assert list(map(repr, trainer.lpg_loss.perturbations)) == ["lpg(strategy='accuracy')"]


def test_settings_changed_before_training_are_used(tmp_path):
    """As `hyperparameter_search` does it."""
    config = LPGConfig(
        str(tmp_path), perturbations=["lpg"], report_to=[], use_cpu=True, max_steps=1, save_strategy="no"
    )
    trainer = make_trainer_with(config)
    config.lpg_epsilon = 0.7
    trainer.train()
    assert list(map(repr, trainer.lpg_loss.perturbations)) == ["lpg(epsilon=0.7)"]


# Telemetry and checkpoints


def test_telemetry_is_logged_as_numbers(tmp_path):
    batches = split(make_batch("bert", 64), [16] * 4)
    model = make_model("bert", exact=True)
    with torch.no_grad():
        logits = model.train()(batches[0]["input_ids"]).logits.numpy()
    trainer = make_trainer(
        LPGTrainer,
        model,
        batches,
        tmp_path,
        args_class=LPGConfig,
        args={"log_perturbations": True},
        perturbations=["logit_clipping(max_norm=0.5)", "logit_clipping(max_norm=0.2)"],
        class_counts=COUNTS,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    norms = [sum(x * x for x in row) ** 0.5 for row in reference.logit_gradient(logits, batches[0]["labels"].numpy())]
    mean = sum(norms) / 16
    clipped = [min(norm, 0.5) for norm in norms]
    assert log["lpg/gradient_norm"] == pytest.approx(mean, abs=1e-9)
    first = sum(norm - small for norm, small in zip(norms, clipped, strict=True)) / 16
    assert log["lpg/logit_clipping/delta_norm"] == pytest.approx(first, abs=1e-9)
    assert log["lpg/logit_clipping/delta_ratio"] == pytest.approx(first / mean, abs=1e-9)
    second = [min(norm, 0.2) / norm for norm in clipped]
    assert log["lpg/logit_clipping_2/weight"] == pytest.approx(sum(second) / 16, abs=1e-9)
    # In all, the first bound leaves no trace.
    both = sum(min(norm, 0.2) / norm for norm in norms) / 16
    assert log["lpg/weight"] == pytest.approx(both, abs=1e-9)
    lost = sum(norm - min(norm, 0.2) for norm in norms) / 16
    assert log["lpg/delta_ratio"] == pytest.approx(lost / mean, abs=1e-9)
    assert {"lpg/head_accuracy", "lpg/tail_accuracy"} <= log.keys()


def test_bad_values_are_raised_at_the_next_log_with_their_step(tmp_path):
    batches = split(make_batch("vit", 48), [8] * 6)
    batches[2]["pixel_values"][0] = float("nan")
    trainer = make_trainer(LPGTrainer, make_model("vit"), batches, tmp_path, args={"logging_steps": 2})
    with pytest.raises(FloatingPointError, match="logits of step 3, or"):
        trainer.train()
    assert trainer.state.global_step == 4


def test_bad_values_are_raised_at_the_end_of_a_run_that_never_logs(tmp_path):
    batches = split(make_batch("vit", 16), [8] * 2)
    batches[1]["pixel_values"][0] = float("nan")
    trainer = make_trainer(LPGTrainer, make_model("vit"), batches, tmp_path, args={"logging_steps": 500})
    with pytest.raises(FloatingPointError, match="step 2"):
        trainer.train()


def test_resumed_training_is_the_uninterrupted_one(tmp_path):
    batches = split(make_batch("bert", 96), [8] * 12)

    def train(path, resume=None):
        trainer = make_trainer(
            LPGTrainer,
            make_model("bert"),
            batches,
            path,
            args={"save_strategy": "steps", "save_steps": 3},
            perturbations=_with_early_gates("auto"),
            class_counts=COUNTS,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-6"))
    assert torch.equal(flat_parameters(whole.model), flat_parameters(resumed.model))
    for name, tensor in whole.lpg_loss.state_dict().items():
        assert torch.equal(tensor, resumed.lpg_loss.state_dict()[name]), name


def test_checkpoint_of_the_plain_trainer_resumes_with_a_warning(tmp_path, caplog):
    batches = split(make_batch("bert", 32), [8] * 4)
    args = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(Trainer, make_model("bert"), batches, tmp_path, args=args).train()
    trainer = make_trainer(LPGTrainer, make_model("bert"), batches, tmp_path, args=args, class_counts=COUNTS)
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "has no lpg_state.safetensors" in caplog.text and trainer.state.global_step == 4


def test_checkpoint_of_another_chain_is_refused(tmp_path):
    batches = split(make_batch("bert", 32), [8] * 4)
    args = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(LPGTrainer, make_model("bert"), batches, tmp_path, args=args, perturbations=["lpg"]).train()
    other = make_trainer(
        LPGTrainer, make_model("bert"), batches, tmp_path, args=args, perturbations=["logit_clipping"]
    )
    with pytest.raises(
        ValueError, match=r"written with perturbations at the logits \['lpg\(\)'\].*\['logit_clipping\(\)'\]"
    ):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# Bad input


def test_bad_input_raises_early(tmp_path):
    args = plain_args(tmp_path)
    with pytest.raises(ValueError, match=r"Unknown perturbation 'lgp'. The known ones are auto, none, .*lpg"):
        LPGTrainer(model=bert(), args=args, perturbations=["lgp"])
    with pytest.raises(ValueError, match="`epsilon` must be at least 0; found -1"):
        LPGConfig(str(tmp_path), perturbations=["lpg"], lpg_epsilon=-1.0)
    with pytest.raises(ValueError, match=r"`lpg_epsilon=0.5` would have no effect: `perturbations` is \['auto'\]"):
        LPGConfig(str(tmp_path), lpg_epsilon=0.5)
    with pytest.raises(ValueError, match=r"`class_counts` has shape \[3\], but there are 4 classes"):
        LPGTrainer(model=bert(), args=args, train_dataset=text_dataset([0]), class_counts=[1, 2, 3]).train()
    with pytest.raises(ValueError, match="7"):
        LPGTrainer(model=bert(), args=args, train_dataset=text_dataset([0, 1, 7])).train()
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        LPGTrainer(model=bert(), args=args, train_dataset=text_dataset([0]).select([])).train()
    with pytest.raises(ValueError, match="`signs` has 2 entries, but there are 4 classes"):
        LPGTrainer(
            model=bert(),
            args=args,
            train_dataset=text_dataset([0, 1, 2, 3]),
            perturbations=[LPG("fixed", signs=[1, -1])],
        ).train()


def test_more_names_in_the_data_than_classes_in_the_model(tmp_path):
    features = Features({"input_ids": ListOf(Value("int64")), "label": ClassLabel(names=[str(i) for i in range(6)])})
    dataset = Dataset.from_dict({"input_ids": [[1]] * 3, "label": [0, 5, 1]}, features=features)
    with pytest.raises(ValueError, match="5"):
        LPGTrainer(model=bert(), args=plain_args(tmp_path), train_dataset=dataset).train()


@pytest.mark.parametrize(
    ("labels", "message"), [([0, 0, 1, 3], r"1 of 4 classes have no training rows \(2\)"), ([1] * 4, "only one class")]
)
def test_missing_classes_are_a_warning(labels, message, tmp_path, caplog):
    trainer = LPGTrainer(model=bert(), args=plain_args(tmp_path), train_dataset=text_dataset(labels))
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        trainer.train()
    assert re.search(message, caplog.text)
