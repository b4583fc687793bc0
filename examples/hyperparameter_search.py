r"""
Searches the settings of the method `lpg` with optuna, and compares what it finds with `auto`, which searches nothing.

    python examples/hyperparameter_search.py text --n_trials 20 --output_dir search \
        --model_name_or_path path/to/model --train_file train.csv --validation_file validation.csv --test_file test.csv

All other arguments are those of `lpg-hf train`. Every trial trains with its own settings and is judged by its balanced
accuracy on the validation data. The comparison is on the test data, which need labels: no trial has seen them. Trials
are kept in `study.db` of the output folder: the same command goes on with that search, for `--n_trials` more. The
settings are in `best.yaml`:

    lpg-hf train text search/best.yaml --do_train --do_eval --output_dir output ...
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import yaml
from transformers.trainer_utils import BestRun, SaveStrategy

from lpg_hf.commands.parser import parse_arguments
from lpg_hf.commands.run import set_up_logging
from lpg_hf.commands.task import make_model, make_trainer, prepare
from lpg_hf.commands.train import KINDS, load_task, train


OBJECTIVE = "balanced_accuracy"


def search_space(trial: optuna.Trial) -> dict[str, object]:
    """Fields of [`LPGConfig`]; any other argument of the Trainer may be added."""
    return {
        "lpg_strategy": trial.suggest_categorical("lpg_strategy", ["frequency", "accuracy"]),
        "lpg_epsilon": trial.suggest_float("lpg_epsilon", 0.02, 1.0, log=True),
        "lpg_max_dampening": trial.suggest_float("lpg_max_dampening", 0.1, 0.9),
        "lpg_direction": trial.suggest_categorical("lpg_direction", ["class", "sample"]),
    }


def search(kind: str, argv: list[str], folder: Path, n_trials: int) -> BestRun | None:
    """The best trial, whose settings are written; `None` on all processes but the first."""
    task = load_task(kind)
    argv = ["--perturbations", "lpg", *argv, "--do_train", "--do_eval", "--do_predict", "--output_dir", str(folder)]
    arguments = parse_arguments(task.data_class, "hyperparameter_search.py", "", argv)
    arguments.training.save_strategy = SaveStrategy.NO
    set_up_logging()
    prepared = prepare(task, arguments)
    if "labels" not in prepared.splits["test"].column_names:
        raise ValueError("The test data has no labels: there is nothing to compare with `auto` on. Pass --test_file.")
    trainer = make_trainer(task, arguments, prepared, model_init=partial(make_model, task, arguments, prepared))
    folder.mkdir(parents=True, exist_ok=True)
    best = trainer.hyperparameter_search(
        hp_space=search_space,
        compute_objective=lambda metrics: metrics[f"eval_{OBJECTIVE}"],
        n_trials=n_trials,
        direction="maximize",
        backend="optuna",
        storage=f"sqlite:///{folder / 'study.db'}",
        study_name="lpg",
        load_if_exists=True,
    )
    if best is not None:
        config = {"perturbations": arguments.training.perturbations, **best.hyperparameters}
        (folder / "best.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        print(f"Best {OBJECTIVE} of the trials: {best.objective:.1%}; its settings: {folder / 'best.yaml'}")
    return best


def compare(kind: str, argv: list[str], folder: Path, seeds: list[int]) -> dict[str, np.ndarray]:
    """Balanced accuracy on the test data with `auto` and with what was found, one per seed."""
    settings = {"auto": ["--perturbations", "auto"], "found": [str(folder / "best.yaml")]}
    shared = [*argv, "--do_train", "--do_predict", "--save_strategy", "no"]
    found = {}
    for name, own in settings.items():
        outputs = {seed: str(folder / f"{name}-seed-{seed}") for seed in seeds}
        runs = [train(kind, [*own, *shared, "--seed", str(seed), "--output_dir", outputs[seed]]) for seed in seeds]
        found[name] = np.array([run[f"predict_{OBJECTIVE}"] for run in runs])
    return found


def main(argv: list[str] | None = None) -> BestRun | None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--n_trials", type=int, default=20, help="trainings of the search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the comparison")
    parser.add_argument("--output_dir", type=Path, required=True)
    own, rest = parser.parse_known_args(argv)
    best = search(own.kind, rest, own.output_dir, own.n_trials)
    results = compare(own.kind, rest, own.output_dir, own.seeds)
    for name, values in {**results, "found - auto": results["found"] - results["auto"]}.items():
        error = f" ± {100 * values.std(ddof=1) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
        print(f"{name:>12}: {100 * values.mean():5.1f}{error}  {OBJECTIVE} on the test data, in %")
    return best


if __name__ == "__main__":
    main()
