r"""
Trainer against LPGTrainer on your data: one of the classification examples, several seeds, one table.

    python examples/compare.py text_classification --seeds 0 1 2 --output_dir comparison \
        --model_name_or_path path/to/model --train_file train.csv --validation_file test.csv \
        --label_noise 0.4 --imbalance_ratio 20

Everything that is not listed below goes to the example. Both trainings of a pair share seed, rows, noise, weights and
arguments, and are evaluated after the last epoch; the first has `--perturbations none`, which is the plain Trainer,
the second what you pass as `--perturbations`, `auto` if nothing. What is in the output folder already is not trained
again. The table is printed as Markdown and kept in `comparison.md` of the output folder.
"""

import importlib
import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
from accelerate import PartialState


SCRIPTS = ("text_classification", "image_classification", "audio_classification")
METRICS = {
    "eval_accuracy": "accuracy",
    "eval_balanced_accuracy": "balanced",
    "eval_few_shot_accuracy": "few-shot",
    "eval_worst_class_accuracy": "worst class",
    "eval_macro_f1": "macro-F1",
    "eval_expected_calibration_error": "calibration error",
}
PLAIN, OURS = "Trainer", "LPGTrainer"


def parse(argv: list[str] | None) -> tuple:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("script", choices=SCRIPTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--perturbations", nargs="+", default=["auto"])
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_known_args(argv)


def results_of(script: str, perturbations: list[str], seed: int, folder: Path, arguments: list[str]) -> dict:
    """
    The evaluation of one training, which is done if it is not there.

    Raises:
        ValueError: If what is there was trained with other arguments.
    """
    results, command = folder / "eval_results.json", folder / "command.json"
    argv = ["--do_train", "--do_eval", "--save_strategy", "no", "--report_to", "none", *arguments]
    argv += ["--seed", str(seed), "--output_dir", str(folder), "--perturbations", *perturbations]
    if not results.exists():
        importlib.import_module(script).main(argv)
        if PartialState().is_main_process:
            command.write_text(json.dumps([script, *argv]))
        PartialState().wait_for_everyone()
    elif json.loads(command.read_text()) != [script, *argv]:
        raise ValueError(f"{folder} was trained with other arguments ({command}). Choose another --output_dir.")
    return json.loads(results.read_text())


def table(results: dict[str, list[dict]]) -> str:
    """Mean ± standard error over the seeds in percent, and of the differences of the pairs."""
    metrics = [metric for metric in METRICS if all(metric in result for result in results[PLAIN] + results[OURS])]
    values = {name: 100 * np.array([[run[m] for m in metrics] for run in runs]) for name, runs in results.items()}
    rows = [["", *(METRICS[metric] for metric in metrics)], ["---"] * (len(metrics) + 1)]
    rows += [[name, *cells(values[name], "")] for name in (PLAIN, OURS)]
    rows += [["difference of the pairs", *cells(values[OURS] - values[PLAIN], "+")]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cells(values: np.ndarray, sign: str) -> list[str]:
    if len(values) == 1:
        return [f"{value:{sign}.1f}" for value in values[0]]
    errors = values.std(axis=0, ddof=1) / len(values) ** 0.5
    return [f"{mean:{sign}.1f} ± {error:.1f}" for mean, error in zip(values.mean(axis=0), errors, strict=True)]


def main(argv: list[str] | None = None) -> str:
    own, arguments = parse(argv)
    results = {PLAIN: [], OURS: []}
    for seed in own.seeds:
        for name, perturbations in ((PLAIN, ["none"]), (OURS, own.perturbations)):
            folder = own.output_dir / f"{name}-seed-{seed}"
            results[name].append(results_of(own.script, perturbations, seed, folder, arguments))
    text = table(results)
    if PartialState().is_main_process:
        (own.output_dir / "comparison.md").write_text(text + "\n")
        print(f"\nValidation data, in %, mean ± standard error over {len(own.seeds)} seeds\n\n{text}")
    return text


if __name__ == "__main__":
    main()
