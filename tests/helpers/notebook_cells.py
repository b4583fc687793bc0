"""
Runs a Jupyter notebook without Jupyter: its code cells one after the other, in one namespace.

    python tests/helpers/notebook_cells.py examples/notebook.ipynb    # writes the new outputs into the file
"""

import base64
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """Runs the code cells, keeps what each prints and shows as its outputs, and returns the namespace."""
    namespace: dict[str, Any] = {}
    for number, cell in enumerate(code_cells(notebook), start=1):
        pictures: list[str] = []
        with patch.object(plt, "show", lambda pictures=pictures: pictures.append(shown())), io.StringIO() as printed:
            with redirect_stdout(printed):
                exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
            text = printed.getvalue()
        cell["execution_count"] = number
        cell["outputs"] = [text_output(text)] if text else []
        cell["outputs"] += [picture_output(picture) for picture in pictures]
    return namespace


def shown() -> str:
    """The present figure as a PNG, which it closes."""
    file = io.BytesIO()
    plt.savefig(file, format="png", dpi=80, bbox_inches="tight")
    plt.close()
    return base64.b64encode(file.getvalue()).decode()


def text_output(text: str) -> dict[str, Any]:
    return {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}


def picture_output(picture: str) -> dict[str, Any]:
    data = {"image/png": picture, "text/plain": ["<Figure>"]}
    return {"data": data, "metadata": {}, "output_type": "display_data"}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    content = json.loads(path.read_text())
    run(content)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
