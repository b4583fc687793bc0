"""SAM, gradient clipping and gradient noise against torch, NumPy and hand-written loops."""

import copy
import gc
import itertools
import math

import numpy as np
import pytest
import reference
import torch
from datasets import ClassLabel, Dataset
from tiny import (
    NUM_LABELS,
    flat_parameters,
    make_batch,
    make_confident_model,
    make_model,
    make_noisy_batch,
    make_trainer,
    split,
)
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from lpg_hf import (
    SAM,
    FocalLoss,
    GradientClipping,
    GradientNoise,
    LogitAdjustment,
    LogitClipping,
    LPGConfig,
    LPGLoss,
    LPGTrainer,
)
from lpg_hf.batch import LogitBatch


COUNTS = [55, 25, 15, 5]
EARLY_GATES = "class_relative_dampening(learned=(0.0, 0.01), evidence=(0.0, 0.001))"
LEARNING_RATE, MOMENTUM = 0.02, 0.9

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Every training ends with a garbage collection, which outlasts a tiny one: it looks at all of torch."""
    gc.collect()
    gc.freeze()


def make_parameters(scale=1.0, dtype=torch.float64, seed=0):
    """Parameters with random gradients; the same for every scale, times the scale."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in [(4, 3), (5,), (2, 2, 2)]]
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        parameter.grad = (scale * gradient).to(dtype)
    return parameters


def gradients_of(parameters):
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


def perturb(method, parameters, scale=1.0):
    """The gradient before and after, and the norm of the delta that the method reports."""
    before = gradients_of(parameters).clone()
    norm = method.perturb_(parameters, scale)
    return before, gradients_of(parameters), norm


# Gradient clipping


@every_dtype
@pytest.mark.parametrize("max_norm", [0.1, 1.0, 4.9, 100.0])
def test_clipping_by_norm_is_torchs_bit_for_bit(max_norm, dtype):
    ours, theirs = make_parameters(dtype=dtype), make_parameters(dtype=dtype)
    before, after, norm = perturb(GradientClipping(max_norm), ours)
    torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert torch.equal(after, gradients_of(theirs))
    # torch divides by the norm plus 1e-6.
    assert norm.item() == pytest.approx((after - before).norm().item(), abs=2e-6)
    assert (norm > 0) == (max_norm < before.norm())


@every_dtype
@pytest.mark.parametrize("max_value", [0.01, 0.5, 100.0])
def test_clipping_by_value_is_torchs_bit_for_bit(max_value, dtype):
    ours, theirs = make_parameters(dtype=dtype), make_parameters(dtype=dtype)
    before, after, norm = perturb(GradientClipping(max_value=max_value), ours)
    torch.nn.utils.clip_grad_value_(theirs, max_value)
    assert torch.equal(after, gradients_of(theirs))
    assert norm.item() == pytest.approx((after - before).norm().item(), rel=1e-6)
    assert (norm > 0) == (max_value < before.abs().max())


def test_clipping_without_arguments_is_clipping_to_norm_one():
    assert torch.equal(
        perturb(GradientClipping(), make_parameters())[1], perturb(GradientClipping(1.0), make_parameters())[1]
    )


def step_scales(num_steps=20):
    """How large the gradient of each step is."""
    return np.random.default_rng(0).lognormal(sigma=0.8, size=num_steps).tolist()


@pytest.mark.parametrize("percentile", [1, 10, 50, 87.5, 100])
def test_clipping_by_percentile_is_autoclip(percentile):
    """Seetharaman et al.'s loop: append the norm, clip to `np.percentile(history, p)`."""
    method, history, num_clipped = GradientClipping(percentile=percentile), [], 0
    for step, size in enumerate(step_scales()):
        before, after, norm = perturb(method, make_parameters(size, seed=step))
        history.append(np.linalg.norm(before.numpy()))
        bound = np.percentile(history, percentile)
        expected = before.numpy() * min(1.0, bound / (history[-1] + 1e-6))
        np.testing.assert_allclose(after.numpy(), expected, rtol=1e-12)
        assert norm.item() == pytest.approx(max(history[-1] - bound, 0), abs=1e-12)
        num_clipped += norm.item() > 0
    assert num_clipped == 0 if percentile == 100 else num_clipped > 2


@pytest.mark.parametrize(
    "options", [{"max_norm": 0.5}, {"max_value": 0.2}, {"percentile": 30}], ids=lambda options: next(iter(options))
)
@pytest.mark.parametrize("scale", [65536.0, 1 / 1024])
def test_clipping_of_scaled_gradients_is_clipping_in_unscaled_units(options, scale):
    plain, scaled = GradientClipping(**options), GradientClipping(**options)
    for step, size in enumerate(step_scales(8)):
        _, expected, expected_norm = perturb(plain, make_parameters(size, seed=step))
        _, after, norm = perturb(scaled, make_parameters(size * scale, seed=step), scale)
        # torch's 1e-6 in the denominator is not scaled.
        torch.testing.assert_close(after / scale, expected, rtol=1e-6 * max(1, 2 / scale), atol=0)
        assert norm.item() == pytest.approx(expected_norm.item(), abs=1e-9)


def test_a_step_that_overflowed_leaves_no_trace_in_the_percentile():
    with_overflow, without = GradientClipping(percentile=40), GradientClipping(percentile=40)
    for step, size in enumerate(step_scales(10)):
        if step in (0, 4):
            overflowed = make_parameters()
            overflowed[1].grad[0] = math.inf
            with_overflow.perturb_(overflowed, 1024.0)
        _, expected, _ = perturb(without, make_parameters(size, seed=step))
        _, after, _ = perturb(with_overflow, make_parameters(size, seed=step))
        assert torch.equal(after, expected)


