"""Low precision, compilation, checkpointing and the other options of the Trainer that touch loss or gradient."""

import math
import shutil
import warnings

import pytest
import reference
import torch
from families import (
    CHAIN,
    COUNTS,
    FAMILIES,
    inputs_of,
    make_family,
    make_family_batch,
    perturbed_by_chain,
    reference_gradients,
)
from method_examples import ALL_IN_TRAINING, LOGIT_METHODS
from tiny import NUM_LABELS, class_means, flat_parameters, make_trainer, split
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from lpg_hf import LPGLoss, LPGTrainer
from lpg_hf.pac_bayes import PathLength
from lpg_hf.perturbations import parse_perturbation


pytestmark = pytest.mark.filterwarnings("error::DeprecationWarning:lpg_hf", "error::FutureWarning:lpg_hf")

SGD = {"optim": "sgd", "learning_rate": 2.0**-4, "max_grad_norm": 0.0}
# `auto` with gates that are open from the second epoch on.
AUTO = ["logit_adjustment", "class_relative_dampening(learned=(0.0, 0.01), evidence=(0.0, 0.001))"]
# So few samples that an epoch ends within two steps.
SMALL_COUNTS = [3, 2, 2, 1]
PARAMETER_METHODS = [text for text in ALL_IN_TRAINING if parse_perturbation(text).space == "parameter"]


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_deprecated_calls_of_this_package_would_fail_here(category):
    with pytest.raises(category):
        warnings.warn_explicit("old", category, "trainer.py", 1, module="lpg_hf.trainer")


