"""`certify` against a slow evaluation of the same draws, on models and data of every kind, and its refusals."""

import copy
import math

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, IterableDataset
from families import FAMILIES, inputs_of, make_family, make_family_batch
from peft import LoraConfig, get_peft_model
from scipy import special
from tiny import MODELS, NUM_LABELS, make_batch, make_model
from torch import nn
from transformers import BertTokenizer, DataCollatorWithPadding, PreTrainedConfig, PreTrainedModel

from lpg_hf.pac_bayes import Certificate, certify, gibbs_error
from lpg_hf.pac_bayes.bounds import balanced_error_bound
from lpg_hf.pac_bayes.fingerprints import row_fingerprint
from lpg_hf.pac_bayes.scope import parameters_in_scope
from lpg_hf.pac_bayes.weight_noise import CERTIFICATION, SELECTION, WeightNoise


FEW = {"num_draws": 24, "num_selection_draws": 2, "disable_tqdm": True}
LORA_TARGETS = {"query", "value", "q_proj", "v_proj"}


def rows_of(batch):
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def distinct_rows(name, size, seed=0, dtype=torch.float32):
    """Rows whose inputs differ: token sequences may repeat by chance."""
    rows = rows_of(make_batch(name, 2 * size, seed=seed, dtype=dtype))
    kept = {tuple(next(iter(row.values())).flatten().tolist()): row for row in rows}
    return list(kept.values())[:size]


def model_and_prior(name, scope="trained", exact=True):
    """A posterior that differs from the prior in its scope alone."""
    prior = make_model(name, exact=exact)
    if scope == "lora":
        settings = LoraConfig(target_modules=LORA_TARGETS, modules_to_save=["classifier"], r=2, lora_dropout=0.0)
        prior = get_peft_model(prior, settings)
    model = copy.deepcopy(prior)
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (parameters[key] for key in parameters_in_scope(model, scope)):
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model, prior


@torch.no_grad()
def slow_errors(model, rows, scope, sigma, num_draws, seed=0, stream=CERTIFICATION):
    """[K, C] shares of wrong answers and [C] counts: a copy of the model for each draw, one row at a time."""
    noise = WeightNoise(model, parameters_in_scope(model, scope), seed)
    labels = np.array([int(row["labels"]) for row in rows])
    errors = np.zeros((num_draws, len(rows)))
    for draw in range(num_draws):
        drawn = copy.deepcopy(model).eval()
        parameters = dict(drawn.named_parameters())
        for name, z in noise.sample(stream, draw).items():
            parameters[name] += sigma * z
        for number, row in enumerate(rows):
            inputs = {key: value[None] for key, value in row.items() if key != "labels"}
            errors[draw, number] = drawn(**inputs).logits.argmax().item() != labels[number]
    counts = np.bincount(labels, minlength=NUM_LABELS)
    return errors, np.stack([errors[:, labels == c].mean(1) for c in range(NUM_LABELS)], 1), counts


# An independent form of the bounds: xi from its definition, the inverse by a root finder


def reference_inverse(q, budget):
    low, high = q, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        kl = special.rel_entr(q, middle) + special.rel_entr(1 - q, 1 - middle)
        low, high = (middle, high) if kl <= budget else (low, middle)
    return high


def reference_limit(errors, level):
    mean, k = errors.mean(), len(errors)
    bernstein = mean + math.sqrt(2 * errors.var(ddof=1) * math.log(4 / level) / k)
    return min(bernstein + 7 * math.log(4 / level) / (3 * (k - 1)), reference_inverse(mean, math.log(2 / level) / k))


def reference_bound(limit, kl, n, events, level):
    k = np.arange(n + 1)
    log_terms = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    log_terms = log_terms + special.xlogy(k, k / n) + special.xlogy(n - k, 1 - k / n)
    return reference_inverse(limit, (kl + special.logsumexp(log_terms) + math.log(events / level)) / n)


