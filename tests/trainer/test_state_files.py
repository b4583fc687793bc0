"""A file of a checkpoint is used as it was written, or an error names the file, what is wrong, and the cure."""

import json
import random
import shutil
import struct

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import flat_parameters, make_batch, make_model, make_trainer

from lpg_hf import LPGTrainer
from lpg_hf.trainer.checkpoint import STATE_FILE
from lpg_hf.trainer.complete_checkpoints import is_complete
from lpg_hf.trainer.row_file import ROWS_FILE, load_rows
from lpg_hf.trainer.state_files import find_bad_value, find_misfit, read_tensors, write_tensors


CHAIN = ["logit_clipping(quantile=0.9)", "auto", "sam", "gradient_clipping(percentile=50)", "logit_noise"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    trainer = run(path)
    return path / "checkpoint-2", flat_parameters(trainer.model)


def run(path, resume=None, steps=3):
    rows = make_batch("bert", 24)
    trainer = make_trainer(
        LPGTrainer,
        make_model("bert"),
        [{name: values[i : i + 1] for name, values in rows.items()} for i in range(24)],
        path,
        args={"save_strategy": "steps", "save_steps": 2, "max_steps": steps, "per_device_train_batch_size": 4},
        perturbations=CHAIN,
    )
    trainer.data_collator = lambda items: {name: torch.cat([item[name] for item in items]) for name in items[0]}
    trainer.train(resume_from_checkpoint=resume and str(resume))
    trainer.label_issues()
    return trainer


def rewritten(path, change):
    """The file with other tensors or metadata and a checksum that fits, as somebody would write who means harm."""
    tensors, metadata = read_tensors(path, "")
    write_tensors(path, *change(tensors, metadata))


def without(name):
    return lambda tensors, metadata: ({key: value for key, value in tensors.items() if key != name}, metadata)


def replaced(name, value):
    def change(tensors, metadata):
        new = value(tensors[name]) if callable(value) else value
        return {**tensors, name: new}, metadata

    return change


def longer(tensor):
    return torch.cat([tensor.reshape(-1), torch.zeros(1, dtype=tensor.dtype)])


def filled(value):
    return lambda tensor: torch.full_like(tensor, value)


def described(**entries):
    return lambda tensors, metadata: (tensors, metadata | entries)


def facts(**entries):
    return lambda tensors, metadata: (
        tensors,
        metadata | {"facts": json.dumps(json.loads(metadata["facts"]) | entries)},
    )


STATE_CHANGES = {
    "no start": without("imbalance.start"),
    "no verdicts": without("imbalance.verdicts"),
    "verdicts of 4": replaced("imbalance.verdicts", longer),
    "verdict 7": replaced("imbalance.verdicts", filled(7)),
    "found of 1": replaced("imbalance.found", torch.tensor([3])),
    "counts below 0": replaced("imbalance.counted", filled(-1)),
    "start as floats": replaced("imbalance.start", torch.tensor(0.5)),
    "no means": without("loss.statistics._running"),
    "no steps": without("loss.statistics.steps"),
    "steps below 0": replaced("loss.statistics.steps", filled(-1)),
    "seen of 5": replaced("loss.statistics.seen_counts", longer),
    "NaN": replaced("loss.statistics._running", filled(torch.nan)),
    "no bounds": without("loss.perturbations.0.bounds"),
    "bounds of 5": replaced("loss.perturbations.0.bounds", longer),
    "more": lambda tensors, metadata: ({**tensors, "loss.evil": torch.zeros(1)}, metadata),
    "more methods": lambda tensors, metadata: ({**tensors, "loss.perturbations.9.bounds": torch.zeros(1)}, metadata),
    "no history": without("parameters.1._extra_state"),
    "no norms": replaced("log.norms", torch.tensor(list(b"[[[]]]"), dtype=torch.uint8)),
    "norms of text": replaced("log.norms", torch.tensor(list(b'[{"step": 1, "epoch": "x"}]'), dtype=torch.uint8)),
    "norms of no text": replaced("log.norms", torch.tensor([0.5, 300.0])),
    "chains as a list": described(perturbations="[]"),
    "chains as text": described(perturbations='{"loss": "auto"}'),
    "deep chains": described(perturbations="[" * 100_000),
    "no chains": described(perturbations=""),
    "facts of text": described(facts='{"num_processes": "x"}'),
    "no facts": described(facts="{}"),
    "another step": facts(step=1),
}


@pytest.mark.parametrize("change", STATE_CHANGES)
def test_a_state_that_does_not_fit_is_refused_though_its_checksum_does(change, whole, tmp_path):
    checkpoint = shutil.copytree(whole[0], tmp_path / "checkpoint-2")
    rewritten(checkpoint / STATE_FILE, STATE_CHANGES[change])
    with pytest.raises(
        ValueError, match=rf"checkpoint-2/{STATE_FILE} cannot be read: .*\. Resume from an older"
    ) as error:
        run(tmp_path, checkpoint)
    assert "delete this file to resume without it: the state of the perturbations" in str(error.value)


ROW_CHANGES = {
    "no votes": without("_votes"),
    "votes as a matrix": replaced("_votes", lambda votes: votes[None]),
    "votes without rows": replaced("_votes", torch.zeros(1)),
    "sums of 25": replaced("_sums", longer),
    "NaN": replaced("_sums", filled(torch.nan)),
    "visits below 0": replaced("_sums", filled(-1.0)),
    "ratios above 1": replaced("_sums", filled(1.0)),
    "votes without end": replaced("_votes", filled(torch.inf)),
    "labels as floats": replaced("_labels", lambda labels: labels.float()),
    "labels below -1": replaced("_labels", filled(-2)),
    "more": lambda tensors, metadata: ({**tensors, "evil": torch.zeros(1)}, metadata),
    "another step": described(step="1"),
    "no step": described(step="two"),
}


@pytest.mark.parametrize("change", ROW_CHANGES)
def test_records_that_do_not_fit_are_refused_though_their_checksum_does(change, whole, tmp_path):
    checkpoint = shutil.copytree(whole[0], tmp_path / "checkpoint-2")
    rewritten(checkpoint / ROWS_FILE, ROW_CHANGES[change])
    with pytest.raises(
        ValueError, match=rf"checkpoint-2/{ROWS_FILE} cannot be read: .*\. Resume from an older"
    ) as error:
        run(tmp_path, checkpoint)
    assert "delete this file to resume without it: the record of each row" in str(error.value)


@pytest.mark.parametrize("file", [STATE_FILE, ROWS_FILE])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(random.Random(1).randbytes(500)),
        lambda path: path.write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        lambda path: torch.save({"a": 1}, path),
        lambda path: save_file(load_file(path), path),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["empty", "header", "one byte", "garbage", "endless", "pickle", "no metadata", "folder"],
)
def test_a_damaged_file_is_named(file, damage, whole, tmp_path):
    checkpoint = shutil.copytree(whole[0], tmp_path / "checkpoint-2")
    damage(checkpoint / file)
    with pytest.raises(ValueError, match=rf"checkpoint-2/{file} cannot be read: .*Resume from an older checkpoint"):
        run(tmp_path, checkpoint)


