import copy
import math
from collections import Counter

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpg_hf.batch import LogitBatch
from lpg_hf.class_means import SURE
from lpg_hf.class_shares import min_counted_samples
from lpg_hf.statistics import ClassStatistics


NUM_CLASSES = 4
IGNORED = -100
RUNNING = ["accuracy", "label_prob", "mean_weight"]
OF_EPOCHS = ["confidence_ratio", "decidedness", "confident_error_rate", "last_label_prob"]
MEANS = RUNNING + OF_EPOCHS
few_examples = settings(max_examples=20, deadline=None, derandomize=True)


@st.composite
def steps(draw, max_steps=4, max_samples=9):
    """Batches of some optimizer steps, some of them without a labeled sample."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    drawn = []
    for _ in range(draw(st.integers(1, max_steps))):
        labels = draw(st.lists(st.sampled_from([IGNORED, *range(NUM_CLASSES)]), max_size=max_samples))
        scale = draw(st.sampled_from([0.1, 1.0, 5.0]))
        logits = scale * torch.randn(len(labels), NUM_CLASSES, dtype=torch.float64, generator=generator)
        drawn.append((logits, torch.tensor(labels, dtype=torch.int64)))
    return drawn


def random_steps(count=5, num_samples=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        logits = 2 * torch.randn(num_samples, NUM_CLASSES, dtype=torch.float64, generator=generator)
        yield logits, torch.randint(NUM_CLASSES, (num_samples,), generator=generator)


def weights_of(labels):
    """Some weights, as dampening would give them; not 1 for ignored samples either."""
    return 1 / (1 + torch.arange(len(labels), dtype=torch.float64) % 3)


def train(statistics, batches):
    for logits, labels in batches:
        statistics.update(LogitBatch(logits, labels), weights_of(labels).to(logits))
        statistics.step()
    return statistics


def reference_of(batches):
    statistics = reference.RunningStatistics(NUM_CLASSES)
    for logits, labels in batches:
        statistics.update(logits.numpy(), labels.tolist(), weights_of(labels).tolist())
    return statistics


def assert_equal(actual, expected, tolerance):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=tolerance)


def assert_same_state(statistics, other, tolerance=1e-12):
    for name in [*MEANS, "_epoch_sums", "class_counts", "prior", "steps", "epochs"]:
        assert_equal(getattr(statistics, name), getattr(other, name), tolerance)


# Running means.


@few_examples
@given(steps())
def test_running_means_and_counts_equal_the_reference(batches):
    statistics = train(ClassStatistics(NUM_CLASSES).double(), batches)
    expected = reference_of(batches)
    for _ in range(2):
        for name in MEANS:
            assert_equal(getattr(statistics, name), getattr(expected, name), 1e-12)
        statistics.end_epoch()
        expected.end_epoch(statistics.prior.tolist())
    assert statistics.class_counts.tolist() == expected.counts.tolist()
    assert statistics.steps.item() == len(batches)


def test_float32_running_means_equal_the_reference_also_for_saturated_logits():
    batches = [(logits.float() * 20, labels) for logits, labels in random_steps()]
    statistics, expected = train(ClassStatistics(NUM_CLASSES), batches), reference_of(batches)
    statistics.end_epoch()
    expected.end_epoch(statistics.prior.tolist())
    for name in MEANS:
        assert getattr(statistics, name).dtype == torch.float32
        assert max(getattr(expected, name)) > 0.01
        np.testing.assert_allclose(getattr(statistics, name), getattr(expected, name), rtol=1e-5)


def test_means_of_a_step_have_weight_n_over_n_plus_20():
    # Class 0 is predicted with certainty; class 1, too, but always as class 0.
    logits = torch.tensor([[30.0, -30.0]]).repeat(15, 1).double()
    labels = torch.tensor([0] * 10 + [1] * 5)
    statistics = train(ClassStatistics(2).double(), [(logits, labels)])
    assert_equal(statistics.accuracy, [10 / 30, 0], 1e-12)
    assert_equal(statistics.label_prob, [10 / 30, 0], 1e-12)
    train(statistics, [(logits, labels)])
    assert_equal(statistics.accuracy[0], 10 / 30 + 10 / 30 * (1 - 10 / 30), 1e-12)


@pytest.mark.parametrize("waits_for_epoch", [True, False])
def test_each_epoch_makes_half_of_the_means_of_epochs(waits_for_epoch):
    """Given the counts, a loss of its own ends an epoch when as many samples were seen."""
    statistics = ClassStatistics(2, [2, 2], waits_for_epoch).double()
    labels = torch.tensor([0, 0, 1, 1])
    expected, epochs = None, []
    for probabilities in ([0.9, 0.5, 0.8, 0.04], [0.7, 0.06, 0.5, 0.6], [0.2, 0.1, 0.3, 0.02]):
        rows = [[p, 1 - p] if label == 0 else [1 - p, p] for p, label in zip(probabilities, [0, 0, 1, 1], strict=True)]
        logits = torch.tensor(rows, dtype=torch.float64).log()
        for part in (slice(0, 3), slice(3, 4)):
            statistics.update(LogitBatch(logits[part], labels[part]))
            statistics.step()
        if waits_for_epoch:
            statistics.end_epoch()
        ratios = np.array([min(p / (1 - p), 1.0) for p in probabilities]).reshape(2, 2)
        new = np.stack([ratios.mean(1), (ratios < 0.1).mean(1)])
        expected = new if expected is None else (expected + new) / 2
        epochs.append(torch.stack([statistics.confidence_ratio, statistics.confident_error_rate]))
        assert_equal(epochs[-1], expected, 1e-12)
        assert torch.equal(statistics.last_label_prob, statistics.label_prob)
    assert statistics.epochs == 3
    assert (epochs[0] != epochs[1]).any()


def test_the_errors_of_all_classes_rise_from_their_smallest_share():
    """Of 20 samples of two classes, that share is .4, .2, .5 and .1 in four epochs; each makes half of its mean."""
    statistics = ClassStatistics(2, [10, 10], waits_for_epoch=True).double()
    rises, labels = [], torch.arange(20) % 2
    for wrong in (8, 4, 10, 2):
        logits = 5 * torch.eye(2, dtype=torch.float64)[torch.where(torch.arange(20) < wrong, 1 - labels, labels)]
        train(statistics, [(logits, labels)])
        statistics.end_epoch()
        rises.append(statistics.error_rise.item())
    # The means are .4, .3, .4 and .25.
    assert_equal(rises, [0, 0, 0.1, 0], 1e-12)


@few_examples
@given(batches=steps(), counts=st.lists(st.integers(1, 9), min_size=NUM_CLASSES, max_size=NUM_CLASSES))
def test_errors_as_a_share_of_the_missing_belief_and_their_rise_equal_the_reference(batches, counts):
    statistics = ClassStatistics(NUM_CLASSES, counts, waits_for_epoch=True).double()
    expected = reference.RunningStatistics(NUM_CLASSES)
    for logits, labels in batches:
        train(statistics, [(logits, labels)])
        statistics.end_epoch()
        expected.update(logits.numpy(), labels.tolist())
        expected.end_epoch(statistics.prior.tolist())
        assert_equal(statistics.error_share, expected.error_share, 1e-9)
        assert_equal(statistics.error_rise, expected.error_rise, 1e-12)
        assert 0 <= statistics.error_share <= 1 / 0.9 + 1e-12


def test_errors_of_a_model_that_is_not_sure_of_itself_are_no_smallest_share():
    """One that begins to contradict labels, and right ones too, does not open the gates by that."""
    statistics = ClassStatistics(2, [10, 10], waits_for_epoch=True).double()
    labels, shares, rises = torch.arange(20) % 2, [], []
    for scale, wrong in ((0.1, 4), (5.0, 12), (5.0, 16)):
        logits = scale * torch.eye(2, dtype=torch.float64)[torch.where(torch.arange(20) < wrong, 1 - labels, labels)]
        train(statistics, [(logits, labels)])
        statistics.end_epoch()
        shares.append(statistics.error_share.item())
        rises.append(statistics.error_rise.item())
    # The means of the contradicted share are 0, .3 and .55.
    assert shares[0] == 0 and SURE < shares[1] < shares[2]
    assert_equal(rises, [0, 0, 0.25], 1e-12)


def test_a_belief_that_is_all_or_nothing_is_decided():
    statistics = ClassStatistics(3, [4, 4, 4], waits_for_epoch=True).double()
    rho = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5, 0.25, 0.75, 0.25, 0.75], dtype=torch.float64)
    labels = torch.arange(12) // 4
    logits = torch.zeros(12, 3, dtype=torch.float64)
    logits[torch.arange(12), (labels + 1) % 3] = -rho.clamp(min=1e-300).log()
    train(statistics, [(logits, labels)])
    assert (statistics.decidedness == 0).all()
    statistics.end_epoch()
    assert_equal(statistics.decidedness, [1, 0, 0.25], 1e-12)


def test_a_class_that_an_epoch_did_not_have_keeps_its_means_of_epochs():
    statistics = train(ClassStatistics(NUM_CLASSES).double(), random_steps())
    statistics.end_epoch()
    before = copy.deepcopy(statistics)
    logits = torch.randn(6, NUM_CLASSES, generator=torch.Generator().manual_seed(1)).double()
    train(statistics, [(logits, torch.tensor([1, 1, 1, 3, 3, IGNORED]))])
    statistics.end_epoch()
    for name in OF_EPOCHS:
        assert torch.equal(getattr(statistics, name)[[0, 2]], getattr(before, name)[[0, 2]])
        assert (getattr(statistics, name)[[1, 3]] != getattr(before, name)[[1, 3]]).any()


def test_without_counts_no_epoch_ends_by_itself():
    statistics = train(ClassStatistics(NUM_CLASSES), list(random_steps(count=200)))
    assert statistics.epochs == 0 and (statistics.confidence_ratio == 0).all()


# The shares of the evaluation.


def test_labels_are_judged_like_the_training_set_by_default():
    assert_equal(ClassStatistics(3, [6, 3, 1]).judged_offset, [0, 0, 0], 1e-7)


@given(st.lists(st.integers(1, 1000), min_size=3, max_size=3), st.lists(st.integers(1, 1000), min_size=3, max_size=3))
def test_the_offset_leads_from_the_shares_of_the_logits_to_those_of_the_evaluation(counts, shares):
    """`log pi_eval - log pi_out`, where corrections change `pi_out` from the shares of the training."""
    statistics = ClassStatistics(3, counts, eval_shares=shares).double()
    counts, shares = np.array(counts, dtype=float), np.array(shares, dtype=float)

    def centered(values):
        return np.asarray(values) - np.mean(np.asarray(values))

    assert_equal(centered(statistics.judged_offset), centered(np.log(shares / counts)), 1e-6)
    statistics.add_correction(lambda statistics: statistics.prior_terms.log_rarity)  # to all classes alike
    assert_equal(centered(statistics.judged_offset), centered(np.log(shares)), 1e-6)
    assert_equal(centered(statistics.log_output_shares), np.zeros(3), 1e-6)


def test_corrections_follow_a_prior_that_is_being_counted():
    statistics = ClassStatistics(2, eval_shares=[1.0, 1.0]).double()
    statistics.add_correction(lambda statistics: 0.5 * statistics.prior_terms.log_rarity)
    train(statistics, [(torch.zeros(30, 2).double(), torch.zeros(30, dtype=torch.int64))])
    # Counts of 40 and 10 with the ten more of each; half of their logarithm is corrected.
    difference = statistics.judged_offset[1] - statistics.judged_offset[0]
    assert_equal(difference, 0.5 * math.log(4), 1e-12)


@pytest.mark.parametrize("shares", [[1.0, 2.0], [1.0, -1.0, 2.0], [0.0, 0.0, 0.0], [1.0, math.nan, 1.0]])
def test_bad_eval_shares_are_refused(shares):
    with pytest.raises(ValueError, match="`eval_shares` must be 3 numbers, one per class"):
        ClassStatistics(3, eval_shares=shares)


# Running means, once more.


def test_classes_absent_from_a_step_keep_their_means():
    statistics = train(ClassStatistics(NUM_CLASSES), random_steps())
    before = copy.deepcopy(statistics)
    logits = torch.randn(6, NUM_CLASSES, generator=torch.Generator().manual_seed(1))
    train(statistics, [(logits, torch.tensor([1, 1, 1, 3, 3, IGNORED]))])
    for name in RUNNING:
        assert torch.equal(getattr(statistics, name)[[0, 2]], getattr(before, name)[[0, 2]])
    assert (statistics.label_prob[[1, 3]] != before.label_prob[[1, 3]]).all()


def test_a_step_without_samples_counts_as_a_step_and_changes_nothing_else():
    statistics = train(ClassStatistics(NUM_CLASSES), random_steps())
    before = copy.deepcopy(statistics)
    train(statistics, [(torch.zeros(0, NUM_CLASSES), torch.zeros(0, dtype=torch.int64))])
    statistics.step()
    assert statistics.steps == before.steps + 2
    for name in [*MEANS, "class_counts"]:
        assert torch.equal(getattr(statistics, name), getattr(before, name))


def test_updates_show_only_after_the_step():
    statistics = train(ClassStatistics(NUM_CLASSES), random_steps())
    before = copy.deepcopy(statistics)
    for logits, labels in random_steps(seed=1):
        statistics.update(LogitBatch(logits, labels))
    assert_same_state(statistics, before, tolerance=0)
    statistics.step()
    assert (statistics.label_prob != before.label_prob).all()


def test_ignored_samples_leave_no_trace_whatever_their_logits():
    (logits, labels), *_ = random_steps()
    dirty = torch.cat([logits, torch.tensor([[math.nan] * 4, [math.inf] * 4, [50.0, 0, 0, 0]]).double()])
    dirty_labels = torch.cat([labels, torch.full((3,), IGNORED)])
    with_ignored = train(ClassStatistics(NUM_CLASSES).double(), [(dirty, dirty_labels)])
    assert_same_state(with_ignored, train(ClassStatistics(NUM_CLASSES).double(), [(logits, labels)]), tolerance=0)


def test_an_update_keeps_no_graph():
    statistics = ClassStatistics(NUM_CLASSES)
    statistics.update(LogitBatch(torch.zeros(2, NUM_CLASSES, requires_grad=True) * 1, torch.tensor([0, 1])))
    statistics.step()
    assert not statistics.label_prob.requires_grad
    assert not list(statistics.parameters())


# Micro-batches and processes.


@few_examples
@given(batches=steps(), data=st.data())
def test_splitting_a_step_into_micro_batches_changes_nothing(batches, data):
    whole = train(ClassStatistics(NUM_CLASSES).double(), batches)
    split = ClassStatistics(NUM_CLASSES).double()
    for logits, labels in batches:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(labels)), max_size=3)))
        sizes = np.diff([0, *cuts, len(labels)]).tolist()
        parts = zip(logits.split(sizes), labels.split(sizes), weights_of(labels).split(sizes), strict=True)
        for part, part_labels, weight in parts:
            split.update(LogitBatch(part, part_labels), weight)
        split.step()
    assert_same_state(split, whole)


def step_together(processes):
    """Steps as if the pending sums of all processes were all-reduced."""
    pending = []
    for process in processes:
        copy.deepcopy(process).step(reduce=lambda tensor: pending.append(tensor.clone()) or tensor)
    calls = []
    for process in processes:
        process.step(reduce=lambda tensor: calls.append(tensor) or sum(pending))
    assert len(calls) == len(processes)  # one collective a step


@few_examples
@given(batches=steps(), data=st.data())
def test_two_processes_end_up_with_the_statistics_of_one(batches, data):
    whole = train(ClassStatistics(NUM_CLASSES).double(), batches)
    processes = [ClassStatistics(NUM_CLASSES).double() for _ in range(2)]
    for logits, labels in batches:
        cut = data.draw(st.integers(0, len(labels)))
        weight = weights_of(labels)
        processes[0].update(LogitBatch(logits[:cut], labels[:cut]), weight[:cut])
        processes[1].update(LogitBatch(logits[cut:], labels[cut:]), weight[cut:])
        step_together(processes)
    for process in processes:
        assert_same_state(process, whole)


def test_a_reduction_in_place_does_not_leak_into_the_next_step():
    batches = list(random_steps())
    doubled = ClassStatistics(NUM_CLASSES).double()
    for logits, labels in batches:
        doubled.update(LogitBatch(logits, labels), weights_of(labels))
        doubled.step(reduce=lambda tensor: tensor.mul_(2))
    twice = ClassStatistics(NUM_CLASSES).double()
    for logits, labels in batches:
        weight = weights_of(labels)
        twice.update(LogitBatch(torch.cat([logits] * 2), torch.cat([labels] * 2)), torch.cat([weight] * 2))
        twice.step()
    assert_same_state(doubled, twice)


# The prior.


def test_given_counts_make_the_prior_and_are_not_changed_by_training():
    statistics = train(ClassStatistics(NUM_CLASSES, [6, 0, 1, 3]), random_steps())
    assert statistics.class_counts.tolist() == [6, 0, 1, 3]
    assert_equal(statistics.prior, [0.6, 0, 0.1, 0.3], 1e-7)


def test_given_counts_are_copied():
    counts = torch.tensor([6.0, 4.0])
    statistics = ClassStatistics(2, counts)
    counts.zero_()
    assert statistics.class_counts.tolist() == [6, 4]


def test_without_counts_the_prior_is_that_of_the_samples_seen_and_ten_more_of_each_class():
    batches = list(random_steps())
    statistics = train(ClassStatistics(NUM_CLASSES).double(), batches)
    labels = torch.cat([labels for _, labels in batches]).tolist()
    counts = [labels.count(c) for c in range(NUM_CLASSES)]
    assert_equal(statistics.prior, reference.running_prior(counts), 1e-15)
    assert_equal(ClassStatistics(NUM_CLASSES).prior, [0.25] * 4, 0)


def test_a_prior_that_is_not_ready_is_uniform_and_counts_on():
    statistics = ClassStatistics(NUM_CLASSES, waits_for_epoch=True).double()
    train(statistics, [(torch.zeros(30, NUM_CLASSES), torch.zeros(30, dtype=torch.int64))])
    assert statistics.prior.tolist() == [0.25] * 4
    statistics.end_epoch()
    assert_equal(statistics.prior, np.array([40, 10, 10, 10]) / 70, 1e-15)


@pytest.mark.parametrize(("num_labels", "enough"), [(4, 1000), (50, 1000), (200, 4000)])
def test_a_prior_is_ready_after_enough_samples_without_an_end_of_the_epoch(num_labels, enough):
    """A stream that is read once has no second epoch."""
    assert min_counted_samples(num_labels) == enough
    statistics = ClassStatistics(num_labels, waits_for_epoch=True).double()
    labels = torch.arange(enough) % 3
    logits = torch.zeros(enough, num_labels, dtype=torch.float64)
    train(statistics, [(logits[1:], labels[1:])])
    assert statistics.prior.tolist() == [1 / num_labels] * num_labels
    train(statistics, [(logits[:1], labels[:1])])
    counts = labels.bincount(minlength=num_labels).numpy() + 10
    assert_equal(statistics.prior, counts / counts.sum(), 1e-15)


def test_given_counts_do_not_wait_to_be_ready():
    statistics = ClassStatistics(2, [3, 1], waits_for_epoch=True)
    assert statistics.prior.tolist() == [0.75, 0.25]


def test_num_labels_and_dtype():
    statistics = ClassStatistics(7)
    assert statistics.num_labels == 7
    assert ClassStatistics(2, [1, 2]).class_counts.dtype == torch.int64
    assert statistics.steps.dtype == torch.int64


# Checkpoints.


@pytest.mark.parametrize("counts", [None, [5, 2, 0, 1]])
def test_state_dict_round_trip_goes_on_bit_for_bit(counts):
    batches = list(random_steps(count=8))
    unbroken = train(ClassStatistics(NUM_CLASSES, counts), batches)
    saved = copy.deepcopy(train(ClassStatistics(NUM_CLASSES, counts), batches[:3]).state_dict())
    resumed = ClassStatistics(NUM_CLASSES, counts)
    resumed.load_state_dict(saved)
    train(resumed, batches[3:])
    assert_same_state(resumed, unbroken, tolerance=0)


def test_the_prior_of_given_counts_follows_a_state_that_is_loaded_and_the_dtype():
    statistics, other = ClassStatistics(2, [1, 3]), ClassStatistics(2, [4, 1])
    assert statistics.prior.tolist() == [0.25, 0.75]
    statistics.load_state_dict(other.state_dict())
    assert_equal(statistics.prior, [0.8, 0.2], 1e-7)
    assert_equal(statistics.double().prior, [0.8, 0.2], 1e-15)


def test_state_dict_holds_no_pending_sums():
    statistics = train(ClassStatistics(NUM_CLASSES), random_steps())
    before = copy.deepcopy(statistics.state_dict())
    statistics.update(LogitBatch(torch.randn(3, NUM_CLASSES), torch.tensor([0, 1, 2])))
    after = statistics.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# Errors.


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([5, 2], r"`class_counts` has shape \[2\], but there are 3 classes. Pass one count per class"),
        ([5, 2, 1, 1], r"`class_counts` has shape \[4\], but there are 3 classes. Pass one count per class"),
        ([[5, 2, 1]], r"`class_counts` has shape \[1, 3\], but there are 3 classes. Pass one count per class"),
        ([], r"`class_counts` has shape \[0\], but there are 3 classes. Pass one count per class"),
        ([5, -2, 1], r"`class_counts` must be finite and not negative.*found \[5, -2, 1\].*lpg_hf.data.class_counts"),
        ([0.6, 0.3, 0.1], r"`class_counts` must be whole numbers of training rows, not shares; found \[0.6"),
        (Counter([0, 1, 1, 2]), r"must be a list in the order of the classes; found a Counter.*counts\[label\] for"),
        ([0, 0, 0], r"at least one positive entry; found \[0, 0, 0\].*lpg_hf.data.class_counts"),
    ],
)
def test_bad_class_counts_are_refused_with_what_was_found_and_what_to_do(counts, message):
    with pytest.raises(ValueError, match=message):
        ClassStatistics(3, counts)


def test_the_counts_are_a_copy():
    given = torch.tensor([5, 3, 2])
    statistics = ClassStatistics(3, given)
    given[0] = 90
    assert statistics.class_counts.tolist() == [5, 3, 2]
    statistics.class_counts[1] = 7
    assert given.tolist() == [90, 3, 2]
