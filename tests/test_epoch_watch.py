"""A bare loss looks for the end of an epoch only when it may have come, and finds each at the same step as ever."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from lpg_hf import LPGLoss, epoch_watch
from lpg_hf.epoch_watch import EpochWatch, read_later


C = 4
COUNTS = [9, 5, 3, 1]


class Late:
    """Answers that arrive after a number of questions whether they have."""

    def __init__(self, delays):
        self._delays = iter(delays)

    def __call__(self, value):
        number, delay = int(value), next(self._delays, 0)
        waits = iter(range(delay))
        return lambda: number if next(waits, None) is None else None


class Looks:
    """A loss that notes at which of its steps it looked."""

    def __init__(self, loss_fn):
        self.loss_fn, self.steps = loss_fn, []
        end_epoch_where = loss_fn.statistics._end_epoch_where

        def noting(is_over):
            self.steps.append(int(loss_fn.statistics.steps))
            end_epoch_where(is_over)

        loss_fn.statistics._end_epoch_where = noting


def batch(seed, size, ignored=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, (size,), generator=generator)
    labels[:ignored] = -100
    return torch.randn(size, C, generator=generator, requires_grad=True), labels


def step(loss_fn, *args):
    logits, labels = batch(*args)
    loss_fn(logits, labels).backward()
    return logits.grad


def always_looking():
    loss_fn = LPGLoss(C, "auto", COUNTS)
    loss_fn.statistics._epoch_watch.count_step = lambda sums, is_seen: True
    return loss_fn


def assert_same(loss_fn, expected):
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loss_fn.state_dict()[name], tensor), name
    assert torch.equal(loss_fn.perturbations[1]._terms, expected.perturbations[1]._terms)


def test_a_state_that_is_loaded_brings_the_rows_that_its_epoch_lacks():
    """The loss had only begun an epoch of 100, and the state has 10 rows to go."""

    def train(loss_fn, num_rows):
        loss_fn(torch.zeros(num_rows, 2, requires_grad=True), torch.zeros(num_rows, dtype=torch.int64))

    begun, nearly = (LPGLoss(2, "auto", [50, 50]) for _ in range(2))
    train(begun, 10)
    train(nearly, 90)
    begun.load_state_dict(nearly.state_dict())
    train(begun, 10)
    assert begun.statistics.epochs == 1


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=25),
    ignored=st.lists(st.sampled_from([0, 0, 0, 1, 5, 12]), min_size=25, max_size=25),
    delays=st.lists(st.integers(0, 4), max_size=25),
    events=st.dictionaries(st.integers(0, 24), st.sampled_from(["end", "copy", "pickle", "load", "move", "graph"])),
)
def test_the_ends_are_those_of_a_loss_that_always_looks(sizes, ignored, delays, events):
    ours, expected = LPGLoss(C, "auto", COUNTS), always_looking()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epoch_watch, "read_later", Late(delays))
        for seed, (size, without_label) in enumerate(zip(sizes, ignored, strict=False)):
            event = events.get(seed)
            if event == "end":
                ours.end_epoch(), expected.end_epoch()
            elif event == "copy":
                ours = copy.deepcopy(ours)
            elif event == "pickle":
                ours = pickle.loads(pickle.dumps(ours))
            elif event == "load":
                other = LPGLoss(C, "auto", COUNTS).to(ours.statistics.prior.dtype)
                step(other, 0, 17)
                other.load_state_dict(ours.state_dict())
                ours = other
            elif event == "move":
                for loss_fn in (ours, expected):
                    loss_fn.double()
            ours.graphs.is_enabled = event == "graph"
            gradients = [step(loss_fn, seed, size, without_label) for loss_fn in (ours, expected)]
            assert torch.equal(*gradients)
            assert_same(ours, expected)


def test_without_ignored_labels_it_looks_once_at_first_and_at_the_end_of_every_epoch():
    ours = Looks(LPGLoss(C, "auto", COUNTS))
    for seed in range(12):
        step(ours.loss_fn, seed, 6)
    assert ours.loss_fn.statistics.epochs == 4
    assert ours.steps == [1, 3, 6, 9, 12]


def test_with_ignored_labels_it_looks_again_when_as_many_rows_have_come_as_were_left():
    """18 samples are an epoch. Of 6 rows, 4 have a label."""
    ours = Looks(LPGLoss(C, "auto", COUNTS))
    for seed in range(5):
        step(ours.loss_fn, seed, 6, 2)
    # 14 left after the first, so that the fourth may be the last: 2 are left then.
    assert ours.steps == [1, 4, 5] and ours.loss_fn.statistics.epochs == 1


def test_it_looks_at_every_step_until_the_answer_arrives(monkeypatch):
    monkeypatch.setattr(epoch_watch, "read_later", Late([3, 2]))
    ours = Looks(LPGLoss(C, "auto", COUNTS))
    for seed in range(10):
        step(ours.loss_fn, seed, 3)
    assert ours.steps == [1, 2, 3, 4, 6, 7, 8] and ours.loss_fn.statistics.epochs == 1


def count(watch, sums, num_rows=1, is_seen=True):
    watch.count_rows(sums, num_rows)
    return watch.count_step(sums, is_seen)


def asked_watch(sums):
    """It has been told that 100 samples are left."""
    watch = EpochWatch()
    assert count(watch, sums)
    watch.ask(lambda: torch.tensor(100))
    assert not count(watch, sums)
    return watch


@pytest.mark.parametrize("kind", ["captured", "traced"])
@pytest.mark.parametrize("part", ["rows", "step", "both"])
def test_what_a_graph_of_the_caller_replays_is_not_counted(kind, part, monkeypatch):
    """It looks at every step from then on."""
    sums = SimpleNamespace(is_cuda=kind == "captured")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    watch = asked_watch(sums)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: kind == "captured")
        patch.setattr(epoch_watch, "get_proxy_mode", lambda: object() if kind == "traced" else None)
        if part != "step":
            watch.count_rows(sums, 1)
        if part != "rows":
            assert watch.count_step(sums, is_seen=True)
    for _ in range(3):
        assert count(watch, sums)
        watch.ask(lambda: pytest.fail("nothing is read back"))
    watch.forget()
    assert count(watch, sums)


@pytest.mark.parametrize("kind", ["compiled", "not seen"])
def test_steps_that_are_not_seen_are_looked_at_and_what_follows_them_is_not_trusted(kind, monkeypatch):
    sums = torch.zeros(1)
    watch = asked_watch(sums)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: kind == "compiled")
        assert count(watch, sums, is_seen=kind == "compiled")
        watch.ask(lambda: pytest.fail("steps that are not seen may follow"))
    assert count(watch, sums)
    watch.ask(lambda: torch.tensor(100))
    assert not count(watch, sums)


def test_rows_of_a_compiled_function_are_not_trusted_either(monkeypatch):
    """Its step may be outside of it."""
    sums = torch.zeros(1)
    watch = asked_watch(sums)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        watch.count_rows(sums, 1)
    assert watch.count_step(sums, is_seen=True)


def test_a_traced_loss_finds_the_ends_that_a_loss_finds_which_always_looks():
    """It is traced at a step with which no epoch may end."""
    ours, expected = LPGLoss(C, "auto", COUNTS), always_looking()
    traced = None
    for seed in range(14):
        if seed == 1:
            traced = make_fx(lambda logits, labels: ours(logits, labels))(*batch(seed, 3))
        else:
            (ours if traced is None or seed % 5 == 0 else traced)(*batch(seed, 3))
        expected(*batch(seed, 3))
        assert_same(ours, expected)
    assert ours.statistics.epochs == 2


@pytest.mark.parametrize("at", [0, 1, 3])
def test_rows_count_that_were_added_before_the_call(at):
    """The next step has them, too. 18 samples are an epoch."""
    ours, expected = LPGLoss(C, "auto", COUNTS), always_looking()
    for seed in range(14):
        for loss_fn in (ours, expected):
            if seed == at:
                logits, labels = batch(100, 6)
                loss_fn.statistics.update(loss_fn.batch_of(logits.detach(), labels))
            step(loss_fn, seed, 3)
        assert_same(ours, expected)
    assert ours.statistics.epochs == 2


def test_rows_count_whose_step_was_interrupted(monkeypatch):
    """They are part of the next step."""
    ours, expected = LPGLoss(C, "auto", COUNTS), always_looking()

    def interrupt(*args):
        raise KeyboardInterrupt

    for seed in range(14):
        for loss_fn in (ours, expected):
            if seed == 2:
                with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    patch.setattr(loss_fn._telemetry, "record", interrupt)
                    step(loss_fn, 100, 6)
            step(loss_fn, seed, 3)
        assert_same(ours, expected)
    assert ours.statistics.epochs == 2


def test_sums_that_others_bring_along_begin_anew():
    """What was answered about those of the loss says nothing about them."""
    ours, other = LPGLoss(C, "auto", COUNTS), LPGLoss(C, "auto", COUNTS)
    step(other, 0, 17)
    step(ours, 1, 3), step(ours, 2, 3)
    buffers = dict(other.named_buffers())
    torch.func.functional_call(ours, buffers, batch(3, 3))
    assert buffers["statistics.epochs"] == 1
    # Nor the other way round.
    for seed in range(4, 8):
        step(ours, seed, 3)
    assert ours.statistics.epochs == 1


def test_other_devices_do_not_answer():
    assert read_later(torch.tensor(3, device="meta"))() is None
    assert read_later(torch.tensor(3))() == 3


def test_counts_beyond_the_precision_of_float32_are_exact():
    counts = [2**24, 2**24, 2**24, 3]
    statistics = LPGLoss(C, "auto", counts).statistics
    statistics._epoch_sums[0] = torch.tensor([2.0**24, 2.0**24, 2.0**24, 2.0])
    assert statistics._samples_left() == 1
