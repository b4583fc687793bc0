"""The examples that are copied and edited, and the one that searches settings."""

from pathlib import Path

import datasets
import hyperparameter_search
import numpy as np
import pytest
from command_data import QUIET, text_model, text_rows, words, write_csv

from lpg_hf.commands.parser import parse_arguments
from lpg_hf.commands.text import TextArguments


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_the_readme_names_every_script():
    table = (EXAMPLES / "README.md").read_text()
    runs = [path for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()]
    assert len(runs) > 6 and [path.name for path in runs if f"| `{path.name}` |" not in table] == []


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_search_writes_a_config_and_compares_it_with_auto(tmp_path, capsys):
    import optuna

    model, rows = text_model(tmp_path / "model"), write_csv(tmp_path / "rows.csv", text_rows(12))
    test = write_csv(tmp_path / "test.csv", text_rows(9, seed=3))
    base = ["--model_name_or_path", model, "--train_file", rows, "--validation_file", rows, *QUIET, "--max_steps", 2]
    argv = words("text", *base, "--test_file", test, "--n_trials", 2, "--output_dir", tmp_path / "search")
    hyperparameter_search.main(argv)
    best = hyperparameter_search.main(argv)
    study = optuna.load_study(study_name="lpg", storage=f"sqlite:///{tmp_path / 'search' / 'study.db'}")
    assert len(study.trials) == 4
    assert len({trial.params["lpg_epsilon"] for trial in study.trials}) == 4
    top = max(trial.value for trial in study.trials)
    assert best.objective == top and best.hyperparameters in [t.params for t in study.trials if t.value == top]
    config = tmp_path / "search" / "best.yaml"
    (arguments,) = parse_arguments(TextArguments, "", "", words(config, *base, "--output_dir", tmp_path / "out"))
    found = {name: getattr(arguments.training, name) for name in best.hyperparameters}
    assert found == best.hyperparameters and arguments.training.perturbations == ["lpg"]

    predictions = [path.read_text() for path in sorted((tmp_path / "search").glob("*/predictions.csv"))]
    assert len(predictions) == 6
    truth = np.array([row["label"] for row in text_rows(9, seed=3)])
    accuracies = [
        np.mean(
            [
                (np.array([line.split(",")[1] for line in text.split()[1:]]) == truth)[truth == name].mean()
                for name in set(truth)
            ]
        )
        for text in predictions
    ]
    printed = capsys.readouterr().out
    assert f"auto: {100 * np.mean(accuracies[:3]):5.1f} ±" in printed
    assert f"found: {100 * np.mean(accuracies[3:]):5.1f} ±" in printed


def test_search_needs_labels_to_compare_on(tmp_path):
    model, rows = text_model(tmp_path / "model"), write_csv(tmp_path / "rows.csv", text_rows(12))
    test = write_csv(tmp_path / "test.csv", [{"text": "a rose"}])
    argv = ["text", "--model_name_or_path", model, "--train_file", rows, "--validation_file", rows, *QUIET]
    with pytest.raises(ValueError, match=r"test data has no labels"):
        hyperparameter_search.main(words(*argv, "--test_file", test, "--output_dir", tmp_path / "search"))