@pytest.mark.parametrize(
    ("name", "scope"),
    [(name, scope) for name in MODELS for scope in ("trained", "head")] + [("bert", "lora"), ("vit", "lora")],
)
def test_certificate_is_that_of_a_slow_evaluation(name, scope):
    model, prior = model_and_prior(name, scope)
    rows = distinct_rows(name, 30, dtype=torch.float64)
    certificate = certify(
        model, rows, prior=prior, scope=scope, sigma_grid=[0.02, 0.05], delta=0.1, batch_size=7, seed=3, **FEW
    )

    errors, class_errors, counts = slow_errors(model, rows, scope, certificate.sigma, 24, seed=3)
    theirs = dict(prior.named_parameters())
    kl = sum(
        torch.distributions.kl_divergence(
            torch.distributions.Normal(parameter.detach(), certificate.sigma),
            torch.distributions.Normal(theirs[key].detach(), certificate.sigma),
        )
        .sum()
        .item()
        for key, parameter in model.named_parameters()
        if key in parameters_in_scope(model, scope)
    )
    assert certificate.kl == pytest.approx(kl, rel=1e-12)
    assert (certificate.sample_level, certificate.draw_level) == pytest.approx((0.8 * 0.1 / 3, 0.2 * 0.1 / 3))
    limit = reference_limit(errors.mean(1), 0.2 * 0.1 / 3)
    assert certificate.overall.error == pytest.approx(errors.mean(), abs=1e-12)
    assert certificate.overall.error_limit == pytest.approx(limit, abs=1e-10)
    bound = reference_bound(limit, kl, 30, 2, 0.8 * 0.1 / 3)
    assert certificate.overall.bound == pytest.approx(bound, abs=1e-9)
    for label, entry in enumerate(certificate.per_class):
        assert entry.num_samples == counts[label]
        assert entry.error == pytest.approx(class_errors[:, label].mean(), abs=1e-12)
        limit = reference_limit(class_errors[:, label], 0.2 * 0.1 / 3 / NUM_LABELS)
        bound = reference_bound(limit, kl, counts[label], 2 * NUM_LABELS, 0.8 * 0.1 / 3)
        assert entry.bound == pytest.approx(bound, abs=1e-9)
    assert certificate.balanced.error == pytest.approx(class_errors.mean(), abs=1e-12)
    limits = [entry.error_limit for entry in certificate.per_class]
    joint = balanced_error_bound(limits, counts, kl, 2, 0.8 * 0.1 / 3)
    mean = np.mean([entry.bound for entry in certificate.per_class])
    assert certificate.balanced.bound == pytest.approx(min(joint, mean), abs=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_family_of_models(name):
    """The head alone, for which the backbone runs once, against copies of the whole model."""
    batch = make_family_batch(name, 12, dtype=torch.float64)
    model, prior = make_family(name, exact=True), make_family(name, exact=True)
    certificate = certify(model, rows_of(batch), prior=prior, scope="head", sigma_grid=[1.0], batch_size=8, **FEW)

    noise = WeightNoise(model, parameters_in_scope(model, "head"), seed=0)
    errors = []
    for draw in range(24):
        drawn = copy.deepcopy(model).eval()
        for key, z in noise.sample(CERTIFICATION, draw).items():
            drawn.get_parameter(key).add_(z)
        errors.append((drawn(**inputs_of(batch)).logits.argmax(-1) != batch["labels"]).double().mean().item())
    assert np.std(errors) > 0
    assert certificate.overall.error == pytest.approx(np.mean(errors), abs=1e-12)


def test_weights_in_bfloat16():
    """Drawn in float32, then rounded; the divergence belongs to the stored weights."""
    model, prior = (network.bfloat16() for network in model_and_prior("bert"))
    rows = distinct_rows("bert", 6)
    certificate = certify(model, rows, prior=prior, sigma_grid=[0.05], batch_size=1, **FEW)
    errors, _, _ = slow_errors(model, rows, "trained", 0.05, 24)
    assert certificate.overall.error == pytest.approx(errors.mean(), abs=1e-12)
    distances = [(a.double() - b.double()).norm() for a, b in zip(model.parameters(), prior.parameters(), strict=True)]
    assert certificate.distance == pytest.approx(torch.stack(distances).norm().item(), rel=1e-12)


def test_the_scale_is_the_best_on_other_draws():
    model, prior = model_and_prior("bert")
    rows = distinct_rows("bert", 30, dtype=torch.float64)
    grid = [0.4, 0.1, 0.025]
    certificate = certify(model, rows, prior=prior, sigma_grid=grid, **FEW)
    assert [choice.sigma for choice in certificate.selection] == grid
    for choice in certificate.selection:
        errors, _, _ = slow_errors(model, rows, "trained", choice.sigma, 2, stream=SELECTION)
        assert choice.error == pytest.approx(errors.mean(), abs=1e-12)
        bound = reference_bound(errors.mean(), choice.kl, 30, 3, certificate.sample_level)
        assert choice.bound == pytest.approx(bound, abs=1e-9)
    assert certificate.sigma == min(certificate.selection, key=lambda choice: choice.bound).sigma
    assert certify(model, rows, prior=prior, sigma_grid=[0.1], **FEW).selection == ()


def test_streams_and_draws_have_noise_of_their_own_and_that_of_no_training():
    model = make_model("bert", exact=True)
    noise = WeightNoise(model, parameters_in_scope(model, "trained"), seed=0)
    first = [noise.sample(stream, draw)["classifier.weight"] for stream in (0, 1, 2) for draw in (0, 1)]
    torch.manual_seed(0)
    first.append(torch.randn(first[0].shape, dtype=torch.float64))
    assert len({tuple(tensor.flatten().tolist()) for tensor in first}) == 7
    again = WeightNoise(model, parameters_in_scope(model, "trained"), seed=0)
    assert torch.equal(again.sample(2, 1)["classifier.weight"], first[5])


def test_no_draw_of_one_stream_is_one_of_another():
    """Draws that chose the scale must not certify it."""
    noise = WeightNoise(make_model("bert", exact=True), ["classifier.bias"], seed=0)
    draws = [tuple(noise.sample(stream, n)["classifier.bias"].tolist()) for stream in (0, 1, 2) for n in range(3000)]
    assert len(set(draws)) == len(draws)


def test_the_model_and_the_random_state_stay_as_they_are():
    model, prior = model_and_prior("bert", exact=False)
    model.train()
    model.bert.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    rows = distinct_rows("bert", 20)
    first, second = (certify(model, rows, prior=prior, sigma_grid=[0.1], seed=5, **FEW) for _ in range(2))
    assert first == second
    assert certify(model, rows, prior=prior, sigma_grid=[0.1], seed=6, **FEW) != first
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_fixed_backbone_runs_as_often_for_many_draws_as_for_few():
    model, prior = model_and_prior("bert", "head")
    calls = []
    model.bert.encoder.register_forward_hook(lambda *_: calls.append(1))
    rows = distinct_rows("bert", 20, dtype=torch.float64)
    certify(model, rows, prior=prior, scope="head", sigma_grid=[0.1], batch_size=5, **FEW)
    # For each of four batches, one that is remembered and one that checks it. Before that, one forward pass that
    # counts the classes, three that are compared with a part of a batch, and two that are compared with the prior.
    assert len(calls) == 4 * 2 + 6
    assert "forward" not in vars(model.bert)


def test_scaling_weights_and_noise_of_a_linear_model_changes_nothing():
    class Linear(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.weight = nn.Parameter(scale * torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))

        def forward(self, x, labels=None):
            return {"logits": x @ self.weight}

    generator = torch.Generator().manual_seed(1)
    rows = [{"x": torch.randn(5, generator=generator), "labels": number % 3} for number in range(60)]
    certificates = []
    for scale in (1, 4):
        prior = Linear(0.0)
        certificates.append(certify(Linear(scale), rows, prior=prior, sigma_grid=[0.25 * scale], **FEW))
    for name in ("overall", "per_class", "balanced", "kl"):
        assert getattr(certificates[0], name) == getattr(certificates[1], name)


def test_gibbs_error_is_that_of_a_slow_evaluation():
    model, _ = model_and_prior("convnext")
    rows = distinct_rows("convnext", 25, dtype=torch.float64)
    found = gibbs_error(model, rows, sigma=0.05, num_draws=6, batch_size=4, disable_tqdm=True)
    errors, class_errors, _ = slow_errors(model, rows, "trained", 0.05, 6, stream=2)
    assert found.draws == pytest.approx(errors.mean(1), abs=1e-12)
    assert found.overall == pytest.approx(errors.mean(), abs=1e-12)
    assert found.per_class == pytest.approx(class_errors.mean(0), abs=1e-12)
    assert found.balanced == pytest.approx(class_errors.mean(), abs=1e-12)


def test_an_answer_that_is_not_a_number_is_wrong():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x, labels=None):
            return {"logits": torch.full((len(x), 2), math.nan) + self.weight}

    rows = [{"x": float(number), "labels": 0} for number in range(10)]
    assert gibbs_error(Broken(), rows, sigma=0.1, num_draws=2, disable_tqdm=True).overall == 1


