"""
Prints constraints for pip: the `oldest` releases that pyproject.toml admits, one version of transformers in between
(`5.12`, `5.17`), or none for the `newest`.

    python .ci/constraints.py oldest > constraints.txt

torch stays at the version that CI tests all of them with: older builds for the CPU alone are on PyTorch's own index.
CONTRIBUTING.md has the command that tries the oldest torch.
"""

import re
import sys
import tomllib
from pathlib import Path


TORCH = "2.13.0"
BETWEEN = ("5.12", "5.17")


def floors() -> dict[str, str]:
    """The lowest version of each dependency."""
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    dependencies = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    return dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", dependency).groups() for dependency in dependencies)


def constraints(which: str) -> dict[str, str]:
    """The versions by package."""
    if which == "newest":
        return {}
    if which == "oldest":
        return floors() | {"torch": TORCH}
    if which in BETWEEN:
        return {"torch": TORCH, "transformers": f"{which}.*"}
    raise SystemExit(f"There are no constraints {which!r}. Choose oldest, {', '.join(BETWEEN)} or newest.")


if __name__ == "__main__":
    for name, version in constraints(*sys.argv[1:]).items():
        print(f"{name}=={version}")
