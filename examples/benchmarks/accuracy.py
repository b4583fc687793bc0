"""
Every method on every regime: balanced, long-tailed and noisy data, with paired seeds.

    python examples/benchmarks/accuracy.py --output_dir results     # digits, a small MLP
    python examples/benchmarks/accuracy.py --output_dir results --data FOLDER --encoder CHECKPOINT  # frozen features
    python examples/benchmarks/accuracy.py --output_dir results --data FEATURES.npz --regimes natural human:noisy
    python examples/benchmarks/accuracy.py settings.yaml            # arguments from a file
    accelerate launch examples/benchmarks/accuracy.py ...           # a share of the runs per process

All methods of a cell (data, model, optimizer, pace, regime) and seed start from the same weights and see the same
batches in the same order, for the same number of steps, on the same schedule. A killed benchmark goes on where it was.
Leaves in `output_dir`: results.csv (a row per run), failures.csv, summary.md, tables as CSV, and figures.
"""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import datasets
import pandas as pd
import torch
from accuracy_data import REGIMES, DataSpec, load_source, make_split, parse_regime
from accuracy_methods import ABLATIONS, BENCHMARK, METHODS, REFERENCE, check_methods
from accuracy_models import MLP, OPTIMIZERS, PACES, feed_of, recipe
from accuracy_results import Results
from accuracy_statistics import CELL, tuned_value
from accuracy_summary import summarize
from accuracy_timing import measure_step_times
from accuracy_training import Run, Setting, describe, prepare_process, train_run
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging


