"""
Prints what the cards of the methods say as Markdown, or writes it into a file between its two markers.

    python -m lpg_hf.perturbations                    # print
    python -m lpg_hf.perturbations docs/methods.md    # write
"""

import re
import sys
from pathlib import Path

from .base import Perturbation
from .registry import METHODS, method_card


BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"


def methods_text() -> str:
    """The table of methods and the card of each, in Markdown."""
    return "\n\n".join([methods_table(), *(card_section(method) for method in METHODS.values())])


def methods_table() -> str:
    """What helps and what hurts, one row per method with a link to its card."""
    rows = [["method", "as a string", "helps", "hurts"], ["---"] * 4]
    for name, method in METHODS.items():
        card = method_card(method)
        link = f"[`{method.__name__}`](#{method.__name__.lower()})"
        # A bar would end the cell.
        cells = [card[column].rstrip(".").replace("|", "\\|") for column in ("Helps", "Hurts")]
        rows.append([link, f'`"{name}"`', *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def card_section(method: type[Perturbation]) -> str:
    """What a method does, costs, and comes from."""
    card = method_card(method)
    lines = [
        f"- Space: {method.space}.",
        *(f"- {column}: {card[column]}" for column in ("Level", "Formula", "Cost", "Source")),
    ]
    return "\n".join([f"### {method.__name__}", "", *lines])


def with_methods(text: str) -> str:
    """`text` with what stands between the markers replaced by the table and the cards."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"The text has no place for the methods: it must contain {BEGIN} and {END}.")
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{methods_text()}\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        path.write_text(with_methods(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(methods_text())
