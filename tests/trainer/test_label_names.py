"""Labels that are not called `labels`, as `label_names` of the arguments allows."""

import pytest
import torch
from clients import distance, exact_bert, losses_of, run, token_rows, warnings_of
from tiny import class_means
from torch import nn
from transformers import BertForSequenceClassification, Trainer

from lpg_hf import LPGTrainer
from lpg_hf.data.training_labels import class_counts_or_none


COUNTS = [24, 10, 6, 4]
DAMPENED = ["auto", "logit_clipping(max_norm=0.3)"]


class WithTarget(BertForSequenceClassification):
    def forward(self, input_ids, attention_mask=None, target=None, **kwargs):
        return super().forward(input_ids, attention_mask=attention_mask, labels=target, **kwargs)


class Wrapper(nn.Module):
    """A module of the user's own, which the Trainer gives no count."""

    def __init__(self):
        super().__init__()
        self.bert = exact_bert()

    def forward(self, input_ids, attention_mask=None, target=None):
        return self.bert(input_ids, attention_mask=attention_mask, labels=target)


def rows(column="target"):
    return token_rows(COUNTS, column=column)


def run_named(trainer_class, model, path, *, args=None, **kwargs):
    settings = {"label_names": ["target"]} | (args or {})
    return run(trainer_class, model, path, rows(), args=settings, eval_dataset=rows(), **kwargs)


@pytest.mark.parametrize("make_model", [lambda: exact_bert(WithTarget), Wrapper], ids=["model", "wrapper"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_labels_of_another_name_train_as_labels_do(make_model, accumulation, tmp_path, caplog):
    args = {"gradient_accumulation_steps": accumulation, "max_steps": 24 // accumulation}
    named = run_named(LPGTrainer, make_model(), tmp_path, args=args, perturbations=DAMPENED)
    assert not warnings_of(caplog)
    usual = run(
        LPGTrainer,
        exact_bert(),
        tmp_path,
        rows("labels"),
        args=args,
        perturbations=DAMPENED,
        eval_dataset=rows("labels"),
    )
    assert distance(named, usual) < 1e-12
    assert named.lpg_loss.statistics.class_counts.tolist() == COUNTS
    torch.testing.assert_close(class_means(named.lpg_loss), class_means(usual.lpg_loss), rtol=0, atol=1e-12)
    for column, values in usual.label_issues()[:].items():
        assert named.label_issues()[column][:] == pytest.approx(values, abs=1e-12), column
    plain = run_named(Trainer, make_model(), tmp_path, args=args)
    assert distance(named, plain) > 1e-3


@pytest.mark.parametrize("accumulation", [1, 2])
def test_without_perturbations_they_train_as_with_trainer(accumulation, tmp_path):
    args = {"gradient_accumulation_steps": accumulation}
    runs = [
        run_named(trainer_class, exact_bert(WithTarget), tmp_path, args=args, **options)
        for trainer_class, options in ((Trainer, {}), (LPGTrainer, {"perturbations": []}))
    ]
    assert distance(*runs) < (1e-15 if accumulation == 1 else 1e-12)
    assert losses_of(runs[0]) == pytest.approx(losses_of(runs[1]), abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"args": {"label_smoothing_factor": 0.1}}, {"compute_loss_func": lambda outputs, *args, **kwargs: outputs.loss}],
)
def test_where_the_trainer_leaves_its_loss_out_it_stays_out_and_the_cure_is_told(options, tmp_path, caplog):
    """Trainer smooths labels called `labels` alone, and gives a `compute_loss_func` no others."""
    ours = run_named(LPGTrainer, exact_bert(WithTarget), tmp_path, **options)
    assert distance(ours, run_named(Trainer, exact_bert(WithTarget), tmp_path, **options)) == 0
    (warning,) = warnings_of(caplog)
    assert "no `labels` (where these have another name, pass it alone as `label_names`" in warning


def test_labels_that_no_name_tells_are_one_warning_with_a_cure(tmp_path, caplog):
    args = {"remove_unused_columns": False}
    ours = run(LPGTrainer, exact_bert(WithTarget), tmp_path, rows(), args=args)
    assert distance(ours, run(Trainer, exact_bert(WithTarget), tmp_path, rows(), args=args)) == 0
    (warning,) = warnings_of(caplog)
    assert "pass it alone as `label_names`" in warning


def test_a_name_that_nobody_gave_is_none_of_labels(tmp_path, caplog):
    """Trainer takes every argument of the model with `label` in its name for one."""

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = exact_bert()

        def forward(self, input_ids, classes, label_weights=None):
            return self.bert(input_ids, labels=classes)

    dataset = [{"input_ids": r["input_ids"], "classes": r["target"], "label_weights": 2} for r in rows()]
    ours = run(LPGTrainer, Weighted(), tmp_path, dataset)
    assert ours.label_names == ["label_weights"]
    assert distance(ours, run(Trainer, Weighted(), tmp_path, dataset)) == 0
    assert len(warnings_of(caplog)) == 1
    with pytest.raises(ValueError, match="recorded no row"):
        ours.label_issues()


def test_a_usual_column_is_counted_first():
    dataset = rows().add_column("label", [0] * sum(COUNTS))
    assert class_counts_or_none(rows(), 4, ["target"]) == COUNTS
    assert class_counts_or_none(dataset, 4, ["target"]) == [sum(COUNTS), 0, 0, 0]
    assert class_counts_or_none(rows(), 4) is class_counts_or_none(rows(), 4, ["target", "other"]) is None
