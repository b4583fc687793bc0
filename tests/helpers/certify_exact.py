"""Certifies a tiny model and measures its path, with one process or several; run by the tests."""

import copy
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from leave import leave_together
from tiny import make_batch, make_model, make_trainer, split

from lpg_hf import LPGTrainer
from lpg_hf.pac_bayes import Certificate, PathLength, certify


def run(sizes: list[int], output_dir: Path) -> tuple[Certificate, dict[str, float]]:
    torch.set_num_threads(1)
    model = make_model("bert", exact=True)
    prior = copy.deepcopy(model)
    path_length = PathLength(interval=1)
    make_trainer(
        LPGTrainer,
        model,
        split(make_batch("bert", sum(sizes), dtype=torch.float64), sizes),
        output_dir,
        args={"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0},
        perturbations=["logit_clipping(max_norm=0.5)"],
        callbacks=[path_length],
    ).train()
    rows = [{"input_ids": torch.tensor([1, row, 7]), "labels": row % 4} for row in range(30)]
    certificate = certify(
        model, rows, prior=prior, sigma_grid=[0.02, 0.05], num_draws=25, num_selection_draws=3, disable_tqdm=True
    )
    return certificate, path_length.report()


if __name__ == "__main__":
    output_dir = Path(sys.argv[2])
    certificate, lengths = run([int(size) for size in sys.argv[1].split(",")], output_dir)
    state = PartialState()
    # Every process has the whole certificate.
    certificate.save(output_dir / f"certificate_{state.process_index}.json")
    if state.is_main_process:
        torch.save(lengths, output_dir / "lengths.pt")
    leave_together()
