"""LPGLoss on a GPU: it never waits, it computes what the CPU computes, and a CUDA graph can hold it."""

import pytest
import torch
from gpu import DEVICE, needs_cuda, needs_device
from method_examples import LOGIT_METHODS

from lpg_hf import LPGLoss


pytestmark = needs_device

C, N = 7, 64
CHAINS = ["auto", "lpg(strategy='accuracy')", *LOGIT_METHODS]
# An epoch ends with every second step.
LONG_TAIL = [40, 25, 15, 10, 5, 3, 2]
every_chain = pytest.mark.parametrize("chain", CHAINS)


def batch(seed, dtype=torch.float32, device=DEVICE):
    """Drawn on the CPU, so that every device gets the same one; some samples are ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(N, C, generator=generator, dtype=torch.float64)
    labels = torch.randint(C, (N,), generator=generator)
    labels[::9] = -100
    return logits.to(device, dtype).requires_grad_(), labels.to(device)


@needs_cuda
@pytest.mark.parametrize("counts", [LONG_TAIL, [100] * C, None], ids=["long tail", "balanced", "unknown"])
@every_chain
def test_a_step_never_waits_for_the_card(chain, counts):
    loss_fn = LPGLoss(C, [chain], counts).cuda()
    batches = [batch(seed) for seed in range(4)]
    for logits, labels in batches[:2]:  # the first call moves the state
        loss_fn(logits, labels).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for logits, labels in batches[2:]:
            loss_fn(logits, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(logits.grad.isfinite().all() for logits, _ in batches)


@every_chain
def test_gradients_and_statistics_are_those_of_the_cpu(chain):
    """In float64, over five steps that learn from each other."""
    if chain == "logit_noise":
        pytest.skip("the devices draw other numbers")

    def run(device):
        loss_fn, gradients = LPGLoss(C, [chain], LONG_TAIL), []
        for seed in range(5):
            logits, labels = batch(seed, torch.float64, device)
            loss_fn(logits, labels).backward()
            gradients.append(logits.grad.cpu())
        return torch.stack(gradients), {name: tensor.cpu() for name, tensor in loss_fn.state_dict().items()}

    (ours, our_state), (expected, state) = run(DEVICE), run("cpu")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    for name, tensor in state.items():
        torch.testing.assert_close(our_state[name], tensor, rtol=0, atol=1e-12, msg=name)


@needs_cuda
@every_chain
def test_a_cuda_graph_of_a_step_replays_what_the_step_computes(chain):
    """State included: each replay learns from the one before."""
    if chain == "logit_noise":
        pytest.skip("a replay draws other numbers")
    loss_fn = LPGLoss(C, [chain], LONG_TAIL).cuda()
    logits, labels = batch(0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            logits.grad = None
            loss_fn(logits, labels).backward()
    torch.cuda.current_stream().wait_stream(stream)
    logits.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss_fn(logits, labels).backward()
    eager = LPGLoss(C, [chain], LONG_TAIL).cuda()
    eager.load_state_dict({name: tensor.clone() for name, tensor in loss_fn.state_dict().items()})
    for seed in range(1, 6):
        other_logits, other_labels = batch(seed)
        with torch.no_grad():
            logits.copy_(other_logits)
            labels.copy_(other_labels)
        logits.grad.zero_()
        graph.replay()
        eager(other_logits, other_labels).backward()
        torch.testing.assert_close(logits.grad, other_logits.grad, rtol=0, atol=1e-6)
