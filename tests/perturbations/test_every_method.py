"""What every method must do: one suite over the table of examples in `method_examples.py`."""

import copy
import importlib
import inspect
import pkgutil
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_batches import (
    COUNTS,
    NUM_CLASSES,
    WITH_ABSENT,
    LargestTensor,
    assert_equal,
    assert_zero_sum_within,
    delta_of,
    every_dtype,
    extreme_batch,
    make_batch,
    make_statistics,
    more_examples,
    prepared,
    valid_batches,
)
from method_examples import LOGIT_METHODS, TABLE, logit_variants, variants

from lpg_hf import LPGLoss, perturbations
from lpg_hf.batch import IGNORE_INDEX, LogitBatch
from lpg_hf.chain import run_chain
from lpg_hf.perturbations import (
    LPG,
    METHODS,
    LabelSmoothing,
    LogitAdjustment,
    LogitClipping,
    Perturbation,
    SampleReweighting,
    build_chain,
    parse_perturbation,
)
from lpg_hf.statistics import ClassStatistics


DEFAULTS = [METHODS[name]() for name in LOGIT_METHODS]
VARIANTS = logit_variants()
#: Methods that write their own delta; the others write a weight.
ADDING = [method for method in [*DEFAULTS, *VARIANTS] if not isinstance(method, SampleReweighting)]
every_variant = pytest.mark.parametrize("method", VARIANTS, ids=repr)
every_default_and_variant = pytest.mark.parametrize("method", [*DEFAULTS, *VARIANTS], ids=repr)
every_adding_class = pytest.mark.parametrize(
    "base", dict.fromkeys(type(method) for method in ADDING), ids=lambda base: base.name
)


# The registry and the table.


def named_methods(package: types.ModuleType) -> set[type[Perturbation]]:
    """The classes of a package that have a `name`, whether or not anybody knows of their module."""
    modules = [
        importlib.import_module(info.name) for info in pkgutil.walk_packages(package.__path__, "lpg_hf.perturbations.")
    ]
    return {
        member
        for module in modules
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, Perturbation) and member.__module__ == module.__name__ and hasattr(member, "name")
    }


def test_every_method_of_the_package_is_registered():
    assert named_methods(perturbations) == set(METHODS.values())
    assert all(name == method.name for name, method in METHODS.items())


def test_a_method_that_is_left_out_of_the_registry_is_found(monkeypatch):
    class Forgotten(LabelSmoothing):
        name = "forgotten"

    Forgotten.__module__ = "lpg_hf.perturbations.lpg"
    monkeypatch.setattr("lpg_hf.perturbations.lpg.Forgotten", Forgotten, raising=False)
    assert Forgotten in named_methods(perturbations)


def test_every_method_of_the_registry_is_in_the_table():
    assert TABLE.keys() == METHODS.keys()
    for name, examples in TABLE.items():
        assert {method.name for method in examples.variants(NUM_CLASSES)} == {name}
        assert examples.training
        assert (examples.bound is not None) == (name in LOGIT_METHODS)
        assert set(examples.idle_at_first) <= set(examples.training)
        for text in examples.training:
            assert parse_perturbation(text).name == name
            assert repr(parse_perturbation(text)) == text


def test_every_argument_of_every_method_is_off_its_default_in_a_variant():
    assert {method.name: type(method) for method in variants()} == METHODS
    for name, method in METHODS.items():
        examples = [example for example in variants() if example.name == name]
        for argument, parameter in inspect.signature(method).parameters.items():
            assert any(getattr(example, argument) != parameter.default for example in examples), f"{name}: {argument}"


# Shapes, dtypes, and samples that are ignored.


@every_variant
def test_a_method_gives_zero_to_ignored_samples_and_leaves_its_inputs_alone(method):
    batch, statistics = make_batch(), make_statistics(COUNTS)
    statistics.end_epoch()  # for dampening
    gradient, method = batch.gradient.clone(), prepared(method)
    batch.label_log_prob.sum()  # which is kept from its first use on
    of_batch = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    inputs = [gradient, *of_batch, *statistics.buffers(), *statistics.prior_terms]
    before = [tensor.clone() for tensor in inputs]
    delta = method.delta(gradient, batch, statistics)
    assert (delta[batch.ignore_mask] == 0).all()
    # A quantile is learned.
    assert delta.abs().max() > 0 or repr(method) == "logit_clipping(quantile=0.9)"
    assert list(map(id, of_batch)) == [id(value) for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    after = [gradient, *of_batch, *statistics.buffers(), *statistics.prior_terms]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@every_default_and_variant
def test_what_the_logits_of_ignored_samples_are_does_not_matter(method):
    batch = make_batch()
    logits = batch.logits.clone()
    logits[batch.ignore_mask] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 0.0]).double()
    other = LogitBatch(logits, batch.labels)
    delta = delta_of(method, other, make_statistics(COUNTS))
    assert (delta[batch.ignore_mask] == 0).all()
    assert torch.equal(delta, delta_of(method, batch, make_statistics(COUNTS)))


