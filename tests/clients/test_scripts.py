"""Whole scripts around the Trainer: the same numbers without perturbations, and other ones by default."""

import copy

import pytest
import torch
from clients import distance, make_args, run, token_rows, weights_of
from text_cases import bert
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainerCallback

from lpg_hf import LPGTrainer


CHECKPOINTS = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def two_steps_in_one(base, path, **kwargs):
    """R-Drop by two calls."""

    class Script(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            losses = [super(Script, self).training_step(model, inputs, num_items_in_batch) for _ in range(2)]
            return sum(losses) / 2

    return run(Script, bert(), path, **kwargs)


def confidence_penalty(base, path, **kwargs):
    """Returns a dict in place of the outputs of the model."""

    class Script(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            log_probs = outputs.logits.log_softmax(-1)
            loss = loss + 0.1 * (log_probs.exp() * log_probs).sum(-1).mean()
            return (loss, {"logits": outputs.logits}) if return_outputs else loss

    return run(Script, bert(), path, eval_dataset=token_rows(seed=1), args=CHECKPOINTS, **kwargs)


def distillation(base, path, **kwargs):
    """The teacher is asked first, through the base class."""
    teacher = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

    class Script(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            with torch.no_grad():
                _, expected = super().compute_loss(teacher, dict(inputs), True, num_items_in_batch)
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            goal = expected.logits.softmax(-1)
            loss = 0.5 * loss + 0.5 * F.kl_div(outputs.logits.log_softmax(-1), goal, reduction="batchmean")
            return (loss, outputs) if return_outputs else loss

    return run(Script, bert(), path, **kwargs)


def probabilities_at_evaluation(base, path, **kwargs):
    class Script(base):
        def prediction_step(self, *args, **kwargs):
            loss, logits, labels = super().prediction_step(*args, **kwargs)
            return loss, logits.softmax(-1), labels

    args = CHECKPOINTS | {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    data = token_rows(seed=1)
    return run(Script, bert(), path, eval_dataset=data, compute_metrics=accuracy, args=args, **kwargs)


def rates_by_layer(base, path, **kwargs):
    class Script(base):
        def create_optimizer(self, *args, **kwargs):
            groups = [
                {"params": self.model.bert.parameters(), "lr": 1e-3},
                {"params": self.model.classifier.parameters(), "lr": 1e-1},
            ]
            self.optimizer = torch.optim.AdamW(groups)
            return self.optimizer

    return run(Script, bert(), path, **kwargs)


def own_optimizer(base, path, **kwargs):
    model = bert()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return run(base, model, path, optimizers=(optimizer, schedule), **kwargs)


def class_of_optimizer(base, path, **kwargs):
    return run(base, bert(), path, optimizer_cls_and_kwargs=(torch.optim.RMSprop, {"lr": 1e-3}), **kwargs)


def frozen_head(base, path, **kwargs):
    model = bert()
    model.classifier.requires_grad_(False)
    return run(base, model, path, **kwargs)


def tuples(base, path, **kwargs):
    model = bert()
    model.config.return_dict = False
    return run(base, model, path, **kwargs)


def averaged_weights(base, path, **kwargs):
    class Average(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            self.model = copy.deepcopy(model)

        def on_step_end(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                for average, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
                    average.lerp_(parameter, 0.3)

        def on_train_end(self, args, state, control, model, **kwargs):
            model.load_state_dict(self.model.state_dict())

    return run(base, bert(), path, callbacks=[Average()], **kwargs)


def evaluation_inside_a_step(base, path, **kwargs):
    class Script(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.evaluate(token_rows(seed=1))
            return loss

    return run(Script, bert(), path, args={"logging_steps": 2}, **kwargs)


def a_training_after_a_failure(base, path, **kwargs):
    class Fails(TrainerCallback):
        is_done = False

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3 and not self.is_done:
                self.is_done = True
                raise KeyboardInterrupt

    trainer = base(model=bert(), args=make_args(path), train_dataset=token_rows(), callbacks=[Fails()], **kwargs)
    trainer.remove_callback(PrinterCallback)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.predict(token_rows(seed=1))
    trainer.train()
    return trainer


def a_second_training_on_other_data(base, path, **kwargs):
    trainer = run(base, bert(), path, **kwargs)
    trainer.train_dataset = token_rows((4, 6, 10, 24), seed=3)
    trainer.train()
    return trainer


SCRIPTS = [
    two_steps_in_one,
    confidence_penalty,
    distillation,
    probabilities_at_evaluation,
    rates_by_layer,
    own_optimizer,
    class_of_optimizer,
    frozen_head,
    tuples,
    averaged_weights,
    evaluation_inside_a_step,
    a_training_after_a_failure,
    a_second_training_on_other_data,
]


def counting(base):
    """Counts what the Trainer calls."""

    class Counting(base):
        def __init__(self, *args, **kwargs):
            self.calls = []
            super().__init__(*args, **kwargs)

        def compute_loss(self, *args, **kwargs):
            self.calls.append("compute_loss")
            return super().compute_loss(*args, **kwargs)

        def training_step(self, *args, **kwargs):
            self.calls.append("training_step")
            return super().training_step(*args, **kwargs)

        def prediction_step(self, *args, **kwargs):
            self.calls.append("prediction_step")
            return super().prediction_step(*args, **kwargs)

        def log(self, *args, **kwargs):
            self.calls.append("log")
            return super().log(*args, **kwargs)

    return Counting


def logs_of(trainer):
    timed = ("runtime", "per_second", "preparation_time")
    return [{k: v for k, v in log.items() if not k.endswith(timed)} for log in trainer.state.log_history]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_is_that_of_trainer_and_by_default_perturbed(script, tmp_path):
    runs = []
    for number, (base, options) in enumerate([(Trainer, {}), (LPGTrainer, {"perturbations": []}), (LPGTrainer, {})]):
        torch.manual_seed(0)
        runs.append(script(counting(base), tmp_path / str(number), **options))
    plain, ours, perturbed = runs
    assert torch.equal(weights_of(ours), weights_of(plain))
    assert logs_of(ours) == logs_of(plain)
    assert ours.calls == plain.calls == perturbed.calls
    assert distance(perturbed, plain) > 1e-5
    # In the last training of a script, each of six batches of four is seen once.
    assert perturbed.lpg_loss.statistics.steps == 6
    assert perturbed.lpg_loss.statistics.seen_counts.sum() == 24
    assert sum(perturbed.label_issues()["visits"]) == 24
