"""Whatever items look like, a ranking names the rows that were trained on, or is refused, or says what is unknown."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NUM_LABELS, make_model
from transformers import TrainingArguments

from lpg_hf import LPGConfig, LPGTrainer, row_records
from lpg_hf.row_numbers import NUM_MARKS, ROWS_KEY, IndexedCollator, IndexedItems, mark_unverified
from lpg_hf.row_records import DynamicsBuffer, TrainingDynamics, Visits
from lpg_hf.trainer.row_check import CHECKED_ROWS, count_wrong_labels


ROWS = 48
NAMES = ["ant", "bee", "cat", "dog"]
LABELS = torch.randint(NUM_LABELS, (ROWS,), generator=torch.Generator().manual_seed(3)).tolist()
LENGTHS = torch.randint(2, 90, (ROWS,), generator=torch.Generator().manual_seed(4)).tolist()


@dataclass
class Example:
    row: int
    name: str


#: How an item is written, and how its row is read from it.
KINDS = {
    "usual name": (lambda row: {"label": LABELS[row], "row": row}, lambda item: item["row"]),
    "usual name, as text": (lambda row: {"label": NAMES[LABELS[row]], "row": row}, lambda item: item["row"]),
    "any key": (lambda row: {"target": LABELS[row], "row": row}, lambda item: item["row"]),
    "any key, as text": (lambda row: {"species": NAMES[LABELS[row]], "row": row}, lambda item: item["row"]),
    "tuples": (lambda row: (row, LABELS[row], LENGTHS[row]), lambda item: item[0]),
    "tuples of text": (lambda row: (NAMES[LABELS[row]], row), lambda item: item[1]),
    "nested": (lambda row: ((row, "x"), {"y": LABELS[row]}), lambda item: item[0][0]),
    "tensors": (lambda row: (torch.tensor(row), torch.tensor(LABELS[row])), int),
    "one-hot": (lambda row: {"row": row, "y": np.eye(NUM_LABELS)[LABELS[row]]}, lambda item: item["row"]),
    "objects": (lambda row: Example(row, NAMES[LABELS[row]]), lambda item: item.row),
    "numbers": (lambda row: row, lambda item: item),
}
KINDS["tensors"] = (KINDS["tensors"][0], lambda item: int(item[0]))


class Rows(torch.utils.data.Dataset):
    def __init__(self, kind):
        self.write = KINDS[kind][0]

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        return self.write(row)


class Collator:
    """Makes a batch in an order of its own."""

    def __init__(self, kind, order, smallest=1):
        self.read, self.order, self.smallest = KINDS[kind][1], order, smallest

    def __call__(self, items):
        if len(items) < self.smallest:
            raise ValueError("too few")
        rows = self.order(list(map(self.read, items)))
        return {
            "input_ids": torch.tensor([[1 + LABELS[row], row % 30] for row in rows]),
            "labels": torch.tensor([LABELS[row] for row in rows]),
        }


ORDERS = {
    "sorted by length": lambda rows: sorted(rows, key=lambda row: -LENGTHS[row]),
    "reversed": lambda rows: rows[::-1],
    "shuffled": lambda rows: random.sample(rows, len(rows)),
    "two swapped": lambda rows: [rows[1], rows[0], *rows[2:]] if len(rows) > 1 else rows,
}


def train(path, kind, order, *, args_class=TrainingArguments, smallest=1, resume=None, **args):
    settings = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    trainer = LPGTrainer(
        model=make_model("bert"),
        args=args_class(str(path), **(settings | args)),
        train_dataset=Rows(kind),
        data_collator=Collator(kind, order, smallest),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_items_in_their_order_are_ranked_whatever_they_look_like(kind, workers, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="lpg_hf"):
        issues = train(tmp_path, kind, list, dataloader_num_workers=workers, num_train_epochs=2).label_issues()
    assert sorted(issues["row"]) == list(range(ROWS)) and set(issues["visits"]) == {2}
    assert issues["label"][:] == [LABELS[row] for row in issues["row"]]
    assert "order" not in caplog.text and "are not known and are left out" not in caplog.text


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_collator_that_changes_the_order_is_found_out(kind, order, tmp_path):
    trainer = train(tmp_path, kind, ORDERS[order])
    with pytest.raises(ValueError, match=r"The rows of the samples are not known: .*in another order"):
        trainer.label_issues()


def test_it_is_found_out_after_a_resumption_that_had_nothing_left_to_train(tmp_path):
    options = {"save_strategy": "epoch", "num_train_epochs": 2}
    train(tmp_path, "objects", ORDERS["reversed"], **options)
    trainer = train(tmp_path, "objects", ORDERS["reversed"], resume=True, **options)
    with pytest.raises(ValueError, match="in another order"):
        trainer.label_issues()


def test_what_cannot_be_compared_is_said(tmp_path, caplog):
    trainer = train(tmp_path, "objects", list, smallest=2)
    with caplog.at_level("WARNING", logger="lpg_hf"):
        assert len(trainer.label_issues()) == ROWS
    assert "Whether `data_collator` keeps the order of its items cannot be told" in caplog.text


def test_a_comparison_leaves_the_random_numbers_as_they_are():
    class Random(Rows):
        def __getitem__(self, row):
            random.random(), np.random.rand(), torch.rand(())
            return super().__getitem__(row)

    def draws():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        compared = count_wrong_labels(Random("tuples"), Collator("tuples", list), dict(enumerate(LABELS)))
        return compared, random.random(), np.random.rand(), torch.rand(()).item()

    compared, *after = draws()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert compared == (0, ROWS) and after == [random.random(), np.random.rand(), torch.rand(()).item()]


@given(st.integers(0, ROWS))
@settings(max_examples=20, deadline=None)
def test_wrong_labels_are_counted(num_wrong):
    recorded = {row: (label + (row < num_wrong)) % NUM_LABELS for row, label in enumerate(LABELS)}
    assert count_wrong_labels(Rows("objects"), Collator("objects", list), recorded) == (num_wrong, ROWS)


def test_of_many_rows_some_are_compared():
    dataset = [{"labels": row % 2} for row in range(5000)]
    asked = []

    def collate(items):
        asked.append(items)
        return {"labels": torch.tensor([item["labels"] for item in items])}

    labels = {row: row % 2 for row in range(5000)}
    assert count_wrong_labels(dataset, collate, labels) == (0, CHECKED_ROWS) and len(asked) == CHECKED_ROWS


@given(st.data())
def test_a_row_that_counts_as_verified_has_the_label_of_its_sample(data):
    """Whatever a collator does: it drops, repeats, permutes and invents."""
    size = data.draw(st.integers(1, 6))
    values = st.integers(0, 2)
    items = [(data.draw(values), data.draw(values)) for _ in range(size)]
    is_named = data.draw(st.booleans())
    after = data.draw(
        st.one_of(
            st.permutations([item[0] for item in items]),
            st.lists(values, min_size=1, max_size=7),
            st.just([item[0] for item in items]),
        )
    )
    given_items = [{"label": label, "other": other} for label, other in items] if is_named else items
    collator = IndexedCollator(lambda _: {"labels": torch.tensor(after)}, num_rows=100)
    numbers = collator([IndexedItems(list(range(10, 10 + size)), given_items)])[ROWS_KEY].tolist()
    assert len(numbers) == len(after)
    for number, label in zip(numbers, after, strict=True):
        if 0 <= number < 100:
            assert label in items[number - 10]
    if not is_named and after not in ([label for label, _ in items], [other for _, other in items]):
        assert all(number < 0 for number in numbers)
        (numbers,) = [mark_unverified(numbers)]
        assert numbers == (list(range(10, 10 + size)) if len(after) == size else [100] * len(after))


def test_the_column_of_the_labels_is_looked_for_again_once_it_did_not_fit():
    labels = iter(([0, 1], [5, 6], [2, 3]))
    collator = IndexedCollator(lambda _: {"labels": torch.tensor(next(labels))}, num_rows=100)
    batches = [[{"a": 0, "b": 7}, {"a": 1, "b": 8}]] * 2 + [[{"a": 7, "b": 2}, {"a": 8, "b": 3}]]
    numbers = [collator([IndexedItems([4, 9], items)])[ROWS_KEY].tolist() for items in batches]
    assert numbers == [[4, 9], mark_unverified([4, 9]), [4, 9]]


class Unreadable(torch.Tensor):
    """Labels whose conversion would take a quarter of a second."""

    def tolist(self):
        raise AssertionError("they were converted")


@pytest.mark.parametrize("shape", [(4, 64, 64), (4, 7), (4, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_labels_of_models_that_are_no_classifiers_are_not_converted(shape, dtype):
    labels = torch.zeros(shape, dtype=dtype).as_subclass(Unreadable)
    collator = IndexedCollator(lambda items: {"labels": labels}, num_rows=9)
    batch = collator([IndexedItems([1, 2, 3, 4], [{"labels": None}] * 4)])
    assert batch["labels"] is labels and torch.Tensor(batch[ROWS_KEY].float()).tolist() == [9] * 4


def test_records_can_be_turned_off(tmp_path):
    trainer = train(tmp_path, "tuples", list, args_class=LPGConfig, track_rows=False, save_strategy="epoch")
    assert trainer._lpg_row_tracker.buffer is None
    assert not list(tmp_path.rglob("lpg_rows.safetensors"))
    with pytest.raises(ValueError, match="records nothing of its rows: `track_rows` is False"):
        trainer.label_issues()
    assert train(tmp_path, "tuples", list, args_class=LPGConfig).label_issues().num_rows == ROWS


class Event:
    """The arrival of a copy that a GPU makes while the host goes on."""

    def __init__(self, visits, source):
        self.visits, self.source, self.is_over = visits, source, False

    def synchronize(self):
        for copy, tensor in zip(self.visits, self.source, strict=True):
            copy.copy_(tensor)
        self.is_over = True


@pytest.mark.parametrize("num_batches", [1, 3])
def test_visits_are_read_when_their_copy_has_arrived_and_not_before(num_batches, monkeypatch):
    monkeypatch.setattr(row_records, "MAX_WAITING_BATCHES", num_batches)
    events = []

    def send(visits):
        empty = Visits(*(torch.full_like(tensor, 10**6) for tensor in visits))
        events.append(Event(empty, visits))
        return empty, events[-1]

    expected, records = TrainingDynamics(20), TrainingDynamics(20)
    buffer = DynamicsBuffer(records)
    monkeypatch.setattr(row_records, "_to_host", send)
    generator = torch.Generator().manual_seed(0)
    for rows in torch.arange(20).repeat(3).split(4):
        logits, labels = torch.randn(4, 3, generator=generator), rows % 3
        expected.update(rows, logits, labels)
        buffer.add(rows, logits, labels)
        assert [event.is_over for event in events[:-1]] == [True] * len(events[:-1])
        assert not events or not events[-1].is_over  # nobody waits for the newest one
    buffer.flush()
    assert len(events) == 15 // num_batches and all(event.is_over for event in events)
    for name, value in expected.state_dict().items():
        assert torch.equal(records.state_dict()[name], value)


def test_records_take_24_bytes_a_row_and_none_of_them_on_the_device():
    records = TrainingDynamics(1000)
    assert sum(buffer.nbytes for buffer in records.buffers()) == 24 * (1000 + NUM_MARKS)
    assert {buffer.device.type for buffer in records.buffers()} == {"cpu"}
