"""Labels that an override replaces in a micro-batch, and the rows that `label_issues` then knows."""

from collections import Counter

import pytest
import torch
from clients import exact_bert, run

from lpg_hf import LPGTrainer


ROWS, EPOCHS = 20, 3


def rows(shape=(), unlabeled=()):
    """The first token is the number of the row."""
    labels = [-100 if row in unlabeled else row % 4 for row in range(ROWS)]
    return [
        {"input_ids": torch.tensor([row, 5, 6]), "labels": torch.tensor(label).view(shape)}
        for row, label in enumerate(labels)
    ]


def visits(cls, path, dataset):
    """How often each row counts as seen, in batches of four."""
    args = {"max_steps": EPOCHS * ROWS // 4, "remove_unused_columns": False}
    trainer = run(cls, exact_bert(), path, dataset, args=args, class_counts=[ROWS // 4] * 4)
    issues = trainer.label_issues()
    return Counter(dict(zip(issues["row"][:], issues["visits"][:], strict=True)))


def replaces(change):
    class Replaces(LPGTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs | {"labels": change(inputs["labels"])}, *args, **kwargs)

    return Replaces


@pytest.mark.parametrize("shape", [(), (1,)], ids=["n", "n_by_1"])
@pytest.mark.parametrize("in_place", [False, True], ids=["in_a_copy", "in_place"])
def test_labels_that_are_left_out_leave_the_other_rows_known(in_place, shape, tmp_path, caplog):
    """Co-teaching: a row counts as often as its label was kept."""
    kept = Counter()

    class CoTeaching(LPGTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            numbers = inputs["input_ids"][:, 0].tolist()
            kept.update(numbers[:1] + numbers[2:])
            labels = inputs["labels"] if in_place else inputs["labels"].clone()
            labels[1] = -100
            return super().compute_loss(model, inputs | {"labels": labels}, *args, **kwargs)

    assert visits(CoTeaching, tmp_path, rows(shape)) == kept
    assert kept.total() == EPOCHS * ROWS * 3 // 4
    assert "not known" not in caplog.text


def test_labels_that_are_made_up_are_those_of_no_row(tmp_path, caplog):
    """Pseudo-labels for a quarter of the rows."""
    fills = replaces(lambda labels: labels.where(labels != -100, 3))
    unlabeled = range(0, ROWS, 4)
    seen = visits(fills, tmp_path, rows(unlabeled=unlabeled))
    assert seen == {row: EPOCHS for row in range(ROWS) if row not in unlabeled}
    assert f"The rows of {EPOCHS * ROWS // 4} of {EPOCHS * ROWS} samples are not known" in caplog.text


@pytest.mark.parametrize(
    "change", [lambda labels: labels.roll(1), lambda labels: labels.roll(1).where(torch.arange(4) != 1, -100)]
)
def test_samples_that_may_be_in_another_order_have_no_row(change, tmp_path):
    with pytest.raises(ValueError, match=r"The rows of \d+ of \d+ samples are not known"):
        visits(replaces(change), tmp_path, rows())
