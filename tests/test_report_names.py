"""A report of unusual names, broken data sets and bad values is written; one that is not costs training nothing."""

import csv
import io
import logging
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from tiny import make_batch, make_model
from transformers import TrainingArguments

import lpg_hf.trainer.reports
from lpg_hf import LPGTrainer
from lpg_hf.class_names import find_class_names
from lpg_hf.report import ReportCallback, write_report
from lpg_hf.report.plots import LONGEST_NAME, STYLE, _bars, _figures, draw_figures, rc_context
from lpg_hf.report.tables import make_tables
from lpg_hf.row_records import TrainingDynamics
from lpg_hf.safe_text import one_line, shown, unique_names
from lpg_hf.summary import Evaluation, TrainingSummary
from lpg_hf.trainer.summary import _evaluation


NAMES = {
    "dollars": ["price_$5_$10", "$10 to $50", "a$x^$", "$\\frac{"],
    "markup": ["<script>alert(1)</script>", "{{ 7 * 7 }}", "![x](http://x.org)", "---\ntags: x\n---"],
    "formulas": ["=1+1", "+1", "-1", "@SUM(1)"],
    "controls": ["\t=1", "\r=1", "a\x00b", "\u202eabc"],
    "empty and long": ["", " ", "n" * 5000, "two\nlines"],
    "right to left": ["שלום", "مرحبا", "می‌روم", "漢字"],
    "lone surrogate": ["\ud800", "b", "c", "d"],
    "duplicates": ["neg", "pos", "neg", "neg (0)"],
}


def make_summary(names, num_rows=40, evaluation=None):
    generator = torch.Generator().manual_seed(0)
    records = TrainingDynamics(num_rows)
    labels = torch.arange(num_rows) % len(names)
    logits = torch.randn(num_rows, len(names), generator=generator)
    records.update(torch.arange(num_rows), logits, labels, torch.rand(num_rows, generator=generator))
    if evaluation is None:
        evaluation = Evaluation("eval_dataset", labels.numpy(), logits.softmax(-1).double().numpy())
    return TrainingSummary(
        model_name="Model",
        output_dir="out",
        num_steps=5,
        active_perturbations=(),
        changed_settings={},
        norms=[],
        class_names=names,
        class_counts=[10] * len(names),
        class_accuracy=[0.5] * len(names),
        class_signs=([1, -1] * len(names))[: len(names)],
        class_bounds=[0.1] * len(names),
        label_issues=records.ranked(names, with_weight=True),
        evaluation=evaluation,
    )


def cells_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return [cell for row in csv.reader(file) for cell in row]


@pytest.mark.parametrize("kind", NAMES)
def test_unusual_names_are_shown_as_they_are(kind, tmp_path):
    names = unique_names(NAMES[kind])
    page = Path(write_report(make_summary(names), tmp_path)).read_text(encoding="utf-8")
    written = [name.encode(errors="backslashreplace").decode() for name in names]
    in_csv = cells_of(tmp_path / "classes.csv")
    for name, text in zip(names, written, strict=True):
        assert f"<bdi>{shown(name)}</bdi>" in unescape(page)
        assert text in in_csv or f"'{text}" in in_csv
    assert page.count("<script") == page.count("</script") == 2  # the page's own
    for file in tmp_path.glob("*.csv"):
        assert not [cell for cell in cells_of(file) if re.match(r"\s*[=+@]|[\t\r\n]|\s*-\D", cell)]
    for name in ("class_accuracy", "signs", "dampening", "confusion"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 700


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("kind", NAMES)
def test_a_figure_draws_a_name_letter_by_letter(kind):
    names = unique_names(NAMES[kind])
    with rc_context(STYLE):
        for figure in (_figures(make_tables(make_summary(names)))[name]() for name in ("dampening", "confusion")):
            figure.savefig(io.BytesIO(), format="png")
            drawn = {text.get_text(): text for text in figure.findobj(Text)}
            for name in names:
                text = drawn[shown(name, LONGEST_NAME)]
                assert not text.get_parse_math() and not text.get_usetex()


@settings(max_examples=6, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=2, max_size=4))
def test_every_name_can_be_drawn(names):
    drawn, failed = draw_figures(make_tables(make_summary(unique_names(names))))
    assert not failed and {"class_accuracy", "signs", "dampening", "confusion"} <= set(drawn)