# The pipeline of a Trainer


def test_a_data_set_with_text_and_padding(tmp_path):
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopq"])
    )
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    rng = np.random.default_rng(0)
    texts = sorted({" ".join(rng.choice(list("abcdefgh"), rng.integers(1, 7))) for _ in range(60)})
    dataset = Dataset.from_dict({"text": texts, "label": rng.integers(0, NUM_LABELS, len(texts)).tolist()})
    dataset = dataset.map(lambda batch: tokenizer(batch["text"]), batched=True)
    model, prior = model_and_prior("bert")
    settings = {"prior": prior, "sigma_grid": [0.05], "data_collator": DataCollatorWithPadding(tokenizer)} | FEW
    whole = certify(model, dataset, batch_size=64, **settings)
    names = ["ant", "bee", "cow", "doe"]
    small = certify(model, dataset.cast_column("label", ClassLabel(names=names)), batch_size=3, **settings)
    # Padding differs, and with it the last bits.
    assert whole.overall.error == pytest.approx(small.overall.error, abs=1e-6)
    assert whole.num_samples == len(texts)
    assert whole.label_names == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    assert small.label_names == tuple(names)  # of the data, as in a report


def test_ignored_labels_do_not_count():
    model, prior = model_and_prior("bert")
    rows = distinct_rows("bert", 30, dtype=torch.float64)
    ignored = [row | {"labels": torch.tensor(-100)} if number % 3 == 0 else row for number, row in enumerate(rows)]
    kept = [row for number, row in enumerate(rows) if number % 3]
    settings = {"prior": prior, "sigma_grid": [0.05]} | FEW
    first, second = certify(model, ignored, **settings), certify(model, kept, **settings)
    assert first.num_samples == 20
    assert first.overall == second.overall and first.per_class == second.per_class


