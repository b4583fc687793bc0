"""Graphs of a loss, with a recorder in the place of CUDA: the numbers are those of the loss without graphs."""

import copy
import logging
import pickle

import pytest
import torch
from method_examples import LOGIT_METHODS
from recorded_step import RecordedStep
from torch import nn

from lpg_hf import LPGLoss, loss_graphs
from lpg_hf.loss_graphs import MAX_GRAPHS, WARMUP_CALLS
from lpg_hf.perturbations import LPG, ClassRelativeDampening, LogitClipping


C = 6
# An epoch of a bare loss ends with every third step.
COUNTS = [16, 9, 5, 3, 2, 1]
# Gates that are open from the second epoch on.
OPEN = ["logit_adjustment(learned=(0.05, 0.2))", "class_relative_dampening(learned=(0.0, 0.01), evidence=(0.0, 0.1))"]
CHAINS = {name: [name] for name in LOGIT_METHODS if name != "logit_noise"}
CHAINS |= {"auto": ["auto"], "open": OPEN, "quantile": ["logit_clipping(quantile=0.7)", "label_smoothing(0.2)"]}
CHAINS |= {"prior": ["auto", "label_smoothing(target='prior')"]}


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    RecordedStep.reset()
    monkeypatch.setattr(loss_graphs, "CapturedStep", RecordedStep)
    monkeypatch.setattr(loss_graphs.LossGraphs.__init__, "__defaults__", (True,))


def batch(seed, size=20, dtype=torch.float32, num_labels=C):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_labels, (size,), generator=generator)
    logits = 2 * torch.randn(size, num_labels, generator=generator)
    logits += 3 * nn.functional.one_hot(labels, num_labels) * (torch.rand(size, 1, generator=generator) < 0.7)
    labels[::7] = -100
    return logits.to(dtype).requires_grad_(), labels


class Pair:
    """The same loss with and without graphs, which see the same batches."""

    def __init__(self, chain=OPEN, counts=COUNTS, **kwargs):
        self.ours, self.expected = (LPGLoss(C, chain, counts, **kwargs) for _ in range(2))
        self.expected.graphs.is_enabled = False

    def each(self, function):
        for loss_fn in (self.ours, self.expected):
            function(loss_fn)

    def step(self, seed, with_model_loss=False, **kwargs):
        """One call of each, which must agree to the last bit."""
        found = []
        for loss_fn in (self.ours, self.expected):
            logits, labels = batch(seed, **kwargs)
            given = {}
            if with_model_loss:
                given = {"num_items_in_batch": 30, "model_loss": nn.functional.cross_entropy(logits, labels)}
            loss = loss_fn(logits, labels, **given)
            (2 * loss).backward()
            weights = [method.last_weight for method in loss_fn.perturbations if hasattr(method, "last_weight")]
            found.append([loss.detach(), logits.grad, *weights])
        assert all(map(torch.equal, *found))

    def check(self):
        state, expected = self.ours.state_dict(), self.expected.state_dict()
        for name, tensor in expected.items():
            assert torch.equal(state[name], tensor), name
        assert self.ours.telemetry() == self.expected.telemetry()


# The numbers.


@pytest.mark.parametrize("counts", [COUNTS, None], ids=["counts", "counting"])
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_a_bare_loss_is_the_same_over_epochs(chain, counts):
    pair = Pair(chain, counts, eval_shares=[1.0] * C)
    for seed in range(12):
        pair.step(seed)
    assert len(pair.ours.graphs) == 1 and RecordedStep.num_replays == 12 - WARMUP_CALLS + 1  # and one to compare
    assert pair.ours.statistics.epochs == (0 if counts is None else 4)
    pair.check()


def test_a_bare_loss_finds_the_end_of_its_epochs_with_graphs_and_between_them():
    """A replay counts samples that the host does not see."""
    pair = Pair(eval_shares=[1.0] * C)
    for seed in range(40):
        pair.ours.graphs.is_enabled = seed % 11 < 7
        pair.step(seed, size=5)
    assert RecordedStep.num_replays >= 10 and pair.ours.statistics.epochs > 3
    pair.check()


