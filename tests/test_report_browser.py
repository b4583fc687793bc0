"""A person ticks rows of the report in a browser, and the file that is downloaded corrects these rows."""

import asyncio
import base64
import csv
import io
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, opened
from datasets import ClassLabel, Dataset, Features, Value
from test_report_names import make_summary

from lpg_hf.data import apply_fixes
from lpg_hf.report import write_report


pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

# Markup, formulas, quotes, commas, lines, an empty name, the word that drops rows, and two names for one number.
NAMES = ["ant, bee", 'say "no"', "=1+1", "</script><b>", "two\nlines", "", "drop", "1", "1.0", "é ünï"]
ROWS = 40


def make_dataset(summary, names=NAMES):
    issues = summary.label_issues
    labels = np.empty(ROWS, dtype=np.int64)
    labels[issues["row"][:]] = issues["label"][:]
    texts = [f'<script>"{row}";</script>, the text =of\nrow {row}' for row in range(ROWS)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names) if names else Value("int64")})
    return Dataset.from_dict({"text": texts, "label": labels}, features=features)


@pytest.fixture
def report(tmp_path):
    summary = make_summary(NAMES)
    dataset = make_dataset(summary)
    return Path(write_report(summary, tmp_path / "report", dataset)), summary.label_issues, dataset


def lines_of(content):
    return list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))


def browse(path, tmp_path, steps, **size):
    """Runs steps on a page, which must not raise anything."""

    async def run():
        async with opened(path, tmp_path / "browser", **size) as page:
            result = await steps(page)
            assert not page.errors
            return result

    return asyncio.run(run())


ROW = "document.querySelectorAll('#label_issues tbody tr')[{}]"
CHOOSE = """(() => {{
    const choice = document.querySelectorAll('#label_issues tbody select')[{}];
    choice.focus();
    choice.value = '{}';
    choice.dispatchEvent(new Event('change', {{ bubbles: true }}));
    return choice.value;
}})()"""


def test_ticked_rows_are_downloaded_and_applied(report, tmp_path):
    path, issues, dataset = report

    async def steps(page):
        assert await page.value("document.getElementById('download').disabled") is True
        for line in range(10):
            await page.value(f"{ROW.format(line)}.querySelector('input').click()")
        for line in range(10, 20):  # each class is chosen once; to choose ticks the row
            label = (issues["label"][line] + 1 + line) % len(NAMES)
            label = (label + 1) % len(NAMES) if label == issues["label"][line] else label
            assert await page.value(CHOOSE.format(line, label)) == str(label)
            expected[line] = label
        for line in (20, 21):
            assert await page.value(CHOOSE.format(line, "drop")) == "drop"
        await page.value(f"{ROW.format(0)}.querySelector('input').click()")  # not this one after all
        assert await page.value("document.getElementById('num_ticked').textContent") == f"21 of {ROWS} rows ticked"
        await page.value("document.getElementById('download').click()")
        return await page.downloaded("label_fixes.csv")

    expected = {line: issues["suggested_label"][line] for line in range(1, 10)}
    content = browse(path, tmp_path, steps)
    lines = lines_of(content)
    with (path.parent / "label_issues.csv").open(newline="", encoding="utf-8-sig") as file:
        exported = list(csv.DictReader(file))
    # The same lines as in the file of the report, but for the fix.
    assert [line | {"fix": ""} for line in lines] == exported[1:22]
    fixes = tmp_path / "fixes.csv"
    fixes.write_bytes(content)
    labels = dataset["label"][:]
    for line, label in expected.items():
        labels[issues["row"][line]] = label
    dropped = issues["row"][20:22]
    result = apply_fixes(dataset, fixes)
    assert result["label"][:] == [label for row, label in enumerate(labels) if row not in dropped]
    assert result["text"][:] == [text for row, text in enumerate(dataset["text"]) if row not in dropped]


def test_sorting_keeps_the_ticks(report, tmp_path):
    path, issues, _ = report
    columns = "[...document.querySelectorAll('#label_issues th')].map(th => th.textContent)"
    cells = "[...document.querySelectorAll('#label_issues tbody tr')].map(row => row.cells[{}].textContent.trim())"
    ticked = "[...document.querySelectorAll('#label_issues tbody input:checked')]"
    chosen = f"{ticked}.map(box => box.closest('tr').cells[1].textContent)"

    async def steps(page):
        names = await page.value(columns)
        assert names == ["", "row", "preview", "label", "suggested", "new label", "score", "weight", "visits"]
        await page.value(f"{ROW.format(3)}.querySelector('input').click()")
        await page.value(CHOOSE.format(5, "drop"))
        sort = "document.querySelectorAll('#label_issues th')[{}].firstElementChild.click()"
        for column in ("row", "score", "weight"):
            index = names.index(column)
            for turn in (1, -1):
                await page.value(sort.format(index))
                values = [float(value) for value in await page.value(cells.format(index))]
                assert values == sorted(values, reverse=turn < 0) and len(values) == ROWS
                order = await page.value(f"document.querySelectorAll('#label_issues th')[{index}].ariaSort")
                assert order == ("ascending" if turn > 0 else "descending")
            assert sorted(await page.value(chosen)) == sorted(str(issues["row"][line]) for line in (3, 5))
        assert await page.value("document.querySelectorAll('#label_issues th[aria-sort]').length") == 1
        await page.value(sort.format(names.index("label")))
        labels = await page.value(cells.format(names.index("label")))
        assert [len(list(group)) for _, group in itertools.groupby(labels)] == [4] * 10  # equal ones are together
        await page.value("document.getElementById('download').click()")
        return await page.downloaded("label_fixes.csv")

    lines = lines_of(browse(path, tmp_path, steps))
    assert [int(line["row"]) for line in lines] == [issues["row"][3], issues["row"][5]]
    assert lines[1]["fix"] == "#drop"  # a class is called drop


