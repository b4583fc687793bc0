"""Replicas of DataParallel: each runs by its own statistics, and the one on the module's device moves its state."""

import sys
import threading

import pytest
import torch
from torch import nn

from lpg_hf import LPGLoss
from lpg_hf.perturbations import ClassRelativeDampening, LogitAdjustment


C = 4
COUNTS = [9, 5, 3, 1]
METHODS = [LogitAdjustment(learned=(0.3, 0.6)), ClassRelativeDampening(learned=(0.0, 0.01), evidence=(0.0, 0.1))]
# The function of the same name hides the module.
REPLICATE = sys.modules["torch.nn.parallel.replicate"]


class Model(nn.Module):
    """A loss within a model, where alone DataParallel makes replicas of it."""

    def __init__(self, loss_fn):
        super().__init__()
        self.loss_fn = loss_fn

    def forward(self, logits, labels):
        return self.loss_fn(logits, labels)


def batch(seed, size=6):
    generator = torch.Generator().manual_seed(seed)
    logits, labels = 3 * torch.randn(size, C, generator=generator), torch.randint(C, (size,), generator=generator)
    return logits.requires_grad_(), labels


def step(model, *args):
    logits, labels = batch(*args)
    model(logits, labels).backward()
    return logits.grad


def assert_same(model, expected):
    """The gate of the dampening is only moved by the next batch."""
    found = model.loss_fn.statistics.state_dict()
    for name, tensor in expected.loss_fn.statistics.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7, msg=name)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.fixture
def replicas(monkeypatch):
    """Two replicas as PyTorch makes them. The tensors of the first are those of the module."""
    monkeypatch.setattr(REPLICATE, "_get_device_index", lambda device, optional: device)

    def broadcast(tensors, devices, detach=False):
        return [[tensor.clone() if device else tensor for tensor in tensors] for device in devices]

    monkeypatch.setattr(REPLICATE, "_broadcast_coalesced_reshape", broadcast)
    return lambda model: REPLICATE.replicate(model, [0, 1])


@pytest.mark.parametrize("counts", [COUNTS, None], ids=["counts", "counting"])
def test_each_replica_runs_by_its_own_statistics(counts, replicas):
    """Those of the second are lost, as PyTorch documents it for every buffer."""
    model, expected = (Model(LPGLoss(C, METHODS, counts)) for _ in range(2))
    for seed in range(30):
        first, second = replicas(model)
        # What the second does to its state is of the second alone.
        copy = Model(LPGLoss(C, METHODS, counts))
        copy.load_state_dict(expected.state_dict())
        for _ in range(2):
            assert_close(step(second, 100 + seed, 9), step(copy, 100 + seed, 9))
        assert_close(step(first, seed), step(expected, seed))
        assert_same(model, expected)
    assert_close(step(model, 200), step(expected, 200))
    if counts is not None:
        assert expected.loss_fn.statistics.epochs == 10 and expected.loss_fn.perturbations[1]._gate.max() > 0.5


def test_a_module_finds_the_end_of_an_epoch_that_its_replica_has_brought_near(replicas):
    model, expected = (Model(LPGLoss(C, METHODS, COUNTS)) for _ in range(2))
    first, _ = replicas(model)
    for seed, (ours, size) in enumerate([(model, 1), (model, 1), (first, 15), (model, 1)]):
        step(ours, seed, size), step(expected, seed, size)
        assert_same(model, expected)
    assert model.loss_fn.statistics.epochs == 1


def test_replicas_in_threads_of_their_own_do_not_mix_up_what_is_left(replicas):
    """Both step at the same time, and the second, which has more left, is the first to say how much."""
    model = Model(LPGLoss(C, METHODS, COUNTS))
    first, second = replicas(model)
    second_looks, first_looks = threading.Event(), threading.Event()
    thread = threading.Thread(target=step, args=(second, 0, 4))

    def before_the_end_of_an_epoch(replica, wait):
        end_epoch_where = replica.loss_fn.statistics._end_epoch_where

        def waiting(is_over):
            replica.loss_fn.statistics._end_epoch_where = end_epoch_where
            wait()
            end_epoch_where(is_over)

        replica.loss_fn.statistics._end_epoch_where = waiting

    before_the_end_of_an_epoch(second, lambda: (second_looks.set(), first_looks.wait()))
    before_the_end_of_an_epoch(first, lambda: (first_looks.set(), thread.join()))
    thread.start()
    second_looks.wait()
    step(first, 1, 16)
    step(first, 2, 1)
    step(first, 3, 1)
    assert model.loss_fn.statistics.epochs == 1
