"""Scripts around the training: a search, LoRA with early stopping, callbacks that log, evaluate and predict."""

import math

import numpy as np
import pytest
import torch
from clients import exact_bert, make_args, run, token_rows, weights_of
from peft import LoraConfig, get_peft_model
from text_cases import bert
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback

from lpg_hf import LPGTrainer


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


# `hyperparameter_search`


def search(trainer_class, path, **kwargs):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trainer = trainer_class(
        model_init=lambda: exact_bert(),
        args=make_args(path, eval_strategy="steps", eval_steps=6),
        train_dataset=token_rows(),
        eval_dataset=token_rows(seed=1),
        compute_metrics=accuracy,
        **kwargs,
    )
    trainer.remove_callback(PrinterCallback)
    objectives = []

    def objective(metrics):
        objectives.append(metrics["eval_loss"])
        return metrics["eval_loss"]

    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1.0, log=True)},
        compute_objective=objective,
        direction="minimize",
        n_trials=4,
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    return trainer, best, objectives


def test_a_search_without_perturbations_is_that_of_trainer(tmp_path):
    _, best, objectives = search(Trainer, tmp_path / "plain")
    _, our_best, ours = search(LPGTrainer, tmp_path / "ours", perturbations=[])
    assert ours == objectives and len(set(objectives)) == 4
    assert our_best.hyperparameters == best.hyperparameters and our_best.objective == best.objective


def test_every_trial_of_a_search_is_a_training_of_its_own(tmp_path):
    trainer, best, objectives = search(LPGTrainer, tmp_path / "search")
    assert best.objective == min(objectives)
    rate = best.hyperparameters["learning_rate"]
    options = {"model_init": lambda: exact_bert(), "eval_dataset": token_rows(seed=1)}
    alone = run(LPGTrainer, None, tmp_path, args={"learning_rate": rate}, **options)
    assert alone.evaluate()["eval_loss"] == pytest.approx(best.objective, abs=1e-12)
    assert trainer.lpg_loss.statistics.steps == 6
    assert best.objective != pytest.approx(search(Trainer, tmp_path / "plain")[1].objective, abs=1e-4)


# LoRA


STOPPED = {
    "max_steps": 60,
    "learning_rate": 3e-2,
    "optim": "adamw_torch",
    "eval_strategy": "steps",
    "eval_steps": 5,
    "save_strategy": "steps",
    "save_steps": 5,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "per_device_eval_batch_size": 64,
}


def lora():
    torch.manual_seed(0)
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    return get_peft_model(bert(), config)


def train_lora(trainer_class, path, **kwargs):
    model = lora()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = run(
        trainer_class,
        model,
        path,
        args=STOPPED,
        eval_dataset=token_rows(seed=1),
        compute_metrics=accuracy,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        **kwargs,
    )
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    return trainer, moved


def evaluations_of(trainer):
    return [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]


def test_lora_with_early_stopping_without_perturbations_is_that_of_trainer(tmp_path):
    plain, moved = train_lora(Trainer, tmp_path / "plain")
    ours, our_moved = train_lora(LPGTrainer, tmp_path / "ours", perturbations=[])
    assert torch.equal(weights_of(ours), weights_of(plain)) and our_moved == moved
    assert evaluations_of(ours) == evaluations_of(plain) and ours.state.best_metric == plain.state.best_metric
    assert ours.state.global_step == plain.state.global_step


def test_lora_with_early_stopping_ends_with_the_best_adapters(tmp_path):
    ours, moved = train_lora(LPGTrainer, tmp_path / "ours")
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)
    evaluations = evaluations_of(ours)
    best = min(evaluations)
    # It stopped two evaluations after the best one, or trained to its end.
    assert ours.state.global_step == min(60, 5 * (evaluations.index(best) + 3))
    assert ours.state.best_metric == best < evaluations[0]
    assert ours.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)
    plain, _ = train_lora(Trainer, tmp_path / "plain")
    assert evaluations != evaluations_of(plain)


# Callbacks


