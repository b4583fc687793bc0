"""CUDA graphs of the loss on a GPU: numbers, waiting, launches, memory, and the training around them."""

import logging

import pytest
import torch
from gpu import losses_of, needs_cuda, train, weights_of
from method_examples import LOGIT_METHODS
from tiny import make_batch, make_model, split
from torch.profiler import ProfilerActivity, profile

from lpg_hf import LPGLoss, loss_graphs


pytestmark = needs_cuda

C, N = 7, 64
# An epoch of a bare loss ends with every second step.
LONG_TAIL = [40, 25, 15, 10, 5, 3, 2]
OPEN = ["logit_adjustment", "class_relative_dampening(learned=(0.0, 0.01), evidence=(0.0, 0.001))"]
CHAINS = [["auto"], OPEN, ["logit_clipping(quantile=0.7)"]]
CHAINS += [[name] for name in LOGIT_METHODS if name != "logit_noise"]


@pytest.fixture(autouse=True)
def no_failed_capture(caplog, monkeypatch):
    monkeypatch.setattr(loss_graphs.LossGraphs.__init__, "__defaults__", (True,))
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        yield
    assert not [record for record in caplog.records if "without CUDA graphs" in record.getMessage()]


def batch(seed, size=N, num_labels=C, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(size, num_labels, generator=generator)
    labels = torch.randint(num_labels, (size,), generator=generator)
    labels[::9] = -100
    return logits.to("cuda", dtype).requires_grad_(), labels.cuda()


def run(chain, uses_graphs, managed, autocast):
    loss_fn = LPGLoss(C, chain, LONG_TAIL, managed=managed).cuda()
    loss_fn.graphs.is_enabled = uses_graphs
    gradients = []
    for seed in range(24):
        logits, labels = batch(seed, (N, N, 40)[seed % 3])
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = loss_fn(logits, labels)
        loss.backward()
        gradients += [loss.detach()[None], logits.grad.flatten()]
        if managed:
            loss_fn.step()
            if seed % 6 == 5:
                loss_fn.end_epoch()
    state = {name: tensor.clone() for name, tensor in loss_fn.state_dict().items()}
    return torch.cat(gradients), state, loss_fn


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("managed", [False, True], ids=["bare", "managed"])
@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_a_loss_with_graphs_is_the_one_without(chain, managed, autocast):
    """Over several epochs and two shapes."""
    ours, state, loss_fn = run(chain, True, managed, autocast)
    expected, expected_state, _ = run(chain, False, managed, autocast)
    assert len(loss_fn.graphs) == 2 + managed
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    for name, tensor in expected_state.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-4, msg=name)


def test_neither_a_replay_nor_a_call_without_graphs_waits_for_the_card():
    for is_enabled in (True, False):
        loss_fn = LPGLoss(C, "auto", LONG_TAIL).cuda()
        loss_fn.graphs.is_enabled = is_enabled
        batches = [batch(seed) for seed in range(8)]
        for logits, labels in batches[:6]:
            loss_fn(logits, labels).backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for logits, labels in batches[6:]:
                loss_fn(logits, labels).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(loss_fn.graphs) == int(is_enabled)


def launches(function):
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        function()
        torch.cuda.synchronize()
    names = [event.key for event in profiled.key_averages() for _ in range(event.count)]
    return sum("Launch" in name or "cudaMemcpyAsync" in name or "cudaMemsetAsync" in name for name in names)


@pytest.mark.parametrize("managed", [False, True], ids=["bare", "managed"])
def test_a_step_is_a_handful_of_launches(managed):
    loss_fn = LPGLoss(C, "auto", LONG_TAIL, managed=managed).cuda()

    def step(seed=0):
        logits, labels = batch(seed)

        def run():
            loss_fn(logits, labels).backward()
            if managed:
                loss_fn.step()

        return run

    for seed in range(6):
        step(seed)()
    found = launches(step(6))
    loss_fn.graphs.is_enabled = False
    step(7)()
    eager = launches(step(8))
    print(f"launches of a step of auto, managed={managed}: {found} with graphs, {eager} without")
    assert found <= 16 < eager


@pytest.mark.parametrize(("size", "num_labels"), [(64, 10), (256, 1000), (32, 100_000)])
def test_the_memory_of_a_graph_is_a_few_matrices(size, num_labels):
    loss_fn = LPGLoss(num_labels, "auto", [1 + label % 50 for label in range(num_labels)], managed=True).cuda()
    held = []
    for seed in range(loss_graphs.WARMUP_CALLS + 2):
        logits, labels = batch(seed, size, num_labels)
        loss_fn(logits, labels).backward()
        matrix = logits.nbytes
        del logits, labels
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    kept = held[-1] - held[loss_graphs.WARMUP_CALLS - 1]
    print(f"a graph of auto at N={size}, C={num_labels} keeps {kept / 2**20:.1f} MiB, {kept / matrix:.1f} matrices")
    assert len(loss_fn.graphs) == 1
    assert kept <= 6 * matrix + 32 * 2**20  # the allocator takes memory in pieces


@pytest.mark.parametrize(
    "args",
    [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"fp16": True}, {"dataloader_num_workers": 2}],
    ids=["plain", "accumulation", "bf16", "fp16", "workers"],
)
@pytest.mark.parametrize("chain", [["auto"], OPEN, ["auto", "sam(rho=0.05)"]], ids=["auto", "open", "sam"])
def test_a_training_with_graphs_is_the_one_without(chain, args, tmp_path, monkeypatch):
    """`LPGTrainer` captures while it trains."""
    model, batches = make_model("bert", exact=True).float(), split(make_batch("bert", 80), [8] * 10)
    with_graphs = train(model, batches, tmp_path, args=args, perturbations=chain)
    assert len(with_graphs.lpg_loss.graphs) == 2
    monkeypatch.setattr(loss_graphs, "MAX_ENTRIES", 0)
    without = train(model, batches, tmp_path, args=args, perturbations=chain)
    assert len(without.lpg_loss.graphs) == 0
    is_half = "bf16" in args or "fp16" in args
    torch.testing.assert_close(weights_of(with_graphs), weights_of(without), rtol=0, atol=2e-2 if is_half else 1e-4)
    assert losses_of(with_graphs) == pytest.approx(losses_of(without), abs=2e-2 if is_half else 1e-4)