@pytest.mark.parametrize(
    "method",
    [GradientClipping(0.5), GradientClipping(max_value=0.1), GradientClipping(percentile=30), GradientNoise(0.1)],
    ids=repr,
)
def test_gradients_in_bfloat16_are_perturbed_too(method):
    method = copy.deepcopy(method)
    for size in (0.1, 1.0, 2.0):
        before, after, norm = perturb(method, make_parameters(size, torch.bfloat16))
    assert not torch.equal(before, after)
    assert norm.item() == pytest.approx((after.double() - before.double()).norm().item(), rel=0.02)


@pytest.mark.parametrize("method", [GradientClipping(percentile=30), GradientNoise(0.1, seed=3)], ids=repr)
@pytest.mark.parametrize("num_before", [0, 1, 5])
def test_a_method_goes_on_from_its_state(method, num_before):
    whole, resumed = copy.deepcopy(method), copy.deepcopy(method)
    scales = step_scales(8)
    for step in range(num_before):
        whole.perturb_(make_parameters(scales[step], seed=step))
    resumed.load_state_dict(whole.state_dict())
    for step in range(num_before, 8):
        _, expected, _ = perturb(whole, make_parameters(scales[step], seed=step))
        _, after, _ = perturb(resumed, make_parameters(scales[step], seed=step))
        assert torch.equal(after, expected)


# Gradient noise


def draw_noise(method, shapes=((300, 500), (50_000,))):
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return perturb(method, parameters)[1]


@pytest.mark.parametrize(("eta", "gamma"), [(0.01, 0.55), (1.0, 0.55), (0.3, 0.0), (0.3, 2.0)])
def test_noise_has_mean_zero_and_the_annealed_variance(eta, gamma):
    method = GradientNoise(eta, gamma)
    for step in range(4):
        noise = draw_noise(method)
        variance = eta / (1 + step) ** gamma
        assert noise.mean().abs() < 5 * math.sqrt(variance / len(noise))
        assert (noise.square().mean() - variance).abs() < 5 * variance * math.sqrt(2 / len(noise))
        kurtosis = noise.pow(4).mean() / variance**2
        assert (kurtosis - 3).abs() < 5 * math.sqrt(96 / len(noise))  # E x^8 - (E x^4)^2 = 105 - 9


def test_noise_is_added_to_the_gradient_and_its_norm_reported():
    before, after, norm = perturb(GradientNoise(0.1), make_parameters())
    on_zero = draw_noise(GradientNoise(0.1), [p.shape for p in make_parameters()])
    torch.testing.assert_close(after - before, on_zero, rtol=0, atol=1e-14)
    assert norm.item() == pytest.approx(on_zero.norm().item(), rel=1e-12)


def test_noise_on_scaled_gradients_is_scaled_alike():
    _, expected, expected_norm = perturb(GradientNoise(0.1), make_parameters())
    _, after, norm = perturb(GradientNoise(0.1), make_parameters(1024.0), 1024.0)
    torch.testing.assert_close(after / 1024, expected, rtol=1e-12, atol=0)
    assert norm == expected_norm


def test_noise_is_fixed_by_seed_and_step_and_leaves_the_global_generator_alone():
    shapes = [(40, 25)]
    torch.manual_seed(0)
    first = GradientNoise(1.0, 0.0, seed=3)
    draws = [draw_noise(first, shapes) for _ in range(3)]
    before = torch.random.get_rng_state()
    torch.manual_seed(1)
    again = GradientNoise(1.0, 0.0, seed=3)
    assert all(torch.equal(draw, draw_noise(again, shapes)) for draw in draws)
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = GradientNoise(1.0, 0.0, seed=4)
    draws += [draw_noise(other, shapes) for _ in range(3)]
    for a, b in itertools.combinations(draws, 2):
        assert F.cosine_similarity(a, b, dim=0).abs() < 5 / math.sqrt(1000)


# Training with LPGTrainer, against loops


