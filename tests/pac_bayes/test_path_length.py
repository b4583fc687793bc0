"""`PathLength` against steps taken by hand, and against theory on a linear softmax model."""

from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from accelerate.utils import DistributedType
from tiny import flat_parameters, make_batch, make_model, make_trainer, split
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput

from lpg_hf import LPG, LogitClipping, LPGTrainer
from lpg_hf.pac_bayes import PathLength
from lpg_hf.perturbations.observers import PerturbationObserver


NUM_CLASSES, NUM_FEATURES, BATCH_SIZE, NUM_STEPS = 4, 6, 10, 40
LENGTHS = ("lpg/displacement", "lpg/path_length", "lpg/perturbation_path")
SGD = {"optim": "sgd", "max_grad_norm": 0.0}


class LinearSoftmax(nn.Module):
    """Logits `W x` without bias, `w_0` not zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(NUM_CLASSES, NUM_FEATURES, dtype=torch.float64))

    def forward(self, features, labels=None):
        logits = features @ self.weight.T
        return SequenceClassifierOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits
        )


class WithFactor(LinearSoftmax):
    """Its factor of 1 has a gradient."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, features, labels=None):
        return super().forward(self.factor * features, labels)


class Recorder(TrainerCallback):
    """Records the weights and the lengths after every step."""

    def __init__(self, path_length):
        self.path_length, self.weights, self.lengths = path_length, [], []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights.append(flat_parameters(model).clone())
        self.lengths.append(self.path_length.report())


def problem():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(NUM_STEPS * BATCH_SIZE, NUM_FEATURES, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, NUM_CLASSES, (len(features),), generator=generator)
    return features, labels


def largest_rate():
    """2 / beta, beta being half the largest squared norm of a sample."""
    features, _ = problem()
    return 4 / features.square().sum(-1).max().item()


def run(perturbations, tmp_path, interval=1, momentum=0.0, kind=LinearSoftmax):
    torch.manual_seed(1)
    features, labels = problem()
    model = kind()
    optimizer = torch.optim.SGD([model.weight], lr=largest_rate(), momentum=momentum)
    path_length = PathLength(interval)
    recorder = Recorder(path_length)
    trainer = make_trainer(
        LPGTrainer,
        model,
        split({"features": features, "labels": labels}, [BATCH_SIZE] * NUM_STEPS),
        tmp_path,
        args=SGD,
        optimizers=(optimizer, None),
        perturbations=perturbations,
        callbacks=[path_length, recorder],
    )
    trainer.train()
    return trainer, recorder


def lpg(epsilon, sign):
    return LPG("fixed", epsilon=epsilon, signs=[sign] * NUM_CLASSES, max_dampening=1.0)


def steps_by_hand(epsilon, sign):
    """Weights and the three lengths after each step, in NumPy."""
    torch.manual_seed(1)
    weight = LinearSoftmax().weight.detach().numpy().copy()
    start, rate, path, perturbation, rows = weight.copy(), largest_rate(), 0.0, 0.0, []
    features, labels = (tensor.numpy() for tensor in problem())
    for step in range(NUM_STEPS):
        x, y = (values[step * BATCH_SIZE : (step + 1) * BATCH_SIZE] for values in (features, labels))
        gradient = reference.softmax(x @ weight.T) - np.eye(NUM_CLASSES)[y]
        delta = np.zeros_like(gradient)
        for label in np.unique(y):
            mean = gradient[y == label].mean(0)
            norm = np.linalg.norm(mean)
            delta[y == label] = sign * (epsilon if sign > 0 else min(epsilon, norm)) * mean / norm
        change = -rate * (gradient + delta).T @ x / BATCH_SIZE
        weight = weight + change
        path += np.linalg.norm(change)
        perturbation += rate * np.linalg.norm(delta.T @ x / BATCH_SIZE)
        rows.append((weight.ravel(), (np.linalg.norm(weight - start), path, perturbation)))
    return rows


