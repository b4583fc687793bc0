"""
Full-size image runs with LPGLoss in a bare loop: CIFAR-10N, long-tailed CIFAR-10, symmetric noise.

    python examples/benchmarks/cifar_gpu.py --data cifar.npz --out cifar.jsonl \
        --runs worst:resnet18:ce:36 worst:resnet18:auto:36 lt100:resnet32:la:100 lt100:resnet32:auto:100
    python examples/benchmarks/cifar_gpu.py --data cifar.npz --out cifar.jsonl --streams 4 --num_train 20000 \
        --warmup_steps 200 --runs worst:small:ce:15 worst:small:auto:15 worst:small:auto:15:seed=1
    python examples/benchmarks/cifar_gpu.py --data cifar.npz --out cifar.jsonl --device cpu --runs worst:small:auto:15

A run is `task:network:method:epochs`, and options such as `:seed=1:learning_rate=0.05` behind it.

- Tasks: worst, random1, aggregate (CIFAR-10N), clean, symR (R % symmetric noise), ltF (long tail F : 1).
- Networks: resnet18, resnet34, resnet32, small (one block of 16, 32 and 64 channels each).
- Methods: ce, auto, la (logit adjustment), gce (generalized cross-entropy), or any methods of LPGLoss with `+` between
  them, such as `logit_adjustment+class_relative_dampening(power=2)`.

Runs of one seed see the same batches, whatever their method. On a GPU a step is one replay of a CUDA graph, in
bfloat16. `--streams K` trains K runs at once, each on a stream of its own: small networks do not fill a card.

Each run appends a line of JSON to `--out` as soon as it is over: accuracy after the last epoch and the best one (which
is chosen on the test set, so nobody could have stopped there), balanced accuracy, macro-F1 and calibration error after
the last, the share of wrong labels that the network has learned by heart, and the mean weights of right and wrong rows
in the last epoch. Times per step have the evaluations in them. A table of all runs comes at the end. `--max_seconds`
ends runs early; their lines say so.

`--data` is an npz file with these arrays:

| array | content |
| --- | --- |
| `x` | uint8 `[60000, 32, 32, 3]`: the training images, then the test images |
| `y`, `yt` | their clean labels, `[50000]` and `[10000]` |
| `worse`, `aggre`, `rand1` | `worse_label`, `aggre_label` and `random_label1` of CIFAR-10N, `[50000]` each |

cifar_pack.py makes it from the files that are published.
"""

import json
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from cifar_data import Cifar, load_cifar
from cifar_settings import RunSettings, read_run
from cifar_training import CifarRun
from transformers import HfArgumentParser

import lpg_hf


# torch hands out the same streams again after that many.
MAX_STREAMS = 32
#: Columns of the table, and the entry of a line that each shows, in percent or as it is.
PERCENT = {
    "last": "accuracy",
    "best": "best_accuracy",
    "macro-F1": "macro_f1",
    "calibration error": "expected_calibration_error",
    "wrong fitted": "wrong_fitted",
}
PLAIN = {
    "best epoch": "best_epoch",
    "weight right": "weight_right",
    "weight wrong": "weight_wrong",
    "steps": "steps",
    "ms / step": "ms_per_step",
}