def train(model, batches, path, perturbations, *, trainer_class=LPGTrainer, args=None, **kwargs):
    """SGD with momentum; ready-made micro-batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    if trainer_class is LPGTrainer:
        kwargs |= {"perturbations": perturbations, "class_counts": COUNTS, "args_class": LPGConfig}
        args = {"log_perturbations": True} | (args or {})
    trainer = make_trainer(
        trainer_class,
        model,
        batches,
        path,
        args={"max_grad_norm": 0.0} | (args or {}),
        optimizers=(optimizer, None),
        **kwargs,
    )
    trainer.train()
    return trainer


def logs_of(trainer, key):
    return [log[key] for log in trainer.state.log_history if "loss" in log]


def summed_cross_entropy(z, y):
    return F.cross_entropy(z, y, reduction="sum")


def class_gradient(z, y):
    """Of the summed cross-entropy."""
    return torch.from_numpy(reference.logit_gradient(z.numpy(), y.numpy()))


def adjusted_and_clipped_gradient(z, y):
    z, y = z.numpy(), y.numpy()
    g = reference.logit_gradient(z, y)
    g = g + reference.logit_adjustment_delta(z, y, np.array(COUNTS) / sum(COUNTS), 1.0)
    return torch.from_numpy(g + reference.clip_delta(g, 0.6))


class Loop:
    """SGD with momentum by hand, with SAM's two passes for every micro-batch, and what it measured on its way."""

    def __init__(
        self,
        model,
        rho,
        adaptive=False,
        interval=1,
        logit_gradient=class_gradient,
        loss=summed_cross_entropy,
        finish=lambda parameters: None,
    ):
        self.model, self.rho, self.adaptive, self.interval = model.train(), rho, adaptive, interval
        self.logit_gradient, self.loss, self.finish = logit_gradient, loss, finish
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.velocity = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.losses, self.delta_norms = [], []

    def train(self, steps):
        for number, micro_batches in enumerate(steps):
            self.step(micro_batches, takes_two_passes=number % self.interval == 0)
        return self

    @torch.no_grad()
    def step(self, micro_batches, takes_two_passes):
        size = sum(len(batch["labels"]) for batch in micro_batches)
        total = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.losses.append(0.0)
        for batch in micro_batches:
            gradients, loss = self.gradients(batch)
            self.losses[-1] += loss / size
            if takes_two_passes:
                weights = [parameter.clone() for parameter in self.parameters]
                for parameter, shift in zip(self.parameters, self.ascent(gradients), strict=True):
                    parameter += shift
                first, (gradients, _) = gradients, self.gradients(batch)
                for parameter, weight in zip(self.parameters, weights, strict=True):
                    parameter.copy_(weight)
                difference = [b - a for a, b in zip(first, gradients, strict=True)]
                self.delta_norms.append(math.sqrt(sum(d.square().sum().item() for d in difference)) / size)
            else:
                self.delta_norms.append(0.0)
            for sum_, gradient in zip(total, gradients, strict=True):
                sum_ += gradient / size
        for parameter, gradient in zip(self.parameters, total, strict=True):
            parameter.grad = gradient
        self.finish(self.parameters)
        for parameter, velocity in zip(self.parameters, self.velocity, strict=True):
            velocity.mul_(MOMENTUM).add_(parameter.grad)
            parameter -= LEARNING_RATE * velocity

    def ascent(self, gradients):
        """`rho g / ||g||`, or ASAM's `rho T^2 g / ||T g||` with `T = |w|`."""
        if not self.adaptive:
            norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
            return [self.rho * g / norm for g in gradients]
        norm = math.sqrt(sum((p * g).square().sum().item() for p, g in zip(self.parameters, gradients, strict=True)))
        return [self.rho * p**2 * g / norm for p, g in zip(self.parameters, gradients, strict=True)]

    @torch.enable_grad()
    def gradients(self, batch):
        """Summed over the samples, and their summed loss."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits, labels = self.model(**inputs).logits, batch["labels"]
        loss = self.loss(logits.detach(), labels).item()
        return torch.autograd.grad(logits, self.parameters, self.logit_gradient(logits.detach(), labels)), loss


def assert_same_parameters(trained, expected, tolerance=1e-10):
    torch.testing.assert_close(flat_parameters(trained), flat_parameters(expected), rtol=0, atol=tolerance)


def sizes_and_steps(num_steps, sizes, name="bert", seed=0):
    """Micro-batches of the given sizes in every step, flat and grouped by step."""
    batches = split(make_batch(name, num_steps * sum(sizes), seed=seed, dtype=torch.float64), sizes * num_steps)
    return batches, [batches[i : i + len(sizes)] for i in range(0, len(batches), len(sizes))]


@pytest.mark.parametrize("name", ["bert", "vit"])
@pytest.mark.parametrize(
    "options",
    [{"rho": 0.1}, {"rho": 0.5}, {"rho": 0.5, "adaptive": True}, {"rho": 0.3, "interval": 3}],
    ids=str,
)
def test_sam_is_the_two_step_loop(name, options, tmp_path):
    batches, steps = sizes_and_steps(20, [8], name)
    trainer = train(make_model(name, exact=True), batches, tmp_path, [SAM(**options)])
    loop = Loop(make_model(name, exact=True), **options).train(steps)
    assert trainer.state.global_step == 20
    assert_same_parameters(trainer.model, loop.model)
    assert logs_of(trainer, "loss") == pytest.approx(loop.losses, abs=1e-6)  # those of the first passes
    logged = [log.get("lpg/sam/delta_norm") for log in trainer.state.log_history if "loss" in log]
    assert logged == [pytest.approx(norm, rel=1e-6) if norm > 0 else None for norm in loop.delta_norms]

    plain = Loop(make_model(name, exact=True), rho=0.0).train(steps)
    assert (flat_parameters(trainer.model) - flat_parameters(plain.model)).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"rho": 0.3}, {"rho": 0.3, "adaptive": True, "interval": 2}], ids=str)
def test_in_a_chain_both_passes_of_sam_see_the_perturbed_loss(options, tmp_path):
    batches, steps = sizes_and_steps(20, [8])
    chain = [LogitAdjustment(1.0), SAM(**options), LogitClipping(0.6)]
    trainer = train(make_model("bert", exact=True), batches, tmp_path, chain)
    loop = Loop(make_model("bert", exact=True), **options, logit_gradient=adjusted_and_clipped_gradient).train(steps)
    assert_same_parameters(trainer.model, loop.model)
    assert logs_of(trainer, "loss") == pytest.approx(loop.losses, abs=1e-6)
    unperturbed = Loop(make_model("bert", exact=True), **options).train(steps)
    assert (flat_parameters(trainer.model) - flat_parameters(unperturbed.model)).abs().max() > 1e-3


@pytest.mark.parametrize("sizes", [[8, 8], [4, 12]], ids=str)
@pytest.mark.parametrize("chain", [[], [LogitAdjustment(1.0), LogitClipping(0.6)]], ids=str)
def test_sam_under_accumulation_ascends_for_every_micro_batch(sizes, chain, tmp_path):
    batches, steps = sizes_and_steps(10, sizes)
    trainer = train(
        make_model("bert", exact=True),
        batches,
        tmp_path,
        [*chain, SAM(0.3, interval=2)],
        args={"gradient_accumulation_steps": 2},
    )
    logit_gradient = adjusted_and_clipped_gradient if chain else class_gradient
    loop = Loop(make_model("bert", exact=True), 0.3, interval=2, logit_gradient=logit_gradient).train(steps)
    assert trainer.state.global_step == 10
    assert_same_parameters(trainer.model, loop.model)
    assert logs_of(trainer, "loss") == pytest.approx(loop.losses, abs=1e-6)
    assert (
        "lpg/sam/delta_norm" not in trainer.state.log_history[0]
    )  # whose two gradients are never whole at the same time

    whole = Loop(make_model("bert", exact=True), 0.3, interval=2, logit_gradient=logit_gradient)
    whole.train([[{key: torch.cat([b[key] for b in step]) for key in step[0]}] for step in steps])
    assert (flat_parameters(trainer.model) - flat_parameters(whole.model)).abs().max() > 1e-4


def test_parameter_methods_act_after_sam_in_the_order_of_the_list(tmp_path):
    batches, steps = sizes_and_steps(8, [8])
    noise = GradientNoise(0.01, seed=5)

    def finish(parameters):
        nn.utils.clip_grad_norm_(parameters, 0.7)
        noise.perturb_(parameters)
        nn.utils.clip_grad_value_(parameters, 0.05)

    chain = [GradientClipping(0.7), GradientNoise(0.01, seed=5), SAM(0.3), GradientClipping(max_value=0.05)]
    trainer = train(make_model("bert", exact=True), batches, tmp_path, chain)
    loop = Loop(make_model("bert", exact=True), 0.3, finish=finish).train(steps)
    assert_same_parameters(trainer.model, loop.model)


def test_parameter_methods_act_once_per_step_on_the_accumulated_gradient(tmp_path):
    batches, steps = sizes_and_steps(8, [4, 5, 7])
    noise, norms = GradientNoise(0.01), []

    def finish(parameters):
        norms.append(gradients_of(parameters).norm().item())
        nn.utils.clip_grad_norm_(parameters, np.percentile(norms, 40))
        noise.perturb_(parameters)

    trainer = train(
        make_model("bert", exact=True),
        batches,
        tmp_path,
        [GradientClipping(percentile=40), GradientNoise(0.01)],
        args={"gradient_accumulation_steps": 3},
    )
    loop = Loop(make_model("bert", exact=True), rho=0.0, finish=finish).train(steps)
    assert_same_parameters(trainer.model, loop.model)


def test_a_loss_scale_changes_nothing(tmp_path):
    """fp16's scaler, here with float64 so that nothing underflows."""
    batches, _ = sizes_and_steps(8, [8])
    chain = [SAM(0.3), GradientClipping(0.7), GradientClipping(percentile=40), GradientNoise(0.01)]

    def run(scaler):
        model = make_model("bert", exact=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        trainer = make_trainer(
            LPGTrainer,
            model,
            batches,
            tmp_path,
            args_class=LPGConfig,
            args={"max_grad_norm": 0.0, "log_perturbations": True},
            perturbations=chain,
            optimizers=(optimizer, None),
        )
        trainer.accelerator.scaler = scaler
        trainer.train()
        return trainer

    plain, scaled = run(None), run(torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6))
    assert scaled.accelerator.scaler.get_scale() == 1024
    assert_same_parameters(scaled.model, plain.model, 1e-6)
    for key in ("lpg/sam/delta_norm", "lpg/gradient_noise/delta_norm", "lpg/gradient_clipping/delta_norm"):
        assert logs_of(scaled, key) == pytest.approx(logs_of(plain, key), rel=1e-4, abs=1e-6)


