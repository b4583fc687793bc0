"""Trains an exact tiny model on ready-made micro-batches; run by the tests with one and with several processes."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import IterableDataset
from transformers import default_data_collator


sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import flat_parameters, make_batch, make_model, make_trainer, split

from lpg_hf import LPGTrainer


def rows_of(batch: dict[str, torch.Tensor]) -> Iterator[dict]:
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


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
        args=job["args"],
        perturbations=job["perturbations"],
        class_counts=None if job.get("is_stream") else [55, 25, 15, 5],
    )
    if job.get("is_stream"):
        trainer.train_dataset = IterableDataset.from_generator(rows_of, gen_kwargs={"batch": batch})
        trainer.data_collator = default_data_collator
    if job.get("is_map"):
        trainer.train_dataset = list(rows_of(batch))
        trainer.data_collator = default_data_collator
    trainer.train(resume_from_checkpoint=job.get("resume"))
    if job.get("is_map"):
        trainer.eval_dataset = trainer.train_dataset[:10]
        trainer.report()
    return {
        "issues": trainer.label_issues().to_dict() if job.get("is_map") else None,
        "parameters": flat_parameters(trainer.model),
        "running": trainer.lpg_loss.statistics._running,
        "counts": trainer.lpg_loss.statistics.class_counts,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "norms": [log["lpg/gradient_norm"] for log in trainer.state.log_history if "loss" in log],
        "steps": trainer.state.global_step,
        "processes": trainer.accelerator.num_processes,
        "is_main": trainer.is_world_process_zero(),
    }


if __name__ == "__main__":
    output_dir = Path(sys.argv[2])
    results = [train(job, output_dir / str(number)) for number, job in enumerate(json.loads(sys.argv[1]))]
    if results[0]["is_main"]:
        torch.save(results, output_dir / "results.pt")
    # A process that leaves early makes gloo abort the others.
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
