"""What is installed: one version, the command `lpg-hf`, and no advice to install what the index may not have."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import lpg_hf


ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_is_the_one_of_the_changelog_and_of_the_citation():
    released = re.findall(r"^## (\d[\w.]*) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert released[0] == cited == lpg_hf.__version__


def test_a_checkout_that_is_not_installed_is_imported_with_its_version(tmp_path):
    """From another folder, and with no metadata of an installed one on the path."""
    script = f"""
import importlib.metadata
def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = missing
import sys
sys.path.insert(0, {str(ROOT)!r})
import lpg_hf
print(lpg_hf.__version__, lpg_hf.__file__)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [lpg_hf.__version__, str(ROOT / "lpg_hf" / "__init__.py")]


def test_the_command_is_a_function():
    module, _, name = PYPROJECT["project"]["scripts"]["lpg-hf"].partition(":")
    assert callable(getattr(import_module(module), name))


def test_no_message_asks_to_install_this_package_from_an_index():
    for path in (ROOT / "lpg_hf").rglob("*.py"):
        assert not re.search(r"install [\"']?lpg[-_]hf", path.read_text(encoding="utf-8")), path


@pytest.mark.slow
def test_the_wheel_brings_the_command(tmp_path):
    pytest.importorskip("build")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("lpg_hf-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if not name.startswith(("lpg_hf/", "lpg_hf-"))]
    assert {"lpg_hf/commands/main.py", "lpg_hf/report/report.html.j2", "lpg_hf/py.typed"} <= set(names)
    target = tmp_path / "installed"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    environment = os.environ | {"PYTHONPATH": str(target)}
    run = [sys.executable, str(target / "bin" / "lpg-hf")]
    done = subprocess.run(
        [*run, "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == lpg_hf.__version__
    where = [sys.executable, "-c", "import lpg_hf.commands; print(lpg_hf.commands.__file__)"]
    done = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(target / "lpg_hf" / "commands" / "__init__.py")
