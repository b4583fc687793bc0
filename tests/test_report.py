"""The report shows the numbers of its CSV files, and these are the ones that can be computed anew."""

import base64
import csv
import dataclasses
import io
import re
import sys
from collections import Counter
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Audio, ClassLabel, Dataset, Features, Image, Value
from huggingface_hub import ModelCard
from make_certificate import write_certificate
from PIL import Image as PILImage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import NUM_LABELS, make_model
from transformers import Trainer, TrainingArguments

import lpg_hf.report
from lpg_hf import SAM, LPGConfig, LPGTrainer
from lpg_hf.metrics import ExpectedCalibrationError
from lpg_hf.model_card import _class_table
from lpg_hf.perturbations.base import LogitPerturbation
from lpg_hf.report import ReportCallback, write_report
from lpg_hf.report.page import confused_pairs, write_page
from lpg_hf.report.plots import draw_figures, most_confused_classes
from lpg_hf.report.previews import preview
from lpg_hf.report.tables import ReportTables, make_tables
from lpg_hf.safe_text import LONGEST_SNIPPET
from lpg_hf.summary import Evaluation, TrainingSummary, Unavailable
from lpg_hf.trainer.summary import summarize_training


NAMES = ["ant", "bee", "cat & <b>dog</b>", "d|og"]
CSV_FILES = {"classes.csv", "norms.csv", "calibration.csv", "confusion.csv", "label_issues.csv"}
FIGURES = {"class_accuracy.png", "calibration.png", "norms.png", "dampening.png", "signs.png", "confusion.png"}


def make_dataset(rows=60, seed=0):
    labels = torch.multinomial(
        torch.tensor([0.5, 0.3, 0.15, 0.05]), rows, replacement=True, generator=torch.Generator().manual_seed(seed)
    ).tolist()
    columns = {
        "input_ids": [[1 + label, row % 25, 3] for row, label in enumerate(labels)],
        "label": [(label + (row % 10 == 0)) % NUM_LABELS for row, label in enumerate(labels)],
        "text": [f"<script>row {row}</script>" for row in range(rows)],
    }
    return Dataset.from_dict(columns).cast_column("label", ClassLabel(names=NAMES))