@dataclass
class BenchmarkArguments:
    output_dir: str = field(metadata={"help": "Where results, tables and figures go. Required."})
    data: list[str] = field(
        default_factory=lambda: ["digits"],
        metadata={
            "help": "'digits', files (parquet, csv, json, npz), folders (parquet, images), or names of the hub."
        },
    )
    input_column: str | None = field(
        default=None, metadata={"help": "Column of images, texts or vectors; the first such column when left out."}
    )
    label_column: str | None = field(default=None, metadata={"help": "Column of clean labels."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Take a random part of the training split."})
    max_test_rows: int | None = field(default=None, metadata={"help": "Take a random part of the test split."})
    max_length: int = field(default=128, metadata={"help": "Longest text, in tokens."})
    model: list[str] = field(
        default_factory=lambda: ["mlp"],
        metadata={"help": "mlp, resnet, resnet32, vit (fresh weights), or checkpoints to fine-tune."},
    )
    encoder: str | None = field(
        default=None, metadata={"help": "Checkpoint whose frozen features the mlp gets, for all data but the digits."}
    )
    optimizer: list[str] = field(default_factory=lambda: list(OPTIMIZERS), metadata={"help": "sgd, adamw."})
    pace: list[str] = field(
        default_factory=lambda: list(PACES),
        metadata={"help": "memorize (long, fast training) or slow; see RECIPES in accuracy_models.py."},
    )
    learning_rate: float | None = field(default=None, metadata={"help": "In place of the recipe's."})
    epochs: int | None = field(default=None, metadata={"help": "In place of the recipe's."})
    batch_size: int | None = field(default=None, metadata={"help": "In place of the recipe's."})
    augment: bool = field(default=False, metadata={"help": "Random crops and mirror images, for pixels."})
    validation_share: float = field(
        default=0.2, metadata={"help": "Share of the training rows held out, as noisy and imbalanced as the rest."}
    )
    regimes: list[str] = field(
        default_factory=lambda: list(REGIMES), metadata={"help": "What is done to the data; see parse_regime."}
    )
    methods: list[str] = field(
        default_factory=list, metadata={"help": "All of the benchmark when left out; see accuracy_methods.py."}
    )
    ablation: bool = field(default=False, metadata={"help": "Compare `auto` with variants of itself instead."})
    tune: bool = field(default=True, metadata={"help": "Run the whole grid of each method, not only its usual value."})
    tuning_seeds: int = field(
        default=3,
        metadata={"help": "Seeds that choose the value of a grid in each cell; the other seeds run the chosen one."},
    )
    seeds: int = field(default=10, metadata={"help": "Repetitions, each with its own split, noise, weights, order."})
    first_seed: int = field(default=0, metadata={"help": "The number of the first seed."})
    workers: int | None = field(
        default=None, metadata={"help": "Processes side by side; one per core when left out, one on a GPU."}
    )
    redo: list[str] = field(
        default_factory=list,
        metadata={"help": "Methods to run anew; old rows go to results-set-aside-N.csv. Not for a resume."},
    )
    timing_rounds: int = field(default=5, metadata={"help": "Rounds of the interleaved timing of steps; 0 for none."})
    summary_only: bool = field(default=False, metadata={"help": "Train nothing, write tables and figures anew."})

    def __post_init__(self):
        for name, values, known in (("optimizer", self.optimizer, OPTIMIZERS), ("pace", self.pace, PACES)):
            unknown = [value for value in values if value not in known]
            if unknown:
                raise ValueError(f"`{name}` has {unknown[0]!r}; the known ones are {', '.join(known)}.")
        for name in self.regimes:
            parse_regime(name)
        if not self.methods:
            self.methods = list(ABLATIONS if self.ablation else BENCHMARK)
        check_methods(self.methods + self.redo)
        if self.seeds < 1:
            raise ValueError(f"`seeds` must be at least 1; found {self.seeds}.")


def make_settings(arguments: BenchmarkArguments) -> list[Setting]:
    """All combinations of data, model, optimizer and pace."""
    settings = []
    for data in arguments.data:
        for model in arguments.model:
            feed = feed_of(model)
            checkpoint = None if data == "digits" else arguments.encoder
            spec = DataSpec(
                data=data,
                feed=feed,
                checkpoint=checkpoint if model == MLP else (model if feed == "processed" else None),
                input_column=arguments.input_column,
                label_column=arguments.label_column,
                max_train_rows=arguments.max_train_rows,
                max_test_rows=arguments.max_test_rows,
                max_length=arguments.max_length,
                cache_dir=arguments.output_dir,
            )
            for optimizer in arguments.optimizer:
                for pace in arguments.pace:
                    overrides = {
                        name: getattr(arguments, name)
                        for name in ("learning_rate", "epochs", "batch_size")
                        if getattr(arguments, name) is not None
                    }
                    settings.append(
                        Setting(
                            data=short_name(data),
                            model=short_name(model),
                            optimizer=optimizer,
                            pace=pace,
                            spec=spec,
                            model_name=model,
                            recipe=replace(recipe(model, optimizer, pace), **overrides),
                            validation_share=arguments.validation_share,
                            augment=arguments.augment,
                        )
                    )
    specs: dict[str, DataSpec] = {}
    for setting in settings:
        if specs.setdefault(setting.name, setting.spec) != setting.spec:
            raise ValueError(
                f"Two data sets or models go by the name {setting.name!r} in the results: {arguments.data} with "
                f"{arguments.model}. Rename a folder, or run them into different `output_dir`s."
            )
    return settings


def short_name(path: str) -> str:
    """The last part of a path or a name of the hub, without the ending of a file."""
    path = path.rstrip("/")
    return Path(path).stem if Path(path).is_file() else path.rsplit("/", 1)[-1]


def make_runs(arguments: BenchmarkArguments, settings: list[Setting]) -> list[Run]:
    """The grid. Whole seeds first, so that what an interrupted benchmark leaves can be compared."""
    return [
        Run(setting, regime, name, value, arguments.first_seed + number)
        for number in range(arguments.seeds)
        for setting in settings
        for regime in arguments.regimes
        for name in arguments.methods
        if METHODS[name].role != REFERENCE or parse_regime(regime).is_noisy
        for value in METHODS[name].values(arguments.tune and number < arguments.tuning_seeds)
    ]


def with_chosen_values(runs: list[Run], frame: pd.DataFrame) -> list[Run]:
    """The runs of the grid that `frame` has no chosen value for yet: each cell's best value, on the seeds left."""
    chosen = {key: tuned_value(group) for key, group in frame.groupby([*CELL, "method"])}
    usual = [run for run in runs if run.value == METHODS[run.method].usual_value]
    return [replace(run, value=chosen[key]) for run in usual if (key := run.key[:6]) in chosen]


def share_of(runs: list[Run], rank: int, num_processes: int) -> list[Run]:
    """The runs of one of several processes. All runs of a method in a cell stay together, for the tuning."""
    groups: dict[tuple[str, ...], int] = {}
    return [run for run in runs if groups.setdefault(run.key[:6], len(groups)) % num_processes == rank]


def check_data(arguments: BenchmarkArguments, settings: list[Setting]) -> None:
    """Loads (and encodes) everything once, and draws each regime once, so that what cannot work fails now."""
    for setting in {setting.spec: setting for setting in settings}.values():
        source = load_source(setting.spec)
        for regime in arguments.regimes:
            make_split(source, parse_regime(regime), arguments.first_seed, setting.validation_share)


def run_or_error(run: Run) -> tuple[Run, dict[str, str] | None, str]:
    """A crash of one run must not stop the others."""
    try:
        return run, train_run(run), ""
    except Exception as error:
        return run, None, f"{type(error).__name__}: {' '.join(str(error).split())}"


def initialize_worker() -> None:
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    prepare_process()


def finished(runs: list[Run], workers: int) -> Iterator[tuple[Run, dict[str, str] | None, str]]:
    """Runs as they are done, in `workers` processes side by side."""
    if workers == 1:
        yield from map(run_or_error, runs)
        return
    # Not forked: torch has threads by now, which a fork would leave behind with their locks held.
    with ProcessPoolExecutor(workers, get_context("spawn"), initialize_worker) as pool:
        waiting = iter(runs)
        pending = {pool.submit(run_or_error, run) for run in islice(waiting, 4 * workers)}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            pending |= {pool.submit(run_or_error, run) for run in islice(waiting, len(done))}
            for future in done:
                yield future.result()


def work(results: Results, runs: list[Run], workers: int, description: str) -> None:
    """Trains what is not in the results yet; each run is on the disk before the next one counts as done."""
    done = results.keys()
    left = [run for run in runs if run.key not in done]
    failures = 0
    with tqdm(
        total=len(runs), initial=len(runs) - len(left), unit="run", smoothing=0.01, desc=description
    ) as progress:
        for run, values, error in finished(left, workers):
            if values is None:
                failures += 1
                results.append_failure(run.key, error)
                progress.set_postfix(failed=failures)
            else:
                results.append(run.key, values)
            progress.update()


def take_share_of_launcher() -> tuple[int, int]:
    """
    Rank and number of the processes that a launcher started; (0, 1) without one.

    Every process trains whole runs on its own device: the variables that would make Trainer join the processes go.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    # One device per process; without a launcher, several would make Trainer split every batch.
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = devices.split(",") if devices else [str(number) for number in range(torch.cuda.device_count())]
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[local_rank % len(devices)]
    return rank, size


def main() -> None:
    parser = HfArgumentParser(BenchmarkArguments)
    last = sys.argv[-1]
    if len(sys.argv) == 2 and last.endswith((".yaml", ".yml", ".json")):
        parse = parser.parse_json_file if last.endswith(".json") else parser.parse_yaml_file
        (arguments,) = parse(os.path.abspath(last))
    else:
        arguments, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
        if unknown:
            parser.error(f"unknown arguments: {' '.join(unknown)}. --help lists the known ones.")

    rank, num_processes = take_share_of_launcher()
    initialize_worker()
    results = Results(Path(arguments.output_dir))
    if not arguments.summary_only:
        settings = make_settings(arguments)
        check_data(arguments, settings)
        results.check_settings({setting.name: describe(setting) for setting in settings})
        if arguments.redo:
            if num_processes > 1:
                raise ValueError(f"`redo` works in one process; found {num_processes}. Leave the launcher out.")
            print(f"{results.set_aside(arguments.redo)} rows set aside.")
        runs = share_of(make_runs(arguments, settings), rank, num_processes)
        workers = arguments.workers or (1 if torch.cuda.is_available() or num_processes > 1 else os.cpu_count())
        work(results, runs, workers, "grid")
        work(results, with_chosen_values(runs, results.frame()), workers, "chosen values")
        if arguments.timing_rounds and rank == 0:
            measure_step_times(settings[0], arguments.methods, arguments.timing_rounds, results.folder)
    print(summarize(results))


if __name__ == "__main__":
    main()