@every_default_and_variant
@every_dtype
def test_a_delta_has_the_shape_and_the_dtype_of_the_gradient(method, dtype):
    batch = make_batch(dtype=dtype)
    delta = delta_of(method, batch, make_statistics(COUNTS).to(dtype))
    assert delta.shape == batch.gradient.shape
    assert delta.dtype == dtype


@every_default_and_variant
@every_dtype
def test_an_empty_batch_gives_an_empty_delta(method, dtype):
    batch = LogitBatch(torch.zeros(0, NUM_CLASSES, dtype=dtype), torch.zeros(0, dtype=torch.int64))
    delta = delta_of(method, batch, make_statistics(COUNTS).to(dtype))
    assert delta.shape == (0, NUM_CLASSES)
    assert delta.dtype == dtype


@every_default_and_variant
def test_a_batch_of_ignored_samples_gives_zeros(method):
    batch = LogitBatch(torch.randn(4, NUM_CLASSES), torch.full((4,), IGNORE_INDEX))
    assert (delta_of(method, batch, make_statistics(COUNTS).float()) == 0).all()


@pytest.mark.parametrize("name", LOGIT_METHODS)
@pytest.mark.parametrize("margin", [30.0, 50.0, 80.0, 1e4])
@every_dtype
def test_every_method_stays_finite_for_extreme_logits(name, margin, dtype):
    batch = extreme_batch(margin, dtype)
    loss_fn = LPGLoss(NUM_CLASSES, name, COUNTS)
    for _ in range(3):  # from the second step on the statistics are those of such logits
        z = batch.logits.clone().requires_grad_()
        loss_fn(z, batch.labels).backward()
        assert z.grad.isfinite().all()
        assert z.grad.norm() < 1e3


# Cost and devices.


#: Forty projected steps would take seconds; two of them are looked at with the formula of LPG.
MANY_CLASSES = [method for method in [*DEFAULTS, *logit_variants(100_000)] if "solver" not in repr(method)]


@pytest.mark.parametrize("method", MANY_CLASSES, ids=lambda method: repr(method)[:60])
def test_a_hundred_thousand_classes_need_no_tensor_larger_than_the_logits(method):
    num_samples, num_classes = 8, 100_000
    labels = torch.tensor([0, 0, 5, 99_999, 99_999, 99_999, 7, IGNORE_INDEX])
    logits = torch.randn(num_samples, num_classes, generator=torch.Generator().manual_seed(0))
    statistics = ClassStatistics(num_classes, [1 + c % 3 for c in range(num_classes)])
    method = prepared(method, num_classes)
    with LargestTensor() as largest:
        batch = LogitBatch(logits, labels)
        delta = method.delta(batch.gradient, batch, statistics)
        perturbed, _ = method.add_delta(batch.gradient, batch, statistics)
    assert largest.numel == num_samples * num_classes
    assert delta.shape == perturbed.shape == logits.shape
    assert delta.isfinite().all()
    assert perturbed.isfinite().all()


@every_default_and_variant
def test_nothing_reads_a_value_back_from_the_device(method):
    # A meta tensor has no values: whatever depends on one (`item`, `unique`, a mask as an index) raises.
    batch = LogitBatch(torch.randn(6, NUM_CLASSES, device="meta"), torch.zeros(6, dtype=torch.int64, device="meta"))
    statistics = ClassStatistics(NUM_CLASSES, COUNTS).to("meta")
    method = prepared(method).to("meta")
    method.update(batch.gradient, batch)
    assert method.delta(batch.gradient, batch, statistics).shape == (6, NUM_CLASSES)
    method.step()


# The delta itself.


