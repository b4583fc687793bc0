r"""
Searches the settings of the method `lpg` for one of the classification examples, with optuna.

    python examples/hyperparameter_search.py text_classification --n_trials 20 --output_dir search \
        --model_name_or_path path/to/model --train_file train.csv --validation_file validation.csv

    python examples/text_classification.py search/best.yaml --do_train --do_eval --output_dir output \
        --model_name_or_path path/to/model --train_file train.csv --validation_file test.csv

All other arguments are those of the example. Every trial trains with its own settings and is judged by its balanced
accuracy on the validation data, so report results on other rows than those. Trials are kept in `study.db` of the
output folder: the same command goes on with that search, for `--n_trials` more.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import optuna
import yaml
from audio_classification import AudioClassification
from classification.arguments import parse_arguments
from classification.training import make_model, make_trainer, prepare, set_up_logging
from image_classification import ImageClassification
from text_classification import TextClassification
from transformers.trainer_utils import BestRun, SaveStrategy


TASKS = {
    "text_classification": TextClassification,
    "image_classification": ImageClassification,
    "audio_classification": AudioClassification,
}


@dataclass
class SearchArguments:
    """How long to search."""

    _argument_group_name = "search"

    n_trials: int = field(default=20, metadata={"help": "Trainings."})


def search_space(trial: optuna.Trial) -> dict[str, object]:
    """Fields of [`LPGConfig`]; any other argument of the Trainer may be added."""
    return {
        "lpg_strategy": trial.suggest_categorical("lpg_strategy", ["frequency", "accuracy"]),
        "lpg_epsilon": trial.suggest_float("lpg_epsilon", 0.02, 1.0, log=True),
        "lpg_max_dampening": trial.suggest_float("lpg_max_dampening", 0.1, 0.9),
        "lpg_direction": trial.suggest_categorical("lpg_direction", ["class", "sample"]),
    }


def main(argv: list[str] | None = None) -> BestRun | None:
    """The best trial; `None` on all processes but the first."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in TASKS:
        print(f"usage: hyperparameter_search.py {{{','.join(TASKS)}}} [--argument VALUE ...]\n{__doc__}")
        raise SystemExit(2)
    task = TASKS[argv[0]]()
    search, arguments = parse_arguments(task.data_class, __doc__, argv[1:], SearchArguments)
    args = arguments.training
    args.do_train = args.do_eval = True
    args.save_strategy = SaveStrategy.NO
    if args.perturbations == ["auto"]:
        args.perturbations = ["lpg"]
    set_up_logging()
    prepared = prepare(task, arguments)
    trainer = make_trainer(task, arguments, prepared, model_init=partial(make_model, task, arguments, prepared))

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    best = trainer.hyperparameter_search(
        hp_space=search_space,
        compute_objective=lambda metrics: metrics["eval_balanced_accuracy"],
        n_trials=search.n_trials,
        direction="maximize",
        backend="optuna",
        storage=f"sqlite:///{folder / 'study.db'}",
        study_name="lpg",
        load_if_exists=True,
    )
    if best is not None:
        config = {"perturbations": args.perturbations, **best.hyperparameters}
        (folder / "best.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        print(f"Balanced accuracy {best.objective:.1%} in trial {best.run_id}; its settings: {folder / 'best.yaml'}")
    return best


if __name__ == "__main__":
    main()
