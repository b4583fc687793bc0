"""What the shell sees of `lpg-hf`: help, mistyped names, errors, missing packages."""

import subprocess
import sys

import pytest

import lpg_hf
from lpg_hf.commands import main as module
from lpg_hf.commands import train
from lpg_hf.commands.main import main


TEXT = ["train", "text", "--output_dir", "out"]


@pytest.mark.parametrize("command", [[], ["train"], ["issues"], ["report"], ["compare"]])
def test_every_command_has_a_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and text.startswith("usage: lpg-hf") and max(map(len, text.splitlines())) < 120


def test_nothing_prints_the_help(capsys):
    for argv in ([], ["train"]):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 2 and "usage: lpg-hf" in capsys.readouterr().out
    main(["--version"])
    assert capsys.readouterr().out.strip() == lpg_hf.__version__


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "lpg-hf: error: unknown command trian. Did you mean train?"),
        (["evaluate"], "lpg-hf: error: unknown command evaluate. There are: train, issues, report, compare."),
        (["train", "texts"], "lpg-hf train: error: unknown kind of data texts. Did you mean text?"),
        ([*TEXT, "--lable_noise", "1"], "unknown argument --lable_noise. Did you mean --label_noise or"),
        ([*TEXT, "--perturbation=none"], "unknown argument --perturbation. Did you mean --perturbations?"),
    ],
)
def test_mistyped_names(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_errors_of_ones_own_input_are_a_line_and_others_keep_their_traceback(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"^lpg-hf: error: There is nothing to do: pass --do_train, --do_eval or"):
        main(["train", "text", "--model_name_or_path", "m", "--train_file", "a.csv", "--output_dir", str(tmp_path)])

    def breaks(name, argv):
        int("x")

    monkeypatch.setattr(module, "run_command", breaks)
    with pytest.raises(ValueError, match="invalid literal"):
        main(["issues"])


@pytest.mark.parametrize(("kind", "missing"), [("audio", "soundfile"), ("image", "pillow"), ("video", "pillow")])
def test_missing_packages_are_named_as_pip_knows_them(kind, missing, monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=rf"`lpg-hf train {kind}` needs {missing}\. Run `pip install {missing}`\."):
        main(["train", kind, "--do_train"])


def test_the_module_is_the_command(tmp_path):
    command = [sys.executable, "-m", "lpg_hf.commands", "compare", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("lpg-hf: error: There is no eval_results.json")
    assert "Traceback" not in done.stderr
