"""Labels are corrected as a person has written it, or not at all."""

import csv
import logging
import os
import random

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import example, given, settings
from hypothesis import strategies as st
from label_data import dataset_of, image_dataset, never_called

from lpg_hf.data import apply_fixes, write_issues
from lpg_hf.data.class_cells import ClassCells
from lpg_hf.safe_text import spreadsheet_cell


NAMES = ["ant", "bee", "cat"]
LABELS = [0, 1, 2, 0, 1, 2, 0, 1]
TEXTS = [f"text of the row {word}" for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")]


def named(labels=LABELS, names=NAMES, texts=TEXTS):
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"text": texts, "label": labels}, features=features)


def issues_of(labels, names, suggested=None, rows=None):
    """A table as `LPGTrainer.label_issues` makes it, the last row first."""
    rows = list(range(len(labels)))[::-1] if rows is None else rows
    suggested = [(label + 1) % len(names) for label in labels] if suggested is None else suggested
    label = ClassLabel(names=names)
    types = {"row": Value("int64"), "label": label, "suggested_label": label, "score": Value("float64")}
    columns = {"row": rows, "label": [labels[row] for row in rows]}
    columns |= {"suggested_label": [suggested[row] for row in rows], "score": np.linspace(1, 0, len(rows)).tolist()}
    return Dataset.from_dict(columns, features=Features(types))