class RecordGradient(TrainerCallback):
    """The gradient that the first optimizer step gets, in float64."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            rows = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            self.gradient = torch.cat([row.double().flatten() for row in rows])


def gradient_of_a_step(trainer_class, model, batch, path, args=None, **kwargs):
    record = RecordGradient()
    make_trainer(trainer_class, model, [batch], path, args=SGD | (args or {}), callbacks=[record], **kwargs).train()
    return record.gradient


def train(trainer_class, model, batches, path, args=None, **kwargs):
    trainer = make_trainer(trainer_class, model, batches, path, args=SGD | (args or {}), **kwargs)
    trainer.train()
    assert trainer.state.global_step == len(batches) * trainer.args.num_train_epochs
    return trainer


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


# bfloat16


def half_precision(name, mode):
    """Model and batch for bfloat16 arithmetic, and the same numbers in float64."""
    weights, inputs, args = {
        "autocast": (torch.float32, torch.float32, {"bf16": True}),
        "bf16 weights": (torch.bfloat16, torch.bfloat16, {}),
    }[mode]
    model = make_family(name, exact=True).to(weights)
    exact = make_family(name, exact=True)
    exact.load_state_dict(model.state_dict())
    batch = make_family_batch(name, 16, dtype=inputs)
    exact_batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    return model, batch, exact, exact_batch, args


@pytest.mark.parametrize("mode", ["autocast", "bf16 weights"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "vit", "swin", "resnet", "wav2vec2"])
def test_bf16_gradient_is_as_near_to_float64_as_the_trainers(name, mode, tmp_path):
    """To 2^-7 of its norm; where the model's own rounding is above that, to the plain Trainer's error."""
    model, batch, exact, exact_batch, args = half_precision(name, mode)
    plain = gradient_of_a_step(Trainer, model, batch, tmp_path, args)
    expected, unperturbed = reference_gradients(exact, list(exact.parameters()), [exact_batch])
    assert relative_error(expected, unperturbed) > 0.25

    model = half_precision(name, mode)[0]
    ours = gradient_of_a_step(LPGTrainer, model, batch, tmp_path, args, perturbations=CHAIN, class_counts=COUNTS)
    error, plain_error = (ours - expected).norm(), (plain - unperturbed).norm()
    assert error < max(2.0**-7 * expected.norm(), plain_error)


@pytest.mark.parametrize("mode", ["autocast", "bf16 weights"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_delta_adds_one_rounding_to_a_bf16_model(name, mode, tmp_path):
    """From the bfloat16 logits on: to 2^-7 of the two gradients that are added up, on top of the Trainer's error."""
    model, batch, _, _, args = half_precision(name, mode)
    plain = gradient_of_a_step(Trainer, half_precision(name, mode)[0], batch, tmp_path, args)
    parameters = list(model.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        logits = model.train()(**inputs_of(batch)).logits
    logits = logits.float()
    expected = []
    for cotangent in perturbed_by_chain(logits.detach().double().numpy(), batch["labels"].numpy()):
        vector = torch.from_numpy(cotangent / 16).float()
        rows = torch.autograd.grad(logits, parameters, vector, retain_graph=True, allow_unused=True)
        rows = [torch.zeros_like(p) if row is None else row for row, p in zip(rows, parameters, strict=True)]
        expected.append(torch.cat([row.double().flatten() for row in rows]))
    perturbed, unperturbed = expected
    ours = gradient_of_a_step(LPGTrainer, model, batch, tmp_path, args, perturbations=CHAIN, class_counts=COUNTS)
    rounding = 2.0**-7 * (perturbed.norm() + unperturbed.norm())
    assert (ours - perturbed).norm() < (plain - unperturbed).norm() + rounding


# The loss scale of fp16


def logits_and_labels(dtype=torch.float32):
    """Confident, undecided and wrong samples; the gradient of the first underflows in float16."""
    logits = torch.randn(8, NUM_LABELS, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    logits[0] = torch.tensor([17.0, 0.0, 0.5, 1.0])
    return logits.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("base_loss", [None, "label smoothing"])
@pytest.mark.parametrize("method", LOGIT_METHODS)
def test_a_scaled_loss_scales_the_gradient(method, base_loss):
    def smoothed(logits, labels):
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)

    def gradient(scale):
        logits, labels = logits_and_labels()
        loss_fn = LPGLoss(NUM_LABELS, [method], COUNTS, base_loss and smoothed)
        for _ in range(2):  # some methods learn from the first step
            logits.grad = None
            (scale * loss_fn(logits, labels)).backward()
        return logits.grad

    assert gradient(1).norm() > 0.05
    assert torch.equal(gradient(65536), 65536 * gradient(1))


def test_the_scale_saves_small_gradients_of_fp16_logits():
    logits, labels = logits_and_labels(torch.float16)
    expected, _ = perturbed_by_chain(logits.detach().double().numpy(), labels.numpy())
    expected = torch.from_numpy(expected / 8)
    loss_fn = LPGLoss(NUM_LABELS, CHAIN, COUNTS)
    (65536 * loss_fn(logits, labels)).backward()
    assert logits.grad.dtype == torch.float16
    torch.testing.assert_close(logits.grad.double(), 65536 * expected, rtol=2.0**-10, atol=2.0**-14)


@pytest.mark.parametrize("methods", [AUTO, *([*AUTO, method] for method in PARAMETER_METHODS)], ids=str)
def test_training_with_a_gradient_scaler_is_training_without(methods, tmp_path):
    batches = split(make_family_batch("bert", 32), [8] * 4)

    def train_with(scaler):
        record = RecordGradient()
        trainer = make_trainer(
            LPGTrainer,
            make_family("bert", exact=True).float(),
            batches,
            tmp_path,
            args=SGD,
            perturbations=methods,
            class_counts=COUNTS,
            callbacks=[record],
        )
        trainer.accelerator.scaler = scaler
        trainer.train()
        return record.gradient, flat_parameters(trainer.model)

    gradient, parameters = train_with(None)
    scaled_gradient, scaled_parameters = train_with(torch.amp.GradScaler("cpu", init_scale=65536.0))
    assert relative_error(scaled_gradient, 65536 * gradient) < 1e-6
    torch.testing.assert_close(scaled_parameters, parameters, rtol=0, atol=1e-6)


# Compilation


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["bert", "vit"])
@pytest.mark.parametrize(
    ("args", "is_compiled"), [({}, True), ({"label_smoothing_factor": 0.1}, False)], ids=["cross-entropy", "smoothed"]
)
def test_compiled_training_is_the_uncompiled(args, is_compiled, name, backend, tmp_path, fresh_compiler):
    """Model and loss; not a loss that is differentiated by autograd on the way. The last batch is a smaller one."""
    batches = split(make_family_batch(name, 29), [8, 8, 8, 5])
    kwargs = {"perturbations": AUTO, "class_counts": COUNTS}
    args = args | {"num_train_epochs": 2}
    plain = train(LPGTrainer, make_family(name, exact=True).float(), batches, tmp_path, args, **kwargs)
    compiled = train(
        LPGTrainer,
        make_family(name, exact=True).float(),
        batches,
        tmp_path,
        args | {"torch_compile": True, "torch_compile_backend": backend},
        **kwargs,
    )
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    assert (compiled.lpg_loss._compiled_call_impl is not None) == is_compiled
    assert plain.lpg_loss._compiled_call_impl is None
    torch.testing.assert_close(flat_parameters(compiled.model), flat_parameters(plain.model), rtol=0, atol=1e-6)
    torch.testing.assert_close(class_means(compiled.lpg_loss), class_means(plain.lpg_loss), rtol=0, atol=1e-5)
    assert plain.lpg_loss.perturbations[1]._gate.max() > 0