# The text of a certificate


@pytest.fixture(scope="module")
def certificate():
    model, prior = model_and_prior("bert")
    rows = [row for row in distinct_rows("bert", 40, dtype=torch.float64) if row["labels"] != 3]
    return certify(model, rows, prior=prior, prior_dataset=[], sigma_grid=[0.05, 0.1], label_noise=0.1, **FEW)


def test_an_empty_class_has_no_certificate_and_says_why(certificate):
    empty = certificate.per_class[3]
    assert math.isnan(empty.bound) and empty.num_samples == 0 and "no sample" in empty.reason
    assert not math.isnan(certificate.balanced.bound) and "1 of 4 classes" in certificate.balanced.reason
    assert certificate.balanced.bound >= 0.25


def test_a_certificate_survives_json(certificate, tmp_path):
    certificate.save(tmp_path / "certificate.json")
    assert "NaN" not in (tmp_path / "certificate.json").read_text()
    loaded = Certificate.load(tmp_path / "certificate.json")
    assert repr(loaded) == repr(certificate)
    assert str(loaded) == str(certificate)


def test_a_certificate_prints_its_numbers(certificate):
    text = str(certificate)
    assert f"{certificate.overall.bound:.4f}" in text and f"{certificate.balanced.bound:.4f}" in text
    assert "probability 0.95" in text and "no sample of this class" in text
    assert "trained on 0 rows, none of which is in the set" in text
    assert len(text.splitlines()) == 3 + 1 + 7 + 1 + 2


