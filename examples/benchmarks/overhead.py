"""
What LPGTrainer costs: time and memory of whole training steps, and of the perturbation alone.

    python examples/benchmarks/overhead.py                                   # everything, on the GPU if there is one
    python examples/benchmarks/overhead.py --parts steps --models bert_6     # one part, one model
    torchrun --nproc_per_node 2 examples/benchmarks/overhead.py --parts steps --models vit_tiny --wall_clock

Times are ratios: all candidates take turns in random order and in one process, so that what else runs on the machine
hits them alike. On the CPU they are processor time, and a turn is one step. On a GPU, or with `--wall_clock`, they are
what a clock shows. On a GPU a turn is a block of steps, and the host waits for the card at its end alone, since it may
run ahead. The launches of a step (kernels, graphs, copies) are counted there, too. Data and weights are random;
nothing is downloaded. Prints Markdown.
"""

import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from threading import Semaphore, Thread

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

from lpg_hf import LPGLoss, LPGTrainer
from lpg_hf.batch import LogitBatch


PARTS = ("steps", "memory", "matrices", "gpu")
BATCH_SIZE = 32
BASELINE = "Trainer"
# What it is compared with; the baseline once more shows how far the measurement can be trusted.
METHODS = {
    "Trainer again": None,
    "none": [],
    "lpg": ["lpg"],
    "auto": ["auto"],
    "lpl": ["lpl"],
    "sam": ["sam"],
}
# What the profiler calls them.
LAUNCHES = {
    "kernels": ("cudaLaunchKernel", "cuLaunchKernel"),
    "graphs": ("cudaGraphLaunch", "cuGraphLaunch"),
    "copies": ("cudaMemcpyAsync", "cudaMemsetAsync"),
}
# Samples and classes of the matrices: one grows while the other stays.
MATRICES_BY_N = [(n, 1000) for n in (32, 128, 512, 1024, 2048, 4096)]
MATRICES_BY_C = [(256, c) for c in (10, 100, 1000, 10_000, 100_000)]
LARGE = (256, 100_000)
USUAL = (1024, 1000)


@dataclass
class OverheadArguments:
    parts: list[str] = field(
        default_factory=lambda: list(PARTS), metadata={"help": f"What to measure: {', '.join(PARTS)}."}
    )
    models: list[str] = field(
        default_factory=list,
        metadata={"help": f"Of {', '.join(['vit_tiny', 'resnet_18', 'bert_6', 'vit_base', 'bert_base'])}; all."},
    )
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "What to compare."})
    rounds: int = field(default=30, metadata={"help": "Turns of each candidate that count."})
    block_steps: int = field(default=0, metadata={"help": "Steps of a turn; 0 for 20 on a GPU and 1 elsewhere."})
    seed: int = field(default=0, metadata={"help": "Of the orders in which candidates are made and take turns."})
    wall_clock: bool = field(default=False, metadata={"help": "Clock instead of processor time on the CPU, too."})
    compile: bool = field(
        default=False,
        metadata={"help": "Steps with `torch_compile=True`; matrices with LPGLoss as it is and compiled."},
    )

    def __post_init__(self):
        for argument, known in (("parts", PARTS), ("models", list(tasks())), ("methods", list(METHODS))):
            unknown = [name for name in getattr(self, argument) if name not in known]
            if unknown:
                raise ValueError(
                    f"`{argument}` has the unknown {unknown[0]!r}. The known ones are {', '.join(known)}."
                )


# Models


@dataclass
class Task:
    """A model with fresh weights, one batch for it, and the classes of its training set."""

    make_model: Callable[[], nn.Module]
    inputs: dict[str, torch.Tensor]
    num_labels: int
    args: dict = field(default_factory=dict)
    gpu_only: bool = False

    @property
    def class_counts(self) -> list[int]:
        """A long tail of 10 : 1, so that `auto` uses all of its methods."""
        return [round(1000 * 10 ** (-label / (self.num_labels - 1))) for label in range(self.num_labels)]


def tasks() -> dict[str, Task]:
    def images(size: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.randn(BATCH_SIZE, 3, size, size)}

    tokens = {"input_ids": torch.randint(1, 30_000, (BATCH_SIZE, 64))}
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    resnet_18 = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    small = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}

    def vit(num_labels: int, **config) -> Callable[[], nn.Module]:
        return lambda: ViTForImageClassification(ViTConfig(num_labels=num_labels, **config))

    def bert(num_labels: int, **config) -> Callable[[], nn.Module]:
        return lambda: BertForSequenceClassification(BertConfig(num_labels=num_labels, **config))

    return {
        "vit_tiny": Task(vit(10, image_size=32, patch_size=8, **tiny), images(32), 10),
        "resnet_18": Task(
            lambda: ResNetForImageClassification(ResNetConfig(num_labels=100, embedding_size=64, **resnet_18)),
            images(64),
            100,
        ),
        "bert_6": Task(bert(77, **small), tokens, 77),
        "vit_base": Task(vit(1000), images(224), 1000, {"bf16": True}, gpu_only=True),
        "bert_base": Task(bert(77), tokens, 77, {"bf16": True}, gpu_only=True),
    }