@pytest.mark.parametrize("sign", [-1, 1])
def test_lengths_are_those_of_steps_by_hand(sign, tmp_path):
    trainer, recorder = run([lpg(0.3, sign)], tmp_path)
    for weights, lengths, (by_hand, expected) in zip(
        recorder.weights, recorder.lengths, steps_by_hand(0.3, sign), strict=True
    ):
        np.testing.assert_allclose(weights, by_hand, atol=1e-12)
        assert [lengths[name] for name in LENGTHS] == pytest.approx(expected, abs=1e-11)
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == NUM_STEPS
    assert [[log[name] for name in LENGTHS] for log in logged] == [
        [lengths[name] for name in LENGTHS] for lengths in recorder.lengths
    ]


def test_a_parameter_that_the_optimizer_does_not_have_adds_no_length(tmp_path):
    _, recorder = run([lpg(0.3, 1)], tmp_path, kind=WithFactor)
    for lengths, (_, expected) in zip(recorder.lengths, steps_by_hand(0.3, 1), strict=True):
        assert [lengths[name] for name in LENGTHS] == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("epsilon", [0.05, 0.3, 1.0])
def test_coupled_runs_part_by_at_most_the_perturbations_path(sign, epsilon, tmp_path):
    """Theorem 5.3 (ii), at every step: the perturbed and the plain run see the same batches from the same weights."""
    _, perturbed = run([lpg(epsilon, sign)], tmp_path)
    _, plain = run([], tmp_path)
    features, _ = problem()
    norms = features.norm(dim=-1).view(NUM_STEPS, BATCH_SIZE).mean(-1)
    a_priori = largest_rate() * epsilon * norms.cumsum(0)
    for step in range(NUM_STEPS):
        gap = (perturbed.weights[step] - plain.weights[step]).norm().item()
        lengths = perturbed.lengths[step]
        assert 0 < gap <= lengths["lpg/perturbation_path"] + 1e-10
        assert lengths["lpg/perturbation_path"] <= a_priori[step] + 1e-10
        assert lengths["lpg/displacement"] <= lengths["lpg/path_length"] + 1e-10


def test_coupled_runs_with_decay_to_the_start_stay_within_eps_over_the_decay():
    """Theorem 5.3 (ii) with decay, on steps by hand: the measured bound, and the limit for all times."""
    features, labels = (tensor.numpy() for tensor in problem())
    decay, epsilon = 0.1, 0.4
    beta = (features**2).sum(1).max() / 2
    rate = 2 / (beta + 2 * decay)
    start = np.random.default_rng(0).normal(size=(NUM_CLASSES, NUM_FEATURES))
    weights, bound = [start.copy(), start.copy()], 0.0
    for step in range(400):
        rows = np.arange(step, step + BATCH_SIZE) % len(labels)
        x, y = features[rows], labels[rows]
        for number in range(2):
            gradient = reference.softmax(x @ weights[number].T) - np.eye(NUM_CLASSES)[y]
            delta = np.zeros_like(gradient)
            if number == 0:
                for label in np.unique(y):
                    mean = gradient[y == label].mean(0)
                    delta[y == label] = epsilon * mean / np.linalg.norm(mean)
                pull = np.linalg.norm(delta.T @ x / BATCH_SIZE)
            step_down = (gradient + delta).T @ x / BATCH_SIZE + decay * (weights[number] - start)
            weights[number] = weights[number] - rate * step_down
        bound = (1 - rate * decay) * bound + rate * pull
        assert np.linalg.norm(weights[0] - weights[1]) <= bound + 1e-10
        assert bound <= epsilon * np.linalg.norm(features, axis=1).max() / decay


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_displacement_path_and_gradients(momentum, tmp_path):
    """Property 23: displacement <= path <= sum eta ||g_t|| / (1 - mu) at a constant rate."""
    _, recorder = run([LogitClipping(0.5)], tmp_path, momentum=momentum)
    torch.manual_seed(1)
    before, total = LinearSoftmax().weight.detach().numpy(), 0.0
    features, labels = (tensor.numpy().reshape(NUM_STEPS, BATCH_SIZE, -1) for tensor in problem())
    for step in range(NUM_STEPS):
        gradient = reference.softmax(features[step] @ before.T) - np.eye(NUM_CLASSES)[labels[step, :, 0]]
        gradient *= np.minimum(1, 0.5 / np.linalg.norm(gradient, axis=1, keepdims=True))
        total += largest_rate() * np.linalg.norm(gradient.T @ features[step] / BATCH_SIZE)
        before = recorder.weights[step].numpy().reshape(before.shape)
        displacement, path, _ = (recorder.lengths[step][name] for name in LENGTHS)
        assert displacement <= path + 1e-10
        assert path <= total / (1 - momentum) + 1e-10
    if momentum == 0:
        assert path == pytest.approx(total, rel=1e-10)