def test_clean_bound_follows_from_the_noisy_one():
    model, _ = model_and_prior("bert")
    rows = distinct_rows("bert", 40, dtype=torch.float64)
    with torch.no_grad():
        model.eval()
        for row in rows:  # labels that the model is right about
            row["labels"] = model(row["input_ids"][None]).logits.argmax(-1)[0]
    settings = {"prior": copy.deepcopy(model), "sigma_grid": [1e-6]} | FEW | {"num_draws": 100}
    noisy = certify(model, rows, label_noise=0.1, **settings)
    assert noisy.clean.bound == pytest.approx((noisy.overall.bound - 0.1) / (1 - 0.1 * 4 / 3), abs=1e-12)
    too_high = certify(model, rows, label_noise=0.7, **settings).clean
    assert math.isnan(too_high.bound) and "too high" in too_high.reason
    assert certify(model, rows, **settings).clean is None
    few = certify(model, rows[:6], label_noise=0.1, **settings | {"num_draws": 24}).clean
    assert math.isnan(few.bound) and "(C-1)/C" in few.reason


# Refusals


@pytest.fixture
def tiny_problem():
    model, prior = model_and_prior("bert")
    return model, prior, distinct_rows("bert", 20, dtype=torch.float64)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"delta": 0.0}, r"`delta` is a probability .* found 0\.0"),
        ({"delta": 1.0}, r"`delta`"),
        ({"delta": math.nan}, r"`delta`"),
        ({"sigma_grid": []}, r"`sigma_grid`"),
        ({"sigma_grid": [0.1, 0.0]}, r"`sigma_grid`"),
        ({"sigma_grid": [0.1, 0.1]}, r"`sigma_grid`"),
        ({"sigma_grid": [math.inf]}, r"`sigma_grid`"),
        ({"num_draws": 0}, r"`num_draws` must be at least 1"),
        ({"num_draws": 11}, r"`num_draws` is 11, but with fewer than 12"),
        ({"num_selection_draws": 0}, r"`num_selection_draws`"),
        ({"label_noise": 0.75}, r"`label_noise` .* found 0\.75"),
        ({"label_noise": -0.1}, r"`label_noise`"),
        ({"scope": "body"}, r"`scope` must be one of trained, head, lora; found 'body'"),
        ({"scope": "lora"}, r"`scope` 'lora' selects no parameter"),
    ],
)
def test_settings_out_of_range(tiny_problem, settings, match):
    model, prior, rows = tiny_problem
    with pytest.raises(ValueError, match=match):
        certify(model, rows, prior=prior, **({"sigma_grid": [0.1]} | FEW | settings))


def test_twelve_draws_are_the_fewest_that_leave_a_class_below_one_half(tiny_problem):
    """At delta 0.05 and four classes, without a single error: `1 - (level / 2C)^(1/K)`."""
    level = 0.2 * 0.05 / 3 / NUM_LABELS
    assert 1 - (level / 2) ** (1 / 12) <= 0.5 < 1 - (level / 2) ** (1 / 11)
    model, prior, rows = tiny_problem
    certify(model, rows, prior=prior, sigma_grid=[0.1], disable_tqdm=True, num_draws=12)