def edited(path, fixes, delimiter=",", encoding="utf-8-sig", cell_of=lambda name, cell: cell):
    """Fills the column `fix` of a file as a spreadsheet does that writes its file anew."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        line["fix"] = fixes.get(int(line["row"]), "")
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(lines[0])
        writer.writerows([[cell_of(*cell) for cell in line.items()] for line in lines])
    return path


@pytest.fixture
def path(tmp_path):
    write_issues(issues_of(LABELS, NAMES), tmp_path / "issues.csv", named())
    return tmp_path / "issues.csv"


def test_the_file_has_what_a_person_needs_to_decide(path):
    assert path.read_bytes().startswith(b"\xef\xbb\xbffix,")  # a spreadsheet reads it as UTF-8
    with path.open(newline="", encoding="utf-8-sig") as file:
        first, *_ = lines = list(csv.DictReader(file))
    assert first == {
        "fix": "",
        "row": "7",
        "score": "1.0",
        "label_name": "bee",
        "suggested_label_name": "cat",
        "text": TEXTS[7],
        "label": "1",
        "suggested_label": "2",
    }
    assert [int(line["row"]) for line in lines] == [7, 6, 5, 4, 3, 2, 1, 0]


def test_names_numbers_and_drop(path):
    fixes = {0: "cat", 1: "#0", 2: " BEE ", 3: "1", 4: "2.0", 5: "Drop", 6: "ant"}
    result = apply_fixes(named(), edited(path, fixes))
    assert result["label"][:] == [2, 0, 1, 1, 2, 0, 1]
    assert result["text"][:] == [*TEXTS[:5], *TEXTS[6:]]
    assert result.features == named().features and named()["label"][:] == LABELS


def test_whole_numbers_with_a_fraction_as_data_frames_write_them(path):
    edited(path, {1: "2.0"}, cell_of=lambda name, cell: f"{cell}.0" if name in ("row", "label") else cell)
    assert apply_fixes(named(), path)["label"][:] == [0, 2, *LABELS[2:]]


@pytest.mark.parametrize("delimiter", ",;\t")
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_what_spreadsheets_write(delimiter, encoding, shuffled, tmp_path):
    names = ["a;b", 'say "no"', "one\ntwo", "=1+1", "é, ü"]
    texts = [f"the {number}th text; with, all\tof\nit" for number in ("four", "five", "six", "seven", "eight")]
    path = tmp_path / "issues.csv"
    dataset = named([0, 1, 2, 3, 4], names, texts)
    write_issues(issues_of([0, 1, 2, 3, 4], names), path, dataset)
    edited(path, {0: "é, ü", 1: "one\ntwo", 2: "'=1+1", 3: "a;b", 4: 'say "no"'}, delimiter, encoding)
    if shuffled:
        with path.open(newline="", encoding=encoding) as file:
            header, *lines = csv.reader(file, delimiter=delimiter)
        random.Random(0).shuffle(lines)
        with path.open("w", newline="", encoding=encoding) as file:
            csv.writer(file, delimiter=delimiter).writerows([header, *lines, [""] * len(header), []])
    assert apply_fixes(dataset, path)["label"][:] == [4, 2, 3, 0, 1]


COLUMNS = {
    "classes": (ClassLabel(names=NAMES), lambda label: label),
    "int64": (Value("int64"), lambda label: label),
    "int8": (Value("int8"), lambda label: label),
    "strings": (Value("string"), lambda label: NAMES[label]),
    "large strings": (Value("large_string"), lambda label: NAMES[label]),
    "lists": (List(Value("int64")), lambda label: [label]),
    "lists of classes": (List(ClassLabel(names=NAMES)), lambda label: [label]),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_kind_of_column(kind, path):
    feature, stored = COLUMNS[kind]
    dataset = dataset_of([stored(label) for label in LABELS], "target", feature)
    result = apply_fixes(dataset, edited(path, {0: "bee", 7: "#0", 3: "drop"}), label_column="target")
    expected = [1, 1, 2, 1, 2, 0, 0]
    assert result["target"][:] == [stored(label) for label in expected]
    assert result["row"][:] == [0, 1, 2, 4, 5, 6, 7] and result.features == dataset.features


def test_a_column_of_integers_has_the_numbers_for_names(tmp_path):
    lines = [{"row": 0, "label": "0", "fix": "2"}, {"row": 1, "label": 1, "fix": 0}]
    lines.append({"row": 2, "label": 2, "fix": None})
    assert apply_fixes(dataset_of([0, 1, 2]), lines)["label"][:] == [2, 0, 2]
    with pytest.raises(ValueError, match=r"fixes\[0\]: the fix '3' is no class\. The classes are '0', '1', '2'\."):
        apply_fixes(dataset_of([0, 1, 2]), [{"row": 0, "label": 0, "fix": "3"}])
    with pytest.raises(ValueError, match=r"fixes\[0\]: the fix 3 is no number of a class"):
        apply_fixes(dataset_of([0, 1, 2]), [{"row": 0, "label": 0, "fix": 3}])


def test_the_table_of_issues_and_records_of_a_data_frame_are_lines():
    issues = issues_of(LABELS, NAMES)
    expected = [(label + 1) % 3 for label in LABELS]
    lines = issues.add_column("fix", issues["suggested_label"][:])
    assert apply_fixes(named(), lines)["label"][:] == expected
    frame = lines.to_pandas()
    assert apply_fixes(named(), frame.to_dict("records"))["label"][:] == expected
    frame["fix"] = frame["fix"].where(frame["row"] < 2)  # the rest becomes NaN
    assert apply_fixes(named(), frame.to_dict("records"))["label"][:] == [*expected[:2], *LABELS[2:]]
    assert apply_fixes(named(), iter(frame.to_dict("records")))["label"][:] == [*expected[:2], *LABELS[2:]]
    with pytest.raises(TypeError, match=r"fixes is a DataFrame, but must be the path .* `to_dict\('records'\)`"):
        apply_fixes(named(), frame)


def test_other_columns_format_and_transform_stay():
    dataset = image_dataset().add_column("clean_label", list(range(24))).with_transform(never_called)
    lines = [{"row": 0, "label": 0, "fix": 2}, {"row": 5, "label": "class_2", "fix": "drop"}]
    result = apply_fixes(dataset, lines)
    assert result.format["type"] == "custom" and result.column_names == dataset.column_names
    before, after = dataset.with_format("arrow")[:], result.with_format("arrow")[:]
    assert after["image"].to_pylist() == [image for row, image in enumerate(before["image"].to_pylist()) if row != 5]
    assert after["clean_label"].to_pylist() == [row for row in range(24) if row != 5]
    assert after["label"].to_pylist()[:6] == [2, 1, 2, 0, 1, 0]
    formatted = dataset.with_format("numpy", columns=["label"])
    assert apply_fixes(formatted, lines).format == formatted.format


def test_a_dataset_of_labels_alone_and_one_that_was_shuffled():
    only = Dataset.from_dict({"label": [0, 1, 0]})
    assert apply_fixes(only, [{"row": 0, "label": 0, "fix": 1}]).to_dict() == {"label": [1, 1, 0]}
    shuffled = named().select([7, 3, 5])
    result = apply_fixes(shuffled, [{"row": 1, "label": "ant", "fix": "cat"}])
    assert result["label"][:] == [1, 2, 2] and result["text"][:] == [TEXTS[7], TEXTS[3], TEXTS[5]]


def test_names_of_strings_that_a_spreadsheet_changes(tmp_path):
    names, path = ["007", "010", "true"], tmp_path / "issues.csv"
    dataset = Dataset.from_dict({"label": ["007", "010", "true", "007"]})
    write_issues(issues_of([0, 1, 2, 0], names), path)
    changed = {"007": "7", "010": "10", "true": "TRUE"}
    edited(path, {0: "10", 3: "TRUE"}, cell_of=lambda name, cell: changed.get(cell, cell))
    assert apply_fixes(dataset, path)["label"][:] == ["010", "010", "true", "true"]
    # A class of the training that has no row here is one all the same.
    assert apply_fixes(dataset.select([0, 1]), path_of(path, 2))["label"][:] == ["010", "010"]
    edited(path, {0: "#2"})
    assert apply_fixes(dataset, path)["label"][0] == "true"


def path_of(path, num_rows):
    """The lines of the first rows."""
    header, *lines = path.read_text(encoding="utf-8-sig").splitlines()
    path.write_text("\n".join([header, *(line for line in lines if int(line.split(",")[1]) < num_rows)]))
    return path


def test_rows_without_a_label_stay():
    assert apply_fixes(dataset_of([0, -100, 1]), [{"row": 0, "label": 0, "fix": 1}])["label"][:] == [1, -100, 1]
    texts = dataset_of(["a", None, "b"], feature=Value("string"))
    assert apply_fixes(texts, [{"row": 0, "label": "a", "fix": "b"}])["label"][:] == ["b", None, "b"]


def test_a_class_called_drop(tmp_path):
    names, path = ["keep", "Drop"], tmp_path / "issues.csv"
    dataset = named([0, 1, 0], names, TEXTS[:3])
    write_issues(issues_of([0, 1, 0], names), path, dataset)
    with pytest.raises(ValueError, match=r"'drop' may mean the class \(write '#1'\) or .* removed \(write '#drop'\)"):
        apply_fixes(dataset, edited(path, {0: "drop"}))
    assert apply_fixes(dataset, edited(path, {0: "#1", 2: "#drop"}))["label"][:] == [1, 1]


@pytest.mark.parametrize(
    ("fixes", "message"),
    [
        ({0: "bees"}, r"issues\.csv, line 9: the fix 'bees' is no class\. Did you mean 'bee'\? The classes are "),
        ({0: "#3"}, "line 9: the fix '#3' means a class by its number, and the numbers are 0, 1, 2"),
        (dict.fromkeys(range(8), "drop"), "The fixes drop all 8 rows"),
    ],
)
def test_a_fix_that_is_none(fixes, message, path):
    with pytest.raises(ValueError, match=message):
        apply_fixes(named(), edited(path, fixes))


def test_a_row_with_two_fixes():
    lines = [{"row": 3, "label": 0, "fix": fix} for fix in ("cat", None, 2)]
    assert apply_fixes(named(), lines)["label"][3] == 2
    with pytest.raises(ValueError, match=r"fixes\[3\]: row 3 gets the fix 'drop', but 'cat' in fixes\[0\]\."):
        apply_fixes(named(), [*lines, {"row": 3, "label": 0, "fix": "drop"}])


@pytest.mark.parametrize("row", ["x", "-1", "1.5", "12.000", "1,234", "", None, True])
def test_a_row_that_is_no_index(row):
    with pytest.raises(ValueError, match=r"fixes\[0\]: the row is .*, but must be a whole number"):
        apply_fixes(named(), [{"row": row, "label": 0, "fix": 1}])


def test_data_that_are_not_those_of_the_issues(path):
    edited(path, {0: "cat", 4: "ant"})
    with pytest.raises(ValueError, match=r"line 2: row 7 is out of range, since the dataset has 7 rows, 0 to 6\."):
        apply_fixes(named().select(range(7)), path)
    moved = named().select([1, 0, *range(2, 8)])
    with pytest.raises(
        ValueError,
        match=r"2 of 8 lines have another label .* row 1 was 'bee' \(number 1\), and is 'ant' \(number 0\); .*moved",
    ):
        apply_fixes(moved, path)
    # Even rows of the same class, which differ in their text alone.
    same = named().select([3, 1, 2, 0, *range(4, 8)])
    with pytest.raises(ValueError, match=r"2 of 8 lines have another text .* row 3 was '.*four', and is '.*one'\)"):
        apply_fixes(same, path)
    recoded = named([2 - label for label in LABELS], NAMES[::-1])
    with pytest.raises(
        ValueError, match=r"row 7 was 'bee' \(number 1\), and|row 6 was 'ant' \(number 0\), and is 'ant' \(n"
    ):
        apply_fixes(recoded, path)
    reordered = Dataset.from_dict(named().to_dict()).cast_column("label", ClassLabel(names=NAMES[::-1]))
    with pytest.raises(ValueError, match=r"have another label than the dataset .*compared with column 'label'"):
        apply_fixes(reordered, path)


def test_fixes_that_are_in_the_data_already(path):
    edited(path, {0: "cat", 4: "ant"})
    once = apply_fixes(named(), path)
    with pytest.raises(
        ValueError, match=r"2 of 8 lines .* row 4 was 'bee' \(number 1\), and is 'ant' .* in the data already"
    ):
        apply_fixes(once, path)


def test_texts_that_a_spreadsheet_changes_are_the_same(path):
    edited(path, {0: "cat"}, cell_of=lambda name, cell: cell.upper() + " 1,0" if name == "text" else cell)
    assert apply_fixes(named(), path)["label"][0] == 2
    edited(path, {0: "cat"}, cell_of=lambda name, cell: "4. Mai" if name == "text" else cell)
    assert apply_fixes(named(texts=["5-4"] * 8), path)["label"][0] == 2  # too short to compare


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04", r"is a workbook or another archive, not a CSV file\. Save it as `CSV UTF-8"),
        ("fix,row,label\n".encode("utf-16"), "is encoded as UTF-16"),
        ("fix,row,label,label_name\n,0,0,é\n".encode("cp1252"), "not encoded as UTF-8: the byte 0xe9 at position 30"),
        (b"", "has no columns 'row' and 'fix' in its first line, which is ''"),
        (b"row,label\n0,1\n", "has no columns 'row' and 'fix' in its first line, which is 'row,label'"),
        (b'"fix,row,label"\n",0,1"\n', "shows all of a line in one cell"),
        (b"fix,row,label\ncat,0,0,more\n", "line 2: there are 4 cells, but 3 columns"),
        (b'fix,row,label\n"cat,0,0\n,1,1\n', "cannot be read after line 3: unexpected end of data"),
        (b"fix,row\ncat,0\n", "line 2 does not say the label of row 0, .* Keep the columns 'label'"),
        (b"fix,row,label\ncat,0,\n", "line 2 does not say the label of row 0"),
    ],
)
def test_files_that_cannot_be_read(content, message, tmp_path):
    path = tmp_path / "issues.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        apply_fixes(named(), path)


def test_what_is_no_dataset_has_no_labels_or_no_fixes(path, tmp_path):
    with pytest.raises(TypeError, match=r"but must be a `datasets\.Dataset`"):
        apply_fixes([{"label": 0}], path)
    with pytest.raises(ValueError, match="dataset has no label column"):
        apply_fixes(Dataset.from_dict({"x": [0]}), path)
    with pytest.raises(ValueError, match="label_column is 'y'"):
        apply_fixes(named(), path, label_column="y")
    with pytest.raises(FileNotFoundError):
        apply_fixes(named(), tmp_path / "none.csv")
    for wrong in (None, 3, {"row": 0}, [3]):
        with pytest.raises(TypeError, match="but must be the path of a CSV file, or dicts in a list"):
            apply_fixes(named(), wrong)
    with pytest.raises(ValueError, match=r"fixes\[0\] has no 'fix', but only 'row', 'label'"):
        apply_fixes(named(), [{"row": 0, "label": 0}])
    with pytest.raises(ValueError, match="has the fix or label True"):
        apply_fixes(named(), [{"row": 0, "label": 0, "fix": True}])


def test_an_edited_name_instead_of_a_fix(path):
    edited(path, {}, cell_of=lambda name, cell: "cat" if (name, cell) == ("label_name", "bee") else cell)
    with pytest.raises(ValueError, match=r"line 3: class 1 is called 'bee', but 'cat' in a line before\. Write new"):
        apply_fixes(named(), path)


def test_what_was_done_is_logged(path, caplog):
    with caplog.at_level(logging.INFO, logger="lpg_hf"):
        assert apply_fixes(named(), path)["label"][:] == LABELS
        assert "None of the 8 lines changes a label" in caplog.text
        apply_fixes(named(), edited(path, {0: "cat", 1: "bee", 2: "drop", 5: "drop"}))
        assert "8 lines of fixes: 1 labels changed, 2 rows dropped." in caplog.text
        assert "leave no row" not in caplog.text
        apply_fixes(named(), edited(path, {1: "drop", 4: "drop", 7: "drop"}))
    assert "The fixes leave no row with the label 'bee'." in caplog.text


def test_a_file_with_fixes_is_not_replaced(path, tmp_path):
    issues = issues_of(LABELS, NAMES)
    write_issues(issues, path)  # none yet
    with pytest.raises(ValueError, match="has fixes that would be lost"):
        write_issues(issues, edited(path, {0: "cat"}))
    with pytest.raises(ValueError, match="issues has a column 'fix' already"):
        write_issues(issues.add_column("fix", [""] * 8), tmp_path / "new.csv")
    (tmp_path / "train.csv").write_text("text,label\na,b\n")
    with pytest.raises(ValueError, match="exists and holds no label issues"):
        write_issues(issues, tmp_path / "train.csv")
    os.mkfifo(tmp_path / "pipe")  # to read it would wait for ever
    with pytest.raises(ValueError, match=r"pipe is no file\. Choose another path"):
        write_issues(issues, tmp_path / "pipe")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text(max_size=8).filter(lambda name: "\x00" not in name), min_size=2, max_size=5, unique=True),
    st.lists(st.text(max_size=30), min_size=1, max_size=6),
    st.sampled_from(",;\t"),
    st.randoms(use_true_random=False),
)
@example(["=1", "'=1"], ["=a", "'=a", "\r\n", '"'], ";", random.Random(0))
@example(["drop", "#drop", "#1", "0"], ["a", "b", "c"], ",", random.Random(1))
def test_every_fix_comes_back_whatever_texts_and_classes_are_called(tmp_path_factory, names, texts, delimiter, rng):
    """Export, edit and apply for any names and texts: the labels are those that were chosen."""
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    try:
        labels = [rng.randrange(len(names)) for _ in texts]
        dataset = named(labels, names, texts)
    except (UnicodeEncodeError, ValueError):  # `datasets` cannot hold these names
        return
    path = tmp_path_factory.mktemp("any") / "issues.csv"
    write_issues(issues_of(labels, names), path, dataset)
    cells = ClassCells(names)
    choices = [rng.choice([None, "drop", *range(len(names))]) for _ in texts]
    choices[0] = rng.randrange(len(names))  # not all are dropped
    written = {
        row: cells.drop if choice == "drop" else spreadsheet_cell(cells.write(choice))
        for row, choice in enumerate(choices)
        if choice is not None
    }
    result = apply_fixes(dataset, edited(path, written, delimiter))
    kept = [row for row, choice in enumerate(choices) if choice != "drop"]
    assert result["label"][:] == [labels[row] if choices[row] is None else choices[row] for row in kept]
    assert result["text"][:] == [texts[row] for row in kept]