def test_momentum_with_a_rising_rate_goes_further_than_the_bound_for_constant_ones():
    """Why the documentation asks for a rate that never rises: a gradient met at rate 0 moves the weights later."""
    momentum, rates, gradients = 0.9, [0.0, 1.0, 1.0], [1.0, 0.0, 0.0]
    velocity = displacement = 0.0
    for rate, gradient in zip(rates, gradients, strict=True):
        velocity = momentum * velocity + gradient
        displacement += rate * velocity
    bound = sum(rate * gradient for rate, gradient in zip(rates, gradients, strict=True)) / (1 - momentum)
    assert displacement > bound


def test_an_interval_extrapolates_from_the_steps_that_it_measures(tmp_path):
    _, every = run([lpg(0.3, -1)], tmp_path)
    _, third = run([lpg(0.3, -1)], tmp_path, interval=3)
    assert all(torch.equal(a, b) for a, b in zip(every.weights, third.weights, strict=True))
    for name in LENGTHS[1:]:
        sums = np.array([lengths[name] for lengths in every.lengths])
        increments = np.diff(sums, prepend=0.0)
        assert third.lengths[-1][name] == pytest.approx(3 * increments[::3].sum(), rel=1e-10)
    assert third.lengths[-1]["lpg/displacement"] == every.lengths[-1]["lpg/displacement"]


