"""
Prints constraints for pip: the `oldest` releases that pyproject.toml admits, those in the `middle`, or none for the
`newest`.

    python .ci/constraints.py oldest > constraints.txt
"""

import re
import sys
import tomllib
from pathlib import Path


# About halfway between the oldest and the newest releases. Move them when a floor in pyproject.toml moves.
MIDDLE = {"transformers": "5.22.0", "accelerate": "1.13.0", "datasets": "4.8.0"}


def floors() -> dict[str, str]:
    """The lowest version of each dependency."""
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    dependencies = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    return dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", dependency).groups() for dependency in dependencies)


def main(which: str) -> None:
    versions = {"oldest": floors, "middle": MIDDLE.copy, "newest": dict}[which]()
    for name, version in versions.items():
        print(f"{name}=={version}")


if __name__ == "__main__":
    main(*sys.argv[1:])
