"""What README and the pages of docs/ show is true: code runs, links lead somewhere, and nothing is stale."""

import ast
import csv
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from documents import DOCS, RAW, REPOSITORY, ROOT, blocks, both_sides, broken_links, links
from sklearn.metrics import balanced_accuracy_score
from tiny import NUM_LABELS, flat_parameters, make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from lpg_hf import LPGTrainer
from lpg_hf.pac_bayes import Certificate
from lpg_hf.perturbations.__main__ import with_methods


README = ROOT / "README.md"
# The steps of label_cleaning.md have a test of their own.
PAGES = [README, *(page for page in DOCS if page.name != "label_cleaning.md" and blocks(page, "python"))]
COUNTS = [16, 8, 5, 3]
WORDS = ["[PAD]", "[UNK]", "red", "green", "blue", "gray"]


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    """What a reader has already: model, arguments and data; for README also a file with texts."""
    monkeypatch.chdir(tmp_path)
    labels = [label for label, count in enumerate(COUNTS) for _ in range(count)]
    rows = {"input_ids": [[1, 2 + row % 8, 3 + row // 8] for row in range(32)], "label": labels}
    with open("train.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((f"a {word} car", word) for word in WORDS[2:] * 10)])
    return {
        "model": make_model("bert"),
        "args": TrainingArguments(
            "out", report_to=[], max_steps=1, optim="sgd", learning_rate=0.1, logging_steps=1, use_cpu=True
        ),
        "train": Dataset.from_dict(rows),
        "test": Dataset.from_dict(rows),
        "logits": torch.randn(8, 3, requires_grad=True),
        "labels": torch.tensor([0, 0, 0, 0, 0, 1, 1, 2]),
    }


@pytest.fixture
def pretrained(tmp_path):
    """A folder in the place of the model on the hub."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    for part in (tokenizer, make_model("bert")):
        part.save_pretrained(tmp_path / "pretrained")
    return str(tmp_path / "pretrained")


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


def first_loss(trainer):
    return trainer.state.log_history[0]["loss"]


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
    torch.testing.assert_close(trained(behind), trained(in_front), rtol=0, atol=1e-6)
    names = [method.name for method in behind.lpg_loss.perturbations]
    assert len(names) > 1 and names[-1] == "focal_loss"


def check_metrics(trainers, namespace):
    (trainer,) = trainers
    metrics = trainer.evaluate()
    predicted = trainer.predict(namespace["test"]).predictions.argmax(-1)
    expected = balanced_accuracy_score(namespace["test"]["label"][:], predicted)
    assert metrics["eval_balanced_accuracy"] == pytest.approx(expected)
    assert {"eval_few_shot_accuracy", "eval_worst_class_accuracy"} <= metrics.keys()


def check_own_texts(trainers, namespace):
    (trainer,) = trainers
    assert type(trainer) is LPGTrainer
    assert trainer.model.config.id2label == dict(enumerate(trainer.train_dataset.features["label"].names))
    assert len(trainer.model.config.id2label) == NUM_LABELS
    assert trainer.state.epoch == 3 and len(trainer.train_dataset) == 32
    assert trainer.evaluate().keys() >= {"eval_accuracy", "eval_balanced_accuracy", "eval_macro_f1"}
    assert "a green car" in Path("out/report/report.html").read_text()


def check_label_issues(trainers, namespace):
    issues = namespace["issues"]
    shown = re.search(r"print\(issues\[0\]\)  # (\{.*\})", README.read_text())[1]
    assert issues.column_names == list(ast.literal_eval(shown))
    assert issues["score"][:] == sorted(issues["score"], reverse=True)
    assert sorted(issues["row"]) == list(range(32))


def check_bare_loss(trainers, namespace):
    (expected,) = torch.autograd.grad(F.cross_entropy(namespace["logits"], namespace["labels"]), namespace["logits"])
    change = namespace["logits"].grad.norm(dim=-1) / expected.norm(dim=-1)
    assert change[:5].max() < change[5:7].min() < change[7]  # the rarer a class, the more it counts


def check_output_shares(trainers, namespace):
    (shown,) = re.findall(r"print\(pi_out\)  # tensor\((\[.*\])\)", (ROOT / "docs" / "how_it_works.md").read_text())
    roots = np.array([0.8, 0.2]) ** (2 / 3)
    np.testing.assert_allclose(namespace["pi_out"].numpy(), roots / roots.sum(), atol=1e-6)
    np.testing.assert_allclose(ast.literal_eval(shown), roots / roots.sum(), atol=1e-4)


def check_uniform_shares(trainers, namespace):
    (trainer,) = trainers
    shares = trainer.lpg_loss.statistics.log_output_shares.softmax(0)
    torch.testing.assert_close(shares, torch.full((NUM_LABELS,), 1 / NUM_LABELS))
    namespace["bias"] = trainer.model.classifier.bias.detach().clone()


def check_shift_to_uniform(trainers, namespace):
    """The logits are trained for these shares already."""
    torch.testing.assert_close(namespace["model"].classifier.bias, namespace["bias"])


def check_shift_to_counts(trainers, namespace):
    log_counts = torch.tensor(COUNTS).log()
    moved = namespace["model"].classifier.bias - namespace["bias"]
    torch.testing.assert_close(moved, log_counts - log_counts.mean(), rtol=0, atol=1e-5)


def check_calibration(trainers, namespace):
    """Back to the shares that the logits were trained for: two thirds of the way to those of the evaluation."""
    trainer = namespace["trainer"]
    before = trainer.model.classifier.bias.detach().clone()
    roots = (torch.tensor(COUNTS) + 1.0) ** (2 / 3)
    trainer.shift_class_shares(roots.tolist())
    expected = roots.log() - torch.tensor(COUNTS).log()
    torch.testing.assert_close(trainer.model.classifier.bias - before, expected - expected.mean(), rtol=0, atol=1e-5)
    assert roots.allclose(roots.sum() * trainer.lpg_loss.statistics.log_output_shares.softmax(0))


def check_own_loss(trainers, namespace):
    (ours,) = trainers
    options = {"model": ours.model, "args": ours.args, "train_dataset": namespace["train"]}
    plain = Trainer(compute_loss_func=namespace["smooth_loss"], **options)
    expected = trained(plain)
    for perturbations, is_same in (([], True), (["focal_loss"], False)):
        other = LPGTrainer(compute_loss_func=namespace["smooth_loss"], perturbations=perturbations, **options)
        assert torch.equal(trained(other), expected) == is_same
    trained(ours)
    assert first_loss(ours) == pytest.approx(first_loss(plain))  # of the batch before the first step, unperturbed


def check_override(trainers, namespace):
    (ours,) = trainers
    (block,) = [block for block in blocks(ROOT / "docs" / "faq.md", "python") if "PenaltyTrainer" in block]
    same = dict(namespace)
    exec(block.replace("from lpg_hf", "from transformers").replace("LPGTrainer", "Trainer"), same)
    options = {"model": ours.model, "args": ours.args, "train_dataset": namespace["train"]}
    expected, without = trained(same["trainer"]), namespace["PenaltyTrainer"](perturbations=[], **options)
    torch.testing.assert_close(trained(without), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(trained(ours), expected)
    assert first_loss(ours) == pytest.approx(first_loss(same["trainer"]))
    assert not torch.allclose(trained(Trainer(**options)), expected, rtol=0, atol=1e-5)  # the penalty acts


def check_best_model(trainers, namespace):
    (trainer,) = trainers
    scores = [entry["eval_balanced_accuracy"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(scores) == 4 and trainer.state.best_metric == max(scores)
    assert trainer.evaluate()["eval_balanced_accuracy"] == pytest.approx(max(scores))


def check_sam(trainers, namespace):
    (trainer,) = trainers
    options = {"model": trainer.model, "args": trainer.args, "train_dataset": namespace["train"]}
    expected = trained(trainer)
    assert torch.equal(trained(LPGTrainer(perturbations=["auto", "sam(rho=0.05)"], **options)), expected)
    assert not torch.equal(trained(LPGTrainer(**options)), expected)


def check_folds(trainers, namespace):
    quality, ranked = namespace["label_quality"], namespace["ranked_rows"][:]
    assert len(quality) == 32 and len(set(ranked)) == len(ranked) == 8  # the rows of the only batch
    assert (np.diff(quality[ranked]) >= 0).all() and 0 <= quality.min() <= quality.max() <= 1


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
    assert change[:5].max() < 0 < change[7]  # the largest class counts less, a small one more


# A line that only this block has, and the check of what the text says about it.
CHECKS = {
    'name = "distilbert/distilbert-base-uncased"': check_own_texts,
    "print(issues[0])": check_label_issues,
    "loss_fn(logits, labels).backward()": check_bare_loss,
    "certificate = certify(": check_certificate,
    'perturbations=["class_weighting"]': check_class_weighting,
    '"focal_loss(gamma=2.0)"]': check_focal_loss,
    "def smooth_loss(": check_own_loss,
    "class PenaltyTrainer(": check_override,
    "metric_for_best_model=": check_best_model,
    "make_compute_metrics(class_counts(train))": check_metrics,
    "trainer.train()\ntrainer.shift_class_shares(class_counts(test))": check_calibration,
    "print(pi_out)": check_output_shares,
    'eval_shares="uniform"': check_uniform_shares,
    "trainer.shift_class_shares([0.25": check_shift_to_uniform,
    "# z + log pi_eval - log pi_out": check_shift_to_counts,
    "LogitClipping(0.5), LPG(": check_methods,
    "SAM(rho=0.05)]": check_sam,
    "label_quality = ": check_folds,
    "loss_fn = LPGLoss(num_labels=4": check_loss,
}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "logged_keys.md"], ids=lambda page: page.stem)
def test_code_blocks_do_what_the_text_says(page, trainers, namespace, pretrained):
    """One after the other, as they are read."""
    for block in blocks(page, "python"):
        (check,) = [check for line, check in CHECKS.items() if line in block]
        trainers.clear()
        exec(block.replace("distilbert/distilbert-base-uncased", pretrained), namespace)
        check(list(trainers), namespace)


def test_every_check_belongs_to_a_block():
    code = "".join(block for page in PAGES for block in blocks(page, "python"))
    assert [line for line in CHECKS if line not in code] == []


def test_the_line_that_logged_keys_tells_of_is_shown(namespace, monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    (block,) = blocks(ROOT / "docs" / "logged_keys.md", "python")
    exec(block, namespace)
    LPGTrainer(model=namespace["model"], args=namespace["args"], train_dataset=namespace["train"]).train()
    assert re.search(rf"INFO.*Class counts from .*: {re.escape(str(COUNTS))}", capsys.readouterr().err)


def diffs():
    return [pytest.param(page, diff, id=page.stem) for page in (README, *DOCS) for diff in blocks(page, "diff")]


@pytest.mark.parametrize(("page", "diff"), diffs())
def test_both_sides_of_a_diff_train(page, diff, trainers, namespace):
    for code, is_ours in zip(both_sides(diff), (False, True), strict=True):
        namespace["model"].load_state_dict(make_model("bert").state_dict())
        torch.manual_seed(0)
        exec(code, namespace)
        assert isinstance(namespace["trainer"], LPGTrainer) == is_ours
    before, after = (trained(trainer) for trainer in trainers)
    assert not torch.equal(before, flat_parameters(make_model("bert")))
    if page.name == "migrating.md":
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
        assert not torch.allclose(
            before, trained(Trainer(namespace["model"], namespace["args"], None, namespace["train"]))
        )


@pytest.mark.parametrize("page", [README, *DOCS, ROOT / "examples" / "README.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_the_readme_can_be_the_page_of_a_package_index():
    assert [link for link in links(README) if "://" not in link] == []
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README.read_text())
    assert pictures and [link for link in pictures if link.startswith(REPOSITORY)] == []  # a page, not a picture
    assert any(link.startswith(RAW) for link in pictures)
    assert not re.search(r"install [\"']?lpg[-_]hf", README.read_text())


def test_the_readme_is_read_in_three_minutes():
    text = README.read_text()
    assert len(text.splitlines()) <= 170 and len(text.split()) <= 1300


def test_the_index_names_every_page():
    index = ROOT / "docs" / "README.md"
    assert {page.name for page in DOCS} - {"README.md"} <= set(links(index))


def test_the_cards_of_the_methods_are_not_stale():
    text = (ROOT / "docs" / "methods.md").read_text()
    assert with_methods(text) == text, "run: python -m lpg_hf.perturbations docs/methods.md"
