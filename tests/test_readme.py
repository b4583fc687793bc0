"""What the README shows is true: its code runs, its table is the one the code makes."""

import ast
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sklearn.metrics import balanced_accuracy_score
from tiny import NUM_LABELS, flat_parameters, make_model
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from lpg_hf import LPGTrainer
from lpg_hf.pac_bayes import Certificate
from lpg_hf.perturbations.__main__ import with_table


README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
DIFF = re.search(r"^```diff\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[1]


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = [0] * 16 + [1] * 8 + [2] * 5 + [3] * 3
    rows = {"input_ids": [[1, 2 + row % 8, 3 + row // 8] for row in range(32)], "label": labels}
    return {
        "model": make_model("bert"),
        "args": TrainingArguments(
            "out", report_to=[], max_steps=1, optim="sgd", learning_rate=0.1, logging_steps=1, use_cpu=True
        ),
        "train": Dataset.from_dict(rows),
        "test": Dataset.from_dict(rows),
    }


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that a block makes, in their order."""
    made, init = [], Trainer.__init__

    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Trainer, "__init__", remember)
    return made


def trained(trainer):
    """The parameters after a training from the weights, batches and dropout that every call starts with."""
    trainer.model.load_state_dict(make_model("bert").state_dict())
    torch.manual_seed(0)
    trainer.train()
    return flat_parameters(trainer.model).clone()


def check_methods(trainers, namespace):
    from_objects, from_strings, without = trainers
    expected = trained(from_objects)
    assert torch.equal(trained(from_strings), expected)
    plain = trained(Trainer(model=without.model, args=without.args, train_dataset=namespace["train"]))
    assert torch.equal(trained(without), plain)
    assert not torch.equal(expected, plain)


def check_class_weighting(trainers, namespace):
    (weighted,) = trainers
    weights = 32 / 4 / torch.tensor([16.0, 8.0, 5.0, 3.0])

    def weighted_loss(outputs, labels, num_items_in_batch=None):
        return (weights[labels] * F.cross_entropy(outputs.logits, labels, reduction="none")).mean()

    options = {"model": weighted.model, "args": weighted.args, "train_dataset": namespace["train"]}
    expected = trained(Trainer(compute_loss_func=weighted_loss, **options))
    torch.testing.assert_close(trained(weighted), expected, rtol=0, atol=1e-6)
    assert (trained(Trainer(**options)) - expected).abs().max() > 1e-4


def check_focal_loss(trainers, namespace):
    (behind,) = trainers
    options = {"model": behind.model, "args": behind.args, "train_dataset": namespace["train"]}
    in_front = LPGTrainer(perturbations=["focal_loss(gamma=2.0)", "auto"], **options)
    assert (trained(behind) - trained(in_front)).abs().max() > 1e-5
    names = [method.name for method in behind.lpg_loss.perturbations]
    assert len(names) > 1 and names[-1] == "focal_loss"


def check_metrics(trainers, namespace):
    (trainer,) = trainers
    metrics = trainer.evaluate()
    predicted = trainer.predict(namespace["test"]).predictions.argmax(-1)
    expected = balanced_accuracy_score(namespace["test"]["label"][:], predicted)
    assert metrics["eval_balanced_accuracy"] == pytest.approx(expected)
    assert {"eval_few_shot_accuracy", "eval_worst_class_accuracy"} <= metrics.keys()


def check_label_issues(trainers, namespace):
    issues = namespace["issues"]
    shown = re.search(r"print\(issues\[0\]\)  # (\{.*\})", README)[1]
    assert issues.column_names == list(ast.literal_eval(shown))
    assert issues["score"][:] == sorted(issues["score"], reverse=True)
    rows = [namespace["train"][row] for row in issues["row"][:20]]
    assert list(namespace["doubtful"]) == rows
    assert Path("out/report/report.html").is_file()
    assert {path.suffix for path in Path("out/report").iterdir()} == {".html", ".png", ".csv"}


def check_certificate(trainers, namespace):
    certificate = namespace["certificate"]
    for part in (certificate.overall, certificate.balanced, *certificate.per_class):
        assert 0 < part.error < part.bound <= 1
    assert len(certificate.per_class) == NUM_LABELS and certificate.label_noise == 0.2
    assert "probability 0.95" in str(certificate)
    assert Certificate.load("certificate.json") == certificate


def check_loss(trainers, namespace):
    logits, loss = namespace["logits"], namespace["loss"]
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    expected = F.cross_entropy(logits, labels)
    assert loss.item() == pytest.approx(expected.item())  # unperturbed
    (unperturbed,) = torch.autograd.grad(expected, logits)
    assert logits.grad.sum(dim=-1).abs().max() < 1e-6
    change = logits.grad.norm(dim=-1) - unperturbed.norm(dim=-1)
    assert change[:5].max() < 0 < change[7]  # the largest class counts less, the smallest more


# A line that only this block has, and the check of what the text says about it.
CHECKS = {
    "LogitClipping(0.5), LPG(": check_methods,
    'perturbations=["class_weighting"]': check_class_weighting,
    '"focal_loss(gamma=2.0)"]': check_focal_loss,
    "make_compute_metrics(class_counts(train))": check_metrics,
    "issues = trainer.label_issues()": check_label_issues,
    "certificate = certify(": check_certificate,
    "loss_fn = LPGLoss(": check_loss,
}


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_blocks_do_what_the_text_says(block, trainers, namespace):
    (check,) = [check for line, check in CHECKS.items() if line in block]
    exec(block, namespace)
    check(list(trainers), namespace)


@pytest.mark.parametrize(("sign", "trainer_class"), [("-", "Trainer"), ("+", "LPGTrainer")])
def test_both_sides_of_the_diff_train(sign, trainer_class, namespace):
    lines = [line[1:] for line in DIFF.splitlines() if line[:1] in (sign, " ")]
    before = flat_parameters(namespace["model"]).clone()
    exec("\n".join(lines), namespace)
    assert type(namespace["trainer"]).__name__ == trainer_class
    assert not torch.equal(before, flat_parameters(namespace["model"]))


def test_the_table_of_methods_is_not_stale():
    assert with_table(README) == README, "run: python -m lpg_hf.perturbations README.md"
