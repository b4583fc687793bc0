"""`lpg-hf compare`: tables of trainings, and pairs of them."""

import json

import numpy as np
import pytest
import torch
from command_data import QUIET, text_model, text_rows, words, write_csv
from scipy import stats

from lpg_hf.commands import compare


pytestmark = pytest.mark.usefixtures("fresh_datasets_cache")


@pytest.mark.parametrize("argument", ["--do_eval", "--do_train"])
def test_a_comparison_of_nothing(argument, tmp_path):
    argv = words("text", "--output_dir", tmp_path / "out", *QUIET, argument, "false")
    with pytest.raises(ValueError, match=rf"`{argument}` is false, which leaves nothing to compare\. Leave it out"):
        compare.main(argv)
    assert not (tmp_path / "out").exists()


def test_a_seed_twice_is_no_second_training(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        compare.main(words("text", "--output_dir", tmp_path / "out", "--seeds", 0, 1, 0))
    assert exit_.value.code == 2 and "--seeds is [0, 1, 0], which has a seed twice" in capsys.readouterr().err


def test_comparison_reports_the_mean_of_the_pairs(tmp_path, capsys):
    model, train_csv = text_model(tmp_path / "model"), write_csv(tmp_path / "train.csv", text_rows(12))
    argv = ["text", "--seeds", 0, 1, "--output_dir", tmp_path / "out", "--num_train_epochs", 2, *QUIET]
    argv += ["--model_name_or_path", model, "--train_file", train_csv, "--validation_file", train_csv]
    argv += ["--learning_rate", 0.01, "--imbalance_ratio", 2]
    compare.main(words(*argv))
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8").strip()
    assert text in capsys.readouterr().out
    accuracy = {}
    for name, chain in (("Trainer", []), ("LPGTrainer", ["auto"])):
        folders = [tmp_path / "out" / f"{name}-seed-{seed}" for seed in (0, 1)]
        runs = [json.loads((folder / "eval_results.json").read_text()) for folder in folders]
        accuracy[name] = 100 * np.array([run["eval_accuracy"] for run in runs])
        args = torch.load(folders[1] / "training_args.bin", weights_only=False)
        assert args.seed == 1 and args.perturbations == (chain or ["none"])
    rows = [line.split("|")[1:-1] for line in text.splitlines()]
    assert [cell.strip() for cell in rows[0][1:3]] == ["accuracy", "balanced"]
    differences = accuracy["LPGTrainer"] - accuracy["Trainer"]
    for row, values, sign in ((2, accuracy["Trainer"], ""), (3, accuracy["LPGTrainer"], ""), (4, differences, "+")):
        expected = f"{values.mean():{sign}.1f} ± {stats.sem(values):.1f}"
        assert rows[row][1].strip() == expected
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/eval_results.json")}
    compare.main(words(*argv))
    assert text in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/eval_results.json")}
    with pytest.raises(SystemExit):
        compare.main(words("text", "--seeds", 0, "--model_name_or_path", model))
    assert "pass --output_dir, the folder of the trainings" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"was trained with other arguments: text .*--seed 0 .*none\. "):
        compare.main(words(*argv, "--weight_decay", 0.1))


def test_pairs_from_a_config_file(tmp_path, capsys, monkeypatch):
    """Its methods and its folder are those of the comparison, and what follows it on the command line counts more."""
    config = tmp_path / "config.yaml"
    config.write_text(f"output_dir: {tmp_path / 'out'}\nperturbations: [lpg, sam]\nweight_decay: 0.1\n")
    (tmp_path / "out").mkdir()
    calls = []
    monkeypatch.setattr(compare, "results_of", lambda *call: calls.append(call) or {"eval_accuracy": 0.5})
    compare.main(words("text", config, "--seeds", 3))
    assert [call[:4] for call in calls] == [
        ("text", ["none"], 3, tmp_path / "out" / "Trainer-seed-3"),
        ("text", ["lpg", "sam"], 3, tmp_path / "out" / "LPGTrainer-seed-3"),
    ]
    assert calls[0][4] == ["--weight_decay", "0.1"]
    with pytest.raises(SystemExit) as exit_:
        compare.main(words("text", tmp_path / "missing.yaml"))
    assert exit_.value.code == 2 and "missing.yaml" in capsys.readouterr().err


def test_runs_side_by_side(tmp_path, capsys):
    results = {"a": {"eval_accuracy": 0.5, "eval_balanced_accuracy": 0.4}, "b": {"eval_accuracy": 0.75}}
    for name, own in results.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "eval_results.json").write_text(json.dumps(own | {"eval_macro_f1": 0.25, "eval_loss": 1.0}))
    compare.main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert capsys.readouterr().out.splitlines() == [
        "|  | accuracy | macro-F1 |",
        "| --- | --- | --- |",
        f"| {tmp_path / 'a'} | 50.0 | 25.0 |",
        f"| {tmp_path / 'b'} | 75.0 | 25.0 |",
    ]
    with pytest.raises(
        FileNotFoundError, match=r"no eval_results\.json in .*c\. Pass .* or a kind of data \(text, image"
    ):
        compare.main([str(tmp_path / "c")])
