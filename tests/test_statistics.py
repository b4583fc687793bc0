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
from lpg_hf.class_shares import min_counted_samples
from lpg_hf.noise_evidence import EXCESS, error_rise, error_share, memorizing, noise_evidence
from lpg_hf.statistics import ClassStatistics


NUM_CLASSES = 4
IGNORED = -100
RUNNING = ["accuracy", "label_prob", "mean_weight"]
OF_EPOCHS = ["confidence_ratio", "decidedness", "last_label_prob"]
OF_ALL_CLASSES = ["noise_evidence", "memorizing"]
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
    names = ["_epoch_sums", "_least_error", "class_counts", "prior", "steps", "epochs"]
    for name in [*MEANS, *OF_ALL_CLASSES, *names]:
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
        expected.end_epoch()
    assert statistics.class_counts.tolist() == expected.counts.tolist()
    assert statistics.steps.item() == len(batches)


def test_float32_running_means_equal_the_reference_also_for_saturated_logits():
    batches = [(logits.float() * 20, labels) for logits, labels in random_steps()]
    statistics, expected = train(ClassStatistics(NUM_CLASSES), batches), reference_of(batches)
    statistics.end_epoch()
    expected.end_epoch()
    for name in MEANS + OF_ALL_CLASSES:
        assert getattr(statistics, name).dtype == torch.float32
    # Where each label is believed or contradicted in full, the missing belief is the share of the contradicted.
    assert_equal(statistics.noise_evidence, expected.noise_evidence, 1e-5 * expected.noise_evidence)
    assert_equal(statistics.memorizing, expected.memorizing, 1e-5)
    for name in MEANS:
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
    for probabilities in ([0.9, 0.4, 0.8, 0.04], [0.7, 0.06, 0.5, 0.6], [0.2, 0.1, 0.3, 0.02]):
        rows = [[p, 1 - p] if label == 0 else [1 - p, p] for p, label in zip(probabilities, [0, 0, 1, 1], strict=True)]
        logits = torch.tensor(rows, dtype=torch.float64).log()
        for part in (slice(0, 3), slice(3, 4)):
            statistics.update(LogitBatch(logits[part], labels[part]))
            statistics.step()
        if waits_for_epoch:
            statistics.end_epoch()
        ratios = np.array([min(p / (1 - p), 1.0) for p in probabilities]).reshape(2, 2)
        new = np.stack([ratios.mean(1), (ratios**2).mean(1)])
        expected = new if expected is None else (expected + new) / 2
        epochs.append(statistics.confidence_ratio.clone())
        assert_equal(epochs[-1], expected[0], 1e-12)
        assert_equal(statistics.decidedness, (expected[1] / expected[0] - expected[0]) / (1 - expected[0]), 1e-12)
        assert torch.equal(statistics.last_label_prob, statistics.label_prob)
    assert statistics.epochs == 3
    assert (epochs[0] != epochs[1]).any()


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


# Evidence of wrong labels.


def train_epoch(statistics, ratios, labels=None):
    """
    One step that is an epoch, with these confidence ratios: of two classes, the label has the logit 0 and the other
    one that of the ratio.
    """
    ratios = torch.tensor(ratios, dtype=torch.float64)
    labels = torch.arange(len(ratios)) % 2 if labels is None else labels
    logits = torch.zeros(len(ratios), 2, dtype=torch.float64)
    logits[torch.arange(len(ratios)), 1 - labels] = -ratios.log()
    statistics.update(LogitBatch(logits, labels))
    statistics.step()
    statistics.end_epoch()
    return statistics.noise_evidence.item(), statistics.memorizing.item()


def of_two_classes():
    return ClassStatistics(2, [10, 10], waits_for_epoch=True).double()


def test_evidence_of_a_small_epoch():
    """
    Of ten samples one is contradicted, by a ratio of 1/20; the others have ratios of 1 and 1/2.

    Mean ratio: (1/20 + 5 + 4 * 1/2) / 10 = .705, so .295 are missing, of which the contradicted share makes .1 / .295.
    The probabilities of the labels are 1/21, 1/2 and 1/3, less the squares 401/441, 1/2 and 5/9: an excess below 0.
    """
    evidence, memorized = train_epoch(of_two_classes(), [1 / 20, *[1.0] * 5, *[1 / 2] * 4])
    assert evidence == pytest.approx(0.1 * (0.1 / 0.295) ** 2 / 0.006, rel=1e-12)
    assert memorized == 0