@pytest.mark.parametrize("counts", [COUNTS, None], ids=["counts", "counting"])
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_a_managed_loss_is_the_same_over_steps_of_two_micro_batches(chain, counts):
    """Its epochs end outside of the graphs."""
    pair = Pair(chain, counts, managed=True)
    for seed in range(16):
        pair.step(seed, with_model_loss=True)
        if seed % 2 == 1:
            pair.each(LPGLoss.step)
        if seed % 4 == 3:
            pair.each(LPGLoss.end_epoch)
    assert len(pair.ours.graphs) == 2  # one for the gradient, one for the end of a step
    assert pair.ours.statistics.steps == 8 and pair.ours.statistics.epochs == 4
    pair.check()


def test_a_gate_that_opens_between_two_replays_dampens():
    pair = Pair(managed=True)
    for seed in range(10):
        pair.step(seed)
        pair.each(LPGLoss.step)
        if seed == 6:
            weight = pair.ours.perturbations[1].last_weight
            assert RecordedStep.num_replays > 0 and (weight[weight > 0] == 1).all()  # ignored samples have 0
            pair.each(LPGLoss.end_epoch)
    weight = pair.ours.perturbations[1].last_weight
    assert weight[weight > 0].min() < 0.5
    assert RecordedStep.num_captured == 2


def test_every_shape_has_its_graph():
    pair = Pair()
    for seed in range(30):
        pair.step(seed, size=(20, 20, 13, 7)[seed % 4])
    assert len(pair.ours.graphs) == 3
    pair.check()


def test_the_two_kinds_of_losses_have_graphs_of_their_own():
    pair = Pair()
    for seed in range(14):
        pair.step(seed, with_model_loss=seed % 2 == 0)
    assert len(pair.ours.graphs) == 2
    pair.check()


def test_gradients_outlive_the_next_call():
    """As where micro-batches are added up before one backward pass."""
    pair = Pair()
    for seed in range(6):
        pair.step(seed)
    gradients = []
    for loss_fn in (pair.ours, pair.expected):
        batches = [batch(seed) for seed in (7, 8, 9)]
        losses = [loss_fn(*each) for each in batches]
        weight = loss_fn.perturbations[1].last_weight
        sum(losses).backward()
        gradients.append([*(logits.grad for logits, _ in batches), *losses, weight])
    assert all(map(torch.equal, *gradients))


def test_half_precision_and_float64():
    pair = Pair()
    # The state moves to float64, and stays there.
    for dtype, num_graphs in ((torch.bfloat16, 1), (torch.float64, 1), (torch.float32, 2)):
        for seed in range(6):
            pair.step(seed, dtype=dtype)
        assert len(pair.ours.graphs) == num_graphs
    pair.check()


# What changes the rule.


def test_a_state_that_is_loaded_is_seen():
    pair = Pair()
    start = copy.deepcopy(pair.ours.state_dict())
    for seed in range(10):
        pair.step(seed)
        if seed == 6:
            pair.each(lambda loss_fn: loss_fn.load_state_dict(start))
    assert RecordedStep.num_captured == 1
    pair.check()


def test_a_setting_that_is_changed_is_seen():
    pair = Pair()
    for seed in range(20):
        pair.step(seed)
        if seed == 7:
            pair.each(lambda loss_fn: setattr(loss_fn.perturbations[1], "power", 1.0))
        if seed == 14:
            pair.each(lambda loss_fn: setattr(loss_fn.perturbations[0], "learned", (0.1, 0.9)))
    assert RecordedStep.num_captured == 3
    pair.check()


def test_a_state_that_moves_is_captured_anew():
    pair = Pair()
    for seed in range(12):
        pair.step(seed)
        if seed == 6:
            pair.each(LPGLoss.double)
    assert RecordedStep.num_captured == 2
    pair.check()


@pytest.mark.parametrize("eval_shares", [None, [1.0] * C], ids=["training shares", "uniform"])
def test_a_correction_that_is_added_is_seen(eval_shares):
    """By the judgment of labels, unless there was an offset for it before, and by their fit."""
    pair = Pair(["class_relative_dampening(learned=(0.0, 0.01), evidence=(0.0, 0.1))"], eval_shares=eval_shares)
    for seed in range(14):
        pair.step(seed)
        if seed == 6:
            pair.each(lambda loss_fn: loss_fn.statistics.add_correction(lambda statistics: statistics.prior.log()))
    pair.check()


# What no graph holds.


def test_frozen_calls_and_observed_ones_run_as_they_are():
    pair, seen = Pair(), []
    for seed in range(8):
        pair.step(seed)
    replays = RecordedStep.num_replays
    for loss_fn in (pair.ours, pair.expected):
        logits, labels = batch(8)
        with loss_fn.frozen():
            loss_fn(logits, labels).backward()
        logits, labels = batch(9)
        loss_fn(logits, labels, observer=seen.append).backward()
    assert RecordedStep.num_replays == replays
    assert torch.equal(*seen) and seen[0].abs().max() > 0
    pair.step(10)
    pair.check()


