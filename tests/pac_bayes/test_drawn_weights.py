"""The drawn weights reach the predictions, whatever way the noise takes, or the model is refused."""

import copy

import pytest
import torch
from families import make_family
from noisy_models import MOVED, NUM_LABELS, REFUSED, RIGHT, SIZE, Classifier, with_layer
from peft import PromptEncoderConfig, PromptTuningConfig, TaskType, get_peft_model
from tiny import make_model
from torch import nn
from transformers import LevitConfig, LevitForImageClassification

from lpg_hf.pac_bayes import certify, gibbs_error
from lpg_hf.pac_bayes.loaded_weights import LoadedWeights
from lpg_hf.pac_bayes.remembered_outputs import RememberedOutputs
from lpg_hf.pac_bayes.scope import parameters_in_scope
from lpg_hf.pac_bayes.weight_noise import EVALUATION, WeightNoise


NUM_DRAWS = 20
FEW = {"num_draws": 13, "sigma_grid": [1.0], "disable_tqdm": True}


def make_rows(num_rows=20):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, 2, SIZE, generator=generator, dtype=torch.float64)
    return [{"x": entry, "labels": number % NUM_LABELS} for number, entry in enumerate(x)]


@torch.no_grad()
def errors_of_new_models(make, rows, sigma):
    """Errors of the draws, each loaded into a model that was just made and has computed nothing yet."""
    template = make()
    noise = WeightNoise(template, parameters_in_scope(template, "trained"), seed=0)
    weights = template.state_dict()
    x, labels = torch.stack([row["x"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    errors = []
    for draw in range(NUM_DRAWS):
        model = make()
        drawn = {name: weights[name] + sigma * z for name, z in noise.sample(EVALUATION, draw).items()}
        model.load_state_dict(drawn, strict=False)
        errors.append((model.eval()(x)["logits"].argmax(-1) != labels).double().mean().item())
    return errors


@pytest.mark.parametrize("name", RIGHT)
def test_every_draw_is_that_of_a_new_model_with_these_weights(name):
    rows = make_rows()
    model = RIGHT[name]()
    found = gibbs_error(model, rows, sigma=1.0, num_draws=NUM_DRAWS, batch_size=16, disable_tqdm=True)
    expected = errors_of_new_models(RIGHT[name], rows, sigma=1.0)
    assert len(set(expected)) > 1
    assert found.draws == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", RIGHT)
@torch.no_grad()
def test_a_model_is_afterwards_what_it_was(name):
    rows = make_rows()
    x = torch.stack([row["x"] for row in rows])
    for is_training in (True, False):
        model = RIGHT[name]().train(is_training)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        logits = model(x)["logits"]
        certify(model, rows, prior=copy.deepcopy(model), **FEW)
        assert model.training == is_training
        # An adapter that is merged and taken out again leaves rounding.
        torch.testing.assert_close(model(x)["logits"], logits, rtol=1e-12, atol=1e-12)
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["Merged", "KeptUntilTraining", "Full"])
@torch.no_grad()
def test_a_model_is_what_it_was_after_an_error(name):
    class Failing(torch.utils.data.Dataset):
        reads = 0

        def __len__(self):
            return 20

        def __getitem__(self, number):
            self.reads += 1
            if self.reads == 35:
                raise OSError("the disk is gone")
            return make_rows()[number]

    model = RIGHT[name]()
    x = torch.stack([row["x"] for row in make_rows()])
    logits = model.eval()(x)["logits"]
    model.train()
    with pytest.raises(OSError, match="the disk is gone"):
        gibbs_error(model, Failing(), sigma=1.0, num_draws=4, batch_size=5, disable_tqdm=True)
    assert model.training
    torch.testing.assert_close(model.eval()(x)["logits"], logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("has_run", [False, True])
def test_a_module_that_never_drops_what_it_computed_is_refused(name, has_run):
    rows = make_rows()
    model = REFUSED[name]()
    if has_run:
        with torch.no_grad():
            model.eval()(torch.stack([row["x"] for row in rows]))
    for run in (
        lambda: gibbs_error(model, rows, sigma=1.0, num_draws=5, disable_tqdm=True),
        lambda: certify(model, rows, prior=copy.deepcopy(model), **FEW),
    ):
        with pytest.raises(
            ValueError, match=r"Noise on encoder\.second\S*weight changes no .* encoder\.second goes on"
        ):
            run()


def test_complex_parameters_are_refused():
    """Their distance would be that of the real parts, and half of the variance would be missing."""

    class Rotated(Classifier):
        trained = ("phase", "classifier")

        def build(self):
            self.phase = nn.Parameter(torch.ones(SIZE, dtype=torch.complex128))

        def encode(self, x):
            return self.encoder((x * self.phase).real)

    message = r"Noise on complex numbers is not defined here; found phase of torch\.complex128\. Make it a real para"
    for run in (
        lambda model: gibbs_error(model, make_rows(), sigma=1.0, num_draws=5, disable_tqdm=True),
        lambda model: certify(model, make_rows(), prior=copy.deepcopy(model), **FEW),
    ):
        model = Rotated()
        with pytest.raises(ValueError, match=message):
            run(model)
        model.phase.requires_grad_(False)
        run(model)


@pytest.mark.parametrize("name", MOVED)
@torch.no_grad()
def test_statistics_that_training_moves_stay(name):
    rows = make_rows()
    x, labels = torch.stack([row["x"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    model = MOVED[name]().eval()
    before, logits = copy.deepcopy(model.state_dict()), model(x)["logits"]
    certify(model, rows, prior=copy.deepcopy(model), **FEW)
    found = gibbs_error(model, rows, sigma=1.0, num_draws=NUM_DRAWS, disable_tqdm=True)
    assert found.draws == pytest.approx(by_hand(model, {"x": x}, labels, sigma=1.0), abs=1e-12)
    assert torch.equal(model(x)["logits"], logits)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_parameters_that_predictions_do_not_use_are_not_refused():
    """Beside a buffer and a tensor that predictions do use, in evaluation mode alone, and for some inputs."""

    class Unused(Classifier):
        trained = ("unused", "mask", "without_effect", "classifier")

        def build(self):
            self.unused = nn.Linear(SIZE, SIZE)
            self.mask = nn.Parameter(torch.empty(SIZE))
            self.without_effect = nn.Parameter(torch.empty(SIZE))
            self.register_buffer("mean", torch.ones(SIZE))
            self.scale = [torch.full((SIZE,), 0.5)]

        def encode(self, x):
            return self.encoder((x - self.mean) * self.scale[0].double() + 0 * self.without_effect)

    rows = make_rows()
    found = gibbs_error(Unused(), rows, sigma=1.0, num_draws=NUM_DRAWS, disable_tqdm=True)
    assert found.draws == pytest.approx(errors_of_new_models(Unused, rows, sigma=1.0), abs=1e-12)


def test_a_kept_tensor_of_one_place_for_many_entries_is_no_obstacle():
    class Expanded(Classifier):
        def build(self):
            self.scale = torch.full((1,), 0.5, dtype=torch.float64).expand(SIZE)

        def encode(self, x):
            return self.encoder(x * self.scale)

    found = gibbs_error(Expanded(), make_rows(), sigma=1.0, num_draws=NUM_DRAWS, disable_tqdm=True)
    assert found.draws == pytest.approx(errors_of_new_models(Expanded, make_rows(), sigma=1.0), abs=1e-12)


def test_outputs_are_remembered_until_an_input_changes_also_in_place():
    layer, x, scale = nn.Linear(2, 2), torch.ones(1, 2), [torch.ones(1)]
    module = nn.Module()
    module.forward = lambda x, scale: layer(x) * scale[0]
    with torch.no_grad(), RememberedOutputs(module) as remembered:
        for change in (lambda: None, lambda: x.add_(1), lambda: scale[0].mul_(3), lambda: scale.__setitem__(0, x[0])):
            change()
            remembered.begin_pass()
            assert torch.equal(module.forward(x, scale), layer(x) * scale[0])


def test_weights_are_loaded_where_a_hook_takes_their_names_for_those_of_an_older_version():
    layer = nn.Linear(2, 2)
    layer.register_load_state_dict_pre_hook(lambda _, state, *rest: state.pop("weight", None))
    weights = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    with LoadedWeights(layer, weights) as loaded:
        loaded.load({name: weight + 1 for name, weight in weights.items()})
        assert all(torch.equal(layer.get_parameter(name), weight + 1) for name, weight in weights.items())
    assert all(torch.equal(layer.get_parameter(name), weight) for name, weight in weights.items())


def test_dropout_that_stays_active_is_drawn_anew_for_every_draw():
    class Dropped(nn.Linear):
        def __init__(self):
            super().__init__(SIZE, SIZE)

        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, training=True)

    model = with_layer(Dropped)()
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    found = gibbs_error(model, make_rows(), sigma=1e-9, num_draws=30, disable_tqdm=True)
    assert len(set(found.draws)) > 5
    certify(model, make_rows(), prior=copy.deepcopy(model), **FEW)


@pytest.mark.parametrize(("size", "num_runs"), [(1e-12, 2), (1e-3, 2 + 20)])
def test_rounding_that_varies_costs_no_speed(size, num_runs, monkeypatch):
    """As sums on a GPU do. What varies by more is drawn anew for every draw."""

    class Varying(nn.Linear):
        def __init__(self):
            super().__init__(SIZE, SIZE)
            self.runs = 0

        def forward(self, x):
            self.runs += 1
            hidden = super().forward(x)
            return hidden + size * torch.randn_like(hidden)

    monkeypatch.setattr("lpg_hf.pac_bayes.drawn_logits.logger.warning", lambda _: None)
    torch.manual_seed(0)
    model = with_layer(Varying)()
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    gibbs_error(model, make_rows(), sigma=1.0, num_draws=20, disable_tqdm=True)
    assert num_runs <= model.encoder.second.runs <= num_runs + 8


def test_a_slower_way_is_announced(monkeypatch):
    warnings = []
    monkeypatch.setattr("lpg_hf.pac_bayes.drawn_logits.logger.warning", warnings.append)
    for name in ("Prompt", "LoRA", "Classifier"):
        gibbs_error(RIGHT[name](), make_rows(), sigma=1.0, num_draws=2, batch_size=5, disable_tqdm=True)
    assert warnings == []
    gibbs_error(RIGHT["PromptAsAttribute"](), make_rows(), sigma=1.0, num_draws=2, batch_size=5, disable_tqdm=True)
    assert len(warnings) == 1 and "The base model runs for every draw, which is slower" in warnings[0]
    gibbs_error(RIGHT["Merged"](), make_rows(), sigma=1.0, num_draws=2, batch_size=5, disable_tqdm=True)
    assert len(warnings) == 2 and "Every draw is loaded, which is slower" in warnings[1]


def test_in_inference_mode():
    rows = make_rows()
    model = RIGHT["Prompt"]()
    expected = gibbs_error(model, rows, sigma=1.0, num_draws=5, disable_tqdm=True)
    with torch.inference_mode():
        assert gibbs_error(model, rows, sigma=1.0, num_draws=5, disable_tqdm=True) == expected


# Models of transformers and peft


def by_hand(model, inputs, labels, sigma):
    """Errors of the draws by writing the weights, and switching to training and back."""
    noise = WeightNoise(model, parameters_in_scope(model, "trained"), seed=0)
    errors = []
    for draw in range(NUM_DRAWS):
        drawn = copy.deepcopy(model).train()
        with torch.no_grad():
            for name, z in noise.sample(EVALUATION, draw).items():
                drawn.get_parameter(name).add_(sigma * z)
            wrong = drawn.eval()(**inputs)["logits"].argmax(-1) != labels
        errors.append(wrong.double().mean().item())
    return errors


@pytest.mark.parametrize(
    "settings",
    [
        PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3),
        PromptEncoderConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3, encoder_hidden_size=8),
    ],
    ids=["prompt", "p-tuning"],
)
def test_prompts_of_peft(settings):
    base = make_model("bert", exact=True)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(10.0 if parameter.ndim > 1 else 1.0)
    model = get_peft_model(base, settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "classifier" not in name)
    ids = torch.arange(2, 26).view(12, 2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.arange(12) % 4
    rows = [{name: entries[row] for name, entries in inputs.items()} | {"labels": labels[row]} for row in range(12)]
    found = gibbs_error(model, rows, sigma=3.0, num_draws=NUM_DRAWS, disable_tqdm=True)
    expected = by_hand(model, inputs, labels, sigma=3.0)
    assert len(set(expected)) > 1
    assert found.draws == pytest.approx(expected, abs=1e-12)


def make_levit():
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [16] * 3, "num_attention_heads": [2] * 3, "depths": [1] * 3, "key_dim": [4] * 3}
    down = [["Subsample", 4, 4, 2, 2, 2]] * 2
    model = LevitForImageClassification(
        LevitConfig(image_size=32, num_labels=2, kernel_size=3, down_ops=down, **sizes)
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attention_biases" in name)
    return model.double().eval()


@torch.no_grad()
def test_attention_biases_of_levit():
    model = make_levit()
    x = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = model(x).logits
    labels = logits.argmax(-1)
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(x, labels, strict=True)]
    found = gibbs_error(model, rows, sigma=50.0, num_draws=NUM_DRAWS, batch_size=20, disable_tqdm=True)
    expected = by_hand(model, {"pixel_values": x}, labels, sigma=50.0)
    assert len(set(expected)) > 1
    assert found.draws == pytest.approx(expected, abs=1e-12)
    # No bias of a draw is left behind.
    assert torch.equal(model(x).logits, logits)


def test_masks_of_speech_models_are_part_of_training_alone():
    model = make_family("wav2vec2", exact=True)
    assert model.get_parameter("wav2vec2.masked_spec_embed").requires_grad
    model.config.apply_spec_augment, model.config.mask_time_prob, model.config.mask_time_length = True, 0.5, 2
    rows = [{"input_values": torch.randn(64, dtype=torch.float64), "labels": row % 4} for row in range(6)]
    assert len(gibbs_error(model, rows, sigma=0.1, num_draws=3, disable_tqdm=True).draws) == 3


# The prior


def test_a_prior_that_differs_in_what_is_not_registered_is_refused():
    class Shifted(Classifier):
        def build(self):
            self.shift = torch.zeros(SIZE, dtype=torch.float64)
            self.temperature = 1.0

        def encode(self, x):
            return self.encoder(x + self.shift) / self.temperature

    for name, value in (("shift", torch.full((SIZE,), 0.1)), ("temperature", 1.5), ("temperature", 1 + 1e-6)):
        model, prior = Shifted(), Shifted()
        certify(model, make_rows(), prior=prior, **FEW)
        setattr(model, name, value)
        with pytest.raises(ValueError, match=r"With the weights of `model`, `prior` has other logits"):
            certify(model, make_rows(), prior=prior, **FEW)


def test_a_prior_of_another_precision_or_mode_is_the_same_function():
    model, prior = make_model("bert"), make_model("bert").double().eval()
    rows = [{"input_ids": torch.tensor([1, number, 7]), "labels": number % 4} for number in range(2, 22)]
    assert certify(model, rows, prior=prior, **FEW).kl == 0
