"""The image runs of the benchmark on a GPU: a replayed step computes what the step computes, alone or among others."""

import numpy as np
import pytest
import torch
from cifar_data import load_cifar
from cifar_settings import RunSettings
from cifar_training import CifarRun
from gpu import needs_cuda


pytestmark = needs_cuda

NUM_TRAIN, NUM_TEST = 640, 200


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    rng = np.random.default_rng(0)
    labels = np.arange(NUM_TRAIN + NUM_TEST) % 10
    images = rng.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    clean = labels[:NUM_TRAIN]
    path = tmp_path_factory.mktemp("cifar") / "cifar.npz"
    np.savez(path, x=images, y=clean, yt=labels[NUM_TRAIN:], worse=(clean + 1) % 10, aggre=clean, rand1=clean)
    data = load_cifar(str(path), torch.device("cuda"))
    torch.cuda.synchronize()
    return data


def flat_parameters(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.network.parameters()]).double()


def train(*runs):
    while not all(run.is_done for run in runs):
        for run in runs:
            if run.is_ready:
                run.advance()
    return [run.result() for run in runs]


def distance(run, other, begin):
    """Of two trainings, relative to how far they went; 16 bits and sums in any order leave a few percent."""
    moved = (flat_parameters(run) - begin).norm()
    return ((flat_parameters(run) - flat_parameters(other)).norm() / moved).item()


@pytest.mark.parametrize("method", ["ce", "auto"])
def test_replays_are_the_steps_and_streams_do_not_mix(cifar, method):
    settings = RunSettings("worst", "small", method, 2, batch_size=64, learning_rate=0.01, warmup_steps=0)
    graph, eager = (CifarRun(settings, cifar, torch.cuda.Stream(), uses_graph) for uses_graph in (True, False))
    begin = flat_parameters(graph)
    assert torch.equal(begin, flat_parameters(eager))  # what was rehearsed left no trace
    for run in (graph, eager):
        (result,) = train(run)
        assert result["is_finished"] and result["steps"] == 20
    assert distance(graph, eager, begin) < 0.1

    other = RunSettings("clean", "resnet32", "auto", 2, seed=1, batch_size=64, learning_rate=0.01)
    beside = CifarRun(settings, cifar, torch.cuda.Stream()), CifarRun(other, cifar, torch.cuda.Stream())
    train(*beside)
    assert distance(graph, beside[0], begin) < 0.1


def test_noise_that_a_replay_would_repeat_is_refused(cifar):
    settings = RunSettings("worst", "small", "logit_noise", 1, batch_size=64)
    with pytest.raises(ValueError, match="each replay of a CUDA graph would add the same noise"):
        CifarRun(settings, cifar, torch.cuda.Stream())
