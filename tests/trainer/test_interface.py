"""What a user's editor, type checker and imports see of the package."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Trainer

import lpg_hf
from lpg_hf import LPGTrainer


ROOT = Path(lpg_hf.__file__).parent.parent


def test_the_arguments_are_those_of_the_trainer_and_three_more():
    expected = list(inspect.signature(Trainer).parameters.values())
    found = list(inspect.signature(LPGTrainer).parameters.values())
    assert [(p.name, p.kind, p.default) for p in found[:-3]] == [(p.name, p.kind, p.default) for p in expected]
    assert [(p.name, p.kind, p.default) for p in found[-3:]] == [
        ("perturbations", inspect.Parameter.KEYWORD_ONLY, None),
        ("class_counts", inspect.Parameter.KEYWORD_ONLY, None),
        ("eval_shares", inspect.Parameter.KEYWORD_ONLY, None),
    ]
    assert all(p.annotation is not inspect.Parameter.empty for p in found)


def test_every_argument_is_documented():
    arguments = inspect.getdoc(LPGTrainer).partition("Args:\n")[2].partition("\nRaises:")[0]
    for name in inspect.signature(LPGTrainer).parameters:
        assert f"\n    {name} (" in f"\n{arguments}"


def test_every_argument_reaches_the_trainer(monkeypatch):
    received, names = {}, list(inspect.signature(Trainer).parameters)
    monkeypatch.setattr(Trainer, "__init__", lambda self, **kwargs: received.update(kwargs))
    values = {name: (name, "a value of its own") for name in names}
    with pytest.raises(AttributeError):  # nothing behind `Trainer.__init__` works without it
        LPGTrainer(**values)
    assert received == values


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_loss_alone_does_not_load_the_trainer():
    code = "import sys; from lpg_hf import LPGLoss; print([name for name in sys.modules if 'trainer' in name])"
    assert "transformers.trainer'" not in python(code)


def test_the_package_works_without_being_installed():
    code = (
        "import importlib.metadata as metadata\n"
        "def version(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = version\n"
        "import lpg_hf; print(lpg_hf.__version__, lpg_hf.LPG(epsilon=0.3))"
    )
    assert python(code) == f"{lpg_hf.__version__} lpg(epsilon=0.3)"


def test_all_public_names_are_found():
    assert set(lpg_hf.__all__) < set(dir(lpg_hf))
    for name in lpg_hf.__all__:
        assert getattr(lpg_hf, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'lpg_hf' has no attribute 'LPGTraner'"):
        _ = lpg_hf.LPGTraner
    assert sys.modules["lpg_hf.trainer"].LPGTrainer is LPGTrainer


def test_a_type_checker_finds_a_misspelled_argument(tmp_path):
    api = pytest.importorskip("mypy.api")
    script, config = tmp_path / "script.py", tmp_path / "mypy.ini"
    script.write_text(
        "from lpg_hf import LPGLoss, LPGTrainer\n"
        "trainer = LPGTrainer(model=None, perturbations=['lpg'], class_counts=[3, 1], eval_shares='train')\n"
        "loss: LPGLoss | None = trainer.lpg_loss\n"
        "LPGTrainer(modle=None)\n"
        "LPGTrainer(perturbations=3)\n"
    )
    # The packages that lpg_hf needs are skipped, as analyzing them takes minutes.
    config.write_text(f"[mypy]\nstrict = True\nmypy_path = {ROOT}\nfollow_imports = silent\n")
    for package in ("torch", "transformers", "accelerate", "datasets", "numpy", "huggingface_hub", "scipy"):
        with config.open("a") as file:
            file.write(f"[mypy-{package}.*]\nfollow_imports = skip\n")
    report, _, _ = api.run(["--config-file", str(config), "--cache-dir", str(tmp_path / "cache"), str(script)])
    errors = [line for line in report.splitlines() if ": error:" in line and line.startswith(str(script))]
    assert len(errors) == 2, report
    assert ':4: error: Unexpected keyword argument "modle" for "LPGTrainer"' in errors[0]
    assert ':5: error: Argument "perturbations" to "LPGTrainer" has incompatible type "int"' in errors[1]
