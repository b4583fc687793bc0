"""Trainers that are pickled or copied, as tools do that send them to other processes or keep them for later."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from accelerate.state import GradientState
from clients import distance, exact_bert, make_args, run, token_rows
from tiny import class_means
from transformers import Trainer

from lpg_hf import LPGTrainer
from lpg_hf.report import ReportCallback


CHAINS = [[], ["auto"], ["lpg", "sam"]]


def make(path, chain, trainer_class=LPGTrainer):
    options = {} if trainer_class is Trainer else {"perturbations": chain}
    return trainer_class(model=exact_bert(), args=make_args(path), train_dataset=token_rows(), **options)


@pytest.mark.parametrize("chain", CHAINS)
def test_a_trainer_that_was_pickled_before_its_training_trains_alike(chain, tmp_path):
    GradientState._reset_state()  # accelerate keeps the scheduler of an earlier training, which cannot be pickled
    assert pickle.dumps(make(tmp_path, chain, Trainer))
    original = make(tmp_path, chain)
    original.add_callback(ReportCallback(original, tmp_path / "report"))
    loaded = pickle.loads(pickle.dumps(original))
    loaded.train()
    assert distance(loaded, run(LPGTrainer, exact_bert(), tmp_path, perturbations=chain)) == 0
    # Its report is its own, and not one of the trainer that was pickled, which has seen no row.
    assert "label_issues.csv" in {file.name for file in (tmp_path / "report").iterdir()}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_deep_copy_of_a_trained_trainer_ranks_as_it_does_and_is_freed(chain, tmp_path):
    trainer = run(LPGTrainer, exact_bert(), tmp_path, perturbations=chain)
    copied = copy.deepcopy(trainer)
    assert copied.label_issues()[:] == trainer.label_issues()[:]
    gc.disable()
    try:
        freed = [weakref.ref(copied), weakref.ref(copied.model)]
        del copied
        assert [reference() for reference in freed] == [None, None]
    finally:
        gc.enable()


def test_a_shallow_copy_outlives_its_original(tmp_path):
    trainer = run(LPGTrainer, exact_bert(), tmp_path, eval_dataset=token_rows())
    loss, issues = trainer.evaluate()["eval_loss"], trainer.label_issues()[:]
    copied = copy.copy(trainer)
    del trainer
    assert copied.evaluate()["eval_loss"] == loss and copied.label_issues()[:] == issues
    copied.train()
    assert copied.lpg_loss.statistics.steps == 6


def test_training_a_deep_copy_leaves_the_original_as_it_is(tmp_path):
    trainer = run(LPGTrainer, exact_bert(), tmp_path)
    before = class_means(trainer.lpg_loss).clone()
    copied = copy.deepcopy(trainer)
    assert torch.equal(class_means(copied.lpg_loss), before)
    copied.args.max_steps = 2
    copied.train()
    assert copied.lpg_loss.statistics.steps == 2 and trainer.lpg_loss.statistics.steps == 6
    assert torch.equal(class_means(trainer.lpg_loss), before)
