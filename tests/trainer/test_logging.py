"""What a training logs of its perturbations, what it keeps for the report, and the line at its start."""

import json
import logging
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from text_cases import bert, plain_args, text_dataset
from tiny import make_batch, make_model, make_trainer, split
from transformers import Trainer, TrainerCallback

from lpg_hf import LPGConfig, LPGTrainer
from lpg_hf.pac_bayes import PathLength
from lpg_hf.trainer.perturbation_log import PerturbationLog


COUNTS = [55, 25, 15, 5]
TABLE = (Path(__file__).parents[2] / "docs" / "logged_keys.md").read_text()
DEFAULT = {"lpg/weight", "lpg/delta_ratio", "lpg/tail_accuracy"}
LENGTHS = {"lpg/displacement", "lpg/path_length", "lpg/perturbation_path"}


def train(path, *, logs_all=False, resume=None, perturbations=("auto",), args=None, **kwargs):
    trainer = make_trainer(
        LPGTrainer,
        make_model("bert"),
        split(make_batch("bert", 64), [8] * 8),
        path,
        args_class=LPGConfig,
        args={"log_perturbations": logs_all, "logging_steps": 2} | (args or {}),
        perturbations=list(perturbations),
        class_counts=COUNTS,
        **kwargs,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged_keys(trainer):
    """The keys that are ours, of all logs of a loss."""
    return [{key for key in log if key.startswith("lpg/")} for log in trainer.state.log_history if "loss" in log]


def keys_of_table(column):
    """The keys of the table in the docs whose second column reads so."""
    rows = [line.split("|")[1:3] for line in TABLE.splitlines() if line.startswith("| `lpg/")]
    return {key for keys, by_default in rows if by_default.strip() in column for key in re.findall("`(.+?)`", keys)}


def test_three_numbers_are_logged_by_default(tmp_path):
    assert logged_keys(train(tmp_path)) == [DEFAULT] * 4
    assert keys_of_table(["yes"]) == DEFAULT


def test_the_table_of_the_docs_has_the_keys_that_are_logged(tmp_path):
    chain = ["auto", "logit_clipping(max_norm=0.5)", "lpg", "lpg(epsilon=0.05)", "sam", "gradient_clipping"]
    trainer = train(tmp_path, logs_all=True, perturbations=chain, callbacks=[PathLength(1)])
    names = [method.name for method in [*trainer.lpg_loss.perturbations, *trainer._lpg_parameter_methods]]
    assert len(names) == 7
    for keys in logged_keys(trainer):
        assert {key.split("/")[1].removesuffix("_2") for key in keys if key.count("/") == 2} == set(names)
        assert "lpg/lpg_2/delta_norm" in keys
        assert {re.sub("lpg/.+/", "lpg/<method>/", key) for key in keys} == keys_of_table(
            ["yes", "", "with `PathLength`"]
        )


def test_what_observers_report_is_logged_by_default(tmp_path):
    assert logged_keys(train(tmp_path, callbacks=[PathLength(1)])) == [DEFAULT | LENGTHS] * 4
    assert keys_of_table(["with `PathLength`"]) == LENGTHS


def test_a_chain_that_reweights_nothing_logs_no_weight(tmp_path):
    trainer = train(tmp_path, logs_all=True, perturbations=["label_smoothing", "logit_adjustment"])
    for log in trainer.state.log_history[:-1]:
        assert "lpg/weight" not in log
        of_methods = [value for key, value in log.items() if key.endswith("/delta_ratio") and key.count("/") == 2]
        assert len(of_methods) == 2 and min(of_methods) > 0.01
        assert log["lpg/delta_ratio"] == pytest.approx(sum(of_methods))


def test_the_flag_changes_no_number(tmp_path):
    few, all_numbers = train(tmp_path / "few"), train(tmp_path / "all", logs_all=True)
    assert torch.equal(few.model.classifier.weight, all_numbers.model.classifier.weight)
    for log, more in zip(few.state.log_history[:-1], all_numbers.state.log_history[:-1], strict=True):
        assert log.items() <= more.items() and len(log) < len(more)


@pytest.mark.parametrize("logs_all", [False, True])
def test_the_norms_of_the_report_survive_a_resumption(logs_all, tmp_path):
    """They are those of the log, logged or not."""
    args, chain = {"save_strategy": "steps", "save_steps": 3}, ["auto", "sam(interval=4)"]
    whole = train(tmp_path / "whole", logs_all=logs_all, args=args, perturbations=chain)
    resumed = train(
        tmp_path / "resumed",
        logs_all=logs_all,
        args=args,
        perturbations=chain,
        resume=str(tmp_path / "whole" / "checkpoint-6"),
    )
    logs = train(tmp_path / "logs", logs_all=True, perturbations=chain).state.log_history[:-1]
    norms = [{key: v for key, v in log.items() if key in ("step", "epoch") or key.endswith("_norm")} for log in logs]
    for line in norms:
        del line["grad_norm"]  # the Trainer's
    assert [line["step"] for line in norms] == [2, 4, 6, 8]
    assert ["lpg/sam/delta_norm" in line for line in norms] == [True, False, True, False]
    assert whole._lpg_norms() == resumed._lpg_norms() == norms


class LogsByHand(TrainerCallback):
    """A log between two of the Trainer's, as some callbacks write them."""

    trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.trainer.log({"temperature": 0.5})


def test_a_log_by_hand_takes_nothing_from_the_next_one(tmp_path):
    by_hand = LogsByHand()
    trainer = make_trainer(
        LPGTrainer,
        make_model("bert"),
        split(make_batch("bert", 64), [8] * 8),
        tmp_path,
        args={"logging_steps": 2},
        class_counts=COUNTS,
        callbacks=[by_hand],
    )
    by_hand.trainer = trainer
    trainer.train()
    assert logged_keys(trainer) == [DEFAULT] * 4
    (log,) = (log for log in trainer.state.log_history if "temperature" in log)
    assert not any(key.startswith("lpg/") for key in log)


# The line at the start


NO_EVALUATION = " Evaluation shares from the training set, since there is no `eval_dataset`."


def start_lines(caplog):
    return [r.message for r in caplog.records if r.levelno == logging.INFO and "Perturbations" in r.message]


def run(path, caplog, labels=(0, 0, 0, 0, 1, 1, 2, 3), *, trainer_class=LPGTrainer, trainings=1, model=None, **kwargs):
    trainer = trainer_class(
        model=model or bert(), args=plain_args(path, max_steps=2), **{"train_dataset": text_dataset(labels)} | kwargs
    )
    with caplog.at_level(logging.INFO, logger="lpg_hf"):
        for _ in range(trainings):
            trainer.train()
    return start_lines(caplog), trainer


def test_a_line_says_what_auto_means_and_where_its_counts_come_from(tmp_path, caplog):
    (line,), trainer = run(tmp_path, caplog)
    assert f"['auto']: {list(trainer.lpg_loss.perturbations)}. " in line
    assert trainer.lpg_loss.perturbations[0].name == "logit_adjustment"
    assert line.endswith("Class counts from the label column 'label': [4, 2, 1, 1]." + NO_EVALUATION)


def test_once_per_training(tmp_path, caplog):
    lines, _ = run(tmp_path, caplog, trainings=2)
    assert len(lines) == 2 and lines[0] == lines[1]


def test_counts_of_the_user(tmp_path, caplog):
    (line,), _ = run(tmp_path, caplog, class_counts=np.array([9, 9, 9, 9]))
    assert line.endswith("Class counts from `class_counts`: [9, 9, 9, 9]." + NO_EVALUATION)


def test_counts_of_a_column_of_another_name(tmp_path, caplog):
    (line,), _ = run(tmp_path, caplog, train_dataset=text_dataset([0, 1, 1, 2], column="labels"))
    assert line.endswith("Class counts from the label column 'labels': [1, 2, 1, 0]." + NO_EVALUATION)


def test_many_classes_are_shortened(tmp_path, caplog):
    labels = [label for label in range(12) for _ in range(label + 2)]
    (line,), _ = run(tmp_path, caplog, labels, model=bert(num_labels=12))
    assert line.endswith(
        "the label column 'label': 12 classes, the largest has 13 and the smallest 2." + NO_EVALUATION
    )


def test_counts_that_nobody_knows(tmp_path, caplog):
    batches = split(make_batch("bert", 16), [8] * 2)
    trainer = make_trainer(LPGTrainer, make_model("bert"), batches, tmp_path)
    with caplog.at_level(logging.INFO, logger="lpg_hf"):
        trainer.train()
    (line,) = start_lines(caplog)
    assert line.endswith("Class counts: unknown, counted while training." + NO_EVALUATION)


def test_a_chain_of_all_kinds_is_written_out(tmp_path, caplog):
    (line,), _ = run(tmp_path, caplog, perturbations=["auto", "focal_loss(gamma=1.0)", "sam"])
    assert "Perturbations ['auto', 'focal_loss(gamma=1.0)', 'sam']: [logit_adjustment(" in line
    assert "focal_loss(gamma=1.0), sam()]. " in line


def test_where_nothing_acts_there_is_no_line(tmp_path, caplog):
    assert run(tmp_path, caplog, perturbations=[])[0] == []
    assert run(tmp_path, caplog, labels=[0.0, 1.0] * 4, model=bert(num_labels=1))[0] == []


def test_the_plain_trainer_logs_none_of_it(tmp_path, caplog):
    lines, trainer = run(tmp_path, caplog, trainer_class=Trainer)
    assert lines == [] and not any(key.startswith("lpg/") for log in trainer.state.log_history for key in log)


def test_the_norms_of_a_long_training_are_saved_without_a_list_of_their_bytes():
    log = PerturbationLog(logs_all=False)
    norms = {f"lpg/{name}/delta_norm": 0.8675723075866699 for name in ("logit_adjustment", "class_relative_dampening")}
    log.norms = [{"step": step, "epoch": step / 125} | norms for step in range(5000)]
    expected = json.dumps(log.norms).encode()
    tracemalloc.start()
    state = log.state_dict()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bytes(state["norms"].tolist()).rstrip() == expected
    assert peak < 8 * len(expected)  # 5.6; a list has 8 bytes for each of them, next to the text itself
    restored = PerturbationLog(logs_all=False)
    restored.load_state_dict(state)
    assert restored.norms == log.norms


def test_the_norms_are_saved_in_few_sizes():
    """safetensors keeps a type of `ctypes` for every size of a tensor that it has saved, for good."""
    log, sizes = PerturbationLog(logs_all=False), set()
    for step in range(1000):
        log.norms.append({"step": step, "epoch": step / 125, "lpg/gradient_norm": 0.8675723075866699})
        sizes.add(log.state_dict()["norms"].numel())
    text = len(json.dumps(log.norms))
    assert text <= max(sizes) < 2 * text
    assert len(sizes) <= 12  # 11: from 2**7 to 2**17 bytes
