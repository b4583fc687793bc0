"""Certifies where every process has rows or weights of its own, and writes down the errors; run by the tests."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from leave import leave_together
from tiny import make_model

from lpg_hf.pac_bayes import certify, gibbs_error


def message_of(run: Callable, *args: object, **kwargs: object) -> str:
    try:
        run(*args, **kwargs, disable_tqdm=True)
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    prior = make_model("bert", exact=True)
    rows = [{"input_ids": torch.tensor([1, row, 7]), "labels": row // 7} for row in range(28)]
    messages = []
    for differs in ("rows", "weights", "nothing"):
        model = copy.deepcopy(prior)
        mine = rows[state.process_index * 14 :][:14] if differs == "rows" else rows
        if differs == "weights":
            model.classifier.bias.data += state.process_index
        messages.append(message_of(certify, model, mine, prior=prior, sigma_grid=[0.1], num_draws=13))
        messages.append(message_of(gibbs_error, model, mine, sigma=0.1, num_draws=4))
    Path(sys.argv[1], f"messages_{state.process_index}").write_text("\n".join(messages))
    leave_together()
