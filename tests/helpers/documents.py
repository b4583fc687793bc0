"""README and the pages of `docs/`: their blocks of code, and where their links lead."""

import re
from pathlib import Path


ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
# Where the package index finds what README links to.
REPOSITORY = "https://github.com/lpg-hf/lpg_hf/blob/main/"
RAW = "https://raw.githubusercontent.com/lpg-hf/lpg_hf/main/"


def blocks(path: Path, language: str) -> list[str]:
    """The blocks of code in one language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def prose(path: Path) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def links(path: Path) -> list[str]:
    """The targets of all links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(path))


def anchors(path: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> list[str]:
    """The links that lead to no file of this repository, or to no heading of its page. Other addresses are skipped."""
    broken = []
    for link in links(path):
        target, _, anchor = link.removeprefix(REPOSITORY).removeprefix(RAW).partition("#")
        if "://" in target:
            continue
        folder = ROOT if link.startswith((REPOSITORY, RAW)) else path.parent
        page = folder / target if target else path
        if not page.exists() or (anchor and anchor not in anchors(page)):
            broken.append(link)
    return broken


def both_sides(diff: str) -> tuple[str, str]:
    """The code before and after a diff."""
    lines = diff.splitlines()
    before, after = ("\n".join(line[1:] for line in lines if not line.startswith(other)) for other in ("+", "-"))
    return before, after