class Counting(LogitClipping):
    """It counts on the host, as users' methods may."""

    calls = 0

    def weight(self, gradient, batch, statistics):
        self.calls += 1
        return super().weight(gradient, batch, statistics) / self.calls


@pytest.mark.parametrize("method", ["logit_noise", Counting(0.5), LPG(sync=True)], ids=repr)
def test_methods_that_need_the_host_run_as_they_are(method):
    loss_fn = LPGLoss(C, [method], COUNTS)
    for seed in range(8):
        loss_fn(*batch(seed)).backward()
    assert RecordedStep.num_captured == 0
    assert not isinstance(method, Counting) or loss_fn.perturbations[0].calls == 8


def test_a_users_loss_and_a_capture_of_the_users_run_as_they_are():
    squares = LPGLoss(C, "auto", COUNTS, base_loss=lambda logits, labels: logits.square().sum(-1))
    for seed in range(8):
        squares(*batch(seed)).backward()
    RecordedStep.possible = False
    captured = LPGLoss(C, "auto", COUNTS)
    for seed in range(8):
        captured(*batch(seed)).backward()
    assert RecordedStep.num_captured == 0


def test_there_are_few_graphs_and_none_of_large_matrices(monkeypatch):
    pair = Pair()
    for size in range(10, 10 + MAX_GRAPHS + 2):
        for seed in range(6):
            pair.step(seed, size=size)
    assert len(pair.ours.graphs) == MAX_GRAPHS
    pair.check()
    monkeypatch.setattr(loss_graphs, "MAX_ENTRIES", 20 * C - 1)
    large = Pair()
    for seed in range(6):
        large.step(seed)
    assert len(large.ours.graphs) == 0


def test_after_a_failed_capture_the_loss_goes_on_without_graphs(caplog):
    RecordedStep.fails = True
    pair = Pair()
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        for seed in range(10):
            pair.step(seed)
    assert [record.getMessage() for record in caplog.records] == [
        "The loss runs without CUDA graphs, which takes longer: no memory for a graph"
    ]
    assert not pair.ours.graphs.is_enabled
    pair.check()  # what the failed capture did to the state is undone


@pytest.mark.parametrize("wrong", [{"error": 0.01}, {"error": torch.nan}, {"is_empty": True}], ids=str)
@pytest.mark.parametrize("managed", [False, True], ids=["bare", "managed"])
def test_a_graph_that_computes_something_else_is_never_used(managed, wrong, monkeypatch, caplog):
    for name, value in wrong.items():
        monkeypatch.setattr(RecordedStep, name, value)
    pair = Pair(managed=managed)
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        for seed in range(10):
            pair.step(seed)
            if managed:
                pair.each(LPGLoss.step)
    (record,) = caplog.records
    assert record.getMessage().endswith("takes longer: its first replay gives other numbers than the loss itself")
    assert len(pair.ours.graphs) == 0 and not pair.ours.graphs.is_enabled and RecordedStep.num_replays == 1
    pair.check()


def pickled(loss_fn):
    return pickle.loads(pickle.dumps(loss_fn))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_has_its_own_graphs(copied):
    pair = Pair()
    for seed in range(6):
        pair.step(seed)
    pair.ours = copied(pair.ours)
    assert len(pair.ours.graphs) == 0
    for seed in range(6, 12):
        pair.step(seed)
    assert len(pair.ours.graphs) == 1 and RecordedStep.num_captured == 2
    pair.check()


def test_a_replica_of_data_parallel_runs_as_it_is():
    pair = Pair()
    for seed in range(6):
        pair.step(seed)
    replays = RecordedStep.num_replays
    replica = pair.ours._replicate_for_data_parallel()
    replica.training = True
    replica(*batch(0)).backward()
    assert RecordedStep.num_replays == replays


def test_dampening_of_a_loss_without_a_graph_is_not_disturbed_by_one_with():
    """The last weights are those of the last call, whichever way it went."""
    pair = Pair([ClassRelativeDampening(learned=(0.0, 0.01), evidence=(0.0, 0.1))])
    for seed in range(20):
        pair.step(seed, size=20 if seed % 3 else 13 + seed)
    pair.check()