@every_variant
@more_examples
@given(drawn=valid_batches(NUM_CLASSES), counts=st.sampled_from([COUNTS, WITH_ABSENT, None]))
def test_a_delta_sums_to_zero_and_stays_within_the_bound_of_the_table(method, drawn, counts):
    method, batch, statistics = prepared(method), drawn.batch, make_statistics(counts, num_steps=2)
    bound = TABLE[method.name].bound(method, batch, statistics)
    assert_zero_sum_within(method.delta(batch.gradient, batch, statistics), bound)


@pytest.mark.parametrize("name", LOGIT_METHODS)
def test_reweighting_tells_whether_the_delta_is_a_multiple_of_the_gradient(name):
    batch = make_batch()
    gradient = batch.gradient[batch.valid_mask]

    def is_a_multiple(method):
        delta = delta_of(method, batch, make_statistics(COUNTS))[batch.valid_mask]
        share = (delta * gradient).sum(-1, keepdim=True) / gradient.square().sum(-1, keepdim=True)
        return bool((delta - share * gradient).abs().max() < 1e-12)

    # One method can be both: LPG in the direction of the sample is.
    always = all(map(is_a_multiple, TABLE[name].variants(NUM_CLASSES)))
    assert always == issubclass(METHODS[name], SampleReweighting)


@pytest.mark.parametrize("method", [each for each in [*DEFAULTS, *VARIANTS] if each not in ADDING], ids=repr)
def test_a_weight_is_one_number_per_sample(method):
    batch = make_batch()
    weight = prepared(method).weight(batch.gradient, batch, make_statistics(COUNTS))
    assert weight.shape == batch.labels.shape
    assert (weight >= 0).all()


def test_ignored_samples_have_weight_0_whatever_a_method_says():
    class Unsure(SampleReweighting):
        name = "unsure"

        def weight(self, gradient, batch, statistics):
            return torch.where(batch.ignore_mask, torch.nan, 0.5)

    batch, statistics = make_batch(), make_statistics(COUNTS)
    assert_equal(Unsure().delta(batch.gradient, batch, statistics), -0.5 * batch.gradient, 1e-15)
    method = Unsure()
    perturbed, rows = run_chain([method], batch.gradient, batch, statistics, learns=False)
    assert_equal(perturbed, 0.5 * batch.gradient, 1e-15)
    assert torch.equal(method.last_weight, torch.where(batch.ignore_mask, 0.0, 0.5).double())
    assert torch.stack(rows).isfinite().all()


@pytest.mark.parametrize("counts", [COUNTS, WITH_ABSENT, None], ids=["counts", "absent", "counting"])
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "new"])
@pytest.mark.parametrize("method", ADDING, ids=repr)
def test_adding_a_delta_adds_that_delta_and_tells_its_norm(method, in_place, is_first, counts):
    batch, statistics = make_batch(), make_statistics(counts)
    # The first method gets the gradient of the batch itself, which nobody may change.
    gradient = batch.gradient if is_first and not in_place else batch.gradient * (1.0 if is_first else 0.7)
    before = gradient.clone()
    # A copy, as noise counts its draws.
    delta = prepared(method).delta(gradient, batch, statistics)
    expected = (before + delta) * batch.valid_mask[:, None]
    perturbed, norm = prepared(method).add_delta(gradient, batch, statistics, in_place)
    assert_equal(perturbed, expected, 1e-15)
    assert_equal(norm[batch.valid_mask], delta.norm(dim=-1)[batch.valid_mask], 1e-15)
    # New memory may take the place of the gradient.
    returns_new_memory = hasattr(type(method).delta, "returns_new_memory")
    assert (perturbed is gradient) == (in_place and not returns_new_memory)
    assert in_place or torch.equal(gradient, before)


@pytest.mark.parametrize("method", [LabelSmoothing(0.3, target="prior"), LogitAdjustment(0.5)], ids=repr)
def test_a_delta_follows_the_prior_and_the_arguments(method):
    batch, statistics = make_batch(), make_statistics(None)
    method = copy.deepcopy(method)
    for step in range(4):
        fresh = parse_perturbation(repr(method))
        perturbed, norm = method.add_delta(batch.gradient, batch, statistics)
        delta = fresh.delta(batch.gradient, batch, statistics)
        assert_equal(perturbed, batch.gradient + delta, 1e-15)
        assert_equal(norm[batch.valid_mask], delta.norm(dim=-1)[batch.valid_mask], 1e-15)
        if step == 1:
            setattr(method, {"label_smoothing": "alpha", "logit_adjustment": "tau"}[method.name], 0.6)
        statistics.update(LogitBatch(batch.logits, batch.labels.clamp(max=1)))
        statistics.step()


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "new"])
@every_adding_class
def test_a_delta_for_ignored_samples_is_not_added(base, in_place):
    class Everywhere(base):
        def delta(self, gradient, batch, statistics):
            return torch.full_like(gradient, torch.nan).where(batch.ignore_mask[:, None], 1.0)

    batch = make_batch()
    gradient = batch.gradient.clone()
    perturbed, _ = Everywhere().add_delta(gradient, batch, make_statistics(COUNTS), in_place)
    assert torch.equal(perturbed, torch.where(batch.valid_mask[:, None], batch.gradient + 1, 0.0))