def test_the_keyboard_is_enough(report, tmp_path):
    path, issues, dataset = report
    focused = "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"

    async def steps(page):
        met = []
        while met[-1:] != [f"New label of row {issues['row'][0]}"]:
            await page.press("Tab", 9, "\t")
            met.append(await page.value(focused))
            if met[-1] == f"Correct row {issues['row'][0]}":
                await page.press(" ", 32, " ")
        await page.press("ArrowDown", 40)
        await page.press("Tab", 9, "\t")
        await page.value("document.getElementById('download').focus()")
        await page.press("Enter", 13, "\r")
        return met, await page.downloaded("label_fixes.csv")

    met, content = browse(path, tmp_path, steps)
    assert met == [
        "Label issues",  # the region scrolls with the arrows
        "Tick all rows",
        *["row", "label", "suggested", "score", "weight", "visits"],
        f"Correct row {issues['row'][0]}",
        f"New label of row {issues['row'][0]}",
    ]
    (line,) = lines_of(content)
    fixes = tmp_path / "fixes.csv"
    fixes.write_bytes(content)
    label = apply_fixes(dataset, fixes)["label"][issues["row"][0]]
    # The arrow chooses the class behind the suggested one, which comes first.
    others = [label for label in range(10) if label not in (issues["label"][0], issues["suggested_label"][0])]
    assert int(line["row"]) == issues["row"][0] and label == others[0]


@pytest.mark.parametrize("num_classes", [5, 250])  # 250: the list of classes is filled when it is used
def test_a_data_set_without_names_gets_numbers(num_classes, tmp_path):
    """The names are the model's, and the file of one row has two of them: a third could not be told."""
    summary = make_summary([f"LABEL_{label}" for label in range(num_classes)])
    issues, dataset = summary.label_issues, make_dataset(summary, None)
    path = Path(write_report(summary, tmp_path / "report", dataset))
    other = next(
        label for label in dataset["label"] if label not in (issues["label"][0], issues["suggested_label"][0])
    )

    async def steps(page):
        await page.value(CHOOSE.format(0, other))
        await page.value("document.getElementById('download').click()")
        return await page.downloaded("label_fixes.csv")

    fixes = tmp_path / "fixes.csv"
    fixes.write_bytes(browse(path, tmp_path, steps))
    assert apply_fixes(dataset, fixes)["label"][issues["row"][0]] == other


def test_all_rows_can_be_ticked_at_once(report, tmp_path):
    path, issues, dataset = report

    async def steps(page):
        await page.value("document.getElementById('tick_all').click()")
        await page.value(f"{ROW.format(1)}.querySelector('input').click()")
        assert await page.value("document.getElementById('tick_all').indeterminate") is True
        await page.value("document.getElementById('download').click()")
        return await page.downloaded("label_fixes.csv")

    fixes = tmp_path / "fixes.csv"
    fixes.write_bytes(browse(path, tmp_path, steps))
    expected = dict(zip(issues["row"], issues["suggested_label"], strict=True))
    expected[issues["row"][1]] = issues["label"][1]
    assert apply_fixes(dataset, fixes)["label"][:] == [expected[row] for row in range(ROWS)]


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(width, report, tmp_path):
    async def steps(page):
        # A desktop's window is never as narrow, a telephone's is.
        await page.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        await page.value("document.querySelector('#fixing').scrollIntoView()")
        await page.value(f"{ROW.format(1)}.querySelector('input').click()")
        picture = await page.send("Page.captureScreenshot", captureBeyondViewport=False)
        if folder := os.environ.get("LPG_TEST_SCREENSHOTS"):
            Path(folder, f"report{width}.png").write_bytes(base64.b64decode(picture["data"]))
        region = "document.querySelector('#label_issues .scroll')"
        return await page.value(f"[document.documentElement.scrollWidth, {region}.scrollWidth - {region}.clientWidth]")

    wide, hidden = browse(report[0], tmp_path, steps)
    assert wide <= width and hidden == 0  # a scroll bar takes its part
