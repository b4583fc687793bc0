"""Trains an exact tiny model on ready-made micro-batches; run by the tests with one and with several processes."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import IterableDataset
from leave import leave_together
from tiny import class_means, make_batch, make_model, make_trainer, split
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, default_data_collator

from lpg_hf import LPGConfig, LPGTrainer


def rows_of(batch: dict[str, torch.Tensor]) -> Iterator[dict]:
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


@contextmanager
def watched_sums() -> Iterator[list[tuple[int, bool]]]:
    """Numbers of each sum over processes that Python asks for, and whether it goes on without waiting."""
    all_reduce, seen = torch.distributed.all_reduce, []

    def watched(tensor: torch.Tensor, *args, async_op: bool = False, **kwargs):
        seen.append((tensor.numel(), async_op))
        return all_reduce(tensor, *args, async_op=async_op, **kwargs)

    torch.distributed.all_reduce = watched
    try:
        yield seen
    finally:
        torch.distributed.all_reduce = all_reduce


class LooksOnMain(TrainerCallback):
    """What one process alone sees at the end of each step: folds before and after it looks, means per class after."""

    def __init__(self, trainer: LPGTrainer):
        self.trainer, self.seen = trainer, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.statistics = self.trainer.lpg_loss.statistics

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            before = self.statistics.steps.item()
            looked_up = self.trainer.lpg_loss
            self.seen.append((before, looked_up.statistics.steps.item(), class_means(looked_up)))


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """FSDP2 shards parameters. All processes must call this."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def train(job: dict, output_dir: Path) -> dict:
    torch.set_num_threads(1)
    name = job["model"]
    batch = make_batch(name, sum(job["sizes"]), dtype=torch.float64)
    for row in job.get("ignored", []):
        batch["labels"][row] = -100
    trainer = make_trainer(
        LPGTrainer,
        make_model(name, exact=True),
        split(batch, job["sizes"]),
        output_dir,
        args_class=LPGConfig,
        args=job["args"] | {"log_perturbations": True},
        perturbations=job["perturbations"],
        class_counts=None if job.get("is_stream") else [55, 25, 15, 5],
    )
    if trainer.args.n_gpu > 1:
        trainer.args._n_gpu = 1
    if job.get("is_stream"):
        trainer.train_dataset = IterableDataset.from_generator(rows_of, gen_kwargs={"batch": batch})
        trainer.data_collator = default_data_collator
    if job.get("is_map"):
        trainer.train_dataset = list(rows_of(batch))
        trainer.data_collator = default_data_collator
    looks = LooksOnMain(trainer)
    if job.get("looks"):
        trainer.add_callback(looks)
    with watched_sums() as sums:
        trainer.train(resume_from_checkpoint=job.get("resume"))
    if job.get("is_map"):
        trainer.eval_dataset = trainer.train_dataset[:10]
        trainer.report()
    return {
        "issues": trainer.label_issues().to_dict() if job.get("is_map") else None,
        "parameters": torch.cat([whole(parameter).detach().flatten() for parameter in trainer.model.parameters()]),
        "means": class_means(trainer.lpg_loss),
        "counts": trainer.lpg_loss.statistics.class_counts,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "norms": [log["lpg/gradient_norm"] for log in trainer.state.log_history if "lpg/gradient_norm" in log],
        "steps": trainer.state.global_step,
        "sums": sums,
        "looks": looks.seen,
        "processes": trainer.accelerator.num_processes,
        "is_main": trainer.is_world_process_zero(),
    }


if __name__ == "__main__":
    output_dir = Path(sys.argv[2])
    results = [train(job, output_dir / str(number)) for number, job in enumerate(json.loads(sys.argv[1]))]
    if results[0]["is_main"]:
        torch.save(results, output_dir / "results.pt")
    leave_together()