# What SAM leaves behind


def forward_passes(model):
    """The parameters and inputs of each forward pass in training."""
    passes = []

    def record(module, args, kwargs):
        if module.training:
            passes.append({name: value.detach().clone() for name, value in module.named_parameters()})

    model.register_forward_pre_hook(record, with_kwargs=True)
    return passes


def batch_norm_buffers(model):
    return {
        f"{name}.{key}": value.clone()
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for key, value in module.named_buffers()
    }


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("chain", [[], [LogitClipping(0.6)]], ids=str)
def test_batch_norm_counts_every_batch_once_at_the_unshifted_weights(chain, accumulation, tmp_path):
    batches = split(make_batch("resnet", 64, dtype=torch.float64), [8] * 8)
    model = make_model("resnet").double()
    assert batch_norm_buffers(model)
    passes = forward_passes(model)
    train(model, batches, tmp_path, [*chain, SAM(0.5)], args={"gradient_accumulation_steps": accumulation})
    assert len(passes) == 16

    replayed = make_model("resnet").double().train()
    for batch, weights in zip(batches, passes[::2], strict=True):
        replayed.load_state_dict(weights, strict=False)
        with torch.no_grad():
            replayed(pixel_values=batch["pixel_values"])
    actual, expected = batch_norm_buffers(model), batch_norm_buffers(replayed)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-12, msg=name)
        assert not name.endswith("num_batches_tracked") or value == 8


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_in_the_second_pass_leaves_weights_and_buffers_as_they_were(where, tmp_path):
    model = make_model("resnet")
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    seen = []

    def fail(*_):
        raise RuntimeError("out of luck")

    def watch(module, args, output):
        seen.append(batch_norm_buffers(module))
        shifted = any(not torch.equal(value, weights[name]) for name, value in module.named_parameters())
        assert shifted == (len(seen) == 2)
        if len(seen) == 2:
            fail() if where == "forward" else output.logits.register_hook(fail)

    model.register_forward_hook(watch)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(model, [make_batch("resnet", 8)], tmp_path, [SAM(0.5)])
    assert len(seen) == 2
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    after = batch_norm_buffers(model)
    assert all(torch.equal(after[name], value) for name, value in seen[0].items())
    assert any(not torch.equal(after[name], value) for name, value in seen[1].items())


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sam_does_not_shift_where_the_gradient_is_zero(dtype, adaptive):
    parameters = [nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones((), dtype=dtype))]
    shifts = SAM(0.5, adaptive).ascent(parameters, [torch.zeros_like(parameter) for parameter in parameters])
    assert [shift.tolist() for shift in shifts] == [[0, 0, 0], 0]
    shifts = SAM(0.5, adaptive).ascent(parameters, [torch.full_like(parameter, -2) for parameter in parameters])
    assert all(shift.dtype == dtype for shift in shifts)
    torch.testing.assert_close(shifts[0].float(), torch.full((3,), -0.25), rtol=1e-2, atol=0)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_shifts_what_trains_by_its_radius_and_nothing_else(adaptive, tmp_path):
    model = make_model("bert", exact=True)
    model.bert.embeddings.requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    passes = forward_passes(model)
    batches, _ = sizes_and_steps(3, [8])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad} | {"unused"}
    trainer = train(model, batches, tmp_path, [SAM(0.4, adaptive)])
    assert len(passes) == 6 and len(frozen) > 3
    for first, second in zip(passes[::2], passes[1::2], strict=True):
        for name in frozen:
            assert torch.equal(second[name], passes[0][name])
        moved = {name: second[name] - first[name] for name in first if name not in frozen}
        if adaptive:
            moved = {name: shift / first[name].abs().clamp(min=1e-300) for name, shift in moved.items()}
        assert sum(shift.square().sum().item() for shift in moved.values()) ** 0.5 == pytest.approx(0.4, rel=1e-6)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, passes[0][name]) == (name in frozen)
    assert model.unused.grad is None