def make_trainer(path, *, cls=LPGTrainer, args_class=TrainingArguments, model=None, train_dataset=None, **kwargs):
    args = kwargs.pop("args", {})
    settings = {
        "output_dir": str(path),
        "num_train_epochs": 4,
        "learning_rate": 2e-2,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return cls(
        model=model or make_model("bert"),
        args=args_class(**(settings | args)),
        train_dataset=make_dataset() if train_dataset is None else train_dataset,
        **kwargs,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer with an evaluation set, metrics of its own, and predictions that are no logits any more."""
    path = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(
        path,
        perturbations=["auto", "lpg(epsilon=0.05)"],
        eval_dataset={"first": make_dataset(40, seed=1), "second": make_dataset(8, seed=2)},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=lambda prediction: {"own": 1.0},
    )
    trainer.train()
    return trainer, Path(trainer.report()).parent


def read_csv(path, encoding="utf-8"):
    with path.open(newline="", encoding=encoding) as file:
        return list(csv.DictReader(file))


def table_of(page, section):
    """The cells of the first table in a section, without markup."""
    html = re.search(rf'<section id="{section}">(.*?)</section>', page, re.DOTALL)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [
        [
            unescape(re.sub(r"<[^>]*>", "", cell)).strip()
            for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)
        ]
        for row in rows
    ]


def test_files(trained):
    assert {file.name for file in trained[1].iterdir()} == CSV_FILES | FIGURES | {"report.html"}
    for name in FIGURES:
        width, height = PILImage.open(trained[1] / name).size
        assert width > 700 and height > 400


def test_the_page_needs_nothing_else_and_is_safe(trained):
    page = (trained[1] / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) >= len(FIGURES) and all(source.startswith("data:image/png;base64,") for source in sources)
    for name in FIGURES:
        assert base64.b64encode((trained[1] / name).read_bytes()).decode() in page
    assert "&lt;script&gt;row" in page  # texts of the data are shown, not run
    own = re.findall("<script.*?</script>", page, re.DOTALL)
    assert len(own) == page.count("<script") == 2 and "<script" not in own[0][1:]
    assert "<b>dog</b>" not in page


def test_classes_agree_with_the_trainer_and_the_page(trained):
    trainer, folder = trained
    lines = read_csv(folder / "classes.csv")
    test = trainer.eval_dataset["first"]
    logits = trainer.predict(test)
    predicted = logits.predictions  # preprocessed: classes
    labels = np.array(test["label"])
    statistics = trainer.lpg_loss.statistics
    method = list(trainer.lpg_loss.perturbations)[-1]
    signs, bounds = method.signs_and_bounds(statistics)
    issues = trainer.label_issues()
    assert [line["name"] for line in lines] == NAMES
    for label, line in enumerate(lines):
        is_own = labels == label
        assert int(line["eval_rows"]) == is_own.sum()
        assert float(line["eval_accuracy"]) == pytest.approx((predicted == labels)[is_own].mean())
        assert int(line["train_rows"]) == trainer.train_dataset["label"][:].count(label)
        assert float(line["train_accuracy"]) == pytest.approx(statistics.accuracy[label].item())
        own = [issue["weight"] for issue in issues if issue["label"] == label]  # each row was visited as often
        assert float(line["weight"]) == pytest.approx(np.mean(own))
        assert (int(line["sign"]), float(line["bound"])) == pytest.approx((signs[label].item(), bounds[label].item()))
    header, *shown = table_of((folder / "report.html").read_text(), "classes")
    by_size = sorted(lines, key=lambda line: -int(line["train_rows"]))
    assert header[:3] == ["class", "training rows", "training accuracy"]
    for cells, line in zip(shown, by_size, strict=True):
        assert cells[:2] == [line["name"], line["train_rows"]]
        assert cells[4] == f"{float(line['eval_accuracy']):.1%}"
        assert cells[5] == f"{float(line['weight']):.3f}"


def test_confusion_and_calibration_agree_with_other_code(trained):
    trainer, folder = trained
    test = trainer.eval_dataset["first"]
    labels = np.array(test["label"])
    trainer.preprocess_logits_for_metrics, saved = None, trainer.preprocess_logits_for_metrics
    logits = torch.tensor(trainer.predict(test).predictions)
    trainer.preprocess_logits_for_metrics = saved
    predicted = logits.argmax(-1).numpy()
    lines = read_csv(folder / "confusion.csv")
    pairs = {(int(line["label"]), int(line["predicted"])): int(line["rows"]) for line in lines}
    expected = {}
    for pair in zip(labels.tolist(), predicted.tolist(), strict=True):
        expected[pair] = expected.get(pair, 0) + 1
    assert pairs == expected
    _, *wrong = table_of((folder / "report.html").read_text(encoding="utf-8"), "confusion")
    shown = [(NAMES.index(label), NAMES.index(guess), int(rows)) for label, guess, rows, _ in wrong]
    mistakes = [(*pair, rows) for pair, rows in expected.items() if pair[0] != pair[1]]
    assert shown == sorted(mistakes, key=lambda line: (-line[2], line[:2])) and 0 < len(shown) <= 15

    bins = [line for line in read_csv(folder / "calibration.csv") if int(line["rows"])]
    gaps = [int(line["rows"]) * abs(float(line["accuracy"]) - float(line["confidence"])) for line in bins]
    gap = sum(gaps) / len(test)
    oracle = ExpectedCalibrationError().compute(predictions=logits.softmax(-1).tolist(), references=labels)
    assert gap == pytest.approx(oracle["expected_calibration_error"], abs=1e-6)
    page = (folder / "report.html").read_text()
    assert f"<b>{gap:.1%}</b><span>calibration error</span>" in page
    assert f"<b>{(predicted == labels).mean():.1%}</b><span>accuracy</span>" in page


def test_label_issues_and_norms_agree_with_the_trainer_and_the_page(trained, tmp_path):
    trainer, folder = trained
    issues = trainer.label_issues()
    lines = read_csv(folder / "label_issues.csv", encoding="utf-8-sig")
    assert [int(line["row"]) for line in lines] == issues["row"][:]
    assert [float(line["score"]) for line in lines] == issues["score"][:]
    assert [line["suggested_label_name"] for line in lines] == [NAMES[label] for label in issues["suggested_label"]]
    _, *shown = table_of((folder / "report.html").read_text(), "label_issues")
    for cells, line in zip(shown, lines[: len(shown)], strict=True):
        assert (line["fix"], line["text"]) == ("", f"<script>row {line['row']}</script>")
        assert cells == [
            "",  # to tick
            line["row"],
            line["text"],
            line["label_name"],
            line["suggested_label_name"],
            f"{line['suggested_label_name']}drop the row",
            f"{float(line['score']):.4f}",
            f"{float(line['weight']):.3f}",
            line["visits"],
        ]
    # The report has them although they were not logged.
    assert not any(key.endswith("_norm") for log in trainer.state.log_history for key in log if key.startswith("lpg/"))
    twin = make_trainer(
        tmp_path,
        args_class=LPGConfig,
        args={"log_perturbations": True},
        perturbations=["auto", "lpg(epsilon=0.05)"],
        eval_dataset=trainer.eval_dataset,  # `auto` counts its classes
    )
    twin.train()
    logs = [log for log in twin.state.log_history if "loss" in log]
    norms = read_csv(folder / "norms.csv")
    assert [float(line["lpg/gradient_norm"]) for line in norms] == [log["lpg/gradient_norm"] for log in logs]
    assert [float(line["lpg/lpg/delta_norm"]) for line in norms] == [log["lpg/lpg/delta_norm"] for log in logs]


def test_the_report_needs_no_trainer(tmp_path):
    summary = TrainingSummary(
        model_name="Model",
        output_dir=str(tmp_path),
        num_steps=1200,
        active_perturbations=(SAM(0.1),),
        changed_settings={},
        norms=[{"step": 1, "epoch": 0.5, "lpg/sam/delta_norm": 0.25}],
        class_names=["ant", "bee"],
        class_counts=[30, 10],
        class_accuracy=[0.75, 0.5],
        class_signs=[-1, 1],
        class_bounds=[0.1, 0.3],
        label_issues=Unavailable("The rows of a stream have no index."),
        evaluation=Evaluation("test", np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])),
    )
    folder = tmp_path / "report"
    assert write_report(summary, folder) == str(folder / "report.html")
    columns = ("label", "name", "train_rows", "train_accuracy", "eval_rows", "eval_accuracy", "sign", "bound")
    lines = (("0", "ant", "30", "0.75", "2", "0.5", "-1", "0.1"), ("1", "bee", "10", "0.5", "1", "1.0", "1", "0.3"))
    assert read_csv(folder / "classes.csv") == [dict(zip(columns, line, strict=True)) for line in lines]
    assert read_csv(folder / "norms.csv") == [{"step": "1", "epoch": "0.5", "lpg/sam/delta_norm": "0.25"}]
    page = (folder / "report.html").read_text()
    for tile in ("<b>1,200</b><span>steps</span>", "<b>3.0 : 1</b>", "<b>66.7%</b>", "<b>test, 3 rows</b>"):
        assert tile in page
    assert "The rows of a stream have no index." in page
    with pytest.raises(dataclasses.FrozenInstanceError):
        summary.num_steps = 0


class TrainerWithOwnAttributes(LPGTrainer):
    """Has attributes of the user that LPGTrainer might use, too."""

    class_names = ("their", "own")
    label_issues = "their own"
    lpg_loss = "their own"
    summary = "their own"
    active_perturbations = "their own"


def test_attributes_of_a_users_subclass_are_not_touched(tmp_path):
    trainer = make_trainer(tmp_path, cls=TrainerWithOwnAttributes, args={"max_steps": 1})
    trainer.train()
    assert "Which labels are wrong?" in Path(trainer.report()).read_text()
    assert len(read_csv(tmp_path / "report" / "label_issues.csv")) > 0
    trainer.create_model_card()
    assert "| ant | " in ModelCard.load(tmp_path / "README.md").text


def test_the_report_leaves_the_trainer_as_it_was(trained):
    trainer, _ = trained
    assert trainer.compute_metrics(None) == {"own": 1.0}
    assert trainer.preprocess_logits_for_metrics(torch.eye(2), None).tolist() == [0, 1]


@pytest.mark.parametrize("settings", [{"prediction_loss_only": True}, {"eval_do_concat_batches": False}])
def test_settings_of_the_users_evaluations_leave_the_report_alone(settings, tmp_path):
    """The last of the batches is smaller than the others."""
    args = {"max_steps": 1, "per_device_eval_batch_size": 16} | settings
    trainer = make_trainer(tmp_path, args=args, eval_dataset=make_dataset(40, seed=1))
    trainer.train()
    folder = Path(trainer.report()).parent
    assert all(getattr(trainer.args, name) == value for name, value in settings.items())
    plain = Trainer(model=trainer.model, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    predicted = plain.predict(make_dataset(40, seed=1)).predictions.argmax(1)
    lines = read_csv(folder / "confusion.csv")
    counts = {(int(line["label"]), int(line["predicted"])): int(line["rows"]) for line in lines}
    assert counts == Counter(zip(make_dataset(40, seed=1)["label"][:], predicted.tolist(), strict=True))


def test_without_an_evaluation_set_the_rest_is_shown(tmp_path):
    trainer = make_trainer(tmp_path / "run", perturbations=["class_relative_dampening"])
    trainer.add_callback(ReportCallback(trainer, tmp_path / "there"))
    trainer.train()
    names = {file.name for file in (tmp_path / "there").iterdir()}
    assert names == {"report.html", "classes.csv", "norms.csv", "label_issues.csv"} | {
        "class_accuracy.png",
        "norms.png",
        "dampening.png",
    }
    page = (tmp_path / "there" / "report.html").read_text()
    assert "There is no `eval_dataset`." in page and "Only LPG and LPL have signs and bounds" in page


def test_an_earlier_report_leaves_nothing_behind(trained, tmp_path):
    tables = ReportTables(summary={"model": "M"}, missing={"issues": "none", "evaluation": "none", "norms": "none"})
    (tmp_path / "confusion.csv").write_text("old")
    (tmp_path / "confusion.png").write_text("old")
    write_page(tables, None, None, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"report.html"}


@pytest.mark.parametrize("perturbations", [[], ["sam"]])
def test_chains_without_methods_at_the_logits(perturbations, tmp_path):
    trainer = make_trainer(tmp_path, perturbations=perturbations, eval_dataset=make_dataset(20))
    trainer.train()
    trainer.report()
    lines = read_csv(tmp_path / "report" / "classes.csv")
    labels = trainer.train_dataset["label"][:]
    assert [int(line["train_rows"]) for line in lines] == [labels.count(label) for label in range(4)]
    assert (tmp_path / "report" / "norms.csv").exists() == bool(perturbations)


def test_a_model_that_is_no_classifier_still_has_a_page(tmp_path):
    model = make_model("bert")
    model.config.problem_type, model.config.num_labels = "regression", 1
    model.num_labels, model.classifier = 1, torch.nn.Linear(16, 1)
    dataset = Dataset.from_dict({"input_ids": [[1, 2]] * 8, "label": [0.5] * 8})
    trainer = make_trainer(tmp_path, model=model, train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    page = Path(trainer.report()).read_text()
    assert "The model is not a single-label classifier." in page
    assert "`eval_dataset` does not have one integer label per row." in page


def test_before_training_and_without_the_extra(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"nothing to report yet: call `train\(\)` first"):
        trainer.report()
    assert summarize_training(trainer, trainer.lpg_loss, [], []).class_accuracy is None
    monkeypatch.setattr(lpg_hf.report, "find_spec", lambda name: None)
    for wanted in (trainer.report, lambda: ReportCallback(trainer)):
        with pytest.raises(ImportError, match=r"needs matplotlib and jinja2. Run `pip install matplotlib jinja2`\."):
            wanted()


def test_the_library_imports_without_the_extra():
    """The modules that need matplotlib or Jinja2 are imported inside functions only."""
    for name in (
        "lpg_hf.trainer.reports",
        "lpg_hf.trainer.summary",
        "lpg_hf.report",
        "lpg_hf.summary",
        "lpg_hf.model_card",
    ):
        source = Path(sys.modules[name].__file__).read_text()
        assert not re.search(r"^(import|from) \S*(matplotlib|jinja2|page|plots|tables)", source, re.MULTILINE)


def test_previews(tmp_path):
    picture = PILImage.fromarray(np.zeros((4, 8, 3), dtype=np.uint8))
    features = Features({"image": Image(), "label": Value("int64")})
    images = Dataset.from_dict({"image": [picture], "label": [0]}, features=features)
    images = images.with_transform(lambda batch: {"pixel_values": [0]})

    def size(shown):
        return PILImage.open(io.BytesIO(base64.b64decode(shown["image"].split(",")[1]))).size

    assert size(preview(images, 0)) == (96, 48)
    gray = Dataset.from_dict({"image": [PILImage.fromarray(np.full((4, 4), 30_000, dtype=np.uint16))]})
    thumbnail = PILImage.open(io.BytesIO(base64.b64decode(preview(gray, 0)["image"].split(",")[1])))
    assert thumbnail.getpixel((50, 50)) == (round(30_000 / 257),) * 3
    pixels = [{"pixel_values": torch.rand(3, 200, 100), "labels": 0}]
    assert size(preview(pixels, 0)) == (48, 96)
    assert preview([{"pixel_values": torch.rand(5)}], 0) == {} == preview([(1, 2)], 0)
    assert len(preview([{"title": "short", "text": "word " * 100}], 0)["text"]) == LONGEST_SNIPPET
    assert preview(Dataset.from_dict({"input_ids": [[5, 6]]}), 0) == {}
    sounds = Dataset.from_dict({"audio": ["no such file.wav"], "label": [0]})
    for decode in (True, False):  # it is not decoded
        assert preview(sounds.cast_column("audio", Audio(decode=decode)), 0) == {"text": "no such file.wav"}
    picture.save(tmp_path / "picture.png")
    (tmp_path / "broken.png").write_text("no image")
    paths = [str(tmp_path / name) for name in ("picture.png", "broken.png", "missing.png")]
    files = Dataset.from_dict({"image": [*paths, None]})
    for decode in (True, False):
        encoded = files.cast_column("image", Image(decode=decode))
        assert size(preview(encoded, 0)) == (96, 48)
        assert [preview(encoded, row) for row in (1, 2, 3)] == [{}, {}, {}]

    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids))

    assert preview(Dataset.from_dict({"input_ids": [[5, 6]]}), 0, Tokenizer()) == {"text": "5 6"}


def test_of_many_classes_those_with_the_most_mistakes_are_drawn():
    confusion = np.diag(np.full(100, 50))
    confusion[np.arange(0, 90, 3), 99] = np.arange(1, 31)
    assert most_confused_classes(confusion).tolist() == list(range(0, 90, 3))
    assert most_confused_classes(confusion[:30, :30]).tolist() == list(range(30))


def test_a_hundred_thousand_classes(tmp_path):
    """A matrix of all their pairs would need 75 GiB."""
    size = 100_000
    labels, predicted = np.array([5, 5, 5, size - 1]), np.array([5, 7, 7, 0])
    evaluation = Evaluation("eval_dataset", labels, np.eye(1, size, dtype=np.float32)[[0] * 4])
    for row, label in enumerate(predicted):
        evaluation.probabilities[row, [0, label]] = [0, 1]
    summary = summarize_training(make_trainer(tmp_path, model=make_model("bert")), None, [], [], evaluation=evaluation)
    tables = make_tables(summary)
    assert tables.summary["accuracy"] == "25.0%" and tables.summary["balanced accuracy"] == "16.7%"
    assert [(line["label"], line["predicted"], line["rows"], line["share"]) for line in confused_pairs(tables)] == [
        (5, 7, 2, 2 / 3),
        (5, 5, 1, 1 / 3),
        (size - 1, 0, 1, 1.0),
    ]
    assert tables.classes[5]["eval_accuracy"] == 1 / 3 and tables.classes[6]["eval_accuracy"] is None
    shown = most_confused_classes(tables.confusion).tolist()
    assert len(shown) == 30 and {5, size - 1} <= set(shown)
    drawn, failed = draw_figures(tables)
    assert "confusion" in drawn and not failed


def test_tensorboard_holds_every_scalar(tmp_path):
    trainer = make_trainer(
        tmp_path,
        args_class=LPGConfig,
        args={"report_to": ["tensorboard"], "logging_steps": 8, "log_perturbations": True},
        perturbations=["auto", SAM(0.05)],
    )
    trainer.train()
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    names = [name for name in logs[0] if name.startswith("lpg/")]
    assert {"lpg/gradient_norm", "lpg/class_relative_dampening/weight", "lpg/sam/delta_norm"} <= set(names)
    for name in names:
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(log["step"], pytest.approx(log[name], rel=1e-6)) for log in logs]


class Halving(LogitPerturbation):
    """A user's own method, without a card."""

    name = "halving"

    def delta(self, gradient, batch, statistics):
        return -0.5 * gradient


def test_the_model_card_says_how_it_was_trained(tmp_path):
    trainer = make_trainer(
        tmp_path,
        args_class=LPGConfig,
        args={"perturbations": ["lpg"], "lpg_epsilon": 0.25},
        perturbations=["auto", "lpg", Halving(), SAM(0.1)],
    )
    trainer.train()
    write_certificate(tmp_path / "certificate.json", trainer.model, scope="a|b")
    for _ in range(2):  # written again it does not grow
        trainer.create_model_card(tags="mine")
        card = ModelCard.load(tmp_path / "README.md")
        assert set(card.data.tags) >= {"mine", "lpg_hf", "gradient-perturbation"}
        assert len(card.data.tags) == len(set(card.data.tags))
        assert card.text.count("## Gradient perturbation") == 1
    assert "## Training procedure" in card.text  # the Trainer's own
    for method in ("class_relative_dampening()", "lpg(epsilon=0.25)", "halving()", "sam(rho=0.1)"):
        assert f"| `{method}` |" in card.text
    assert "- `lpg_epsilon=0.25`" in card.text
    counts = trainer.train_dataset["label"][:]
    accuracy = trainer.lpg_loss.statistics.accuracy
    for label, name in enumerate(["ant", "bee", "cat &amp; &lt;b&gt;dog&lt;/b&gt;", r"d\|og"]):
        assert f"| {name} | {counts.count(label)} | {accuracy[label]:.3f} |" in card.text
    assert "| delta | 0.05 |" in card.text and "| scope | a\\|b |" in card.text


def test_without_perturbations_the_model_card_is_the_trainers(tmp_path):
    cards = []
    for cls, options in ((Trainer, {}), (LPGTrainer, {"perturbations": []})):
        trainer = make_trainer(tmp_path, cls=cls, args={"max_steps": 1}, **options)
        trainer.train()
        trainer.create_model_card()
        cards.append((tmp_path / "README.md").read_text())
        (tmp_path / "README.md").unlink()
    assert cards[0] == cards[1]


def test_of_many_classes_the_card_shows_both_ends():
    lines = _class_table([f"c{label}" for label in range(1000)], list(range(1, 1001)), [0.5] * 1000).splitlines()
    assert len(lines) == 2 + 40 + 1
    assert lines[2] == "| c999 | 1000 | 0.500 |" and lines[-1] == "| c0 | 1 | 0.500 |"
    assert "960 more classes" in lines[22]
