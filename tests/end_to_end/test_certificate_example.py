"""The certificate examples run, and what the one on digits promises holds (slow)."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, BertTokenizer


EXAMPLES = Path(__file__).parents[2] / "examples"


def run(output_dir):
    command = [sys.executable, str(EXAMPLES / "certificate.py"), "--output_dir", str(output_dir)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    certificates = [json.loads((output_dir / f"certificate_{name}.json").read_text()) for name in ("clean", "noisy")]
    return done.stdout, certificates


def value_of(output, name, occurrence):
    lines = [line for line in output.splitlines() if line.startswith(name)]
    return float(lines[occurrence].split()[-1])


@pytest.mark.parametrize("scope", ["lora", "head"])
def test_a_pretrained_model_is_certified_from_files(scope, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    letters = "abcdefgh"
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    BertModel(BertConfig(vocab_size=13, **sizes)).save_pretrained(tmp_path / "model")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    for name, rest in (("train", letters[:5]), ("test", letters[5:])):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([f"{first} {a} {b}", first] for first in "abc" for a in rest for b in letters)

    options = {
        "model_name_or_path": tmp_path / "model",
        "train_file": tmp_path / "train.csv",
        "test_file": tmp_path / "test.csv",
        "scope": scope,
        "prior_epochs": 1,
        "num_draws": 30,
        "output_dir": tmp_path / "out",
    }
    command = [sys.executable, str(EXAMPLES / "certificate_text.py")]
    command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["scope"] == scope and certificate["num_samples"] == 60
    assert certificate["label_names"] == ["a", "b", "c"]
    assert certificate["num_prior_rows"] == 60 and certificate["label_noise"] == 0.2
    assert "certified error under the true labels" in done.stdout


@pytest.mark.slow
def test_digits_are_certified(tmp_path):
    output, (clean, noisy) = run(tmp_path)
    assert (tmp_path / "certificate.png").stat().st_size > 10_000
    overall = [line.split() for line in output.splitlines() if line.startswith("overall")]
    assert [row[1] for row in overall] == [f"{entry['overall']['bound']:.4f}" for entry in (clean, noisy)]
    assert len([line for line in output.splitlines() if line.startswith(("dampen", "amplify"))]) == 8
    assert clean["overall"]["bound"] < 0.15
    assert noisy["clean"]["bound"] < 0.5
    for occurrence, bound in enumerate((clean["overall"]["bound"], noisy["clean"]["bound"])):
        assert value_of(output, "LPGTrainer, test error: randomized", occurrence) < bound
    assert value_of(output, "LPGTrainer, balanced test error", 0) < clean["balanced"]["bound"]
    assert max(entry["bound"] for entry in clean["per_class"]) < 0.6