def test_a_prior_of_another_architecture(tiny_problem):
    model, _, rows = tiny_problem
    for other in (make_model("distilbert"), get_peft_model(make_model("bert"), LoraConfig(target_modules=["query"]))):
        with pytest.raises(ValueError, match=r"another architecture .* copy of `model` before"):
            certify(model, rows, prior=other, **FEW)
    wider = copy.deepcopy(model)
    wider.classifier = nn.Linear(16, 5)
    with pytest.raises(ValueError, match=r"classifier.* \[4\] in `model` and \[5\] in `prior`"):
        certify(model, rows, prior=wider, **FEW)


def test_what_has_no_noise_must_be_the_priors(tiny_problem):
    model, prior, rows = tiny_problem
    with pytest.raises(ValueError, match=r"tensors without noise differ .*bert\.embeddings"):
        certify(model, rows, prior=prior, scope="head", **FEW)
    model.bert.requires_grad_(False)
    with pytest.raises(ValueError, match=r"without noise differ"):
        certify(model, rows, prior=prior, **FEW)


def test_weights_that_are_not_finite(tiny_problem):
    model, prior, rows = tiny_problem
    with torch.no_grad():
        model.classifier.bias[0] = math.nan
    with pytest.raises(ValueError, match=r"not finite"):
        certify(model, rows, prior=prior, **FEW)


def test_batch_norm():
    prior = make_model("resnet").eval()
    rows = distinct_rows("resnet", 20)
    model = copy.deepcopy(prior)
    frozen = certify(model, rows, prior=prior, sigma_grid=[0.01], **FEW)
    assert frozen.kl == 0
    model.train()
    with pytest.raises(ValueError, match=r"resnet\S+ is in training mode, so its running statistics"):
        certify(model, rows, prior=prior, **FEW)
    model(torch.stack([row["pixel_values"] for row in rows]))
    with pytest.raises(ValueError, match=r"running_mean.* keep BatchNorm in eval mode"):
        certify(model.eval(), rows, prior=prior, **FEW)

    def without_statistics(network):
        network = copy.deepcopy(network)
        network.resnet.embedder.embedder.normalization = nn.BatchNorm2d(8, track_running_stats=False)
        return network

    with pytest.raises(ValueError, match=r"normalizes by its own batch"):
        certify(without_statistics(prior), rows, prior=without_statistics(prior), **FEW)


class Augmented(torch.utils.data.Dataset):
    """Rows that change: their inputs, or their labels."""

    def __init__(self, rows, column):
        self.rows, self.column, self.reads = rows, column, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        self.reads += 1
        changed = dict(self.rows[row])
        if row == 4 and self.reads > len(self.rows):
            changed[self.column] = (changed[self.column] + 1) % NUM_LABELS
        return changed


@pytest.mark.parametrize("column", ["input_ids", "labels"])
@pytest.mark.parametrize("sigma_grid", [[0.1], [0.1, 0.2]])
def test_augmentation_and_labels_drawn_anew(tiny_problem, column, sigma_grid):
    model, prior, rows = tiny_problem
    with pytest.raises(
        ValueError, match=r"1 of 20 rows of `dataset` changed between two readings \(row 4 is the first\)"
    ):
        certify(model, Augmented(rows, column), prior=prior, sigma_grid=sigma_grid, **FEW)


def test_copies_within_the_set_and_between_the_parts(tiny_problem):
    model, prior, rows = tiny_problem
    relabeled = rows[3] | {"labels": (rows[3]["labels"] + 1) % NUM_LABELS}
    with pytest.raises(ValueError, match=r"1 rows of `dataset` have the inputs of another"):
        certify(model, [*rows, relabeled], prior=prior, **FEW)
    with pytest.raises(ValueError, match=r"1 rows of `prior_dataset` .* the prior has seen rows"):
        certify(model, rows, prior=prior, prior_dataset=[relabeled], **FEW)