def test_accumulation_and_a_loss_of_the_users_measure_the_whole_batch(tmp_path):
    """Micro-batches of any size add up to what the whole batch measures."""
    batch = make_batch("bert", 24, dtype=torch.float64)

    def lengths(sizes, steps, **kwargs):
        path_length = PathLength(interval=1)
        trainer = make_trainer(
            LPGTrainer,
            make_model("bert", exact=True),
            split(batch, sizes),
            tmp_path,
            args=SGD | {"learning_rate": 0.1, "gradient_accumulation_steps": steps},
            perturbations=["logit_clipping(max_norm=0.5)"],
            callbacks=[path_length],
            **kwargs,
        )
        trainer.train()
        return path_length.report()

    whole = lengths([8, 8, 8], 1)
    assert whole["lpg/perturbation_path"] > 0.01
    assert lengths([3, 5, 1, 7, 4, 4], 2) == pytest.approx(whole, abs=1e-10)

    def loss(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    assert lengths([3, 5, 1, 7, 4, 4], 2, compute_loss_func=loss) == pytest.approx(whole, abs=1e-10)


def test_sam_is_measured_at_the_pass_that_trains(tmp_path):
    """The perturbation path comes from the second pass, at the shifted weights."""
    batch = make_batch("bert", 8, dtype=torch.float64)
    path_length = PathLength(interval=1)
    model = make_model("bert", exact=True)
    start = make_model("bert", exact=True)
    trainer = make_trainer(
        LPGTrainer,
        model,
        [batch],
        tmp_path,
        args=SGD | {"learning_rate": 0.1},
        perturbations=["logit_clipping(max_norm=0.5)", "sam(rho=0.5)"],
        callbacks=[path_length],
    )
    trainer.train()

    def gradient(max_norm):
        logits = start(input_ids=batch["input_ids"]).logits
        g = logits.softmax(-1) - F.one_hot(batch["labels"], 4)
        factor = (max_norm / g.norm(dim=-1, keepdim=True)).clamp(max=1).detach()
        return torch.autograd.grad(logits, list(start.parameters()), (factor * g).detach() / 8, allow_unused=True)

    ascent = [torch.zeros_like(p) if g is None else g for p, g in zip(start.parameters(), gradient(0.5), strict=True)]
    norm = torch.cat([part.flatten() for part in ascent]).norm()
    with torch.no_grad():
        for parameter, part in zip(start.parameters(), ascent, strict=True):
            parameter += 0.5 * part / norm
    pairs = zip(gradient(0.5), gradient(torch.inf), strict=True)
    expected = 0.1 * torch.cat([(a - b).flatten() for a, b in pairs if a is not None]).norm().item()
    assert path_length.report()["lpg/perturbation_path"] == pytest.approx(expected, rel=1e-8)


def test_a_resumed_run_goes_on_measuring(tmp_path):
    batches = split(make_batch("bert", 64), [8] * 8)

    def trainer(folder):
        return make_trainer(
            LPGTrainer,
            make_model("bert"),
            batches,
            tmp_path / folder,
            args={"save_strategy": "steps", "save_steps": 3},
            perturbations=["logit_clipping(max_norm=0.5)"],
            callbacks=[PathLength(interval=2)],
        )

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.log_history[-2] == whole.state.log_history[-2]
    assert resumed.state.log_history[-2]["lpg/path_length"] > 0

    plain = make_trainer(
        LPGTrainer, make_model("bert"), batches, tmp_path / "plain", args={"save_strategy": "steps", "save_steps": 3}
    )
    plain.train()
    with pytest.raises(ValueError, match=r"written without PathLength"):
        trainer("late").train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-3"))


def test_displacement_from_a_prior(tmp_path):
    prior, model = make_model("vit", seed=1), make_model("vit", seed=2)
    path_length = PathLength(prior=prior)
    batch = make_batch("vit", 8)
    make_trainer(LPGTrainer, model, [batch], tmp_path, callbacks=[path_length]).train()
    expected = (flat_parameters(model) - flat_parameters(prior)).norm().item()
    assert path_length.report()["lpg/displacement"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"`prior` has no parameter"):
        make_trainer(
            LPGTrainer, make_model("bert"), [make_batch("bert", 8)], tmp_path, callbacks=[PathLength(prior=prior)]
        ).train()


def test_the_scale_of_half_precision_does_not_count():
    """What the scaler multiplies, only to avoid underflow, is divided again."""
    parameter = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    lengths = []
    for scale in (1.0, 1024.0):
        path_length, model = PathLength(interval=1), nn.ParameterList([parameter])
        path_length.on_train_begin(None, None, None, model=model)
        path_length.on_step_begin(None, SimpleNamespace(global_step=0), None)
        path_length.add_perturbation(3 * parameter, torch.tensor([[3.0, -4.0]]), scale)
        path_length.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        lengths.append(path_length.report()["lpg/perturbation_path"])
    assert lengths == pytest.approx([0.5 * 3 * 5] * 2)


def test_training_is_bit_for_bit_the_same_with_it(tmp_path):
    results = []
    for callbacks in ([], [PathLength(interval=2)]):
        model = make_model("bert")
        batches = split(make_batch("bert", 32), [8] * 4)
        make_trainer(LPGTrainer, model, batches, tmp_path, perturbations=["auto"], callbacks=callbacks).train()
        results.append(flat_parameters(model))
    assert torch.equal(*results)


def test_an_interval_below_one():
    with pytest.raises(ValueError, match=r"`interval` must be at least 1; found 0"):
        PathLength(0)


def test_an_observer_starts_anew_with_every_trainer(tmp_path):
    path_length = PathLength(interval=1)
    assert isinstance(path_length, PerturbationObserver) and not isinstance(TrainerCallback(), PerturbationObserver)
    reports = []
    for _ in range(2):
        batches = split(make_batch("bert", 16), [8] * 2)
        make_trainer(LPGTrainer, make_model("bert"), batches, tmp_path, callbacks=[path_length]).train()
        reports.append(path_length.report())
    assert reports[0]["lpg/displacement"] > 0
    assert reports[0] == reports[1]


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_sharded_parameters_are_refused(kind):
    with pytest.raises(ValueError, match=r"needs whole parameters on every process, but \S+ shards them\. Use DDP"):
        PathLength().start(SimpleNamespace(distributed_type=kind))