def sums_of_epoch(logits, batches):
    """Samples of each class, and sums of confidence ratios, of these squared, of confident errors, of fit excesses."""
    sums = torch.zeros(5, NUM_LABELS, dtype=torch.float64)
    for z, batch in zip(logits, batches, strict=True):
        for p, label in zip(z.softmax(-1), batch["labels"].tolist(), strict=True):
            ratio = (p[label] / p.max()).item()
            excess = (p[label] - p.square().sum()).item()
            sums[:, label] += torch.tensor([1.0, ratio, ratio**2, ratio >= 0.1, excess], dtype=torch.float64)
    return sums


def test_statistics_and_learning_methods_see_each_step_once_at_the_unshifted_weights(tmp_path):
    batches = split(make_noisy_batch("bert", 80), [8] * 10)
    model, logits = make_confident_model("bert"), []
    model.register_forward_hook(lambda module, args, output: logits.append(output.logits.detach().clone()))
    chain = [LogitClipping(quantile=0.6), EARLY_GATES, SAM(0.5)]
    trainer = train(model, batches, tmp_path, chain, args={"num_train_epochs": 2})
    assert len(logits) == 40

    expected, with_both = reference.RunningStatistics(NUM_LABELS), reference.RunningStatistics(NUM_LABELS)
    clipping = LogitClipping(quantile=0.6)
    clipping.setup(NUM_LABELS)
    clipping.double()
    for step, (first, second, batch) in enumerate(zip(logits[::2], logits[1::2], batches * 2, strict=True)):
        if step == 10:
            expected.end_epoch()
        y = batch["labels"]
        expected.update(first.numpy(), y.tolist())
        with_both.update(first.numpy(), y.tolist())
        with_both.update(second.numpy(), y.tolist())
        clipping.update(class_gradient(first, y), LogitBatch(first, y))
        clipping.step(None)
    statistics = trainer.lpg_loss.statistics
    assert statistics.steps == 20 and statistics.epochs == 1
    for name in ("accuracy", "label_prob"):
        np.testing.assert_allclose(getattr(statistics, name).numpy(), getattr(expected, name), atol=1e-9)
    first_epoch, second_epoch = (sums_of_epoch(logits[epoch : epoch + 20 : 2], batches) for epoch in (0, 20))
    means = first_epoch[1:] / first_epoch[0]
    torch.testing.assert_close(statistics.confidence_ratio, means[0], rtol=0, atol=1e-9)
    found = statistics.noise_evidence.item(), statistics.memorizing.item()
    assert found == pytest.approx((expected.noise_evidence, expected.memorizing), rel=1e-9) and found[0] > 0.1
    torch.testing.assert_close(statistics._epoch_sums, second_epoch, rtol=0, atol=1e-9)
    assert statistics.mean_weight.min() < 0.99  # it did dampen
    assert abs(statistics.label_prob.numpy() - with_both.label_prob).max() > 0.005
    torch.testing.assert_close(trainer.lpg_loss.perturbations[0].bounds, clipping.bounds, rtol=0, atol=1e-6)


def test_samples_are_counted_once_where_the_prior_is_counted(tmp_path):
    batches = split(make_batch("bert", 40, dtype=torch.float64), [4] * 10)
    trainer = make_trainer(
        LPGTrainer,
        make_model("bert", exact=True),
        batches,
        tmp_path,
        args={"gradient_accumulation_steps": 2},
        perturbations=["lpg", SAM(0.1)],
    )
    trainer.train()
    labels = torch.cat([batch["labels"] for batch in batches])
    assert torch.equal(trainer.lpg_loss.statistics.class_counts, labels.bincount(minlength=NUM_LABELS))
    assert trainer.lpg_loss.statistics.steps == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_restored_bit_for_bit_under_bfloat16(dtype, tmp_path):
    """`w + e - e` would not be `w`, in few bits least of all. Training stands still, so what is left is the shift."""
    model = make_model("vit").to(dtype)
    before, passes = flat_parameters(model).clone(), forward_passes(model)
    trainer = make_trainer(
        LPGTrainer,
        model,
        split(make_batch("vit", 32, dtype=dtype), [8] * 4),
        tmp_path,
        args={"bf16": True, "optim": "sgd", "learning_rate": 0.0},
        perturbations=[LogitClipping(0.6), SAM(0.5)],
    )
    trainer.train()
    assert torch.equal(flat_parameters(model), before)
    assert len(passes) == 8
    assert all(not torch.equal(a["classifier.weight"], b["classifier.weight"]) for a, b in itertools.pairwise(passes))


