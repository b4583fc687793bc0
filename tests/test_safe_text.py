"""Whatever a class is called, its name is shown as it is: no markup, no formula, no second class of that name."""

import csv
import io
import re
from html import unescape

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lpg_hf.safe_text import code_span, escape_markdown, one_line, restored_cell, shown, spreadsheet_cell, unique_names


MARKUP = "\\`*_{}[]()<>#+-.!|~$&@:/='\"^ \n\t\r"
TEXTS = st.one_of(st.text(), st.text(alphabet=MARKUP + "ahtpws1é", max_size=20))
HOSTILE = [
    "",
    " ",
    "$5 to $10",
    "a$x^$",
    "_a_ **b** ~~c~~ `d`",
    "{{ 7 * 7 }}",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "![x](javascript:alert(1))",
    "<https://x.org> https://x.org www.x.org a@x.org",
    "---\ntags: mine\n---",
    "| a | \\| b |",
    "&lt;b&gt; &#124;",
    "שלום עולם",
    "\u202eabc",
    "\ud800",
    "a\x00b",
    "n" * 100_000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_in_a_cell_of_a_card_is_plain_text(text):
    parser = pytest.importorskip("markdown_it").MarkdownIt("gfm-like" if _has_linkify() else "commonmark")
    parser.enable("table")
    tokens = parser.parse(f"| head | value |\n| --- | --- |\n| {escape_markdown(text)} | 1 |\n")
    cells = [token for token in tokens if token.type == "inline"]
    assert len(cells) == 4
    children = cells[2].children
    assert {child.type for child in children} <= {"text", "text_special"}
    assert "".join(child.content for child in children) == one_line(text)


def _has_linkify():
    try:
        import linkify_it  # noqa: F401
    except ImportError:
        return False
    return True


@given(TEXTS)
def test_escaping_can_be_undone_and_leaves_no_bare_markup(text):
    escaped = escape_markdown(text)
    assert unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", escaped)) == one_line(text)
    assert not re.search(r"[`*_{}\[\]<>#|~$@!]", re.sub(r"\\.", "", escaped))
    assert "://" not in escaped and "www." not in escaped.lower() and len(escaped.splitlines()) <= 1


@given(TEXTS)
def test_a_code_span_ends_where_its_text_does(text):
    line = code_span(text or "x")
    (fence,) = re.findall("^`+", line)
    inside = line[len(fence) : -len(fence)]
    assert line.endswith(fence) and fence not in re.findall("`+", inside)
    assert inside.strip() == one_line(text or "x").strip()


@given(TEXTS)
@example("=HYPERLINK(1)")
@example("\t=1")
@example(" =1")
@example("'=1")
@example("\uff1d1")
@example("\r1")
def test_no_cell_is_a_formula_and_every_text_can_be_restored(text):
    cell = spreadsheet_cell(text)
    assert not re.match(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]", cell)
    assert cell.removeprefix("'") == text
    assert restored_cell(cell) == text
    if "\ud800" <= max(text, default="") <= "\udfff":
        return
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerow([cell, -0.5])
    assert next(csv.reader(io.StringIO(buffer.getvalue(), newline=""))) == [cell, "-0.5"]


@given(st.lists(st.sampled_from(["", "a", "a (0)", "a (1)", "a (0) (0)", "b"]), max_size=8))
def test_names_differ_and_those_that_did_before_stay(names):
    result = unique_names(names)
    assert len(set(result)) == len(result) == len(names)
    for name, new in zip(names, result, strict=True):
        assert new == name if names.count(name) == 1 else new.startswith(f"{name} (")


@given(TEXTS, st.integers(2, 30))
def test_a_shown_name_is_short_and_can_be_written(text, longest):
    name = shown(text, longest)
    assert name and len(name) <= max(longest + 1, len("(no name)"))
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", name)
    name.encode()