def test_evidence_counts_twice_where_the_model_memorizes():
    """Of a hundred labels one has the probability 1/20, and the others 19/20. Without an excess five would have it."""
    statistics = of_two_classes()
    logits = math.log(19) * torch.eye(2, dtype=torch.float64)[[0] * 99 + [1]]
    statistics.update(LogitBatch(logits, torch.zeros(100, dtype=torch.int64)))
    statistics.step()
    statistics.end_epoch()
    excess = (99 * 0.95 + 0.05) / 100 - 0.95**2 - 0.05**2
    memorized = (excess - 0.015) / 0.025
    assert excess == pytest.approx(0.036) and memorized == pytest.approx(0.84)
    assert_equal(statistics.memorizing, memorized, 1e-12)
    # The one lacks 18/19, and the others nothing: it makes up for 19/18 of what is missing.
    assert_equal(statistics.noise_evidence, 0.01 * (19 / 18) ** 2 * (1 + memorized) / 0.006, 1e-12)


def test_a_pool_of_all_rows_counts_and_not_the_means_of_the_classes():
    """Nine rows of ten are of one class, and an epoch before counts no half."""
    statistics = of_two_classes()
    labels = torch.tensor([0] * 9 + [1])
    ratios = [1.0] * 9 + [1 / 20]
    first = train_epoch(statistics, ratios, labels)[0]
    # The contradicted row lacks 19/20 of the belief, and the others nothing.
    assert first == pytest.approx(0.1 * (20 / 19) ** 2 / 0.006, rel=1e-12)
    statistics = of_two_classes()
    train_epoch(statistics, [1.0] * 10, labels)
    assert train_epoch(statistics, ratios, labels)[0] == pytest.approx(first, rel=1e-12)


def test_errors_rise_from_the_smallest_share_of_a_settled_epoch():
    """
    Of a thousand samples the model contradicts 40, 20, 10 and 70, by a ratio of 1/20. All others have the ratio .8,
    so that their share of the missing belief lies above .15 with 40 and 70 of them, and below with 20 and 10.
    """
    statistics, errors, found = of_two_classes(), [40, 20, 10, 70], []
    for wrong in errors:
        ratios = [1 / 20] * wrong + [0.8] * (1000 - wrong)
        mean = (wrong / 20 + 0.8 * (1000 - wrong)) / 1000
        share = wrong / 1000 / (1 - mean)
        assert (share > 0.15) == (wrong >= 40)
        found.append((train_epoch(statistics, ratios)[0], wrong / 1000 * share**2 / 0.006))
    assert_equal([evidence for evidence, _ in found[:3]], [found[0][1]] * 3, 1e-12)
    # From 40, and not from the 10 of an epoch that was not settled.
    assert_equal(found[3][0], (0.07 - 0.04) / (0.008 + math.sqrt(0.07 / 1000)), 1e-12)
    assert found[3][0] > found[3][1] + 0.1


def test_the_smallest_share_is_that_of_the_epochs_before():
    """A fall gives no evidence, and each later rise is measured from the smallest share so far: here from 40."""
    statistics, found = of_two_classes(), []
    for wrong in (60, 40, 50, 80):
        found.append(train_epoch(statistics, [1 / 20] * wrong + [0.85] * (1000 - wrong))[0])
    # The share alone: 60 rows lack .95 each, and 940 lack .15.
    first = 0.06 * (60 / (60 * 0.95 + 940 * 0.15)) ** 2 / 0.006
    assert_equal(found[:3], [first] * 3, 1e-12)
    assert found[3] == pytest.approx(0.04 / (0.008 + math.sqrt(0.08 / 1000)), rel=1e-12)


def test_memorizing_is_the_largest_until_the_evidence_is_enough():
    """The epoch that gives the evidence counts. After it the excess says nothing of a training without dampening."""
    statistics, found = of_two_classes(), []

    def epoch(p, wrong, size=1000):
        """`wrong` labels of a probability of 1 - p, the others of p."""
        labels = torch.zeros(size, dtype=torch.int64)
        logits = math.log(p / (1 - p)) * torch.eye(2, dtype=torch.float64)[[0] * (size - wrong) + [1] * wrong]
        statistics.update(LogitBatch(logits, labels))
        statistics.step()
        statistics.end_epoch()
        excess = ((size - wrong) * p + wrong * (1 - p)) / size - p**2 - (1 - p) ** 2
        found.append((statistics.noise_evidence.item(), statistics.memorizing.item()))
        return min(max((excess - EXCESS[0]) / (EXCESS[1] - EXCESS[0]), 0), 1)

    small, smaller, large = epoch(0.98, 0), epoch(0.985, 0), epoch(0.96, 5)
    assert 0 == smaller < small < large < 1
    assert_equal([memorized for _, memorized in found], [small, small, large], 1e-12)
    # Enough, and the gate is not yet open in full.
    assert found[0][0] == found[1][0] == 0 and 1 < found[2][0] < 2
    assert epoch(0.95, 0) == 1
    assert_equal(found[3], found[2], 0)


