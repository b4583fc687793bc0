r"""
`lpg-hf compare`: the results of trainings as one Markdown table.

Finished trainings, one line each:

    lpg-hf compare output-a output-b

Trainer against LPGTrainer on your data, over seeds:

    lpg-hf compare text --seeds 0 1 2 --output_dir comparison \
        --model_name_or_path path/to/model --train_file train.csv --validation_file test.csv \
        --label_noise 0.4 --imbalance_ratio 20

Of the second form, everything that is not listed below goes to `lpg-hf train`. Both trainings of a pair share seed,
rows, noise, weights and arguments, and are evaluated after the last epoch; the first has `--perturbations none`, which
is the plain Trainer, the second what you pass as `--perturbations`, `auto` if nothing. What is in the output folder
already is not trained again. The table is kept in `comparison.md` of the output folder.
"""

import shlex
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
from accelerate import PartialState

from ..whole_files import read_json_object, replacing
from .parser import expand_config, parse_arguments
from .run_files import REWRITTEN, read_command, without_secrets
from .train import KINDS, load_task, train


METRICS = {
    "eval_accuracy": "accuracy",
    "eval_balanced_accuracy": "balanced",
    "eval_few_shot_accuracy": "few-shot",
    "eval_worst_class_accuracy": "worst class",
    "eval_macro_f1": "macro-F1",
    "eval_expected_calibration_error": "calibration error",
}
PLAIN, OURS = "Trainer", "LPGTrainer"
RESULTS_FILE = "eval_results.json"
Results = dict[str, float]


def results_of(kind: str, perturbations: list[str], seed: int, folder: Path, arguments: list[str]) -> Results:
    """
    The evaluation of one training, which is done if it is not there.

    Raises:
        ValueError: If what is there was trained with other arguments.
    """
    results = folder / RESULTS_FILE
    argv = ["--do_train", "--do_eval", "--save_strategy", "no", "--report_to", "none", *arguments]
    argv += ["--seed", str(seed), "--output_dir", str(folder), "--perturbations", *perturbations]
    if not results.exists():
        asked = parse_arguments(load_task(kind).data_class, f"lpg-hf compare {kind}", "", argv).training
        if not (asked.do_train and asked.do_eval):
            missing = "--do_eval" if asked.do_train else "--do_train"
            raise ValueError(f"`{missing}` is false, which leaves nothing to compare. Leave it out.")
        train(kind, argv)
        PartialState().wait_for_everyone()
    else:
        found = read_command(folder)
        if (found["kind"], found["arguments"]) != (kind, without_secrets(argv)):
            raise ValueError(
                f"{folder} was trained with other arguments: {found['kind']} {shlex.join(found['arguments'])}. Choose "
                "another --output_dir."
            )
    return read_json_object(results, f"Delete {folder} to train it anew.")


def pairs_table(results: dict[str, list[Results]]) -> str:
    """Mean ± standard error over the seeds in percent, and of the differences of the pairs."""
    metrics = shared_metrics(results[PLAIN] + results[OURS])
    values = {name: percent(runs, metrics) for name, runs in results.items()}
    lines = [[name, *cells(values[name], "")] for name in (PLAIN, OURS)]
    lines += [["difference of the pairs", *cells(values[OURS] - values[PLAIN], "+")]]
    return markdown(metrics, lines)


def runs_table(folders: list[str]) -> str:
    """
    One line per finished training, in percent.

    Raises:
        OSError: If a folder has no evaluation.
    """
    runs = [read_results(folder) for folder in folders]
    metrics = shared_metrics(runs)
    values = [cells(percent([run], metrics), "") for run in runs]
    return markdown(metrics, [[folder, *line] for folder, line in zip(folders, values, strict=True)])


def read_results(folder: str) -> Results:
    path = Path(folder) / RESULTS_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {RESULTS_FILE} in {folder}. Pass the --output_dir of a run with --do_eval, or a kind of "
            f"data ({', '.join(KINDS)}) and the arguments of a training."
        )
    return read_json_object(path, REWRITTEN)


def shared_metrics(runs: list[Results]) -> list[str]:
    return [metric for metric in METRICS if all(metric in run for run in runs)]


def percent(runs: list[Results], metrics: list[str]) -> np.ndarray:
    return 100 * np.array([[run[metric] for metric in metrics] for run in runs])


def cells(values: np.ndarray, sign: str) -> list[str]:
    if len(values) == 1:
        return [f"{value:{sign}.1f}" for value in values[0]]
    errors = values.std(axis=0, ddof=1) / len(values) ** 0.5
    return [f"{mean:{sign}.1f} ± {error:.1f}" for mean, error in zip(values.mean(axis=0), errors, strict=True)]


def markdown(metrics: list[str], lines: list[list[str]]) -> str:
    rows = [["", *(METRICS[metric] for metric in metrics)], ["---"] * (len(metrics) + 1), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def compare_pairs(kind: str, own: Namespace, arguments: list[str]) -> None:
    """Trains what is not trained, and prints the table."""
    results: dict[str, list[Results]] = {PLAIN: [], OURS: []}
    for seed in own.seeds:
        for name, perturbations in ((PLAIN, ["none"]), (OURS, own.perturbations)):
            folder = own.output_dir / f"{name}-seed-{seed}"
            results[name].append(results_of(kind, perturbations, seed, folder, arguments))
    text = pairs_table(results)
    if PartialState().is_main_process:
        with replacing(own.output_dir / "comparison.md") as new:
            new.write_text(text + "\n", encoding="utf-8")
        print(f"\nValidation data, in %, mean ± standard error over {len(own.seeds)} seeds\n\n{text}")


def main(argv: list[str]) -> None:
    options = ArgumentParser("lpg-hf compare", add_help=False, allow_abbrev=False)
    pairs = options.add_argument_group("training pairs")
    pairs.add_argument("--output_dir", type=Path, help="required: folder of the trainings and of the table")
    pairs.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one pair for each (default: 0 1 2)")
    pairs.add_argument("--perturbations", nargs="+", default=["auto"], help="of LPGTrainer (default: auto)")
    parser = ArgumentParser(
        "lpg-hf compare",
        usage="lpg-hf compare OUT1 OUT2 ... | {text,image,audio,video} --output_dir FOLDER [--argument VALUE ...]",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[options],
    )
    parser.add_argument("what", nargs="+", metavar="OUT", help="folders of finished trainings, or a kind of data")
    if not argv or argv[0] not in KINDS or {"-h", "--help"} & set(argv):
        print(runs_table(parser.parse_args(argv).what))
        return
    # Without the positional argument, which would take the values of arguments that are for `lpg-hf train`.
    try:
        own, arguments = options.parse_known_args(expand_config(argv[1:]))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if len(set(own.seeds)) < len(own.seeds):
        parser.error(f"--seeds is {own.seeds}, which has a seed twice: it would count as two trainings. Leave one")
    if own.output_dir is None:
        parser.error(f"pass --output_dir, the folder of the trainings. To compare finished ones, write ./{argv[0]}.")
    compare_pairs(argv[0], own, arguments)
