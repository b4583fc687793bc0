"""A model card shows a certificate if it belongs to the weights, and says so if it does not."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_certificate import make_certificate, write_certificate
from peft import LoraConfig, get_peft_model
from tiny import make_batch, make_model, make_trainer, split
from torch import nn

from lpg_hf import LPGTrainer
from lpg_hf.card_certificate import read_certificate
from lpg_hf.pac_bayes import Certificate, certify
from lpg_hf.weights_hash import weights_hash


class Log:
    """Warnings of `transformers` loggers, which do not reach the root logger."""

    def __init__(self, monkeypatch):
        self.warnings = []
        monkeypatch.setattr("lpg_hf.card_certificate.logger.warning", self.warnings.append)


@pytest.fixture
def log(monkeypatch):
    return Log(monkeypatch)


# The hash


def test_the_hash_is_that_of_every_bit_of_the_checkpoint():
    model = make_model("resnet")
    first = weights_hash(model)
    assert weights_hash(copy.deepcopy(model)) == first == weights_hash(nn.Sequential(model))
    for name, tensor in model.state_dict().items():
        changed = copy.deepcopy(model)
        entry = changed.state_dict()[name].view(-1)
        with torch.no_grad():
            entry[0] = torch.nextafter(entry[0], torch.tensor(9.0)) if entry.is_floating_point() else entry[0] + 1
        assert weights_hash(changed) != first, name
        assert tensor.numel() > 0
    assert weights_hash(model.double()) != first


def test_the_same_bits_in_another_shape_or_dtype_have_another_hash():
    tensors = (
        torch.arange(6.0).view(2, 3),
        torch.arange(6.0).view(3, 2),
        torch.arange(6.0).view(torch.int32).view(2, 3),
    )
    hashes = [weights_hash(nn.ParameterList([nn.Parameter(tensor, requires_grad=False)])) for tensor in tensors]
    assert len(set(hashes)) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8])
def test_the_hash_takes_every_dtype_and_shape(dtype):
    class Odd(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.scalar = nn.Parameter(torch.tensor(value).to(dtype), requires_grad=False)
            self.empty = nn.Parameter(torch.zeros(0, 3, dtype=dtype), requires_grad=False)
            self.turned = nn.Parameter(torch.arange(6).view(2, 3).to(dtype).T, requires_grad=False)

    assert weights_hash(Odd(1.0)) == weights_hash(Odd(1.0)) != weights_hash(Odd(2.0))


def test_a_saved_model_has_the_hash_of_the_model(tmp_path):
    model = make_model("bert")
    model.save_pretrained(tmp_path)
    assert weights_hash(type(model).from_pretrained(tmp_path)) == weights_hash(model)


# The card


def card(trainer, folder):
    trainer.create_model_card()
    return (folder / "README.md").read_text()


def make_trained(tmp_path, model=None):
    model = make_model("bert") if model is None else model
    trainer = make_trainer(LPGTrainer, model, split(make_batch("bert", 16), [8, 8]), tmp_path, perturbations=["lpg"])
    trainer.train()
    return trainer


@pytest.mark.parametrize("is_lora", [False, True])
def test_from_training_over_certificate_to_card(is_lora, tmp_path, log):
    model = make_model("bert")
    if is_lora:
        model = get_peft_model(model, LoraConfig(target_modules=["query"], modules_to_save=["classifier"], r=2))
    prior = copy.deepcopy(model)
    trainer = make_trained(tmp_path, model)
    rows = [{"input_ids": torch.tensor([1, row, 7]), "labels": row % 4} for row in range(2, 22)]
    certificate = certify(trainer.model, rows, prior=prior, sigma_grid=[0.1, 0.2], num_draws=20, disable_tqdm=True)
    assert certificate.weights_hash == weights_hash(trainer.model)
    certificate.save(tmp_path / "certificate.json")
    text = card(trainer, tmp_path).partition("### Certificate")[2]
    assert f"| kl | {certificate.kl} |" in text and f"| sigma | {certificate.sigma} |" in text
    # The scales that were tried would be thousands of characters in one cell.
    assert "selection" not in text and "grid" not in text and max(map(len, text.splitlines())) < 1000
    assert log.warnings == []
    # The weights move on, and the certificate stays behind.
    trainer.train()
    assert "### Certificate" not in card(trainer, tmp_path)
    assert len(log.warnings) == 1 and "belongs to other weights" in log.warnings[0]
    assert str(tmp_path / "certificate.json") in log.warnings[0]


BROKEN = {
    "list": "[1, 2]",
    "number": "3",
    "string": '"x"',
    "cut": '{"a": 1',
    "empty": "",
    "foreign": '{"risk bound": 0.31}',
    "deep": "[" * 100_000,
    "digits": '{"overall": ' + "9" * 10_000 + "}",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_foreign_file_is_named_and_costs_nothing(name, tmp_path, log):
    trainer = make_trained(tmp_path)
    (tmp_path / "certificate.json").write_text(BROKEN[name])
    text = card(trainer, tmp_path)
    assert "## Gradient perturbation" in text and "### Certificate" not in text
    assert len(log.warnings) == 1
    assert f"{tmp_path / 'certificate.json'} holds no certificate" in log.warnings[0]


def test_what_is_no_text_and_no_file(tmp_path, log):
    (tmp_path / "certificate.json").write_bytes(b"\xff\xfe{}")
    assert read_certificate(tmp_path / "certificate.json", nn.Linear(1, 1)) is None
    (tmp_path / "folder.json").mkdir()
    assert read_certificate(tmp_path / "folder.json", nn.Linear(1, 1)) is None
    assert len(log.warnings) == 2
    assert read_certificate(tmp_path / "none.json", nn.Linear(1, 1)) is None
    assert len(log.warnings) == 2


def change(content, path, value):
    *parents, last = path
    for key in parents:
        content = content[key]
    if value is None:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (["overall"], "<script>", r"`overall` must be an object .* '<script>'"),
        (["overall", "bound"], "0.1", r"`bound` must be float; found '0.1'"),
        (["overall", "bound"], 1.5, r"bounds must lie in \[0, 1\]"),
        (["overall", "bound"], True, r"`bound` must be float"),
        (["per_class", 1, "bound"], -0.1, r"bounds must lie in \[0, 1\]"),
        (["per_class", 1], None, r"one bound and one name for each class"),
        (["overall", "error"], None, r"`overall` lacks the entry `error`"),
        (["delta"], None, r"lacks the entry `delta`"),
        (["delta"], 2.0, r"`delta` strictly"),
        (["sigma"], float("inf"), r"`sigma` must be float"),
        (["sigma"], 10**400, r"too deep or too large"),
        (["num_samples"], 1.5, r"`num_samples` must be int"),
        (["label_names"], "ab", r"`label_names` must be tuple"),
        (["surprise"], 1, r"unknown entry 'surprise'"),
        (["weights_hash"], 7, r"`weights_hash` must be str"),
    ],
)
def test_a_changed_file_is_refused_with_the_entry_and_the_cure(path, value, match, tmp_path):
    file = tmp_path / "certificate.json"
    write_certificate(file, nn.Linear(1, 1))
    content = json.loads(file.read_text())
    change(content, path, value)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=match) as raised:
        Certificate.load(file)
    assert str(file) in str(raised.value) and "ertify again" in str(raised.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_whatever_an_entry_is_the_file_loads_or_is_refused(data, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "any.json"
    certificate = make_certificate(nn.Linear(1, 1))
    certificate.save(file)
    content = json.loads(file.read_text())
    name = data.draw(st.sampled_from(sorted(content)))
    inner = content[name]
    if isinstance(inner, dict) and data.draw(st.booleans()):
        inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(JSON_VALUES)
    else:
        content[name] = data.draw(JSON_VALUES)
    file.write_text(json.dumps(content))
    try:
        loaded = Certificate.load(file)
    except ValueError as error:
        assert str(file) in str(error)
    else:
        assert str(loaded)
        loaded.save(file)
        assert repr(Certificate.load(file)) == repr(loaded)


def test_weights_that_are_not_here_do_not_fit(tmp_path, log):
    write_certificate(tmp_path / "certificate.json", nn.Linear(1, 1))
    assert read_certificate(tmp_path / "certificate.json", nn.Linear(1, 1, device="meta")) is None
    assert len(log.warnings) == 1 and "belongs to other weights" in log.warnings[0]


def test_a_certificate_of_an_older_version_loads_and_is_not_shown(tmp_path, log):
    file, model = tmp_path / "certificate.json", nn.Linear(1, 1)
    write_certificate(file, model)
    content = json.loads(file.read_text())
    del content["weights_hash"], content["num_near_copies"]
    file.write_text(json.dumps(content))
    assert Certificate.load(file).overall.bound == 0.25
    assert read_certificate(file, model) is None
    assert len(log.warnings) == 1 and "older version" in log.warnings[0]