@dataclass
class CifarArguments:
    data: str = field(metadata={"help": "The npz file that the docstring describes. Required."})
    runs: list[str] = field(metadata={"help": "task:network:method:epochs, and :option=value. Required."})
    out: str = field(metadata={"help": "Where the lines of JSON are appended. Required."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cuda or cpu."})
    streams: int = field(default=1, metadata={"help": "Runs at once."})
    graph: bool = field(default=True, metadata={"help": "Steps as CUDA graphs, on a GPU."})
    max_seconds: float | None = field(default=None, metadata={"help": "Ends all runs that long after the start."})
    num_test: int | None = field(default=None, metadata={"help": "Look at the first test images only."})
    seed: int = field(default=0, metadata={"help": "Of runs that name none; so are the options below."})
    num_train: int | None = field(default=None, metadata={"help": "Train on the first training images only."})
    learning_rate: float = field(default=0.1, metadata={"help": "The largest one; SGD with Nesterov momentum."})
    momentum: float = field(default=0.9, metadata={"help": "Of Nesterov."})
    weight_decay: float = field(default=5e-4, metadata={"help": "On all parameters."})
    batch_size: int = field(default=128, metadata={"help": "Images per step."})
    warmup_epochs: float = field(default=2.0, metadata={"help": "Epochs in which the learning rate rises."})
    warmup_steps: int | None = field(default=None, metadata={"help": "The same in steps."})

    def __post_init__(self):
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"`device` must be cuda or cpu; found {self.device!r}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("`device` is cuda, but torch sees no GPU. Pass `--device cpu`.")
        if not 1 <= self.streams <= MAX_STREAMS:
            raise ValueError(f"`streams` must lie in [1, {MAX_STREAMS}]; found {self.streams}.")
        if self.num_test is not None and self.num_test < 1:
            raise ValueError(f"`num_test` must be at least 1; found {self.num_test}.")

    @property
    def settings(self) -> list[RunSettings]:
        """The settings of all runs; raises where one cannot be read."""
        names = ("seed", "num_train", "learning_rate", "momentum", "weight_decay", "batch_size")
        defaults = {name: getattr(self, name) for name in (*names, "warmup_epochs", "warmup_steps")}
        return [read_run(run, defaults) for run in self.runs]


def train_all(
    settings: list[RunSettings], cifar: Cifar, arguments: CifarArguments, deadline: float
) -> Iterator[dict[str, object]]:
    """
    Trains up to `streams` runs at once, turn by turn in this thread. A crash of one run does not stop the others.

    Yields:
        `dict[str, object]`: The line of each run as soon as it is over. After the deadline, the lines of the runs that
        are under way.
    """
    is_cuda = cifar.train_images.is_cuda
    streams = [torch.cuda.Stream() if is_cuda else None for _ in range(arguments.streams)]
    waiting, active = deque(settings), dict[int, CifarRun]()
    while waiting or active:
        is_late = time.perf_counter() > deadline
        if is_late:
            waiting.clear()
        was_idle = True
        for slot, stream in enumerate(streams):
            try:
                if slot not in active and waiting:
                    now = waiting.popleft()
                    active[slot] = CifarRun(now, cifar, stream, arguments.graph)
                    was_idle = False
                if slot not in active:
                    continue
                now, run = active[slot].settings, active[slot]
                if run.is_done or is_late:
                    del active[slot]
                    yield describe(now, arguments) | run.result()
                elif run.is_ready:
                    run.advance()
                else:
                    continue
                was_idle = False
            except Exception as error:
                traceback.print_exc()
                active.pop(slot, None)
                yield describe(now, arguments) | {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        if was_idle and active:
            time.sleep(5e-4)  # all streams are busy


def describe(settings: RunSettings, arguments: CifarArguments) -> dict[str, object]:
    """What a line says of its run besides the result."""
    is_cuda = arguments.device == "cuda"
    return asdict(settings) | {
        "streams": arguments.streams,
        "graph": is_cuda and arguments.graph,
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        "torch": torch.__version__,
        "lpg_hf": lpg_hf.__version__,
    }


def table(lines: list[dict[str, object]]) -> str:
    """A Markdown table of the lines; accuracies in percent."""
    heading = ["task", "network", "method", "epochs", "seed", "images", *PERCENT, *PLAIN]
    rows = [heading, ["---"] * len(heading)]
    for line in lines:
        cells = [line[name] for name in ("task", "network", "method", "epochs", "seed")]
        if not line.get("is_finished", True):
            cells[3] = f"{len(line.get('accuracies', []))} of {cells[3]}"
        if "error" in line:
            rows.append([*cells, line["error"]] + [""] * (len(heading) - len(cells) - 1))
            continue
        cells += [line["rows"]]
        cells += [f"{100 * line[name]:.2f}" if name in line else "" for name in PERCENT.values()]
        cells += [line.get(name, "") for name in PLAIN.values()]
        rows.append(cells)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def main(arguments: CifarArguments) -> int:
    """The number of runs that crashed or never began."""
    begin = time.perf_counter()
    settings = arguments.settings
    device = torch.device(arguments.device)
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    cifar = load_cifar(arguments.data, device, arguments.num_test)
    if arguments.device == "cuda":
        torch.cuda.synchronize()  # the images are there for every stream
    print(f"{len(settings)} runs; data in {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    lines = []
    deadline = begin + (float("inf") if arguments.max_seconds is None else arguments.max_seconds)
    for line in train_all(settings, cifar, arguments, deadline):
        lines.append(line)
        with out.open("a") as file:
            file.write(f"{json.dumps(line)}\n")
        print(json.dumps(line), file=sys.stderr, flush=True)
    print(table(lines))
    missing = len(settings) - len(lines)
    if missing:
        print(f"`max_seconds` left {missing} of {len(settings)} runs unstarted.", file=sys.stderr)
    seconds, steps = time.perf_counter() - begin, sum(line.get("steps", 0) for line in lines)
    print(f"{steps} steps in {seconds:.1f} s", file=sys.stderr, flush=True)
    return missing + sum("error" in line for line in lines)


if __name__ == "__main__":
    sys.exit(min(main(HfArgumentParser(CifarArguments).parse_args_into_dataclasses()[0]), 1))
