"""A sum over processes that arrives later, here with a second process that is played by the test."""

from types import SimpleNamespace

import pytest
import torch

from lpg_hf import distributed
from lpg_hf.distributed import AsyncAllReduce


@pytest.fixture
def sent(monkeypatch):
    """Tensors under way: a sum with the process that has 10 of each is there once it is waited for."""
    sent = []

    def all_reduce(tensor, async_op):
        assert async_op
        sent.append(tensor)
        return SimpleNamespace(wait=lambda: tensor.add_(10))

    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    return sent


def test_the_sum_leaves_at_once_and_is_of_what_the_tensor_was_then(sent):
    tensor = torch.tensor([1, 2])
    pending = AsyncAllReduce(tensor, SimpleNamespace(num_processes=2))
    assert len(sent) == 1
    tensor.zero_()
    assert pending.wait().tolist() == [11, 12]
    assert pending.wait().tolist() == [11, 12]
    assert tensor.tolist() == [0, 0]


def test_one_process_sends_nothing(sent):
    accelerator = SimpleNamespace(num_processes=1, reduce=lambda tensor, reduction: tensor.clone())
    assert AsyncAllReduce(torch.tensor([1, 2]), accelerator).wait().tolist() == [1, 2]
    assert sent == []
