"""Honest-looking calls whose bound would be too low are refused, named in a warning, or come out right."""

import copy
import sys

import pytest
import torch
from torch import nn
from transformers import default_data_collator

from lpg_hf.pac_bayes import certify, gibbs_error
from lpg_hf.pac_bayes.near_copies import find_near_copies_within
from lpg_hf.pac_bayes.scope import share_memory
from lpg_hf.pac_bayes.weight_noise import EVALUATION, WeightNoise


SIZE, NUM_ROWS, SIGMA = 8, 60, 1.0
FEW = {"num_draws": 13, "sigma_grid": [SIGMA], "disable_tqdm": True}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, 32), nn.Linear(32, 2)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x, labels=None):
        return {"logits": self.second(self.hidden(x).relu())}

    def hidden(self, x):
        return self.first(x)


def make_rows(num_rows=NUM_ROWS):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, SIZE, generator=generator)
    labels = torch.randint(2, (num_rows,), generator=generator).tolist()
    return [{"x": entry, "labels": label} for entry, label in zip(x, labels, strict=True)]


def memorize(model, rows):
    """Labels by chance, learned by heart: no classifier errs on fewer than half of new rows."""
    x, labels = torch.stack([row["x"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x)["logits"], labels).backward()
        optimizer.step()
    assert (model(x)["logits"].argmax(-1) == labels).all()


@pytest.fixture
def memorized():
    model, rows = Network(), make_rows()
    prior = copy.deepcopy(model)
    memorize(model, rows)
    return model, prior, rows


# The noise


@torch.no_grad()
def test_under_autocast_every_draw_is_that_of_a_new_model(memorized):
    model, prior, rows = memorized
    x, labels = torch.stack([row["x"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    noise = WeightNoise(model, list(dict(model.named_parameters())), seed=0)
    expected = []
    for draw in range(20):
        new = copy.deepcopy(model).eval()
        for name, z in noise.sample(EVALUATION, draw).items():
            new.get_parameter(name).add_(SIGMA * z)
        with torch.autocast("cpu", torch.bfloat16):
            expected.append((new(x)["logits"].argmax(-1) != labels).double().mean().item())
    with torch.autocast("cpu", torch.bfloat16):
        found = gibbs_error(model, rows, sigma=SIGMA, num_draws=20, disable_tqdm=True)
        certificate = certify(model, rows, prior=prior, **FEW)
    assert min(expected) > 0
    assert found.draws == pytest.approx(expected, abs=1e-12)
    assert certificate.overall.error > 0 and certificate.overall.bound > 0.5


@pytest.mark.parametrize("prior_has_run", [False, True])
@pytest.mark.parametrize("kept", ["tensor", "number"])
def test_a_value_that_no_module_holds_is_found(kept, prior_has_run):
    cache = {}

    class Cached(Network):
        def hidden(self, x):
            if self.training:
                return super().hidden(x)
            scale = self.first.weight.norm().detach()
            scale = cache.setdefault(id(self), scale if kept == "tensor" else scale.item())
            return self.first(x) * scale

    model, rows = Cached(), make_rows()
    prior = copy.deepcopy(model)
    memorize(model, rows)
    if prior_has_run:
        prior.eval()(rows[0]["x"][None])
    with pytest.raises(ValueError, match=r"`prior` has other logits .* as a number or in a global cache"):
        certify(model, rows, prior=prior, **FEW)


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_shards_are_refused(where):
    model, rows = Network(), make_rows()
    model.second.bias = nn.Parameter(torch.zeros(0, device=where))
    for run in (
        lambda: certify(model, rows, prior=copy.deepcopy(model), **FEW),
        lambda: gibbs_error(model, rows, sigma=1.0, num_draws=3, disable_tqdm=True),
    ):
        with pytest.raises(ValueError, match=r"second\.bias is not here as a whole .* without sharding"):
            run()


class OwnNormalization(Network):
    def hidden(self, x):
        hidden = super().hidden(x)
        return (hidden - hidden.mean(0)) / (hidden.std(0, correction=0) + 1e-5)


class Dropping(Network):
    def hidden(self, x):
        return nn.functional.dropout(super().hidden(x), 0.5)


def test_rows_that_depend_on_their_batch_are_refused():
    rows = make_rows()
    model = OwnNormalization()
    with pytest.raises(ValueError, match=r"depend on the other rows of its batch .* `batch_size=1`"):
        certify(model, rows, prior=copy.deepcopy(model), **FEW)
    certify(model, rows, prior=copy.deepcopy(model), batch_size=1, **FEW)
    # What is drawn at random differs from pass to pass, and says nothing about the batch.
    certify(Dropping(), rows, prior=Dropping(), **FEW)


# The prior


def shares_one_layer(model, prior):
    prior.first = model.first
    return prior


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda model, prior: model, 4),
        (lambda model, prior: copy.copy(model), 4),
        (shares_one_layer, 2),
    ],
)
def test_a_prior_that_training_has_moved_is_refused(memorized, make, count):
    model, prior, rows = memorized
    with pytest.raises(ValueError, match=rf"^{count} parameters of `prior` lie in the memory .* `copy\.deepcopy"):
        certify(model, rows, prior=make(model, prior), **FEW)


def test_memory_is_compared_as_far_as_it_goes():
    whole = torch.zeros(10)
    assert share_memory(whole, whole) and share_memory(whole, whole[9:]) and share_memory(whole[3:6], whole[:4])
    assert not share_memory(whole[:5], whole[5:]) and not share_memory(whole, whole.clone())
    assert not share_memory(whole[:0], whole) and not share_memory(whole, whole.to("meta"))


def test_weights_without_noise_may_lie_in_one_memory(memorized):
    model, prior, rows = memorized
    prior.first = model.first.requires_grad_(False)
    assert certify(model, rows, prior=prior, **FEW).distance > 0


def test_a_prior_with_the_weights_of_the_model_is_named(memorized, monkeypatch):
    model, prior, rows = memorized
    warnings = []
    monkeypatch.setattr(sys.modules["lpg_hf.pac_bayes.certify"].logger, "warning", warnings.append)
    text = "it has the weights of the model, which must not have seen the set either"
    assert text not in str(certify(model, rows, prior=prior, **FEW)) and not warnings
    assert text in str(certify(model, rows, prior=copy.deepcopy(model), **FEW))
    (warning,) = warnings
    assert "It holds only if `model` has never seen the rows" in warning


# The rows


def test_several_views_of_a_row_do_not_count_as_rows(memorized):
    model, prior, rows = memorized

    def two_views(rows):
        return default_data_collator([view for row in rows for view in (row, row | {"x": -row["x"]})])

    with pytest.raises(ValueError, match=r"made 120 labels of 60 rows\. Several views"):
        certify(model, rows, prior=prior, data_collator=two_views, **FEW)


def test_near_copies_within_the_set_are_named(memorized, monkeypatch):
    model, prior, rows = memorized
    warnings = []
    monkeypatch.setattr("lpg_hf.pac_bayes.independence.logger.warning", warnings.append)
    texts = [f"how are you today {number}" for number in range(len(rows))]
    texts[7], texts[9] = "How are YOU  today 3", "how are you today 3 "
    named = [row | {"text": text} for row, text in zip(rows, texts, strict=True)]
    assert find_near_copies_within(named) == (["text"], [7, 9])
    certify(model, named, prior=prior, **FEW)
    (warning,) = warnings
    assert warning.startswith("2 rows of `dataset` have the texts of an earlier row") and "(rows 7, 9)" in warning


def test_without_texts_nobody_says_that_there_are_no_near_copies(memorized):
    model, prior, rows = memorized
    assert certify(model, rows[:40], prior=prior, prior_dataset=rows[40:], **FEW).num_near_copies is None