def test_duplicate_names_of_a_model_get_their_number():
    model = make_model("bert")
    model.config.id2label = {0: "neg", 1: "pos", 2: "neg", 3: "neg (0)"}
    expected = ["neg (0) (0)", "pos", "neg (2)", "neg (0)"]
    assert find_class_names(4, None, model) == expected
    issues = make_summary(find_class_names(4, None, model)).label_issues
    assert issues.features["label"] == ClassLabel(names=expected)


def test_the_file_of_label_issues_is_the_table_whatever_its_length(tmp_path, monkeypatch):
    monkeypatch.setattr("lpg_hf.data.issues_csv.CHUNK_ROWS", 7)
    summary = make_summary(["=a", "b"])
    write_report(summary, tmp_path)
    with (tmp_path / "label_issues.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 40
    for line, issue in zip(lines, summary.label_issues, strict=True):
        assert [int(line[key]) for key in ("row", "label", "suggested_label", "visits")] == [
            issue[key] for key in ("row", "label", "suggested_label", "visits")
        ]
        assert float(line["score"]) == issue["score"] and float(line["weight"]) == issue["weight"]
        assert [line["label_name"], line["suggested_label_name"]] == [
            ["'=a", "b"][issue[key]] for key in ("label", "suggested_label")
        ]


class CountedRows(torch.utils.data.Dataset):
    """Remembers which rows were asked for."""

    def __init__(self, num_rows):
        self.num_rows, self.asked = num_rows, []

    def __len__(self):
        return self.num_rows

    def __getitem__(self, row):
        self.asked.append(row)
        return {"text": f"row {row}", "label": 0}


def test_only_the_rows_that_the_page_shows_are_read(tmp_path):
    dataset, summary = CountedRows(500), make_summary(["a", "b"], num_rows=500)
    page = Path(write_report(summary, tmp_path, dataset)).read_text()
    assert dataset.asked == summary.label_issues["row"][:100]
    assert "The 100 most doubtful of 500 training rows" in page


def test_a_tokenizer_that_fails_costs_the_file_its_texts_alone(tmp_path, caplog):
    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            raise RuntimeError("no words")

    dataset = Dataset.from_dict({"input_ids": [[1]] * 40})
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        write_report(make_summary(["a", "b"]), tmp_path, dataset, Tokenizer())
    assert "The file label_issues.csv has no texts: RuntimeError('no words')" in caplog.text
    with (tmp_path / "label_issues.csv").open(newline="", encoding="utf-8-sig") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 40 and "tokens" not in lines[0]


class Broken(CountedRows):
    def __getitem__(self, row):
        raise RuntimeError("disk on fire")


def test_rows_that_cannot_be_read_have_no_preview(tmp_path, caplog):
    summary = make_summary(["a", "b"])
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        page = Path(write_report(summary, tmp_path, Broken(40))).read_text()
    row = summary.label_issues["row"][0]
    assert f"40 of 40 rows in the report have no preview: row {row} raised RuntimeError('disk on fire')" in caplog.text
    assert f'<span class="muted">row {row}</span>' in page


def test_a_figure_that_cannot_be_drawn_leaves_the_rest(tmp_path, caplog, monkeypatch):
    def fails(*args):
        raise ValueError("no ink")

    monkeypatch.setattr("lpg_hf.report.plots._confusion", fails)
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        page = Path(write_report(make_summary(["a", "b"]), tmp_path)).read_text()
    assert "The figure could not be drawn: ValueError(&#39;no ink&#39;)." in page
    assert "figure 'confusion' of the report could not be drawn" in caplog.text
    assert (tmp_path / "dampening.png").exists() and not (tmp_path / "confusion.png").exists()


def test_an_evaluation_with_bad_labels_or_logits_is_not_shown_as_a_good_one():
    logits, labels = np.zeros((4, 3)), np.array([0, 2, 1, -100])
    evaluation = _evaluation("e", logits, labels)
    assert evaluation.labels.tolist() == [0, 2, 1] and evaluation.probabilities.shape == (3, 3)
    for wrong in (-1, 3, 255):
        found = _evaluation("e", logits, np.array([0, wrong, 1, -100]))
        assert f"1 of 3 rows of `e` have labels outside of 0 to 2, {wrong} among them" in found.reason
    for value in (np.nan, np.inf, -np.inf):
        logits[1, 0] = value
        assert "The logits of 1 of 3 rows of `e` are not finite" in _evaluation("e", logits, labels).reason
    assert "No row of `e` has a label" in _evaluation("e", logits, np.full(4, -100)).reason


def make_trainer(path, **kwargs):
    batch = make_batch("bert", 16)
    features = {"input_ids": batch["input_ids"].tolist(), "label": batch["labels"].tolist()}
    names = kwargs.pop("names", list("abcd"))
    dataset = Dataset.from_dict(features).cast_column("label", ClassLabel(names=names))
    args = TrainingArguments(str(path), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=2, save_strategy="no")
    return LPGTrainer(model=make_model("bert"), args=args, train_dataset=dataset, **kwargs)


def test_a_report_that_fails_never_costs_the_return_of_train(tmp_path, caplog, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(ReportCallback(trainer))

    def fails(*args):
        raise OSError("no space left")

    monkeypatch.setattr("lpg_hf.report.write_report", fails)
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        assert trainer.train().global_step == 2
    assert "The report could not be written: OSError('no space left'). The training is complete" in caplog.text
    with pytest.raises(OSError, match="no space left"):  # asked for by name, it says so
        trainer.report()


def test_an_evaluation_set_that_cannot_be_predicted_leaves_the_rest_of_the_report(tmp_path, caplog):
    trainer = make_trainer(tmp_path, eval_dataset=Broken(4))
    trainer.train()
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        page = Path(trainer.report()).read_text()
    assert "Predicting `eval_dataset` failed: RuntimeError(&#39;disk on fire&#39;)." in page
    assert "Predicting `eval_dataset` for the report failed" in caplog.text
    assert "The 16 most doubtful of 16 training rows" in page


@pytest.mark.parametrize("kind", ["dollars", "markup", "formulas", "right to left"])
def test_a_card_shows_names_as_plain_text(kind, tmp_path):
    trainer = make_trainer(tmp_path, names=NAMES[kind])
    trainer.train()
    for _ in range(2):
        trainer.create_model_card()
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert card.count("## Gradient perturbation") == 1 and card.count("| running training accuracy |") == 1
    assert "<script" not in card and "tags: x" not in card.split("---")[1]
    counts = trainer.train_dataset["label"][:]
    rows = [line for line in card.splitlines() if re.fullmatch(r"\| .* \| \d+ \| \d\.\d{3} \|", line)]
    found = {unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", line[2:])).rsplit(" | ", 2)[0]: line for line in rows}
    assert set(found) == {one_line(name) for name in NAMES[kind]}
    for label, name in enumerate(NAMES[kind]):
        assert f" | {counts.count(label)} | " in found[one_line(name)]


def test_a_section_of_the_card_that_fails_is_a_warning(tmp_path, caplog, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.train()

    def fails(*args):
        raise RuntimeError("no pen")

    monkeypatch.setattr(lpg_hf.trainer.reports, "add_section", fails)
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        trainer.create_model_card()
    assert "could not be written: RuntimeError('no pen')" in caplog.text
    assert "## Training procedure" in (tmp_path / "README.md").read_text()


def test_the_heights_of_ten_thousand_classes_are_lines():
    heights = np.random.default_rng(0).uniform(-1, 1, 10_000)
    axes = Figure().add_subplot()
    _bars(axes, [str(label) for label in range(10_000)], heights.tolist(), ["red"] * 10_000)
    assert not axes.patches
    (lines,) = axes.collections
    np.testing.assert_array_equal(
        [line[1] for line in lines.get_segments()], np.stack([np.arange(10_000), heights], 1)
    )
