"""The division of a loss under gradient accumulation, with the Trainer's switch and without it (before 5.19)."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny import flat_parameters, make_batch, make_model, make_trainer, split
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lpg_hf import SAM, LPGTrainer
from lpg_hf.trainer import accumulation
from lpg_hf.trainer.accumulation import StepItems


def own_loss(outputs, labels, num_items_in_batch=None):
    if num_items_in_batch is None:
        return F.cross_entropy(outputs.logits, labels)
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("has_switch", sorted({False, accumulation.HAS_SWITCH}))
@pytest.mark.parametrize("perturbations", [[], ["logit_clipping(max_norm=0.5)"], ["logit_adjustment", SAM(1e-10)]])
@pytest.mark.parametrize(
    "settings",
    [{}, {"args": {"label_smoothing_factor": 0.2}}, {"compute_loss_func": own_loss}],
    ids=["model", "smoothed", "own"],
)
@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_a_step_is_the_same_in_one_piece_or_several(name, settings, perturbations, has_switch, tmp_path, monkeypatch):
    """
    BERT takes the number of samples and ResNet does not, so only the loss of the latter is divided by the Trainer. SAM
    shifts once per micro-batch, here by too little to see.
    """
    monkeypatch.setattr(accumulation, "HAS_SWITCH", has_switch)
    batch = make_batch(name, 33, dtype=torch.float64)

    def train(sizes):
        steps = len(sizes) // 3
        args = settings.get("args", {}) | {"gradient_accumulation_steps": steps, "optim": "sgd", "learning_rate": 0.1}
        trainer = make_trainer(
            LPGTrainer,
            make_model(name, exact=True),
            split(batch, sizes),
            tmp_path,
            perturbations=perturbations,
            **(settings | {"args": args}),
        )
        trainer.train()
        assert trainer.state.global_step == 3
        return flat_parameters(trainer.model), [log["loss"] for log in trainer.state.log_history if "loss" in log]

    parameters, losses = train([11] * 3)
    split_parameters, split_losses = train([3, 3, 5] * 3)
    torch.testing.assert_close(split_parameters, parameters, rtol=0, atol=1e-9)
    torch.testing.assert_close(split_losses, losses, rtol=1e-6, atol=0)


class Refuses(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} takes a kernel")


@pytest.mark.parametrize("num_batches", [1, 2])
def test_labels_that_are_as_the_loader_made_them_are_not_counted_again(num_batches):
    """A count is a few kernels for each micro-batch on a GPU."""
    accelerator = SimpleNamespace(num_processes=1)
    trainer = SimpleNamespace(args=SimpleNamespace(n_gpu=1, label_names=None), accelerator=accelerator)
    batches = [{"labels": torch.tensor([0, 1, -100, 1])} for _ in range(num_batches)]
    num_items, items = torch.tensor(3 * num_batches), StepItems(trainer)
    with nullcontext() if num_batches > 1 else Refuses():
        items.begin(batches, num_items, torch.device("cpu"))
    labels = batches[0]["labels"]
    with Refuses():
        assert items.of_call(num_items, batches[0], labels) is num_items
    assert items.of_call(num_items, batches[0], labels[:1]) == num_batches
    labels[1] = -100
    assert items.of_call(num_items, batches[0], labels) == 2 * num_batches