@every_adding_class
def test_a_delta_that_is_the_gradient_itself_leaves_it_alone(base):
    class Itself(base):
        def delta(self, gradient, batch, statistics):
            return gradient

    batch = make_batch()
    gradient = batch.gradient.clone()
    perturbed, _ = Itself().add_delta(gradient, batch, make_statistics(COUNTS))
    assert torch.equal(gradient, batch.gradient)
    assert torch.equal(perturbed, 2 * batch.gradient)


@every_adding_class
def test_a_delta_that_is_overridden_is_the_one_that_is_added(base):
    class Twice(base):
        def delta(self, gradient, batch, statistics):
            return 2 * super().delta(gradient, batch, statistics)

    class Named(Twice):
        name = "named"

    class Doubling:
        def delta(self, gradient, batch, statistics):
            return 2 * super().delta(gradient, batch, statistics)

    class Mixed(Doubling, base):
        pass

    batch, statistics = make_batch(), make_statistics(COUNTS)
    delta = delta_of(base(), batch, statistics)
    for method in (Twice(), Named(), Mixed()):
        perturbed, norm = method.add_delta(batch.gradient, batch, statistics)
        assert_equal(perturbed, (batch.gradient + 2 * delta) * batch.valid_mask[:, None], 1e-15)
        assert_equal(norm[batch.valid_mask], 2 * delta.norm(dim=-1)[batch.valid_mask], 1e-15)


# Chains and state.


def gradients(loss_fn, seeds, dtype=torch.float64):
    """The logit gradients of one step after another."""
    steps = []
    for seed in seeds:
        batch = make_batch(seed=seed, dtype=dtype)
        z = batch.logits.clone().requires_grad_()
        loss_fn(z, batch.labels).backward()
        steps.append(z.grad)
    return steps


@every_default_and_variant
def test_a_chain_gives_each_method_the_gradient_that_the_one_before_left(method):
    loss_fn = LPGLoss(NUM_CLASSES, [LPG(epsilon=0.3), method, LogitClipping(0.4)], COUNTS)
    first, last, method = LPG(epsilon=0.3), LogitClipping(0.4), prepared(method)
    statistics = ClassStatistics(NUM_CLASSES, COUNTS).double()
    for seed, found in enumerate(gradients(loss_fn, range(4))):
        batch = make_batch(seed=seed)
        g = batch.gradient + first.delta(batch.gradient, batch, statistics)
        method.update(g, batch)
        g = g + method.delta(g, batch, statistics)
        g = g + last.delta(g, batch, statistics)
        assert_equal(found, g / batch.valid_mask.sum(), 1e-14)
        statistics.update(batch)
        statistics.step()
        method.step()


@every_default_and_variant
def test_a_method_by_its_text_is_the_method(method):
    (by_text,) = build_chain(repr(method))
    by_object, by_text = (LPGLoss(NUM_CLASSES, [each], COUNTS) for each in (method, by_text))
    assert all(map(torch.equal, gradients(by_object, range(4)), gradients(by_text, range(4))))


@every_default_and_variant
def test_a_loss_goes_on_from_its_state(method):
    whole, resumed = (LPGLoss(NUM_CLASSES, ["auto", method], COUNTS) for _ in range(2))
    gradients(whole, range(3), torch.float32)
    resumed.load_state_dict(whole.state_dict())
    rest = [gradients(loss_fn, range(3, 6), torch.float32) for loss_fn in (resumed, whole)]
    assert all(map(torch.equal, *rest))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@every_default_and_variant
def test_a_step_needs_no_reduction(method):
    """As the base class declares it: one process has nothing to reduce."""
    prepared(method).step()
