"""A kill at any moment of a save leaves a run that resumes from a whole checkpoint and ends as if nothing happened."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import HfApi, RepoUrl
from safetensors.torch import load_file
from tiny import flat_parameters, make_batch, make_confident_model, make_model, make_noisy_batch, make_trainer, split
from transformers.trainer_utils import get_last_checkpoint

from lpg_hf import SAM, GradientNoise, LPGTrainer
from lpg_hf.trainer.checkpoint import STATE_FILE
from lpg_hf.trainer.complete_checkpoints import is_complete, last_complete_checkpoint
from lpg_hf.trainer.row_file import ROWS_FILE
from lpg_hf.trainer.state_files import read_tensors, write_tensors


COUNTS = [55, 25, 15, 5]
CHAIN = ["auto", "logit_noise(sigma=0.05)", "logit_clipping(quantile=0.8)", SAM(0.05), GradientNoise(1e-4)]
FILES = [
    "config.json",
    "model.safetensors",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    STATE_FILE,
    ROWS_FILE,
    "rng_state.pth",
    "trainer_state.json",
]


def train(path, resume=None, *, perturbations=CHAIN, model=None, batches=None, class_counts=COUNTS, **args):
    trainer = make_trainer(
        LPGTrainer,
        model or make_model("bert"),
        batches or split(make_batch("bert", 96), [8] * 12),
        path,
        args={"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2} | args,
        perturbations=perturbations,
        class_counts=class_counts,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def state_of(trainer):
    return {
        "parameters": flat_parameters(trainer.model),
        **{f"loss.{name}": value for name, value in trainer.lpg_loss.state_dict().items()},
        **{f"parameter.{name}": value for name, value in trainer._lpg_parameter_methods.state_dict().items()},
        **{f"adam.{i}": row["exp_avg"] for i, row in enumerate(trainer.optimizer.state_dict()["state"].values())},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    return path, state_of(train(path))


def test_a_finished_training_that_is_resumed_has_its_loss(whole, tmp_path):
    """No step is left that would ask for the loss; a report and the model card do."""
    path = shutil.copytree(whole[0], tmp_path / "copy")
    finished = train(path)  # writes the same again
    resumed = train(path, resume=str(path / f"checkpoint-{finished.state.global_step}"))
    assert resumed.state.global_step == finished.state.global_step
    expected, found = ({k: v for k, v in state_of(t).items() if k[:4] != "adam"} for t in (finished, resumed))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert resumed.lpg_loss.statistics.steps == finished.lpg_loss.statistics.steps > 0


def test_a_checkpoint_has_the_files_this_test_knows(whole):
    assert {file.name for file in (whole[0] / "checkpoint-4").iterdir()} == set(FILES)


@pytest.mark.parametrize("killed_after", range(len(FILES)), ids=lambda i: f"after {FILES[i]}")
def test_a_kill_after_any_file_resumes_from_a_whole_checkpoint(killed_after, whole, tmp_path):
    path, expected = whole
    shutil.copytree(path / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-4").mkdir()
    for file in FILES[: killed_after + 1]:
        shutil.copy(path / "checkpoint-4" / file, tmp_path / "checkpoint-4")
    is_last = killed_after == len(FILES) - 1
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / ("checkpoint-4" if is_last else "checkpoint-2"))
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")  # the Trainer would take the half one
    resumed = state_of(train(tmp_path, resume=True))
    assert resumed.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(resumed[name], value), name


def test_a_kill_in_a_folder_with_checkpoints_of_an_earlier_run(whole, tmp_path, monkeypatch):
    """Its `trainer_state.json` must not make a half-written checkpoint look whole."""
    shutil.copytree(whole[0] / "checkpoint-4", tmp_path / "checkpoint-4")

    def killed(trainer, folder):
        if trainer.state.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(LPGTrainer, "_save_rng_state", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_state_of_the_trainer_that_was_cut_off_does_not_count(whole, tmp_path):
    shutil.copytree(whole[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:-20])
    assert not is_complete(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match=r"No valid checkpoint found in output directory .* all 1 are incomplete"):
        train(tmp_path, resume=True)
    with pytest.raises(ValueError, match="checkpoint-4 is not a complete checkpoint"):
        train(tmp_path, resume=str(tmp_path / "checkpoint-4"))


def test_writing_over_an_old_checkpoint_makes_it_half_first(whole, tmp_path, monkeypatch):
    """A run that starts anew in the same folder must not leave a mixture that passes for whole."""
    shutil.copytree(whole[0] / "checkpoint-2", tmp_path / "checkpoint-2")

    def killed(self, output_dir):
        raise KeyboardInterrupt

    monkeypatch.setattr(LPGTrainer, "_save_rng_state", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    assert not is_complete(tmp_path / "checkpoint-2")


def test_the_last_whole_checkpoint_outlives_the_rotation(tmp_path, monkeypatch):
    save = LPGTrainer._save_rng_state

    def killed_at_step_4(self, output_dir):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        save(self, output_dir)

    monkeypatch.setattr(LPGTrainer, "_save_rng_state", killed_at_step_4)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, save_total_limit=1)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_training_that_ended_within_an_epoch_takes_no_step_more(tmp_path):
    done = state_of(train(tmp_path, max_steps=4))
    again = train(tmp_path, max_steps=4, resume=True)
    assert again.state.global_step == 4
    assert torch.equal(flat_parameters(again.model), done["parameters"])


def test_a_kill_inside_an_accumulation_resumes_from_the_last_whole_step(whole, tmp_path, monkeypatch):
    step = LPGTrainer.training_step
    calls = iter(range(1000))

    def killed(self, *args, **kwargs):
        if next(calls) == 7:  # the second micro-batch of the fourth step
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LPGTrainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.undo()
    resumed = state_of(train(tmp_path, resume=True))
    for name, value in whole[1].items():
        assert torch.equal(resumed[name], value), name


def test_a_checkpoint_of_other_classes_is_refused(tmp_path):
    train(tmp_path, perturbations=["logit_clipping"])
    file = tmp_path / "checkpoint-4" / STATE_FILE
    tensors, metadata = read_tensors(file, "")
    facts = json.loads(metadata["facts"])
    assert facts == {"num_processes": 1, "num_labels": 4, "step": 4}
    write_tensors(file, tensors, metadata | {"facts": json.dumps(facts | {"num_labels": 3})})
    with pytest.raises(ValueError, match="was written for 3 classes, but this model has 4"):
        train(tmp_path, resume=str(tmp_path / "checkpoint-4"), perturbations=["logit_clipping"])


def test_parameter_methods_of_another_run_are_refused(whole, tmp_path):
    shutil.copytree(whole[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    with pytest.raises(
        ValueError,
        match=r"written with perturbations for the parameters \['sam\(\)', .*but this run has \['sam\(rho=0.2\)'\]",
    ):
        train(tmp_path, resume=True, perturbations=["auto", SAM(0.2)])


@pytest.mark.parametrize("save_only_model", [True, False])
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_the_best_model_is_loaded_at_the_end(name, save_only_model, tmp_path):
    """ViT too, which transformers 5.23 saves under older names than those its Trainer looks for."""
    batches = split(make_batch(name, 96), [8] * 12)
    trainer = make_trainer(
        LPGTrainer,
        make_model(name),
        batches,
        tmp_path,
        args={
            "save_strategy": "steps",
            "eval_strategy": "steps",
            "save_steps": 4,
            "eval_steps": 4,
            "per_device_eval_batch_size": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "save_only_model": save_only_model,
            "greater_is_better": True,  # the loss falls, so the best is an early one
        },
        class_counts=COUNTS,
        eval_dataset=batches[:4],
    )
    trainer.train()
    assert trainer.state.best_global_step < 12
    assert (tmp_path / "checkpoint-4" / STATE_FILE).exists() != save_only_model
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


def test_auto_find_batch_size_starts_the_statistics_anew(tmp_path, monkeypatch, caplog):
    batches = split(make_batch("bert", 96), [8] * 12)
    trainer = make_trainer(
        LPGTrainer,
        make_model("bert"),
        batches,
        tmp_path,
        args={"auto_find_batch_size": True, "per_device_train_batch_size": 4, "max_steps": 3},
        perturbations=["auto"],
        class_counts=COUNTS,
    )
    trainer.data_collator = lambda rows: rows[0]
    step, calls = LPGTrainer.training_step, iter(range(1000))

    def out_of_memory_once(self, *args, **kwargs):
        if next(calls) == 2:
            raise RuntimeError("CUDA out of memory.")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LPGTrainer, "training_step", out_of_memory_once)
    with caplog.at_level(logging.ERROR):
        trainer.train()
    assert trainer.state.train_batch_size < 4
    assert trainer.lpg_loss.statistics.steps.item() == 3


@pytest.mark.parametrize("name", ["vit", "resnet", "wav2vec2"])
def test_weights_saved_under_older_names_are_found(name, tmp_path):
    """transformers 5.23 saves ViT under older names; the plain Trainer resumes it with fresh weights and a warning."""

    def train(resume=None):
        trainer = make_trainer(
            LPGTrainer,
            make_model(name),
            split(make_batch(name, 96), [8] * 12),
            tmp_path,
            args={"save_strategy": "steps", "save_steps": 6},
            class_counts=COUNTS,
        )
        trainer.train(resume_from_checkpoint=resume)
        return flat_parameters(trainer.model)

    whole = train()
    assert torch.equal(train(str(tmp_path / "checkpoint-6")), whole)


CHAINS = {
    "auto": ["auto"],
    "lpg": ["lpg(epsilon=0.3)", "lpg(strategy='accuracy')"],
    "sam": ["logit_adjustment", "logit_clipping(max_norm=0.5)", "sam(rho=0.05, interval=2)"],
    "noise": ["gradient_noise(eta=0.001)", "logit_noise"],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_every_point_of_interruption_ends_in_the_same_place(chain, tmp_path):
    """Six steps of two micro-batches, interrupted after each of the first five."""
    options = {"save_steps": 1, "num_train_epochs": 1, "logging_steps": 1}
    whole = train(tmp_path, perturbations=CHAINS[chain], **options)
    expected, logs = state_of(whole), [log["loss"] for log in whole.state.log_history if "loss" in log]
    for step in range(1, 6):
        resumed = train(
            tmp_path, str(tmp_path / f"checkpoint-{step}"), perturbations=CHAINS[chain], **options, save_strategy="no"
        )
        assert [log["loss"] for log in resumed.state.log_history if "loss" in log] == logs
        for name, value in state_of(resumed).items():
            assert torch.equal(expected[name], value), (step, name)


# Epochs: what was measured in one acts in the next.

THREE_EPOCHS = {"num_train_epochs": 3, "save_steps": 1, "learning_rate": 1e-3}


def noisy_batches():
    """Three steps of two micro-batches."""
    return split(make_noisy_batch("bert", 48), [8] * 6)


def train_epochs(path, resume=None, **options):
    """A model that is confident and often wrong, so that `auto` dampens as it is."""
    options = {"perturbations": ["auto"], "model": make_confident_model("bert")} | THREE_EPOCHS | options
    return train(path, resume, batches=noisy_batches(), **options)


@pytest.mark.parametrize("class_counts", [COUNTS, None], ids=["given", "counted"])
def test_a_resumption_in_any_epoch_and_between_two_is_the_uninterrupted_run(class_counts, tmp_path):
    whole = train_epochs(tmp_path, class_counts=class_counts)
    expected = state_of(whole)
    statistics, dampening = whole.lpg_loss.statistics, whole.lpg_loss.perturbations[1]
    assert whole.state.global_step == 9 and statistics.epochs == 2
    assert dampening._gate.max() > 0.2 and statistics.mean_weight.min() < 0.98
    for step in range(1, 9):  # an epoch ends with step 3, and with step 6
        checkpoint = tmp_path / f"checkpoint-{step}"
        saved = load_file(checkpoint / STATE_FILE)
        (gate,) = (value for name, value in saved.items() if name.endswith("._gate"))
        assert (gate.max() > 0) == (step > 3)
        (sums,) = (value for name, value in saved.items() if name.endswith("._epoch_sums"))
        assert sums[0].sum() == 16 * ((step - 1) % 3 + 1)
        assert (sums[4] < 0).any()  # a model that is sure of itself fits these labels less than it expects
        (evidence,) = (value for name, value in saved.items() if name.endswith("._evidence"))
        assert (evidence[0] > 1) == (step > 3)
        resumed = train_epochs(tmp_path, str(checkpoint), class_counts=class_counts, save_strategy="no")
        assert torch.equal(resumed.lpg_loss.statistics.prior, statistics.prior)
        for name, value in state_of(resumed).items():
            assert torch.equal(expected[name], value), (step, name)


def test_after_a_checkpoint_without_statistics_no_single_step_counts_as_an_epoch(tmp_path):
    plain = make_trainer(
        transformers.Trainer,
        make_confident_model("bert"),
        noisy_batches(),
        tmp_path,
        args={"save_strategy": "steps", "gradient_accumulation_steps": 2} | THREE_EPOCHS | {"num_train_epochs": 2},
    )
    plain.train()
    resumed = train_epochs(tmp_path, str(tmp_path / "checkpoint-6"))
    statistics = resumed.lpg_loss.statistics
    assert resumed.state.global_step == 9 and statistics.epochs == 2
    assert statistics._epoch_sums[0].sum() == 48 and not statistics._epoch_means.any()
    again = train_epochs(tmp_path, str(tmp_path / "checkpoint-8"))
    for name, value in state_of(again).items():
        assert torch.equal(state_of(resumed)[name], value), name


def test_another_number_of_processes_is_a_warning_where_it_matters(tmp_path, caplog):
    def resume(perturbations):
        train(tmp_path, perturbations=perturbations)
        file = tmp_path / "checkpoint-4" / STATE_FILE
        tensors, metadata = read_tensors(file, "")
        facts = json.loads(metadata["facts"]) | {"num_processes": 2}
        write_tensors(file, tensors, metadata | {"facts": json.dumps(facts)})
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="lpg_hf"):
            train(tmp_path, str(tmp_path / "checkpoint-4"), perturbations=perturbations)
        return caplog.text

    assert resume(["logit_clipping()"]) == ""
    assert "written by 2 processes and this run has 1. lpg() depends on how a batch is split" in resume(["lpg()"])


def test_evaluation_in_the_middle_of_training_changes_nothing(tmp_path):
    batches = split(make_batch("resnet", 96), [8] * 12)
    trainers = []
    for strategy in ("no", "steps"):
        trainer = make_trainer(
            LPGTrainer,
            make_model("resnet"),
            batches,
            tmp_path,
            args={"eval_strategy": strategy, "eval_steps": 2, "per_device_eval_batch_size": 1},
            perturbations=["auto", "logit_clipping(quantile=0.8)"],
            class_counts=COUNTS,
            eval_dataset=batches[:3],
        )
        trainer.train()
        trainers.append(trainer)
    first, second = map(state_of, trainers)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_push_to_the_hub_uploads_model_card_and_weights(tmp_path, monkeypatch):
    """Everything but the upload, which would need the network."""
    uploads = []

    def upload(self, *, folder_path, **kwargs):
        uploads.append({file.name for file in Path(folder_path).iterdir()})

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **kwargs: RepoUrl("https://hf.co/somebody/something"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    # Older transformers, 5.6 among them, call functions that their Trainer has imported.
    monkeypatch.setattr(transformers.trainer, "create_repo", partial(HfApi.create_repo, None), raising=False)
    monkeypatch.setattr(transformers.trainer, "upload_folder", partial(upload, None), raising=False)
    trainer = make_trainer(
        LPGTrainer,
        make_model("bert"),
        split(make_batch("bert", 16), [8] * 2),
        tmp_path,
        args={"push_to_hub": True, "hub_strategy": "end"},
        class_counts=COUNTS,
    )
    trainer.train()
    trainer.push_to_hub()
    assert {"README.md", "config.json", "model.safetensors"} <= uploads[-1]