def test_evidence_never_falls_and_an_epoch_without_samples_gives_none():
    statistics = of_two_classes()
    statistics.end_epoch()
    assert statistics.noise_evidence == 0 and statistics.memorizing == 0
    found = [train_epoch(statistics, [1 / 20] * wrong + [1.0] * (100 - wrong))[0] for wrong in (5, 2, 0)]
    assert found[0] > 1 and found == [found[0]] * 3
    statistics.end_epoch()
    assert statistics.noise_evidence == found[0]


def test_ratios_of_a_tenth_are_no_contradiction():
    assert train_epoch(of_two_classes(), [0.1001] * 6 + [1.0] * 4)[0] == 0


@st.composite
def epochs_of_noisy_labels(draw, max_epochs=4, max_steps=3):
    """Batches of some epochs, of models that believe all labels, or some, or none."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    epochs = []
    for _ in range(draw(st.integers(1, max_epochs))):
        scale, skill = draw(st.sampled_from([0.1, 1.0, 4.0])), draw(st.sampled_from([0.0, 2.0, 6.0]))
        epoch = []
        for _ in range(draw(st.integers(0, max_steps))):
            drawn = draw(st.lists(st.sampled_from([IGNORED, *range(NUM_CLASSES)]), max_size=12))
            labels = torch.tensor(drawn, dtype=torch.int64)
            logits = scale * torch.randn(len(labels), NUM_CLASSES, dtype=torch.float64, generator=generator)
            logits += skill * (labels[:, None] == torch.arange(NUM_CLASSES))
            epoch.append((logits, labels))
        epochs.append(epoch)
    return epochs


@settings(few_examples, max_examples=60)
@given(
    epochs=epochs_of_noisy_labels(),
    counts=st.lists(st.integers(1, 9), min_size=NUM_CLASSES, max_size=NUM_CLASSES),
    corrects=st.booleans(),
)
def test_evidence_and_memorizing_of_any_epochs_equal_the_reference(epochs, counts, corrects):
    """Contradictions are judged at the shares of the evaluation, and the excess at those of the training."""
    shares = [4.0, 1.0, 2.0, 0.5]
    statistics = ClassStatistics(NUM_CLASSES, counts, waits_for_epoch=True, eval_shares=shares).double()
    log_train, log_eval = np.log(np.array(counts) / sum(counts)), np.log(np.array(shares) / sum(shares))
    log_output = log_train
    if corrects:  # toward the shares of the evaluation
        statistics.add_correction(lambda s: s.prior_terms.log_rarity + 0.5 * s.prior_terms.log_eval)
        log_output = 0.5 * log_eval
    expected = reference.RunningStatistics(NUM_CLASSES)
    before = 0.0, 0.0
    for epoch in epochs:
        for logits, labels in epoch:
            statistics.update(LogitBatch(logits, labels, statistics.offsets))
            statistics.step()
            expected.update(logits.numpy(), labels.tolist(), None, log_eval - log_output, log_train - log_output)
        statistics.end_epoch()
        expected.end_epoch()
        now = statistics.noise_evidence.item(), statistics.memorizing.item()
        assert now == pytest.approx((expected.noise_evidence, expected.memorizing), rel=1e-6, abs=1e-6)
        assert now[0] >= before[0] and before[1] <= now[1] <= 1
        before = now


@pytest.mark.parametrize("counts", [[5, 5], [50, 3]])
def test_a_bare_loss_finds_the_same_evidence_by_the_counts(counts):
    """Whoever ends the epochs: the trainer, or as many samples as there are."""
    by_counts, by_trainer = (ClassStatistics(2, counts, waits).double() for waits in (False, True))
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(2).repeat_interleave(torch.tensor(counts))
    for epoch in range(3):
        logits = (1 + epoch) * torch.randn(len(labels), 2, generator=generator).double()
        for rows in torch.randperm(len(labels), generator=generator).split(4):
            for statistics in (by_counts, by_trainer):
                statistics.update(LogitBatch(logits[rows], labels[rows]))
                statistics.step()
        by_trainer.end_epoch()
        assert by_counts.epochs == epoch + 1
        assert_same_state(by_counts, by_trainer, tolerance=0)
    assert by_counts.noise_evidence > 0.1


def test_logits_that_are_not_finite_give_no_evidence():
    """The classes of their step are left out as a whole, and the others count."""
    (logits, labels), *_ = random_steps(num_samples=40)
    bad = torch.full((2, NUM_CLASSES), math.nan, dtype=torch.float64)
    with_bad, without = (ClassStatistics(NUM_CLASSES).double() for _ in range(2))
    train(with_bad, [(logits, labels), (bad, torch.tensor([0, 1])), (bad * math.inf, torch.tensor([2, 3]))])
    train(without, [(logits, labels)])
    for statistics in (with_bad, without):
        statistics.end_epoch()
        assert statistics.noise_evidence > 0 and statistics.noise_evidence.isfinite()
    for name in OF_ALL_CLASSES + OF_EPOCHS + ["_least_error"]:
        assert torch.equal(getattr(with_bad, name), getattr(without, name))


def test_the_formulas_of_the_evidence():
    error, ratio, excess = (torch.tensor(value, dtype=torch.float64) for value in (0.05, 0.8, 0.02))
    assert_equal(error_share(error, ratio), 0.25, 1e-12)
    assert error_share(error * 0, ratio * 0 + 1) == 0  # nothing is missing
    assert_equal(memorizing(excess), 0.2, 1e-12)
    assert memorizing(excess - 1) == 0 and memorizing(excess + 1) == 1
    assert_equal(noise_evidence(error, ratio, excess), 0.05 * 0.0625 * 1.2 / 0.006, 1e-12)
    count = torch.tensor(500.0, dtype=torch.float64)
    assert_equal(error_rise(error, torch.tensor(0.03), count), 0.02 / (0.008 + 0.01), 1e-7)
    assert error_rise(error, torch.tensor(math.inf), count) == -math.inf


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
    # And the other way, from there to the training set.
    assert_equal(centered(statistics.fitted_offset), centered(np.log(counts)), 1e-6)


def test_logits_fit_the_training_set_unless_a_method_corrects_them():
    statistics = ClassStatistics(3, [6, 3, 1], eval_shares=[1.0, 1.0, 1.0])
    assert_equal(statistics.fitted_offset, [0, 0, 0], 1e-7)


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


@pytest.mark.parametrize(("margin", "accuracy"), [(0.0, 1.0), (5e-4, 0.0)])
def test_a_tie_counts_as_correct_and_a_close_defeat_does_not(margin, accuracy):
    statistics = ClassStatistics(2)
    statistics.update(LogitBatch(torch.tensor([[1.0, 1.0 + margin]]), torch.tensor([0])))
    statistics.step()
    assert statistics.accuracy[0] == pytest.approx(accuracy / 21)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_passage_through_half_precision_rounds_no_constant(half):
    statistics = ClassStatistics(2, [3, 1], eval_shares=[1.0, 3.0])
    statistics.add_correction(lambda s: s.prior_terms.log_rarity)
    before = [tensor.clone() for tensor in (statistics._bounds, *statistics.offsets.rows)]
    statistics.to(half).float()
    after = [statistics._bounds, *statistics.offsets.rows]
    assert torch.equal(after[0], before[0]) and torch.equal(after[3], before[3])
    assert before[0].flatten().tolist() == pytest.approx([0.1, 1.0], abs=2e-6)
    assert not before[3].any()


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
    for statistics in (split, whole):
        statistics.end_epoch()
    assert_same_state(split, whole, tolerance=1e-9)


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
    whole.end_epoch()
    for process in processes:
        process.end_epoch()
        assert_same_state(process, whole, tolerance=1e-9)


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


@pytest.mark.parametrize("waits_for_epoch", [True, False])
@pytest.mark.parametrize("cut", [1, 4, 7])
def test_evidence_goes_on_bit_for_bit_from_a_checkpoint(waits_for_epoch, cut):
    """Within an epoch and after it; an epoch has four steps, or as many samples as these. The first one gives most."""
    batches = [(logits * (3.0 if i < 4 else 0.3), labels) for i, (logits, labels) in enumerate(random_steps(12))]

    def trained(statistics, steps):
        for step in steps:
            train(statistics, [batches[step]])
            if waits_for_epoch and step % 4 == 3:
                statistics.end_epoch()
        return statistics

    def fresh():
        return ClassStatistics(NUM_CLASSES, [12] * NUM_CLASSES, waits_for_epoch)

    unbroken, first = trained(fresh(), range(12)), trained(fresh(), range(4))
    resumed = fresh()
    resumed.load_state_dict(copy.deepcopy(trained(fresh(), range(cut)).state_dict()))
    trained(resumed, range(cut, 12))
    assert_same_state(resumed, unbroken, tolerance=0)
    assert unbroken.epochs == 3 and unbroken._least_error.isfinite()
    assert unbroken.noise_evidence == first.noise_evidence > 1


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