def test_the_second_pass_under_autocast_is_at_the_shifted_weights(tmp_path):
    """A stale cache of the weights in bfloat16 would make the delta zero."""
    batches = split(make_batch("vit", 32), [8] * 4)
    norms = []
    for args in ({"bf16": True}, {}):
        trainer = make_trainer(
            LPGTrainer,
            make_model("vit", exact=True).float(),
            batches,
            tmp_path,
            args_class=LPGConfig,
            args=args | {"log_perturbations": True},
            perturbations=[SAM(0.5)],
        )
        trainer.train()
        norms.append(logs_of(trainer, "lpg/sam/delta_norm"))
    assert norms[0][0] == pytest.approx(norms[1][0], rel=0.05)
    assert norms[0][0] > 0.01


class Skipping(nn.Module):
    """Each forward pass uses one of two branches, in turns, as layer drop may."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(3, NUM_LABELS), nn.Linear(3, NUM_LABELS)])
        self.passes = 0

    def forward(self, values, labels=None):
        logits = self.branches[self.passes % 2](values)
        self.passes += 1
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_parameters_that_only_one_pass_uses_count_in_the_norm(tmp_path):
    torch.manual_seed(0)
    model = Skipping().double()
    first, second = copy.deepcopy(model.branches)
    batch = {"values": torch.randn(6, 3, dtype=torch.float64), "labels": torch.arange(6) % NUM_LABELS}
    trainer = make_trainer(
        LPGTrainer,
        model,
        [batch],
        tmp_path,
        args_class=LPGConfig,
        args={"log_perturbations": True},
        perturbations=[SAM(0.1)],
        class_counts=COUNTS,
    )
    trainer.train()
    # What is shifted, the first branch, is not what the second pass uses.
    squares = 0
    for branch in (first, second):
        F.cross_entropy(branch(batch["values"]), batch["labels"]).backward()
        squares += sum(parameter.grad.square().sum() for parameter in branch.parameters())
    assert logs_of(trainer, "lpg/sam/delta_norm") == pytest.approx([squares.sqrt().item()], rel=1e-6)


# Other models and settings


def test_sam_with_gradient_checkpointing_is_sam_without(tmp_path):
    batches, _ = sizes_and_steps(6, [8])
    model = make_model("bert", exact=True)
    train(model, batches, tmp_path, [LogitClipping(0.6), SAM(0.3)], args={"gradient_checkpointing": True})
    assert model.is_gradient_checkpointing
    expected = make_model("bert", exact=True)
    train(expected, batches, tmp_path, [LogitClipping(0.6), SAM(0.3)])
    assert_same_parameters(model, expected, 1e-12)


def test_sam_refuses_reentrant_checkpointing(tmp_path):
    batches, _ = sizes_and_steps(1, [8])
    args = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match=r"reentrant checkpointing does not support; found .*use_reentrant=True"):
        train(make_model("bert", exact=True), batches, tmp_path, [SAM(0.3)], args=args)
    train(make_model("bert", exact=True), batches, tmp_path, [GradientClipping(0.1)], args=args)
    args["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    train(make_model("bert", exact=True), batches, tmp_path, [SAM(0.3)], args=args)


@pytest.mark.parametrize("factor", [0.0, 0.2])
def test_sam_with_label_smoothing_as_base_loss(factor, tmp_path):
    batches, steps = sizes_and_steps(6, [8])
    args = {"label_smoothing_factor": factor}
    trainer = train(make_model("bert", exact=True), batches, tmp_path, [SAM(0.3)], args=args)
    loop = Loop(
        make_model("bert", exact=True),
        0.3,
        logit_gradient=lambda z, y: class_gradient(z, y) + factor * (F.one_hot(y, NUM_LABELS) - 1 / NUM_LABELS),
    ).train(steps)
    assert_same_parameters(trainer.model, loop.model, 1e-6 if factor else 1e-10)


def regression_model():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=30,
        max_position_embeddings=16,
        num_labels=1,
        problem_type="regression",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).double()


def regression_batches(num_steps):
    batches, _ = sizes_and_steps(num_steps, [8])
    return [batch | {"labels": batch["labels"].double()} for batch in batches]


def test_sam_works_for_a_regression(tmp_path):
    batches = regression_batches(20)
    trainer = train(regression_model(), batches, tmp_path, [SAM(0.3), GradientClipping(0.5)])
    assert trainer.model.config.problem_type == "regression"
    loop = Loop(
        regression_model(),
        0.3,
        logit_gradient=lambda z, y: 2 * (z - y[:, None]),
        loss=lambda z, y: (z[:, 0] - y).square().sum(),
        finish=lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.5),
    ).train([batch] for batch in batches)
    assert_same_parameters(trainer.model, loop.model)
    assert logs_of(trainer, "loss") == pytest.approx(loop.losses, abs=1e-6)
    assert logs_of(trainer, "lpg/sam/delta_norm") == pytest.approx(loop.delta_norms, rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_sam_with_radius_zero_is_the_trainer_bit_for_bit(accumulation, tmp_path):
    """On what is no classifier: with the Trainer's own scale of loss and gradient under accumulation."""
    batches = regression_batches(8)
    args = {"gradient_accumulation_steps": accumulation}
    plain = train(regression_model(), batches, tmp_path, None, trainer_class=Trainer, args=args)
    ours = train(regression_model(), batches, tmp_path, [SAM(0.0)], args=args)
    assert torch.equal(flat_parameters(ours.model), flat_parameters(plain.model))
    assert logs_of(ours, "loss") == logs_of(plain, "loss")