class Notebook(TrainerCallback):
    """Writes down all that a callback is told."""

    def __init__(self):
        self.events, self.logs, self.metrics = [], [], []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.events.append(f"epoch {state.epoch:g}")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(f"step {state.global_step}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.metrics.append(dict(metrics))
        self.events.append("evaluate")

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        self.events.append("predict")


class LooksAround(TrainerCallback):
    """Evaluates and predicts in the middle of a training, and looks at the training loss of a few rows."""

    trainer = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % 4 == 0:
            self.trainer.evaluate()
            self.trainer.predict(self.trainer.eval_dataset)
            rows = [self.trainer.train_dataset[row] for row in range(4)]
            batch = self.trainer.data_collator([{k: row[k] for k in ("input_ids", "label")} for row in rows])
            with torch.no_grad():
                self.trainer.compute_loss(model.train(), batch)


TWO_EPOCHS = {"num_train_epochs": 2, "max_steps": -1, "logging_steps": 3, "eval_strategy": "epoch"}


def train_with_callbacks(trainer_class, path, *, looks=True, model=None, **kwargs):
    notebook, around = Notebook(), LooksAround()
    trainer = trainer_class(
        model=model or exact_bert(),
        args=make_args(path, **TWO_EPOCHS),
        train_dataset=token_rows(),
        eval_dataset=token_rows(seed=1),
        compute_metrics=accuracy,
        callbacks=[notebook, around] if looks else [notebook],
        **kwargs,
    )
    trainer.remove_callback(PrinterCallback)
    around.trainer = trainer
    trainer.train()
    return trainer, notebook


def timeless(logs):
    slow = ("time", "per_second", "flos")
    return [{key: v for key, v in log.items() if not any(word in key for word in slow)} for log in logs]


def test_callbacks_are_told_what_trainer_tells_them(tmp_path):
    plain, theirs = train_with_callbacks(Trainer, tmp_path)
    ours, notes = train_with_callbacks(LPGTrainer, tmp_path, perturbations=[])
    assert notes.events == theirs.events and "predict" in notes.events
    assert timeless(notes.logs) == timeless(theirs.logs) and timeless(notes.metrics) == timeless(theirs.metrics)
    assert torch.equal(weights_of(ours), weights_of(plain))


def test_a_perturbed_run_adds_three_numbers_to_the_logs_of_losses_alone(tmp_path):
    _, theirs = train_with_callbacks(Trainer, tmp_path)
    _, notes = train_with_callbacks(LPGTrainer, tmp_path)
    assert notes.events == theirs.events
    for ours, plain in zip(notes.logs, theirs.logs, strict=True):
        added = {"lpg/weight", "lpg/delta_ratio", "lpg/tail_accuracy"} if "loss" in plain else set()
        assert set(ours) == set(plain) | added
        assert all(math.isfinite(ours[key]) for key in added)


@pytest.mark.parametrize("perturbations", [[], ["auto"], ["logit_adjustment", "sam"]], ids=str)
def test_looking_around_changes_nothing(perturbations, tmp_path):
    """Bit for bit: weights, statistics, and how often each row was seen."""
    trainers = [
        train_with_callbacks(LPGTrainer, tmp_path, looks=looks, perturbations=perturbations)[0]
        for looks in (True, False)
    ]
    looking, alone = trainers
    assert torch.equal(weights_of(looking), weights_of(alone))
    assert looking.label_issues().to_dict() == alone.label_issues().to_dict()
    if perturbations:
        for name, tensor in alone.lpg_loss.state_dict().items():
            assert torch.equal(looking.lpg_loss.state_dict()[name], tensor), name


def test_predictions_of_the_trained_model_are_trainers(tmp_path):
    ours, _ = train_with_callbacks(LPGTrainer, tmp_path)
    plain = Trainer(model=ours.model, args=make_args(tmp_path), compute_metrics=accuracy)
    rows = token_rows(seed=2)
    theirs, predicted = plain.predict(rows), ours.predict(rows)
    assert np.array_equal(predicted.predictions, theirs.predictions)
    assert timeless([predicted.metrics]) == timeless([theirs.metrics])


# A class with a second trainer behind LPGTrainer


class OlderTrainer(Trainer):
    """Written before the Trainer had all of its arguments."""

    def __init__(
        self,
        model=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        model_init=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        rate=3.0,
    ):
        kwargs = {name: value for name, value in locals().items() if name not in ("self", "rate", "__class__")}
        super().__init__(**kwargs)
        self.rate = rate

    def create_optimizer(self, *args, **kwargs):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.rate * self.args.learning_rate)
        return self.optimizer


class Both(LPGTrainer, OlderTrainer):
    pass


def test_a_trainer_with_fewer_arguments_may_stand_behind(tmp_path):
    plain, ours = run(OlderTrainer, exact_bert(), tmp_path), run(Both, exact_bert(), tmp_path, perturbations=[])
    assert torch.equal(weights_of(ours), weights_of(plain))
    faster = run(LPGTrainer, exact_bert(), tmp_path, args={"learning_rate": 3.0 * plain.args.learning_rate})
    assert torch.equal(weights_of(run(Both, exact_bert(), tmp_path)), weights_of(faster))
    with pytest.raises(TypeError, match="compute_loss_func"):
        run(Both, exact_bert(), tmp_path, compute_loss_func=lambda *args, **kwargs: None)
