"""The class counts are those of this run's data, read before the first step or counted, also after a resume."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import flat_parameters, make_model
from torch.utils.data import ConcatDataset, Subset
from transformers import Trainer, TrainingArguments, default_data_collator

from lpg_hf import LPGTrainer
from lpg_hf.trainer.checkpoint import STATE_FILE


LONG_TAIL, BALANCED, TURNED = [40, 8, 4, 4], [14, 14, 14, 14], [4, 4, 8, 40]
UNKNOWN_COUNTS = "class counts of `train_dataset` are not known"


def make_rows(counts):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    labels = [labels[i] for i in torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    return Dataset.from_dict(
        {"input_ids": [[1 + label, i % 30, 3] for i, label in enumerate(labels)], "label": labels}
    )


class Items(torch.utils.data.Dataset):
    """A data set of torch, whose labels can be read if it has an attribute for them."""

    def __init__(self, rows, **attributes):
        self.rows = rows
        vars(self).update(attributes)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def make_trainer(path, dataset, *, cls=LPGTrainer, epochs=1, perturbations="auto", class_counts=None, **args):
    settings = {
        "output_dir": str(path),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_strategy": "no",
        "save_strategy": "epoch",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    own = {"perturbations": perturbations, "class_counts": class_counts} if issubclass(cls, LPGTrainer) else {}
    return cls(
        model=make_model("bert"),
        args=TrainingArguments(**(settings | args)),
        train_dataset=dataset,
        data_collator=default_data_collator,
        **own,
    )


def train(path, dataset, *, resume=None, **options):
    trainer = make_trainer(path, dataset, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def counts_of(trainer):
    return trainer.lpg_loss.statistics.class_counts.tolist()


def names_of(trainer):
    return [method.name for method in trainer.lpg_loss.perturbations]


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="lpg_hf")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("lpg_hf")]


# Counts before the first step


@pytest.mark.parametrize(
    "wrap",
    [
        lambda rows: Items(rows, labels=rows["label"][:]),
        lambda rows: Items(rows, targets=torch.tensor(rows["label"][:])),
        lambda rows: Subset(Items(rows, targets=rows["label"][:]), range(len(rows))),
        lambda rows: ConcatDataset([Subset(rows, range(20)), list(rows.select(range(20, len(rows))))]),
        list,
        lambda rows: rows.map(lambda row: {"label_ids": [row["label"]]}, remove_columns="label"),
    ],
    ids=["labels", "targets", "Subset", "ConcatDataset", "list", "[N, 1]"],
)
def test_any_training_set_that_shows_its_labels_trains_as_the_column(wrap, tmp_path, warnings):
    rows = make_rows(LONG_TAIL)
    expected = train(tmp_path, rows)
    trainer = make_trainer(tmp_path, wrap(rows))
    assert counts_of(trainer) == LONG_TAIL and names_of(trainer) == names_of(expected)
    assert trainer.lpg_loss.statistics.prior.tolist() == pytest.approx([n / 56 for n in LONG_TAIL])
    trainer.train()
    assert torch.equal(flat_parameters(trainer.model), flat_parameters(expected.model))
    assert warnings() == []


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: Subset(rows, range(8, 32))], ids=["all", "Subset"])
def test_labels_of_yes_and_no_are_counted(wrap, tmp_path, warnings):
    rows = make_rows([24, 8, 0, 0])
    labels = [bool(label) for label in rows["label"]]
    numbers, bools = (
        wrap(rows.remove_columns("label").add_column("label", each)) for each in (rows["label"][:], labels)
    )
    expected, trainer = (train(tmp_path, each, eval_strategy="no") for each in (numbers, bools))
    assert counts_of(trainer) == counts_of(expected) and sum(counts_of(trainer)) == len(numbers)
    assert torch.equal(flat_parameters(trainer.model), flat_parameters(expected.model))
    assert all("have no training rows" in message for message in warnings())


def test_a_training_set_that_hides_its_labels_is_one_warning_that_names_the_cure(tmp_path, warnings):
    dataset = Items(make_rows(LONG_TAIL))
    trainer = train(tmp_path, dataset, epochs=2)
    (message,) = warnings()
    assert UNKNOWN_COUNTS in message and "of the type Items" in message and "`class_counts=[...]`" in message
    assert counts_of(trainer) == [2 * count for count in LONG_TAIL]
    given = train(tmp_path, dataset, class_counts=LONG_TAIL)
    assert len(warnings()) == 1 and counts_of(given) == LONG_TAIL
    train(tmp_path, dataset, perturbations=[])
    assert len(warnings()) == 1


def test_labels_that_are_names_are_an_error_that_names_the_cure(tmp_path):
    rows = make_rows(LONG_TAIL)
    names = rows.remove_columns("label").add_column("label", [f"class {label}" for label in rows["label"]])
    message = "Column 'label' of `train_dataset` holds names, such as 'class [0-3]'.*class_encode_column"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, names)
    trained = train(tmp_path, names.class_encode_column("label"))
    assert counts_of(trained) == LONG_TAIL


def test_a_stream_that_is_read_once_gets_its_prior_on_the_way(tmp_path, warnings):
    """1000 samples come before the end of the first epoch, which never comes."""
    rows = make_rows([1000, 100, 50, 50])
    trainer = train(
        tmp_path,
        rows.to_iterable_dataset(),
        epochs=1,
        max_steps=37,
        per_device_train_batch_size=32,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
    )
    assert UNKNOWN_COUNTS in warnings()[0] and "or 1000 samples" in warnings()[0]
    norms = [entry["lpg/logit_adjustment/delta_norm"] for entry in trainer._lpg_norms()]
    assert max(norms[:32]) == 0 and min(norms[32:]) > 0
    seen = torch.tensor(counts_of(trainer)) + 10
    assert trainer.lpg_loss.statistics.prior.tolist() == pytest.approx((seen / seen.sum()).tolist())


# Resume with other data


@pytest.mark.parametrize(
    ("before", "after", "class_counts", "expected"),
    [
        (LONG_TAIL, TURNED, None, TURNED),
        (LONG_TAIL, LONG_TAIL, [1, 1, 1, 99], [1, 1, 1, 99]),
        (LONG_TAIL, [60, 8, 4, 4], None, [60, 8, 4, 4]),
    ],
    ids=["other labels", "given", "more rows"],
)
def test_counts_of_this_run_win_over_those_of_the_checkpoint(before, after, class_counts, expected, tmp_path):
    train(tmp_path, make_rows(before))
    trainer = train(tmp_path, make_rows(after), epochs=2, class_counts=class_counts, resume=True)
    assert counts_of(trainer) == expected
    assert trainer.lpg_loss.statistics.prior.tolist() == pytest.approx([n / sum(expected) for n in expected])
    assert trainer.state.global_step > 7


def test_a_resumed_stream_counts_on_and_a_map_style_set_counts_nothing_twice(tmp_path):
    rows = make_rows(LONG_TAIL)
    stream = {"max_steps": 7, "epochs": 1, "save_strategy": "steps", "save_steps": 4}
    whole = train(tmp_path, rows.to_iterable_dataset(), **stream)
    assert counts_of(whole) == LONG_TAIL
    checkpoint = str(tmp_path / "checkpoint-4")
    assert counts_of(train(tmp_path / "a", rows.to_iterable_dataset(), **stream, resume=checkpoint)) == LONG_TAIL
    assert counts_of(train(tmp_path / "b", rows, **stream, resume=checkpoint)) == LONG_TAIL


def test_a_stream_after_a_map_style_set_counts_anew(tmp_path, warnings):
    rows = make_rows(LONG_TAIL)
    train(tmp_path, rows, max_steps=4)
    trainer = train(tmp_path, rows.to_iterable_dataset(), max_steps=7, resume=str(tmp_path / "checkpoint-4"))
    assert sum(counts_of(trainer)) == 24
    assert sum(UNKNOWN_COUNTS in message for message in warnings()) == 1


@pytest.mark.parametrize(("before", "after"), [(BALANCED, LONG_TAIL), (LONG_TAIL, BALANCED)], ids=["longer", "level"])
def test_auto_stands_for_the_same_methods_after_the_data_has_changed(before, after, tmp_path, warnings):
    first = train(tmp_path, make_rows(before))
    steps = first.lpg_loss.statistics.steps.item()
    trainer = train(tmp_path, make_rows(after), epochs=2, resume=True)
    assert names_of(first) == names_of(trainer) == ["logit_adjustment", "class_relative_dampening"]
    assert trainer.lpg_loss.statistics.steps.item() == 2 * steps
    assert not [message for message in warnings() if "stood for" in message]


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.1), (0.1, 0.0)], ids=["smoothed", "no longer"])
def test_auto_may_stand_for_other_methods_after_the_settings_have_changed(before, after, tmp_path, warnings):
    """A `label_smoothing_factor`, which `auto` turns toward the class shares."""
    rows = make_rows(LONG_TAIL)
    first = train(tmp_path, rows, label_smoothing_factor=before)
    steps = first.lpg_loss.statistics.steps.item()
    trainer = train(tmp_path, rows, epochs=2, resume=True, label_smoothing_factor=after)
    now = make_trainer(tmp_path, rows, label_smoothing_factor=after)
    assert names_of(first) != names_of(trainer) == names_of(now)
    assert trainer.lpg_loss.statistics.steps.item() == 2 * steps
    (message,) = [message for message in warnings() if "stood for" in message]
    assert message.count("label_smoothing") == 2 and "The methods in both continue" in message


def test_methods_in_both_chains_keep_their_state(tmp_path):
    """Dampening and clipping stand at another place in the chain that turns a label smoothing."""
    chain = ["auto", "logit_clipping(quantile=0.8)", "logit_clipping(quantile=0.5)"]
    first = train(tmp_path, make_rows(LONG_TAIL), perturbations=chain)
    trainer = make_trainer(tmp_path, make_rows(LONG_TAIL), perturbations=chain, epochs=2, label_smoothing_factor=0.1)
    assert len(trainer.lpg_loss.perturbations) == len(first.lpg_loss.perturbations) + 2
    states = []
    begin = type(trainer._lpg_managed).begin

    def spy(self, *args):
        begin(self, *args)
        states.append([copy.deepcopy(method.state_dict()) for method in self.methods])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer._lpg_managed), "begin", spy)
        trainer.train(resume_from_checkpoint=True)
    for old, new in zip(list(first.lpg_loss.perturbations)[-3:], states[0][-3:], strict=True):
        assert old.state_dict() and all(torch.equal(value, new[name]) for name, value in old.state_dict().items())


def test_a_chain_that_the_user_changed_is_refused_with_what_was_asked_for(tmp_path):
    train(tmp_path, make_rows(LONG_TAIL))
    with pytest.raises(ValueError, match=r"perturbations at the logits \['auto'\], but this run has \['lpg\(\)'\]"):
        train(tmp_path, make_rows(LONG_TAIL), perturbations="lpg", epochs=2, resume=True)


def test_the_methods_of_auto_by_name_resume_a_run_of_auto(tmp_path):
    methods = [repr(method) for method in train(tmp_path, make_rows(LONG_TAIL)).lpg_loss.perturbations]
    resumed = train(tmp_path, make_rows(LONG_TAIL), perturbations=methods, epochs=2, resume=True)
    assert [repr(method) for method in resumed.lpg_loss.perturbations] == methods


def relabeled(rows, changed):
    return rows.map(lambda row, i: {"label": (row["label"] + (i in changed)) % 4}, with_indices=True)


@pytest.mark.parametrize("is_readable", [True, False])
def test_records_of_rows_continue_only_where_the_label_is_the_same(is_readable, tmp_path, warnings):
    rows, changed = make_rows(LONG_TAIL), range(10)
    wrap = (lambda rows: rows) if is_readable else Items
    train(tmp_path, wrap(rows), epochs=2)
    trainer = train(tmp_path, wrap(relabeled(rows, changed)), epochs=3, resume=True)
    issues = trainer.label_issues()
    labels = relabeled(rows, changed)["label"]
    for issue in issues:
        assert issue["label"] == labels[issue["row"]]
        assert issue["visits"] == (1 if issue["row"] in changed else 3)
    messages = [message for message in warnings() if "have another label than" in message]
    assert len(messages) == is_readable and all("10 rows of `train_dataset`" in message for message in messages)


def test_records_of_a_changed_row_are_gone_even_if_it_is_not_visited_again(tmp_path):
    rows = make_rows(LONG_TAIL)
    train(tmp_path, rows)
    finished = train(tmp_path, relabeled(rows, range(10)), resume=True)
    assert sorted(finished.label_issues()["row"]) == list(range(10, 56))


# What there is to resume from


def attempt(path, cls, resume, **options):
    try:
        return train(path, make_rows(LONG_TAIL), cls=cls, epochs=2, resume=resume, **options).state.global_step
    except (ValueError, OSError) as error:
        return type(error), str(error)


def test_what_cannot_be_resumed_is_said_in_the_words_of_the_trainer(tmp_path):
    train(tmp_path / "run", make_rows(LONG_TAIL)).save_model(str(tmp_path / "final"))
    (tmp_path / "empty").mkdir()
    for path, resume in [
        ("empty", str(tmp_path / "run" / "chekpoint-7")),
        ("empty", str(tmp_path / "empty")),
        ("empty", str(tmp_path / "final")),
        ("empty", True),
        ("nowhere", True),
    ]:
        assert attempt(tmp_path / path, LPGTrainer, resume) == attempt(tmp_path / path, Trainer, resume)
    kind, message = attempt(tmp_path / "empty", LPGTrainer, "chekpoint-7")
    assert kind is ValueError and message == "Can't find a valid checkpoint at chekpoint-7"
    kind, message = attempt(tmp_path / "empty", LPGTrainer, True)
    assert message.startswith("No valid checkpoint found in output directory")


def test_a_checkpoint_of_the_model_alone_resumes_as_with_the_trainer(tmp_path, warnings):
    for cls in (Trainer, LPGTrainer):
        train(tmp_path / cls.__name__, make_rows(LONG_TAIL), cls=cls, save_only_model=True)
        assert attempt(tmp_path / cls.__name__, cls, True) == 14
    (message,) = warnings()
    assert "written with `save_only_model`, or without perturbations" in message and "starts anew" in message


def test_the_state_of_an_earlier_version_is_refused_and_can_be_left_out(tmp_path, warnings):
    """It has no checksum, so nobody knows whether it is whole."""
    train(tmp_path, make_rows(LONG_TAIL), perturbations="lpg")
    file = tmp_path / "checkpoint-7" / STATE_FILE
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    del metadata["checksum"]
    save_file(load_file(file), file, metadata=metadata)
    with pytest.raises(ValueError, match=rf"{STATE_FILE} cannot be read: it has no checksum.* delete this file"):
        train(tmp_path, make_rows(LONG_TAIL), perturbations="lpg", epochs=2, resume=True)
    file.unlink()
    assert train(tmp_path, make_rows(LONG_TAIL), perturbations="lpg", epochs=2, resume=True).state.global_step == 14
    assert f"has no {STATE_FILE}" in warnings()[-1]