@pytest.mark.parametrize("is_launched", [False, True], ids=["torch_compile", "accelerate-launch"])
def test_path_length_refuses_a_compiled_model(is_launched, tmp_path, monkeypatch):
    """Where buffers are donated, the second gradient is wrong or an error."""
    batches, args = [make_family_batch("bert", 8)], {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    if is_launched:  # what `accelerate launch --dynamo_backend` sets
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
        args = {}
    with pytest.raises(ValueError, match="torch_compile=False"):
        make_trainer(LPGTrainer, make_family("bert"), batches, tmp_path, args=args, callbacks=[PathLength()])


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_loss_of_a_native_compiler_is_the_uncompiled(fresh_compiler):
    """`auto` on a long tail, in batches of two sizes; the gates are open from the third step on."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    chain = [*AUTO, "label_smoothing"]
    plain, compiled = (LPGLoss(NUM_LABELS, chain, SMALL_COUNTS) for _ in range(2))
    compiled.compile()
    num_graphs = []
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        size = 9 if step % 2 else 16
        values = 3 * torch.randn(size, NUM_LABELS, generator=generator)
        labels = torch.randint(NUM_LABELS, (size,), generator=generator)
        labels[::4] = -100
        values[4] = torch.nan  # of an ignored sample
        results = []
        for loss_fn in (plain, compiled):
            logits = values.clone().requires_grad_()
            loss = loss_fn(logits, labels)
            loss.backward()
            results.append((loss.detach(), logits.grad, loss_fn.perturbations[1].last_weight))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert plain.perturbations[1].last_weight.min() < 0.9
    assert compiled.telemetry() == pytest.approx(plain.telemetry(), abs=1e-5)
    # One graph while what follows from the prior is not known yet, one after it, one for any size.
    assert num_graphs[-1] == num_graphs[2] <= 3


@pytest.mark.parametrize("method", LOGIT_METHODS)
def test_the_loss_compiles_without_graph_break(method, fresh_compiler):
    """Three steps, so that what is learned from one is used in the next."""

    def run(compile_loss):
        loss_fn = LPGLoss(NUM_LABELS, [method], SMALL_COUNTS)
        call = torch.compile(loss_fn, fullgraph=True, backend="aot_eager") if compile_loss else loss_fn
        results = []
        for step in range(3):
            logits, labels = logits_and_labels()
            with torch.no_grad():
                logits.add_(step)[:, 1].sub_(step)
            loss = call(logits, labels)
            loss.backward()
            results += [loss.detach(), logits.grad]
        return results, loss_fn

    expected, loss_fn = run(compile_loss=False)
    results, compiled = run(compile_loss=True)
    for actual, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-6)
    assert loss_fn.statistics.steps == 3
    for key, tensor in loss_fn.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[key], tensor, rtol=0, atol=1e-6, msg=key)
    assert compiled.telemetry() == pytest.approx(loss_fn.telemetry(), abs=1e-5)


# Gradient checkpointing


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("methods", [AUTO, [*AUTO, "sam"]], ids=["logits", "sam"])
@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_gradient_checkpointing_changes_nothing(name, methods, tmp_path):
    batches = split(make_family_batch(name, 32), [8] * 4)
    forwards = {}

    def train_with(checkpointing):
        model = make_family(name, exact=True).float()
        forwards[checkpointing] = 0

        def count(*_):
            forwards[checkpointing] += 1

        layer = next(module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
        next(module for module in layer.modules() if isinstance(module, nn.Linear)).register_forward_hook(count)
        args = {"gradient_checkpointing": checkpointing, "num_train_epochs": 2}
        kwargs = {"perturbations": methods, "class_counts": COUNTS}
        return train(LPGTrainer, model, batches, tmp_path, args, **kwargs)

    without, with_checkpointing = train_with(False), train_with(True)
    assert forwards[True] == 2 * forwards[False]
    assert torch.equal(flat_parameters(with_checkpointing.model), flat_parameters(without.model))
    assert torch.equal(class_means(with_checkpointing.lpg_loss), class_means(without.lpg_loss))


# Other options of the Trainer


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_label_smoothing_factor_is_perturbed_as_the_reference(name, tmp_path):
    """`g = softmax(z) - ((1 - a) onehot + a / C)`, then clipped."""
    batch = make_family_batch(name, 8, dtype=torch.float64)
    model = make_family(name, exact=True)
    logits = model.train()(**inputs_of(batch)).logits
    labels = batch["labels"].numpy()
    g = reference.softmax(logits.detach().numpy()) - 0.2 / NUM_LABELS
    g[range(8), labels] -= 0.8
    g = torch.from_numpy(g + reference.clip_delta(g, 0.5))
    rows = torch.autograd.grad(logits, list(model.parameters()), g / 8, allow_unused=True)
    rows = [torch.zeros_like(p) if row is None else row for row, p in zip(rows, model.parameters(), strict=True)]
    expected = torch.cat([row.flatten() for row in rows])

    args = {"label_smoothing_factor": 0.2}
    ours = gradient_of_a_step(LPGTrainer, model, batch, tmp_path, args, perturbations=["logit_clipping(max_norm=0.5)"])
    plain = gradient_of_a_step(Trainer, make_family(name, exact=True), batch, tmp_path, args)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
    assert relative_error(plain, expected) > 0.1


@pytest.mark.parametrize("perturbations", [[], ["logit_clipping(max_norm=100.0)"]], ids=str)
def test_neftune_is_the_trainers(perturbations, tmp_path):
    """Its noise is drawn once per forward pass, with the same seed, and is gone in evaluation."""
    batches = split(make_family_batch("bert", 32), [8] * 4)
    noise = {"neftune_noise_alpha": 5.0, "per_device_eval_batch_size": 1}
    plain = train(Trainer, make_family("bert", exact=True), batches, tmp_path, noise)
    ours = train(LPGTrainer, make_family("bert", exact=True), batches, tmp_path, noise, perturbations=perturbations)
    quiet = train(Trainer, make_family("bert", exact=True), batches, tmp_path)
    if perturbations:
        torch.testing.assert_close(flat_parameters(ours.model), flat_parameters(plain.model), rtol=0, atol=1e-12)
    else:
        assert torch.equal(flat_parameters(ours.model), flat_parameters(plain.model))
        assert (ours.predict(batches).predictions == plain.predict(batches).predictions).all()
    assert (flat_parameters(ours.model) - flat_parameters(quiet.model)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_max_grad_norm_clips_the_perturbed_gradient(name, tmp_path):
    batch = make_family_batch(name, 8, dtype=torch.float64)
    model = make_family(name, exact=True)
    before = flat_parameters(model).clone()
    gradient, unperturbed = reference_gradients(model, list(model.parameters()), [batch])
    norm = gradient.norm().item()
    assert abs(norm - unperturbed.norm().item()) > 0.05 * norm
    trainer = train(
        LPGTrainer,
        model,
        [batch],
        tmp_path,
        {"max_grad_norm": norm / 4},
        perturbations=CHAIN,
        class_counts=COUNTS,
    )
    expected = gradient * (norm / 4) / (norm + 1e-6) * SGD["learning_rate"]
    torch.testing.assert_close(before - flat_parameters(model), expected, rtol=0, atol=1e-12)
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("nan_filter", [True, False])
def test_the_nan_filter_does_not_hide_bad_values(nan_filter, tmp_path):
    batches = split(make_family_batch("vit", 32), [8] * 4)
    batches[1]["pixel_values"][0, 0, 0, 0] = math.nan
    args = {"logging_nan_inf_filter": nan_filter, "logging_steps": 4}
    with pytest.raises(FloatingPointError, match="logits of step 2, or"):
        train(LPGTrainer, make_family("vit"), batches, tmp_path, args, class_counts=COUNTS)


@pytest.mark.parametrize("nan_filter", [True, False])
def test_the_nan_filter_logs_what_the_trainer_logs(nan_filter, tmp_path):
    batches = split(make_family_batch("vit", 32), [8] * 4)
    batches[1]["pixel_values"][0, 0, 0, 0] = math.nan
    args = {"logging_nan_inf_filter": nan_filter}
    plain = train(Trainer, make_family("vit"), batches, tmp_path, args)
    ours = train(LPGTrainer, make_family("vit"), batches, tmp_path, args, perturbations=[])
    losses = [str(log["loss"]) for log in ours.state.log_history if "loss" in log]
    assert losses == [str(log["loss"]) for log in plain.state.log_history if "loss" in log]
    assert ("nan" in losses) != nan_filter