def test_a_file_that_is_deleted_is_left_out_and_one_that_is_whole_resumes_bit_for_bit(whole, tmp_path):
    checkpoint = shutil.copytree(whole[0], tmp_path / "checkpoint-2")
    assert torch.equal(flat_parameters(run(tmp_path, checkpoint).model), whole[1])
    (checkpoint / ROWS_FILE).unlink()
    trainer = run(tmp_path, checkpoint)
    assert torch.equal(flat_parameters(trainer.model), whole[1])
    assert sum(trainer.label_issues()["visits"]) == 4


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_byte_can_change_without_being_noticed(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "state.safetensors"
    tensors = {"b": torch.arange(3), "a": torch.tensor([0.5, torch.nan]), "c": torch.zeros(())}
    write_tensors(path, tensors, {"step": "1"})
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found, metadata = read_tensors(path, "it")
    except ValueError as error:
        assert str(path) in str(error)
        return
    # Blanks in the header mean nothing.
    assert metadata == {"step": "1"} and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items() if name != "a")


@given(
    shapes=st.dictionaries(
        st.text(max_size=5).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.uint8]),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        max_size=4,
    ),
    metadata=st.dictionaries(st.text(alphabet="abc", max_size=5), st.text(max_size=10), max_size=3),
)
@example(shapes={}, metadata={})
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(shapes, metadata, tmp_path_factory):
    path = tmp_path_factory.mktemp("round") / "state.safetensors"
    tensors = {name: torch.ones(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}
    write_tensors(path, tensors, metadata)
    found, entries = read_tensors(path, "it")
    assert entries == metadata and found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)


def test_misfits_and_bad_values():
    assert find_misfit({"a": torch.zeros(2, dtype=torch.float64)}, {"a": torch.zeros(2)}) is None
    assert find_misfit({}, {"a": torch.zeros(2)}) == "a is missing"
    assert find_misfit({"a": torch.zeros(2)}, {}) == "a does not belong there"
    assert "instead of torch.int64" in find_misfit({"a": torch.zeros(2)}, {"a": torch.zeros(2).long()})
    assert find_bad_value({"a": torch.tensor([torch.inf])}) is None
    assert find_bad_value({"a": torch.tensor([torch.nan])}) == "a has NaN"
    assert find_bad_value({"a": torch.tensor([-1])}) == "a has negative entries"
    assert find_bad_value({"a": torch.tensor([-1])}, may_be_negative=["a"]) is None
    assert find_bad_value({"a": torch.tensor([torch.nan])}, may_be_negative=["a"]) == "a has NaN"


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", '{"global_step": "4"}', '{"global_step": -1}', "[" * 99_999, "{}"]
)
def test_a_state_of_the_trainer_that_is_none_is_no_complete_checkpoint(text, whole, tmp_path):
    checkpoint = shutil.copytree(whole[0], tmp_path / "checkpoint-2")
    assert is_complete(checkpoint)
    (checkpoint / "trainer_state.json").write_text(text)
    assert not is_complete(checkpoint)
    with pytest.raises(
        ValueError, match=r"checkpoint-2 is not a complete checkpoint: its trainer_state.json is damaged"
    ):
        run(tmp_path, checkpoint)


def test_rows_without_a_file_are_none(tmp_path):
    assert load_rows(tmp_path, 3) is None