@pytest.mark.parametrize(
    "change",
    [
        lambda row: {name: value.tolist() for name, value in row.items()},
        lambda row: {name: value.numpy() for name, value in row.items()},
        lambda row: {name: value.int() for name, value in row.items()},
    ],
    ids=["lists", "arrays", "int32"],
)
def test_a_row_of_the_prior_is_known_in_any_container(tiny_problem, change):
    model, prior, rows = tiny_problem
    rows = [{name: torch.as_tensor(value) for name, value in row.items()} for row in rows]
    with pytest.raises(ValueError, match=r"2 rows of `prior_dataset` .* the prior has seen rows"):
        certify(model, rows, prior=prior, prior_dataset=[change(rows[3]), change(rows[5])], **FEW)


def test_a_row_of_floats_is_known_in_any_precision():
    row = {"x": torch.tensor([0.1, 0.7])}
    kinds = [row, {"x": row["x"].double()}, {"x": row["x"].tolist()}, {"x": row["x"].numpy()}]
    assert len({row_fingerprint(kind) for kind in kinds}) == 1
    assert row_fingerprint({"x": [0.1, 0.8]}) != row_fingerprint(row) != row_fingerprint({"x": [[0.1, 0.7]]})


def test_a_prior_data_set_that_is_not_preprocessed(tiny_problem):
    model, prior, rows = tiny_problem
    with pytest.raises(
        ValueError, match=r"`prior_dataset` have the inputs \[\], but .* `dataset` have \['input_ids'\]"
    ):
        certify(model, rows, prior=prior, prior_dataset=[{"text": "how are you"}], **FEW)


class BackboneConfig(PreTrainedConfig):
    model_type = "backbone_and_head"


class BackboneAndHead(PreTrainedModel):
    config_class = BackboneConfig
    base_model_prefix = "backbone"

    def __init__(self, inplace):
        super().__init__(BackboneConfig(num_labels=3))
        generator = torch.Generator().manual_seed(0)
        self.backbone = nn.Linear(4, 6)
        self.classifier = nn.Sequential(nn.Hardswish(inplace=inplace), nn.Linear(6, 3))
        self.post_init()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x, labels=None):
        return {"logits": self.classifier(self.backbone(x))}


def test_a_head_that_works_in_place_does_not_spoil_the_remembered_backbone():
    generator = torch.Generator().manual_seed(1)
    rows = [{"x": torch.randn(4, generator=generator), "labels": number % 3} for number in range(60)]
    settings = {"sigma": 0.3, "num_draws": 5, "scope": "head", "disable_tqdm": True}
    assert gibbs_error(BackboneAndHead(inplace=True), rows, **settings) == gibbs_error(
        BackboneAndHead(inplace=False), rows, **settings
    )


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda rows: [], r"empty"),
        (lambda rows: IterableDataset.from_generator(lambda: iter(rows)), r"map-style"),
        (lambda rows: [row | {"labels": torch.tensor(4)} for row in rows], r"Labels must lie in \[0, 4\)"),
        (lambda rows: [row | {"labels": torch.tensor(-100)} for row in rows], r"no labeled sample"),
        (lambda rows: [row | {"labels": torch.tensor(0.5)} for row in rows], r"one integer per sample"),
        (lambda rows: [{"input_ids": row["input_ids"]} for row in rows], r"no labels"),
    ],
    ids=["empty", "stream", "range", "ignored", "float", "none"],
)
def test_data_that_cannot_certify(tiny_problem, make, match):
    model, prior, rows = tiny_problem
    with pytest.raises(ValueError, match=match):
        certify(model, make(rows), prior=prior, sigma_grid=[0.1], **FEW)
