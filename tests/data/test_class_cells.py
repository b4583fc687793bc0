"""A cell means the class that a person meant, or none, whatever classes are called and whatever spreadsheets do."""

import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lpg_hf.data.class_cells import ClassCells


ODD = [
    "drop",
    "Drop",
    "#drop",
    "##drop",
    "#0",
    "#1",
    "0",
    "1",
    "1.0",
    "01",
    "true",
    "TRUE",
    "",
    " ",
    "a",
    "A",
    " a",
    "=a",
]
NAMES = st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=8)), min_size=1, max_size=6, unique=True)


@given(NAMES)
@example(["drop", "#drop", "#0"])
@example(["#1", "#0"])
@example(["\ud800", "\\ud800"])
@example(["", " "])
def test_what_is_written_for_a_class_means_this_class(names):
    cells = ClassCells(names)
    for position in range(len(names)):
        cell = cells.write(position)
        assert cell.strip() and not cells.is_drop(cell) and cells.read(cell) == position


@given(NAMES)
def test_the_word_that_drops_a_row_is_no_class(names):
    cells = ClassCells(names)
    assert re.fullmatch("#*drop", cells.drop) and cells.is_drop(f" {cells.drop.upper()} ")
    assert cells.drop not in {name.strip().casefold() for name in names}
    assert (cells.drop == "drop") == ("drop" not in {name.strip().casefold() for name in names})


@given(NAMES, st.text(max_size=8))
def test_a_cell_is_read_as_a_name_that_it_resembles_or_refused(names, cell):
    assume(cell.strip() and not cell.strip().startswith("#"))
    cells = ClassCells(names)
    try:
        position = cells.read(cell)
    except ValueError:
        return
    name = cells.names[position]
    as_name = " ".join(name.split()).casefold() == " ".join(cell.split()).casefold()
    number = re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", cell.strip())
    assert (
        as_name
        or (number and re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", name.strip()) and float(cell) == float(name))
        or (number and float(cell) == position)
    )


@given(st.lists(st.sampled_from(ODD), min_size=1, max_size=6, unique=True), st.data())
def test_what_a_spreadsheet_makes_of_a_number_or_a_truth_value_is_no_other_class(names, data):
    cells = ClassCells(names)
    position = data.draw(st.integers(0, len(names) - 1))
    cell = cells.write(position)
    if re.fullmatch("[0-9]+(.[0-9]+)?", cell):
        cell = f"{float(cell):g}"
    elif cell.casefold() in ("true", "false"):
        cell = cell.upper()
    assert cells.read(cell) == position


@pytest.mark.parametrize(
    ("names", "cell", "expected"),
    [
        (["cat", "dog"], " Dog\n", 1),
        (["cat", "dog"], "1", 1),
        (["cat", "dog"], "1.0", 1),
        (["cat", "dog"], "#1", 1),
        (["big  cat", "dog"], "Big Cat", 0),
        (["a", "A"], "A", 1),
        (["5", "4", "3"], "4", 1),  # a name, and not the number 4
        (["5", "4", "3"], "4.0", 1),
        (["007", "008"], "8", 1),
        (["5", "4", "3"], "#0", 0),
        (["'a", "a"], "'a", 0),
        (["#1", "dog"], "#1", 0),
        (["#1", "dog"], "##1", 1),
    ],
)
def test_cells_that_mean_a_class(names, cell, expected):
    assert ClassCells(names).read(cell) == expected


@pytest.mark.parametrize(
    ("names", "cell", "message"),
    [
        (["cat", "dog"], "dgo", r"'dgo' is no class\. Did you mean 'dog'\? The classes are 'cat', 'dog'\."),
        (["cat", "dog"], "2", r"'2' is no class\. The classes are 'cat', 'dog'\."),
        (["cat", "dog"], "-1", "'-1' is no class"),
        (["cat", "dog"], "1.5", "'1.5' is no class"),
        (["cat"] + [f"c{i}" for i in range(1, 20_000)], "12.000", "'12.000' is no class"),  # or twelve thousand?
        (["5", "4", "3"], "0", r"'0' is no class\. The classes are '5', '4', '3'\."),
        (["cat", "dog"], "#2", r"'#2' means a class by its number, and the numbers are 0, 1\."),
        (["#1", "dog"], "#0", r"'#0' is no class"),
        (["a", "A"], "Á", "is no class"),
        (["dog", "Dog"], "DOG", r"may mean one of the classes 'dog' \(write '#0'\), 'Dog' \(write '#1'\)"),
        (["1", "1.0"], "1", r"may mean one of the classes '1' \(write '#0'\)"),
        (["cat", "drop"], "drop", r"'drop' may mean the class \(write '#1'\) or that .* \(write '#drop'\)"),
    ],
)
def test_cells_that_mean_none_or_several(names, cell, message):
    with pytest.raises(ValueError, match=message):
        ClassCells(names).read(cell)
