"""The certificate example runs, and what it promises holds (slow)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"


def run(output_dir, *options):
    command = [sys.executable, str(EXAMPLES / "certificate.py"), "--output_dir", str(output_dir), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    certificates = [json.loads((output_dir / f"certificate_{name}.json").read_text()) for name in ("clean", "noisy")]
    return done.stdout, certificates


def value_of(output, name, occurrence):
    lines = [line for line in output.splitlines() if line.startswith(name)]
    return float(lines[occurrence].split()[-1])


def test_it_leaves_picture_certificates_and_tables(tmp_path):
    options = ["--prior_epochs", "2", "--posterior_epochs", "1", "--num_draws", "50"]
    output, (clean, noisy) = run(tmp_path, *options)
    assert (tmp_path / "certificate.png").stat().st_size > 10_000
    assert clean["num_samples"] == 719 and clean["clean"] is None and noisy["label_noise"] == 0.4
    assert f"overall           {clean['overall']['bound']:.4f}" in output.replace("class 0  ", "")
    assert len([line for line in output.splitlines() if line.startswith(("dampen", "amplify"))]) == 8


@pytest.mark.slow
def test_digits_are_certified(tmp_path):
    output, (clean, noisy) = run(tmp_path)
    assert clean["overall"]["bound"] < 0.15
    assert noisy["clean"]["bound"] < 0.5
    for occurrence, bound in enumerate((clean["overall"]["bound"], noisy["clean"]["bound"])):
        assert value_of(output, "LPGTrainer, test error: randomised", occurrence) < bound
    assert value_of(output, "LPGTrainer, balanced test error", 0) < clean["balanced"]["bound"]
    assert max(entry["bound"] for entry in clean["per_class"]) < 0.6
