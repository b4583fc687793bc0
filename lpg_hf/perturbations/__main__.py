"""
Prints the table of methods as Markdown, or writes it into a file between its two markers.

    python -m lpg_hf.perturbations              # print
    python -m lpg_hf.perturbations README.md    # write
"""

import re
import sys
from pathlib import Path

from .registry import METHODS, method_card


BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
COLUMNS = ("Level", "Formula", "Cost", "Source")


def methods_table() -> str:
    """The table of methods in Markdown, one row per method, from their cards."""
    rows = [["method", "space", *map(str.lower, COLUMNS)], ["---"] * (2 + len(COLUMNS))]
    for name, method in METHODS.items():
        card = method_card(method)
        # A bar would end the cell.
        cells = [card[column].rstrip(".").replace("|", "\\|") for column in COLUMNS]
        rows.append([f"`{method.__name__}`, `{name}`", method.space, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_table(text: str) -> str:
    """`text` with what stands between the markers replaced by the table."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"The text has no place for the table: it must contain {BEGIN} and {END}.")
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{methods_table()}\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        path.write_text(with_table(path.read_text()))
    else:
        print(methods_table())
