"""Supported versions: the table of the package, pyproject.toml, what CI installs, and the error at import."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from lpg_hf import versions


ROOT = Path(__file__).parents[1]


def pyproject_floors() -> dict[str, str]:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return dict(dependency.split(">=") for dependency in dependencies)


def fake_metadata(monkeypatch, **found: str | None) -> None:
    """Lets the metadata name these versions; a package of the table that is not named is the oldest supported one."""

    def version(name: str) -> str:
        installed = found.get(name, ".".join(map(str, versions.OLDEST[name])) + ".0")
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(versions, "version", version)


def test_the_table_holds_the_bounds_of_pyproject():
    floors = pyproject_floors()
    assert {name: tuple(map(int, floors[name].split("."))) for name in versions.OLDEST} == versions.OLDEST


@pytest.mark.parametrize(
    ("name", "found", "needed"),
    [
        ("transformers", "4.57.6", "5.6"),
        ("transformers", "5.5.4", "5.6"),
        ("transformers", "5.2.0", "5.6"),
        ("torch", "2.5.1+cu124", "2.6"),
        ("accelerate", "1.6.0", "1.7"),
        ("datasets", "3.6.0", "4.0"),
    ],
)
def test_too_old_a_version_is_refused_with_the_cure(monkeypatch, name, found, needed):
    fake_metadata(monkeypatch, **{name: found})
    message = f'lpg_hf needs {name}>={needed}; found {name} {found}. Run `pip install --upgrade "{name}>={needed}"`.'
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        versions.check_versions()


def test_all_old_packages_are_named_at_once(monkeypatch):
    fake_metadata(monkeypatch, torch="2.4.0", transformers="4.50.0")
    with pytest.raises(ImportError, match=r"found torch 2\.4\.0, transformers 4\.50\.0") as caught:
        versions.check_versions()
    assert '`pip install --upgrade "torch>=2.6" "transformers>=5.6"`' in str(caught.value)


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"torch": "2.6.0a0+ecf3bae40a.nv25.01"},  # as in the containers of a vendor
        {"torch": "2.10.0", "transformers": "5.10.1", "accelerate": "1.15.0"},
        {"transformers": "6.0.0.dev0"},
        {"torch": None},
    ],
)
def test_supported_versions_pass(monkeypatch, found):
    fake_metadata(monkeypatch, **found)
    versions.check_versions()


def test_the_import_itself_refuses(tmp_path):
    """Any import of the package, before it loads torch or transformers."""
    old = tmp_path / "transformers-4.57.6.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.6\n")
    script = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]
try:
    import lpg_hf.batch
except ImportError as error:
    print(error)
print(sorted({{"torch", "transformers", "accelerate", "datasets"}} & set(sys.modules)))
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == [
        'lpg_hf needs transformers>=5.6; found transformers 4.57.6. Run `pip install --upgrade "transformers>=5.6"`.',
        "[]",
    ]