class MeanSquaredErrorOfPixels(nn.Module):
    """A model that takes no further keyword arguments, for which the Trainer divides by the accumulation itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * 8 * 8, 1).double()

    def forward(self, pixel_values, labels):
        prediction = self.layer(pixel_values.flatten(1))[:, 0].sigmoid()
        return {"loss": (prediction - labels).square().mean()}


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_sam_with_radius_zero_is_the_trainer_where_that_divides_by_the_accumulation(accumulation, tmp_path):
    batches = split(make_batch("vit", 64, dtype=torch.float64), [8] * 8)
    args = {"gradient_accumulation_steps": accumulation}
    plain = train(MeanSquaredErrorOfPixels(), batches, tmp_path, None, trainer_class=Trainer, args=args)
    ours = train(MeanSquaredErrorOfPixels(), batches, tmp_path, [SAM(0.0)], args=args)
    assert torch.equal(flat_parameters(ours.model), flat_parameters(plain.model))
    assert logs_of(ours, "loss") == logs_of(plain, "loss")


class LossOfTwoReplicas(MeanSquaredErrorOfPixels):
    """What DataParallel makes of a model: one loss for each of its replicas."""

    def forward(self, pixel_values, labels):
        halves = zip(pixel_values.chunk(2), labels.chunk(2), strict=True)
        return {"loss": torch.stack([super(LossOfTwoReplicas, self).forward(*half)["loss"] for half in halves])}


@pytest.mark.skipif(torch.cuda.is_available(), reason="DataParallel would use the GPUs")
def test_sam_takes_the_mean_over_the_losses_of_replicas_as_the_trainer_does(tmp_path):
    batches, models = split(make_batch("vit", 64, dtype=torch.float64), [8] * 8), []
    for trainer_class, options in ((Trainer, {}), (LPGTrainer, {"perturbations": [SAM(0.0)]})):
        trainer = make_trainer(trainer_class, LossOfTwoReplicas(), batches, tmp_path, **options)
        trainer.args._n_gpu = 2
        trainer.train()
        models.append(trainer.model)
    assert torch.equal(*map(flat_parameters, models))


# Telemetry


def test_norms_of_the_deltas_are_logged_as_numbers(tmp_path):
    batches, steps = sizes_and_steps(6, [8])
    norms, noise = [], GradientNoise(0.1)

    def finish(parameters):
        norms.append([gradients_of(parameters).norm().item()])
        nn.utils.clip_grad_norm_(parameters, 0.5)
        norms[-1].append(noise.perturb_(parameters).item())

    trainer = train(
        make_model("bert", exact=True), batches, tmp_path, [SAM(0.3), GradientClipping(0.5), GradientNoise(0.1)]
    )
    loop = Loop(make_model("bert", exact=True), 0.3, finish=finish).train(steps)
    excess = [max(norm - 0.5, 0) for norm, _ in norms]
    assert max(excess) > 0
    assert logs_of(trainer, "lpg/sam/delta_norm") == pytest.approx(loop.delta_norms, rel=1e-6)
    assert logs_of(trainer, "lpg/gradient_clipping/delta_norm") == pytest.approx(excess, rel=1e-6, abs=1e-6)
    assert logs_of(trainer, "lpg/gradient_noise/delta_norm") == pytest.approx([n for _, n in norms], rel=1e-6)


def test_norms_are_means_over_the_steps_since_the_last_log_that_have_one(tmp_path):
    batches, steps = sizes_and_steps(8, [8])
    trainer = train(
        make_model("bert", exact=True), batches, tmp_path, [SAM(0.3, interval=3)], args={"logging_steps": 4}
    )
    norms = Loop(make_model("bert", exact=True), 0.3, interval=3).train(steps).delta_norms
    assert [norm > 0 for norm in norms] == [True, False, False, True, False, False, True, False]
    expected = [sum(norms[:4]) / 2, sum(norms[4:])]
    assert logs_of(trainer, "lpg/sam/delta_norm") == pytest.approx(expected, rel=1e-6)


def test_logit_telemetry_is_that_of_the_first_pass(tmp_path):
    batches, _ = sizes_and_steps(4, [8])
    logs = []
    for chain in ([LogitClipping(0.5)], [LogitClipping(0.5), SAM(0.5)]):
        trainer = train(make_model("bert", exact=True), batches, tmp_path, chain)
        logs.append(trainer.state.log_history[0])
    for key in ("lpg/gradient_norm", "lpg/logit_clipping/delta_norm", "lpg/logit_clipping/weight"):
        assert logs[0][key] == pytest.approx(logs[1][key], abs=1e-12)


def test_a_parameter_method_that_occurs_twice_is_logged_twice(tmp_path):
    """Numbered as the logit methods are."""
    batches, _ = sizes_and_steps(2, [8])
    trainer = train(
        make_model("bert", exact=True), batches, tmp_path, [GradientClipping(0.5), GradientClipping(max_value=0.01)]
    )
    log = trainer.state.log_history[0]
    alone = train(make_model("bert", exact=True), batches, tmp_path, [GradientClipping(0.5)]).state.log_history[0]
    assert log["lpg/gradient_clipping/delta_norm"] == alone["lpg/gradient_clipping/delta_norm"]
    assert 0 < log["lpg/gradient_clipping_2/delta_norm"] < 0.5


def test_a_log_by_hand_before_the_first_step_has_no_norms(tmp_path):
    trainer = make_trainer(LPGTrainer, make_model("bert"), [], tmp_path, perturbations=[GradientClipping(0.5)])
    trainer.log({"loss": 1.0})
    assert "lpg/gradient_clipping/delta_norm" not in trainer.state.log_history[-1]


def test_the_users_objects_learn_nothing_and_every_training_starts_anew(tmp_path):
    batches, _ = sizes_and_steps(4, [8])
    chain = [GradientNoise(0.1), GradientClipping(percentile=40)]
    before = [method.get_extra_state().clone() for method in chain]
    first = train(make_model("bert", exact=True), batches, tmp_path, chain)
    second = train(make_model("bert", exact=True), batches, tmp_path, chain)
    assert torch.equal(flat_parameters(first.model), flat_parameters(second.model))
    assert all(torch.equal(method.get_extra_state(), state) for method, state in zip(chain, before, strict=True))


# Bad input


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SAM(-0.1), r"`rho` must be at least 0; found -0\.1"),
        (lambda: SAM(math.nan), r"`rho` must be at least 0; found nan"),
        (lambda: SAM(math.inf), r"`rho` must be finite; found inf"),
        (lambda: SAM(interval=1.5), r"`interval` must be a whole number; found 1\.5"),
        (lambda: SAM(interval=math.inf), r"`interval` must be a whole number; found inf"),
        (lambda: SAM(interval=0), r"`interval` must be at least 1; found 0"),
        (lambda: GradientNoise(-0.1), r"`eta` must be at least 0; found -0\.1"),
        (lambda: GradientNoise(math.inf), r"`eta` must be finite; found inf"),
        (lambda: GradientNoise(gamma=math.inf), r"`gamma` must be finite; found inf"),
        (lambda: GradientNoise(gamma=-0.1), r"`gamma` must be at least 0; found -0\.1"),
        (lambda: GradientClipping(0.0), r"`max_norm` must be positive; found 0\.0"),
        (lambda: GradientClipping(max_value=-1.0), r"`max_value` must be positive; found -1\.0"),
        (lambda: GradientClipping(percentile=0), r"`percentile` must be in \(0, 100\]; found 0"),
        (lambda: GradientClipping(percentile=101), r"`percentile` must be in \(0, 100\]; found 101"),
        (lambda: GradientClipping(1.0, percentile=10), r"must be given one at a time; found \[1\.0, 10\]"),
    ],
)
def test_arguments_out_of_range_are_refused_with_name_value_and_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("method", [SAM(0.1), GradientClipping(), GradientNoise(), "sam(rho=0.1)"], ids=repr)
def test_a_loss_refuses_methods_for_the_parameters(method):
    with pytest.raises(
        ValueError, match=r"perturbs the gradient of the parameters.*LPGTrainer\(perturbations=\.\.\.\)"
    ):
        LPGLoss(NUM_LABELS, [FocalLoss(), method])


@pytest.mark.parametrize("second", [SAM(0.2, adaptive=True), "sam"])
def test_two_sams_are_refused(second, tmp_path):
    with pytest.raises(ValueError, match=r"`perturbations` has more than one SAM: .*Keep one"):
        make_trainer(LPGTrainer, make_model("bert"), [], tmp_path, perturbations=[SAM(0.1), "lpg", second])


@pytest.mark.parametrize(
    ("column", "config", "key", "index"),
    [
        (["ant", "bee", "cow", "doe"], {}, "doe", 3),
        (["doe", "cow", "bee", "ant"], {"label2id": {"ant": 0, "bee": 1, "cow": 2, "doe": 3}}, "doe", 0),
        (["0", "1", "2", "3"], {"label2id": {"ant": 0, "bee": 1, "cow": 2, "doe": 3}}, "doe", 3),
        (None, {"id2label": {0: "ant", 1: "bee", 2: "cow", 3: "doe"}}, "doe", 3),
    ],
    ids=["the data", "data and model disagree", "data with numbers", "the model without label2id"],
)
def test_weights_go_to_the_class_that_the_data_or_the_model_calls_so(column, config, key, index, tmp_path):
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4, "label": [0, 1, 2, 3]})
    rows = rows if column is None else rows.cast_column("label", ClassLabel(names=column))
    model = make_model("bert")
    model.config.update(config)
    args = TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    chain = [f"class_weighting(weights={{{key!r}: 3.0}})"]
    trainer = LPGTrainer(model=model, args=args, train_dataset=rows, perturbations=chain)
    (method,) = trainer.lpg_loss.perturbations
    expected = [1.0] * 4
    expected[index] = 3.0
    assert method.class_weights(trainer.lpg_loss.statistics).tolist() == expected


def test_unknown_label_names_and_weights_of_the_wrong_length_are_refused_by_the_trainer(tmp_path):
    model, batches = make_model("bert"), split(make_batch("bert", 8), [8])
    model.config.label2id = {"ant": 0, "bee": 1, "cow": 2, "doe": 3}
    make_trainer(LPGTrainer, model, batches, tmp_path, perturbations=["class_weighting(weights={'doe': 3.0})"]).train()
    with pytest.raises(ValueError, match=r"the key 'elk', which does not name a class.*'ant', 'bee', 'cow', 'doe'"):
        make_trainer(
            LPGTrainer, model, batches, tmp_path, perturbations=["class_weighting(weights={'elk': 3.0})"]
        ).train()
    with pytest.raises(ValueError, match=r"one weight for each of 4 classes; found \[1\.0, 2\.0\]"):
        make_trainer(
            LPGTrainer, model, batches, tmp_path, perturbations=["class_weighting(weights=[1.0, 2.0])"]
        ).train()