def make_trainer(task: Task, perturbations: list[str] | None, output_dir: str, **args) -> Trainer:
    """A Trainer where `perturbations` is `None`, else an LPGTrainer, that trains on the same rows again and again."""
    torch.manual_seed(0)
    shares = torch.tensor(task.class_counts, dtype=torch.float64)
    labels = torch.multinomial(shares, BATCH_SIZE, replacement=True)
    rows = [dict(zip(task.inputs, row, strict=True)) for row in zip(*task.inputs.values(), strict=True)]
    rows = [row | {"labels": label} for row, label in zip(rows, labels.tolist(), strict=True)]
    lpg = {} if perturbations is None else {"perturbations": perturbations, "class_counts": task.class_counts}
    return (Trainer if perturbations is None else LPGTrainer)(
        model=task.make_model(),
        args=TrainingArguments(
            output_dir,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=1e-4,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            log_level="error",
            use_cpu=not torch.cuda.is_available(),
            **(task.args | args),
        ),
        # An epoch is longer than the training: what happens once per epoch is not a step's.
        train_dataset=rows * (1000 * int(os.environ.get("WORLD_SIZE", 1))),
        **lpg,
    )


# Time of whole steps


class Candidate(TrainerCallback):
    """A training that waits after some steps until it is told to go on; a lap is all that happens in between."""

    def __init__(self, trainer: Trainer, clock: Callable[[], float]):
        self.trainer, self.clock = trainer, clock
        self.may_go, self.is_waiting = Semaphore(0), Semaphore(0)
        self.laps = []
        self.error = None
        trainer.add_callback(self)
        # Threads that a computation may use are counted for each thread that starts one.
        num_threads = torch.get_num_threads()
        self.thread = Thread(target=self._train, args=[num_threads], daemon=True)

    def _train(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.may_go.acquire()
        try:
            self.trainer.train()
        except BaseException as error:
            self.error = error
        self.is_waiting.release()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps_left -= 1
        if self.steps_left > 0:
            return
        self.laps.append(self.clock() - self.start)
        self.is_waiting.release()
        self.may_go.acquire()
        self.start = self.clock()

    def lap(self, num_steps: int = 1) -> None:
        self.steps_left = num_steps
        if not self.thread.is_alive():
            self.start = self.clock()
            self.thread.start()
        self.may_go.release()
        self.is_waiting.acquire()
        if self.error is not None:
            raise self.error


def count_launches(candidate: Candidate, num_steps: int) -> str:
    """Launches and copies of a step, as the profiler sees them."""
    if not torch.cuda.is_available():
        return "not run"
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        candidate.lap(num_steps)
    counts = Counter()
    for event in profiled.events():
        kind = next((kind for kind, names in LAUNCHES.items() if event.name.startswith(names)), None)
        counts[kind] += 1
    return ", ".join(f"{counts[kind] / num_steps:.0f} {kind}" for kind in LAUNCHES)


def time_steps(name: str, task: Task, arguments: OverheadArguments, clock: Callable[[], float]) -> None:
    has_gpu = torch.cuda.is_available()
    block_steps = arguments.block_steps or (20 if has_gpu else 1)
    # Graphs are captured within these.
    warmup_steps, counted_steps = (10, 2) if has_gpu else (3, 0)
    shuffler = random.Random(arguments.seed)
    chains = {BASELINE: None} | {method: METHODS[method] for method in arguments.methods}
    # Where a candidate lies in memory depends on when it was made, and moves its times by some percent.
    made = shuffler.sample(list(chains), len(chains))
    with TemporaryDirectory() as folder:
        trainers = {
            method: make_trainer(
                task,
                chains[method],
                folder,
                max_steps=warmup_steps + arguments.rounds * block_steps + counted_steps + 1,
                torch_compile=arguments.compile,
            )
            for method in made
        }
        for trainer in trainers.values():
            trainer.remove_callback(transformers.PrinterCallback)
        candidates = {method: Candidate(trainer, clock) for method, trainer in trainers.items()}
        order = list(candidates.values())
        for candidate in order:
            candidate.lap(warmup_steps)
        for _ in range(arguments.rounds):
            # All processes need the same order.
            shuffler.shuffle(order)
            for candidate in order:
                candidate.lap(block_steps)
        laps = {method: np.array(candidates[method].laps[1:]) / block_steps for method in chains}
        launches = {method: count_launches(candidates[method], counted_steps) for method in chains}
    baseline = laps[BASELINE]
    for method, times in laps.items():
        row(name, method, f"{1000 * np.median(times):.1f}", spread(times, baseline), launches[method])


def spread(times: np.ndarray, baseline: np.ndarray) -> str:
    """Ratio of the medians, and an interval of 90 % from resampling the rounds."""
    draws = np.random.default_rng(0).integers(len(times), size=(2000, len(times)))
    ratios = np.median(times[draws], axis=1) / np.median(baseline[draws], axis=1)
    low, high = np.quantile(ratios, [0.05, 0.95])
    return f"{np.median(times) / np.median(baseline):.3f} ({low:.3f} to {high:.3f})"


# Memory of whole steps


class PeakOfStep(TrainerCallback):
    """Bytes of all tensors at the worst moment of the third step."""

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step == 2:
            self.measure = Peak()
            self.held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
            moments = [value for values in optimizer.state.values() for value in values.values()]
            self.held += sum(value.nbytes for value in moments if isinstance(value, torch.Tensor))
            self.measure.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.measure.__exit__()
            self.peak = self.held + self.measure.peak


class Peak:
    """Context that measures the most bytes of tensors held at once, over what was held before."""

    def __enter__(self):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
            self.profile.__enter__()
        return self

    def __exit__(self, *error):
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated() - self.before
            return
        self.profile.__exit__(None, None, None)
        events = self.profile.profiler.kineto_results.events()
        changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
        self.peak = max(0, *np.cumsum(changes))


def peak_of_steps(name: str, task: Task, arguments: OverheadArguments) -> None:
    peaks = {}
    with TemporaryDirectory() as folder:
        for method, chain in ({BASELINE: None} | METHODS).items():
            if method in (BASELINE, "auto", "none", "sam"):
                trainer = make_trainer(task, chain, folder, max_steps=3)
                trainer.remove_callback(transformers.PrinterCallback)
                callback = PeakOfStep()
                trainer.add_callback(callback)
                trainer.train()
                peaks[method] = callback.peak
    baseline = peaks.pop(BASELINE)
    for method, peak in peaks.items():
        row(name, method, f"{baseline / 2**20:.1f}", f"{peak / baseline:.4f}")


# The perturbation alone


def take_turns(steps: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each step."""
    shuffler = random.Random(0)
    times = {name: [] for name in steps}
    names = list(steps)
    for round in range(rounds + 2):
        shuffler.shuffle(names)
        for name in names:
            start = clock()
            steps[name]()
            if round >= 2:
                times[name].append(clock() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def matrix(n: int, c: int, device: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(n, c, generator=generator)).to(device).requires_grad_()
    labels = torch.randint(c, (n,), generator=generator).to(device)
    return logits, labels, [max(1, round(1000 * 10 ** (-2 * label / c))) for label in range(c)]


def step_of(loss_fn: Callable, logits: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        logits.grad = None
        loss_fn(logits, labels).backward()

    return step


def time_matrices(arguments: OverheadArguments, clock: Callable[[], float], device: str) -> None:
    heading("N", "C", "loss", "cross-entropy, ms", "LPGLoss / cross-entropy", "perturbation alone / cross-entropy")
    alone = {}
    for n, c in dict.fromkeys(MATRICES_BY_N + MATRICES_BY_C):
        logits, labels, counts = matrix(n, c, device)
        chains = {"auto": ("auto", counts)}
        if (n, c) == USUAL:
            chains |= {"auto, balanced": ("auto", [1] * c), "lpg": ("lpg", counts), "lpl": ("lpl", counts)}
        losses = {name: LPGLoss(c, chain, chain_counts) for name, (chain, chain_counts) in chains.items()}
        if arguments.compile and (n, c) == USUAL:
            losses["auto, compiled"] = torch.compile(LPGLoss(c, "auto", counts), fullgraph=True)
        steps = {name: step_of(loss_fn, logits, labels) for name, loss_fn in losses.items()}
        steps[""] = step_of(F.cross_entropy, logits, labels)
        times = take_turns(steps, arguments.rounds if n * c < 10**7 else max(arguments.rounds // 3, 5), clock)
        base = times.pop("")
        for name, seconds in times.items():
            row(n, c, name, f"{1000 * base:.3f}", f"{seconds / base:.2f}", f"{seconds / base - 1:.2f}")
        alone[n, c] = (times["auto"] - base, base)

    heading("grows with", "perturbation alone", "cross-entropy")
    for axis, name, sizes in ((0, "N", MATRICES_BY_N), (1, "C", MATRICES_BY_C)):
        for part, chosen in (("", sizes), (", the three largest", sizes[-3:])):
            seconds = zip(*(alone[size] for size in chosen), strict=True)
            exponents = [growth([size[axis] for size in chosen], column) for column in seconds]
            row(f"{name}{part}", *(f"{name}^{exponent:.2f}" for exponent in exponents))

    heading("delta alone, N = 1024, C = 1000", "ms", "times that of lpg")
    logits, labels, counts = matrix(*USUAL, device)
    deltas = {}
    for chain in ("lpg", "lpl"):
        loss_fn = LPGLoss(USUAL[1], chain, counts).to(device)
        deltas[chain] = delta_of(loss_fn, LogitBatch(logits.detach(), labels))
    times = take_turns(deltas, arguments.rounds, clock)
    for chain, seconds in times.items():
        row(chain, f"{1000 * seconds:.3f}", f"{seconds / times['lpg']:.1f}")


def growth(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The exponent with which time grows; a difference that is lost in the noise, not above zero, does not count."""
    points = [(size, time) for size, time in zip(sizes, seconds, strict=True) if time > 0]
    return np.polyfit(*np.log(points).T, 1)[0] if len(points) > 1 else math.nan


def delta_of(loss_fn: LPGLoss, batch: LogitBatch) -> Callable[[], torch.Tensor]:
    (method,) = loss_fn.perturbations
    return lambda: method.delta(batch.gradient, batch, loss_fn.statistics)


def peak_of_matrices(device: str) -> None:
    heading("loss, N = 256, C = 100,000", "peak over the logits, in [N, C] of float32")
    logits, labels, counts = matrix(*LARGE, device)
    losses = {"cross-entropy": F.cross_entropy}
    losses |= {chain: LPGLoss(LARGE[1], chain, counts) for chain in ("auto", "lpg", "lpl")}
    for name, loss_fn in losses.items():
        step = step_of(loss_fn, logits, labels)
        step()  # moves the state of the loss
        logits.grad = None
        with Peak() as measured:
            step()
        row(name, f"{measured.peak / logits.nbytes:.2f}")


# What only a GPU can show


def check_gpu() -> None:
    """Raises where LPGLoss waits for the GPU, or where a gradient scaler changes the gradient."""
    heading("check on the GPU", "result")
    for chain in ("auto", "lpg", "lpl", "logit_clipping(quantile=0.9)", "focal_loss"):
        logits, labels, counts = matrix(256, 1000, "cuda")
        loss_fn = LPGLoss(1000, chain, counts)
        step_of(loss_fn, logits, labels)()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step_of(loss_fn, logits, labels)()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        row(f"`{chain}` does not synchronize", "passed")

    logits, labels, counts = matrix(256, 1000, "cuda")
    step_of(LPGLoss(1000, "auto", counts), logits, labels)()
    half = logits.detach().half().requires_grad_()
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12)
    scaler.scale(LPGLoss(1000, "auto", counts)(half, labels)).backward()
    torch.testing.assert_close(half.grad.float() / scaler.get_scale(), logits.grad, rtol=2e-2, atol=1e-6)
    row("gradient of fp16 logits under a scaler", "passed")


# Output


def heading(*columns: object) -> None:
    row()
    row(*columns)
    row(*["---"] * len(columns))


def row(*cells: object) -> None:
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(f"| {' | '.join(map(str, cells))} |" if cells else "", flush=True)


def main(arguments: OverheadArguments) -> None:
    logging.set_verbosity_error()
    has_gpu = torch.cuda.is_available()
    uses_wall_clock = arguments.wall_clock or has_gpu

    def clock() -> float:
        if has_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() if uses_wall_clock else time.process_time()

    device = "cuda" if has_gpu else "cpu"
    name = torch.cuda.get_device_name() if has_gpu else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {name}", file=sys.stderr)
    chosen = {name: task for name, task in tasks().items() if not arguments.models or name in arguments.models}
    for part, measure, columns in (
        ("steps", lambda *task: time_steps(*task, arguments, clock), ("ms", "step time / Trainer (90 %)", "launches")),
        ("memory", lambda *task: peak_of_steps(*task, arguments), ("Trainer, MiB", "peak memory / Trainer")),
    ):
        if part in arguments.parts:
            heading("model", "method", *columns)
            for name, task in chosen.items():
                if task.gpu_only and not has_gpu:
                    row(name, "all", *["not run"] * len(columns))
                else:
                    measure(name, task)
    if "matrices" in arguments.parts:
        time_matrices(arguments, clock, device)
        peak_of_matrices(device)
    if "gpu" in arguments.parts and has_gpu:
        check_gpu()


if __name__ == "__main__":
    main(HfArgumentParser(OverheadArguments).parse_args_into_dataclasses()[0])
