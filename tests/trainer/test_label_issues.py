"""Every visit of every row is found again by its number, training never notices, and the ranking is what it says."""

import copy
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import NUM_LABELS, flat_parameters, make_model
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import lpg_hf.trainer.row_tracker
from lpg_hf import ClassRelativeDampening, LPGTrainer, row_records
from lpg_hf.row_matching import match_labels
from lpg_hf.row_numbers import ROWS_KEY, IndexedCollator, IndexedDataset, IndexedItems
from lpg_hf.row_records import SMALLEST_CONFIDENCE, DynamicsBuffer, TrainingDynamics, _merge_votes, look_at


ROWS = 26  # batches of 8: the last one is smaller
OPEN_GATES = "class_relative_dampening(learned=(0.0, 0.01), evidence=(0.0, 0.001))"


class TorchRows(torch.utils.data.Dataset):
    """A data set of torch that wants to know the epoch, and has a column that the model does not."""

    def __init__(self, rows):
        self.rows, self.epochs = rows, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def make_dataset(kind="datasets", ignored=(), wrong=(), rows=ROWS):
    """The second token is the number of the row, so that a spy sees it; the first and the length tell the class."""
    labels = torch.randint(NUM_LABELS, (rows,), generator=torch.Generator().manual_seed(0)).tolist()
    given_labels = [(label + (row in wrong)) % NUM_LABELS for row, label in enumerate(labels)]
    columns = {
        "input_ids": [[1 + label, row % 30] + [3] * (4 - label) for row, label in enumerate(labels)],
        "label": [-100 if row in ignored else label for row, label in enumerate(given_labels)],
        "text": ["unused"] * rows,
    }
    dataset = Dataset.from_dict(columns)
    return dataset if kind == "datasets" else TorchRows(list(dataset))


COUNTS = np.bincount(make_dataset()["label"][:]).tolist()


def pad(items):
    """A collator that keeps the keys it knows and no other."""
    ids = [torch.as_tensor(item["input_ids"]) for item in items]
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "labels": torch.tensor([item["label"] for item in items]),
    }


def train(
    path,
    dataset=None,
    *,
    model=None,
    perturbations=("auto",),
    class_counts=None,
    resume=None,
    collator=pad,
    cls=LPGTrainer,
    **args,
):
    settings = {
        "output_dir": str(path),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    chain = {"perturbations": list(perturbations), "class_counts": class_counts} if issubclass(cls, LPGTrainer) else {}
    trainer = cls(
        model=model or make_model("bert"),
        args=TrainingArguments(**(settings | args)),
        train_dataset=make_dataset() if dataset is None else dataset,
        data_collator=collator,
        **chain,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def spy_on_visits(monkeypatch):
    """What the model answers on each training row, noted independently: `{row: [logits, ...]}`."""
    visits = {}
    compute_loss = LPGTrainer.compute_loss

    def spy(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert ROWS_KEY not in inputs
        rows = inputs["input_ids"][:, 1].tolist()
        loss, outputs = compute_loss(self, model, inputs, True, num_items_in_batch)
        for row, logits in zip(rows, outputs["logits"].detach().double().numpy(), strict=True):
            visits.setdefault(row, []).append(logits)
        return (loss, outputs) if return_outputs else loss

    monkeypatch.setattr(LPGTrainer, "compute_loss", spy)
    return visits


def slow_ranking(visits, labels, adjusted=True):
    """
    Score and suggested label of each row by loops in float64; `None` for a suggestion that hangs on rounding.

    Logits that are adjusted fit the class shares to the power of 2/3, but are judged at the shares themselves.
    """
    offset = np.log(COUNTS) / 3 if adjusted else 0.0
    result = {}
    for row, all_logits in visits.items():
        log_confidence, votes = [], np.zeros(NUM_LABELS)
        for logits in all_logits:
            p = np.exp(logits + offset - (logits + offset).max())
            p /= p.sum()
            log_confidence.append(math.log(max(p[labels[row]] / p.max(), SMALLEST_CONFIDENCE)))
            p[labels[row]] = -1
            votes[p.argmax()] += p.max()
        has_majority = votes.max() > votes.sum() / 2 + 1e-3
        result[row] = (1 - math.exp(np.mean(log_confidence)), int(votes.argmax()) if has_majority else None)
    return result


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("datasets", {}),
        ("datasets", {"remove_unused_columns": False}),
        ("datasets", {"gradient_accumulation_steps": 2}),
        ("datasets", {"train_sampling_strategy": "group_by_length"}),
        ("datasets", {"dataloader_num_workers": 2}),
        ("torch", {}),
        ("torch", {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2}),
        ("torch", {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}),
        ("torch", {"train_sampling_strategy": "batch_rebalance"}),
        ("datasets", {"perturbations": []}),
        ("datasets", {"perturbations": [], "gradient_accumulation_steps": 2}),
        ("torch", {"perturbations": ["sam"]}),
    ],
    ids=str,
)
def test_every_visit_is_booked_on_its_row(kind, args, tmp_path, monkeypatch):
    visits = spy_on_visits(monkeypatch)
    trainer = train(tmp_path, make_dataset(kind), class_counts=COUNTS, **args)
    if args.get("perturbations") == ["sam"]:  # of the two looks at a batch, the first counts
        visits = {row: looks[::2] for row, looks in visits.items()}
    labels = make_dataset()["label"][:]
    expected = slow_ranking(visits, labels, adjusted="perturbations" not in args)
    issues = trainer.label_issues()
    assert sorted(issues["row"]) == sorted(visits) == list(range(ROWS))
    assert issues["visits"][:] == [3] * ROWS
    assert issues["score"][:] == sorted(issues["score"], reverse=True)
    suggestions = 0
    for issue in issues:
        score, suggested = expected[issue["row"]]
        assert issue["label"] == labels[issue["row"]] != issue["suggested_label"]
        assert issue["score"] == pytest.approx(score, abs=1e-5)
        if suggested is not None:
            suggestions += 1
            assert issue["suggested_label"] == suggested
    assert suggestions > ROWS / 2


def test_set_epoch_still_reaches_the_data_set(tmp_path):
    dataset = make_dataset("torch")
    train(tmp_path, dataset, train_sampling_strategy="sequential")
    assert sorted(set(dataset.epochs)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("perturbations", "args"),
    [
        (["auto"], {}),
        ([OPEN_GATES, "logit_noise"], {"train_sampling_strategy": "group_by_length"}),
        ([OPEN_GATES], {"dataloader_num_workers": 1, "gradient_accumulation_steps": 2}),
        ([], {}),
        ([], {"train_sampling_strategy": "batch_rebalance"}),
        (["sam"], {}),
    ],
    ids=str,
)
def test_training_is_bit_for_bit_what_it_is_without_row_numbers(perturbations, args, tmp_path, monkeypatch):
    followed = train(tmp_path, perturbations=perturbations, **args)
    assert followed.label_issues().num_rows == ROWS
    monkeypatch.setattr(lpg_hf.trainer.row_tracker, "has_rows", lambda dataset: False)
    alone = train(tmp_path, perturbations=perturbations, **args)
    assert alone._lpg_row_tracker.buffer is None
    assert torch.equal(flat_parameters(followed.model), flat_parameters(alone.model))
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (followed, alone)]
    assert losses[0] == losses[1]
    if not perturbations:
        plain = train(tmp_path, cls=Trainer, **args)
        assert torch.equal(flat_parameters(followed.model), flat_parameters(plain.model))


def test_an_adapter_is_followed_like_a_model(tmp_path, monkeypatch):
    visits = spy_on_visits(monkeypatch)
    model = get_peft_model(make_model("bert"), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    issues = train(tmp_path, model=model).label_issues()
    expected = slow_ranking(visits, make_dataset()["label"][:])
    assert issues["score"][:] == pytest.approx([expected[row][0] for row in issues["row"]], abs=1e-5)


def test_the_weights_are_those_of_the_dampening(tmp_path, monkeypatch):
    weights = {}
    weight = ClassRelativeDampening.weight

    def spy(self, gradient, batch, statistics):
        result = weight(self, gradient, batch, statistics)
        weights.setdefault("all", []).extend(result.tolist())
        return result

    monkeypatch.setattr(ClassRelativeDampening, "weight", spy)
    dataset = make_dataset(rows=200, wrong=range(30))
    issues = train(tmp_path, dataset, perturbations=[OPEN_GATES], num_train_epochs=10).label_issues()
    # What compensates for the weights of others is left out.
    assert np.mean(issues["weight"]) == pytest.approx(np.minimum(weights["all"], 1).mean(), abs=1e-6)
    assert max(weights["all"]) > 1
    assert min(issues["weight"]) < 0.5 and max(issues["weight"]) <= 1
    assert set(issues["row"][:30]) == set(range(30))
    truth = make_dataset(rows=200)["label"]
    assert issues["suggested_label"][:30] == [truth[row] for row in issues["row"][:30]]
    assert "weight" not in train(tmp_path, perturbations=["logit_clipping"]).label_issues().column_names


@pytest.mark.parametrize("step", [2, 4, 7])
def test_a_resumed_run_ranks_bit_for_bit_as_the_whole_one(step, tmp_path):
    whole = train(tmp_path, save_strategy="steps", save_steps=1, perturbations=[OPEN_GATES])
    resumed = train(tmp_path, perturbations=[OPEN_GATES], resume=str(tmp_path / f"checkpoint-{step}"))
    assert torch.equal(flat_parameters(whole.model), flat_parameters(resumed.model))
    assert whole.label_issues().to_dict() == resumed.label_issues().to_dict()


def test_another_data_set_starts_anew(tmp_path, caplog):
    train(tmp_path, save_strategy="steps", save_steps=4, perturbations=["logit_clipping"])
    with caplog.at_level("WARNING", logger="lpg_hf"):
        trainer = train(
            tmp_path,
            make_dataset().select(range(20)),
            perturbations=["logit_clipping"],
            resume=str(tmp_path / "checkpoint-4"),
        )
    assert "`train_dataset` of 26 rows and this run has 20" in caplog.text
    assert trainer.label_issues().num_rows <= 20


def test_ignored_and_unseen_rows_are_left_out(tmp_path):
    issues = train(tmp_path, make_dataset(ignored=(3, 5))).label_issues()
    assert sorted(issues["row"]) == [row for row in range(ROWS) if row not in (3, 5)]
    issues = train(tmp_path, max_steps=2, train_sampling_strategy="sequential").label_issues()
    assert sorted(issues["row"]) == list(range(16))


def test_a_training_set_that_is_exchanged_after_the_training_is_told(tmp_path, caplog):
    trainer, other, message = train(tmp_path), make_dataset(rows=8), "`train_dataset` is another object than"
    own, issues = trainer.train_dataset, trainer.label_issues()[:]
    assert copy.deepcopy(trainer).label_issues()[:] == issues
    assert not caplog.records
    trainer.train_dataset = other
    assert trainer.label_issues()[:] == issues
    assert caplog.text.count(message) == 1
    trainer.train_dataset = own
    trainer.label_issues()
    trainer.train_dataset = other
    trainer.train()
    assert sorted(trainer.label_issues()["row"]) == list(range(8))
    assert caplog.text.count(message) == 1


def test_names_are_those_of_the_data_set_or_of_the_model(tmp_path):
    issues = train(tmp_path).label_issues()
    assert issues.features["label"].names == [f"LABEL_{label}" for label in range(NUM_LABELS)]
    names = ["ant", "bee", "cat", "dog"]
    dataset = make_dataset().cast_column("label", ClassLabel(names=names))
    assert train(tmp_path, dataset).label_issues().features["suggested_label"].names == names


@pytest.mark.parametrize(
    ("collator", "problem"),
    [
        (
            lambda items: pad(sorted(items, key=lambda item: -len(item["input_ids"]))),
            r"hands out \d+ of 78 samples in",
        ),
        (
            lambda items: pad(items + items),
            r"The rows of 156 of 156 samples are not known: `data_collator`, `training_step`",
        ),
        (lambda items: pad([item | {"label": (item["label"] + 1) % NUM_LABELS} for item in items]), "changes their"),
    ],
    ids=["reorders", "doubles", "changes labels"],
)
def test_a_collator_under_which_rows_are_lost_trains_but_does_not_rank(collator, problem, tmp_path):
    trainer = train(tmp_path, collator=collator, remove_unused_columns=False)
    with pytest.raises(ValueError, match=problem):
        trainer.label_issues()


def test_a_collator_that_sorts_is_found_out_though_most_batches_have_one_class(tmp_path):
    """Where all labels of a batch are equal, the order cannot be seen; one batch that shows it says it of all."""
    dataset = make_dataset(rows=64).map(lambda row, i: {"label": int(i == 0)}, with_indices=True)
    trainer = train(tmp_path, dataset, collator=lambda items: pad(items[::-1]), train_sampling_strategy="sequential")
    with pytest.raises(ValueError, match="hands out 24 of 192 samples in another order"):
        trainer.label_issues()


class Damaged(TorchRows):
    """Some files cannot be read."""

    def __getitem__(self, index):
        return None if index in (3, 11) else self.rows[index]


def without_none(items):
    return pad([item for item in items if item is not None])


def filled_up(items):
    """Keeps the size of the batch, with copies of its first item."""
    items = [item for item in items if item is not None]
    return pad(items + [items[0]] * (8 - len(items)))


def without_short(items):
    """Drops by another rule than `None`."""
    return pad([item for item in items if item["input_ids"][1] not in (3, 11)])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("collator", "min_known"), [(without_none, 72), (filled_up, 60), (without_short, 50)], ids=lambda c: str(c)
)
def test_items_that_a_collator_drops_or_repeats_leave_the_others_on_their_rows(
    collator, min_known, workers, tmp_path, monkeypatch, caplog
):
    visits = spy_on_visits(monkeypatch)
    dataset = TorchRows(list(make_dataset())) if collator is without_short else Damaged(list(make_dataset()))
    options = {"collator": collator, "remove_unused_columns": False, "dataloader_num_workers": workers}
    options["class_counts"] = COUNTS
    with caplog.at_level("WARNING", logger="lpg_hf"):
        issues = train(tmp_path, dataset, **options, dataloader_drop_last=collator is filled_up).label_issues()
    labels = make_dataset()["label"][:]
    assert 3 not in issues["row"] and 11 not in issues["row"]
    assert [labels[row] for row in issues["row"]] == issues["label"][:]
    known = sum(issues["visits"])
    assert min_known <= known <= 72
    total = sum(map(len, visits.values()))
    assert (f"rows of {total - known} of {total} samples are not known" in caplog.text) == (known < total)
    # Where every visit of a row is known, its record is that of the visits.
    for issue in issues:
        seen = visits[issue["row"]]
        if len(seen) == issue["visits"]:
            score, _ = slow_ranking({issue["row"]: seen}, labels)[issue["row"]]
            assert issue["score"] == pytest.approx(score, abs=1e-5)


class Tuples(torch.utils.data.Dataset):
    """Items without names: tokens, length, label."""

    def __init__(self):
        self.rows = make_dataset()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return row["input_ids"], len(row["input_ids"]), row["label"]


def pad_tuples(items):
    return pad([{"input_ids": ids, "label": label} for ids, _, label in items])


def test_the_labels_of_items_without_names_are_found_by_comparison(tmp_path):
    issues = train(tmp_path, Tuples(), collator=pad_tuples).label_issues()
    assert issues["visits"][:] == [3] * ROWS
    assert [make_dataset()["label"][row] for row in issues["row"]] == issues["label"][:]
    by_length = train(tmp_path, Tuples(), collator=lambda items: pad_tuples(sorted(items, key=lambda i: -i[1])))
    with pytest.raises(ValueError, match=r"are not known: \d+ of 26 rows that were compared have another label"):
        by_length.label_issues()


class Numbers(torch.utils.data.Sampler):
    """A sampler that hands out given numbers."""

    def __init__(self, numbers):
        self.numbers = numbers

    def __len__(self):
        return len(self.numbers)

    def __iter__(self):
        return iter(self.numbers)


class Virtual(TorchRows):
    """An epoch of 16 rows over a larger store."""

    def __len__(self):
        return 16


def with_sampler(cls, numbers):
    class Sampled(cls):
        def _get_train_sampler(self, *args):
            return Numbers(numbers)

    return Sampled


@pytest.mark.parametrize(
    ("dataset", "numbers", "rows"),
    [
        (lambda: make_dataset("torch"), list(range(-1, -27, -1)), list(range(26))),
        (lambda: make_dataset("torch"), [0, -1, 5, -20, 9], [0, 5, 6, 9, 25]),
        (lambda: Virtual(list(make_dataset())), [*range(12, 16), *range(16, 20)], list(range(12, 16))),
    ],
    ids=["negative", "mixed", "virtual epoch"],
)
def test_numbers_of_rows_count_as_in_python_and_those_beyond_are_unknown(dataset, numbers, rows, tmp_path, caplog):
    options = {"perturbations": [], "cls": with_sampler(LPGTrainer, numbers)}
    with caplog.at_level("WARNING", logger="lpg_hf"):
        trainer = train(tmp_path, dataset(), **options)
        issues = trainer.label_issues()
    plain = train(tmp_path, dataset(), cls=with_sampler(Trainer, numbers))
    assert torch.equal(flat_parameters(trainer.model), flat_parameters(plain.model))
    assert sorted(issues["row"]) == rows and set(issues["visits"]) == {3}
    assert [make_dataset()["label"][row] for row in issues["row"]] == issues["label"][:]
    unknown = 3 * (len(numbers) - len(rows))
    assert (f"rows of {unknown} of {3 * len(numbers)} samples are not known" in caplog.text) == (unknown > 0)


class Growing(TorchRows):
    size = 16

    def __len__(self):
        return self.size


class Grows(TrainerCallback):
    def on_epoch_end(self, args, state, control, train_dataloader, **kwargs):
        train_dataloader.dataset.size = 26


class GrowingTrainer(LPGTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(Grows())


def test_rows_that_a_data_set_gains_in_training_are_unknown(tmp_path, caplog, monkeypatch):
    visits = spy_on_visits(monkeypatch)
    with caplog.at_level("WARNING", logger="lpg_hf"):
        issues = train(tmp_path, Growing(list(make_dataset())), cls=GrowingTrainer).label_issues()
    assert sorted(issues["row"]) == list(range(16))
    assert dict(zip(issues["row"], issues["visits"], strict=True)) == {row: len(visits[row]) for row in range(16)}
    unknown = sum(len(looks) for row, looks in visits.items() if row >= 16)
    assert unknown > 0 and f"The rows of {unknown} of" in caplog.text


def test_a_row_whose_label_changes_is_judged_by_its_last_label():
    records, logits = TrainingDynamics(2), torch.tensor([[0.0, 2.0, 0.0]])
    for label in (0, 0, 2, 2, 2):
        records.update(torch.tensor([1]), logits, torch.tensor([label]))
    anew = TrainingDynamics(2)
    for _ in range(3):
        anew.update(torch.tensor([1]), logits, torch.tensor([2]))
    assert records.ranked(["a", "b", "c"]).to_dict() == anew.ranked(["a", "b", "c"]).to_dict()
    assert records.num_samples == (3, 2, 0) and anew.num_samples == (3, 0, 0)


@given(st.lists(st.integers(0, 3), max_size=7), st.data())
def test_a_sample_that_is_matched_comes_from_its_item(before, data):
    """Against all ways in which an order-keeping collator could have made the samples."""
    after = data.draw(st.lists(st.integers(0, 3), max_size=6))
    matched = match_labels(before, after)
    short, long = sorted((before, after), key=len)
    ways = [
        places
        for places in itertools.combinations(range(len(long)), len(short))
        if [long[place] for place in places] == short
    ]
    if not ways:
        if len(before) != len(after) or Counter(before) == Counter(after):
            is_permuted = Counter(short) <= Counter(long)
            assert matched is None if is_permuted else matched == [None] * len(after)
        return
    for sample, item in enumerate(matched):
        if len(after) <= len(before):
            meant = {way[sample] for way in ways}
        else:
            meant = {way.index(sample) if sample in way else None for way in ways}
        assert item == (meant.pop() if len(meant) == 1 else None)


def test_labels_that_a_collator_hides_leave_the_rest_on_their_rows():
    assert match_labels([0, 1, 2], [0, -100, 2]) == [0, 1, 2]


def test_a_collator_that_hands_out_the_rows_themselves_leaves_them_as_they_were():
    item = {"labels": torch.tensor([1]), "input_ids": torch.tensor([[1]])}
    batch = IndexedCollator(lambda items: items[0], num_rows=5)([IndexedItems([3], [item])])
    assert batch[ROWS_KEY].tolist() == [3] and ROWS_KEY not in item


def test_training_batches_asked_for_by_others_are_those_of_the_trainer(tmp_path):
    trainer = train(tmp_path)
    assert set(next(iter(trainer.get_train_dataloader()))) == {"input_ids", "labels"}


def test_rows_read_a_batch_at_once_where_the_data_set_can():
    dataset = make_dataset()
    loader = DataLoader(IndexedDataset(dataset, ROWS), batch_size=4, collate_fn=tuple)
    assert next(iter(loader)) == (([0, 1, 2, 3], [dataset[row] for row in range(4)]),)
    assert IndexedDataset("ab", 2).__getitems__([-1, 0]) == [([1, 0], ["b", "a"])]
    assert IndexedDataset(dataset, ROWS).__getitems__([5, 2]) == [([5, 2], [dataset[5], dataset[2]])]
    assert IndexedDataset("ab", 2).__getitems__([1, 0]) == [([1, 0], ["b", "a"])] and IndexedDataset("ab", 2)[1] == "b"
    with pytest.raises(AttributeError, match="nothing"):
        _ = IndexedDataset(dataset, ROWS).nothing


class Columns(torch.utils.data.Dataset):
    """Hands its collator a batch, not items."""

    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["labels"])

    def __getitems__(self, rows):
        return {name: values[rows] for name, values in self.columns.items()}


def test_a_data_set_that_hands_out_whole_batches_trains_and_ranks_as_one_of_items(tmp_path):
    items = make_dataset()
    columns = Columns(dict(pad([items[row] for row in range(ROWS)])))
    chain = [OPEN_GATES]  # not `auto`, which knows the class counts of the one and has to count those of the other
    options = {"collator": lambda batch: batch, "remove_unused_columns": False, "perturbations": chain}
    batches = train(tmp_path, columns, **options)
    padded = Dataset.from_dict({name: values.tolist() for name, values in columns.columns.items()})
    padded = padded.rename_column("labels", "label")
    by_items = train(tmp_path, padded, perturbations=chain)
    assert torch.equal(flat_parameters(batches.model), flat_parameters(by_items.model))
    assert batches.label_issues()["score"][:] == by_items.label_issues()["score"][:]


class OwnLoader(LPGTrainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=8, collate_fn=self.data_collator)


class OtherRows(LPGTrainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset.shuffle(seed=0), batch_size=8, collate_fn=self.data_collator)


def test_a_loader_of_the_users_over_the_training_set_is_numbered(tmp_path, monkeypatch):
    visits = spy_on_visits(monkeypatch)
    issues = train(tmp_path, cls=OwnLoader).label_issues()
    expected = slow_ranking(visits, make_dataset()["label"][:])
    assert issues["visits"][:] == [3] * ROWS
    assert issues["score"][:] == pytest.approx([expected[row][0] for row in issues["row"]], abs=1e-5)


class OwnLoss(LPGTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


def test_what_cannot_be_ranked_trains_and_says_why(tmp_path):
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match=r"there was no training yet: call `train\(\)` first"):
        LPGTrainer(model=make_model("bert"), args=args, train_dataset=make_dataset()).label_issues()
    stream = make_dataset().to_iterable_dataset()
    with pytest.raises(ValueError, match="is of the type IterableDataset, whose rows have no index"):
        train(tmp_path, stream, max_steps=2, remove_unused_columns=False).label_issues()
    with pytest.raises(ValueError, match="`get_train_dataloader` is overridden and does not return a `DataLoader`"):
        train(tmp_path, cls=OtherRows).label_issues()
    with pytest.raises(ValueError, match=r"recorded no row. .* `compute_loss` or `training_step` are overridden"):
        train(tmp_path, cls=OwnLoss).label_issues()
    model = make_model("bert")
    model.config.problem_type, model.config.num_labels = "regression", 1
    model.num_labels, model.classifier = 1, torch.nn.Linear(16, 1)
    with pytest.raises(ValueError, match="is not a single-label classifier"):
        train(
            tmp_path,
            model=model,
            collator=lambda items: (batch := pad(items)) | {"labels": batch["labels"].float()},
        ).label_issues()


def test_rows_without_a_number_are_not_known():
    collator = IndexedCollator(default_data_collator, num_rows=5)
    keyed = IndexedDataset({"a": {"label": 1}, "b": {"label": 0}}, 5).__getitems__(["a", "b"])
    assert collator(keyed)[ROWS_KEY].tolist() == [5, 5]
    grown = IndexedDataset([{"label": 1}] * 8, 5).__getitems__([-1, 7, 4, -8])
    assert collator(grown)[ROWS_KEY].tolist() == [5, 5, 4, 0]
    assert collator([IndexedItems([1, 2], [{"x": 1.0}, {"x": 0.0}])]).keys() == {"x"}
    assert IndexedCollator(list, num_rows=5)([IndexedItems([1], ["a"])]) == ["a"]


def test_bad_values_do_not_stick():
    """A visit with NaN counts as the smallest probability; training itself reports such values."""
    records = TrainingDynamics(1)
    records.update(torch.tensor([0]), torch.tensor([[math.nan, 1.0]]), torch.tensor([1]))
    records.update(torch.tensor([0]), torch.tensor([[0.0, -1e30]]), torch.tensor([1]))
    assert records.ranked(["a", "b"])["score"][:] == pytest.approx([1 - SMALLEST_CONFIDENCE])


def test_a_visit_with_nan_casts_no_vote():
    records, row, label = TrainingDynamics(1), torch.tensor([0]), torch.tensor([0])
    for logits in ([math.nan, 1.0, 1.0], *[[0.0, 9.0, 0.0]] * 3, [0.0, 0.0, 0.5]):
        records.update(row, torch.tensor([logits]), label)
    assert records.ranked(["a", "b", "c"])["suggested_label"][:] == [1]


def test_a_tie_and_a_process_that_never_saw_the_row_leave_a_suggestion():
    leader, votes = _merge_votes(torch.tensor(2), torch.tensor(0.0), torch.tensor(-1), torch.tensor(0.0))
    assert (leader, votes) == (2, 0)


def test_a_row_of_whose_label_the_model_is_certain_has_a_suggestion():
    """The probability of the other class is 0 in float32."""
    records = TrainingDynamics(1)
    records.update(torch.tensor([0]), torch.tensor([[200.0, 0.0]]), torch.tensor([0]))
    assert records.ranked(["a", "b"])["suggested_label"][:] == [1]


def test_labels_that_a_loss_of_the_users_ignores_are_ignored():
    records = TrainingDynamics(3)
    records.update(torch.arange(3), torch.zeros(3, 2), torch.tensor([1, 255, -1]))
    assert records.ranked(["a", "b"])["row"][:] == [0]


def test_a_step_never_asks_the_device_for_a_value():
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows, labels = torch.empty(4, dtype=torch.int64), torch.empty(4, dtype=torch.int64)
        visits = look_at(rows, torch.empty(4, 3), labels, torch.empty(4))
        assert visits.numbers.shape == (3, 4) and visits.values.shape == (4, 4)
        with pytest.raises(DataDependentOutputException):
            visits.values.any().item()  # which does


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.25, 0.5, 1.0])), min_size=1, max_size=30),
    st.integers(1, 4),
)
def test_a_majority_leads_however_the_votes_are_spread_over_processes(votes, processes):
    counters = [(torch.tensor(-1), torch.tensor(0.0)) for _ in range(processes)]
    for number, (candidate, vote) in enumerate(votes):
        process = number % processes
        counters[process] = _merge_votes(*counters[process], torch.tensor(candidate), torch.tensor(vote))
    merged = counters[0]
    for counter in counters[1:]:
        merged = _merge_votes(*merged, *counter)
    totals = np.bincount([candidate for candidate, _ in votes], [vote for _, vote in votes], minlength=4)
    if totals.max() > totals.sum() / 2:
        assert merged[0] == totals.argmax()
    assert 0 <= merged[1] <= totals.max()


def test_records_of_two_processes_are_one():
    generator = torch.Generator().manual_seed(0)
    parts, whole = [TrainingDynamics(5), TrainingDynamics(5)], TrainingDynamics(5)
    for step in range(20):
        rows = torch.randperm(5, generator=generator)[:2]
        logits = 3 * torch.randn(2, 3, generator=generator)
        labels = rows % 3
        parts[step % 2].update(rows, logits, labels)
        whole.update(rows, logits, labels)
    names = iter(["_sums", "_labels", "_votes"])  # in the order in which they are gathered

    def gather(tensor):
        name = next(names)
        return torch.stack([getattr(part, name) for part in parts])

    merged = parts[0].merged(gather)
    first, second = merged.ranked(["a", "b", "c"]), whole.ranked(["a", "b", "c"])
    assert first["row"][:] == second["row"][:] and first["visits"][:] == second["visits"][:]
    assert first["score"][:] == pytest.approx(second["score"][:], abs=1e-6)


@pytest.mark.parametrize(("num_batches", "num_logits"), [(1, 2**20), (3, 2**20), (32, 13), (32, 2**20)])
@pytest.mark.parametrize("with_weight", [False, True])
def test_visits_that_wait_count_as_those_that_do_not(with_weight, num_batches, num_logits, monkeypatch):
    monkeypatch.setattr(row_records, "MAX_WAITING_BATCHES", num_batches)
    monkeypatch.setattr(row_records, "MAX_WAITING_LOGITS", num_logits)
    at_once, later = TrainingDynamics(14), TrainingDynamics(14)
    queue = DynamicsBuffer(later)
    for _ in range(4):
        for rows in torch.randperm(14).split(3):
            weight = (torch.rand(len(rows)),) if with_weight and rows[0] % 2 else ()
            logits, labels = (3 * torch.randn(len(rows), 3)).bfloat16(), rows % 3
            at_once.update(rows, logits.float(), labels, *weight)
            queue.add(rows, logits, labels[:, None].int(), *weight)
        queue.flush()
    queue.flush()
    for name, expected in at_once.state_dict().items():
        torch.testing.assert_close(later.state_dict()[name], expected)


def test_large_batches_do_not_wait(monkeypatch):
    monkeypatch.setattr(row_records, "MAX_WAITING_LOGITS", 6)
    records = TrainingDynamics(4)
    queue = DynamicsBuffer(records)
    queue.add(torch.arange(2), torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64))
    assert not records.has_visits
    queue.add(torch.arange(2, 3), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
    assert records.has_visits


class Collator:
    """A collator with a setting, which a callback changes."""

    def __init__(self):
        self.max_length, self.lengths = 2, []

    def __call__(self, items):
        batch = pad(items)
        batch["input_ids"] = batch["input_ids"][:, : self.max_length]
        self.lengths.append(batch["input_ids"].shape[1])
        return batch


class Levels(TorchRows):
    """A data set with a setting, which a callback changes."""

    def __init__(self, rows):
        super().__init__(rows)
        self.level, self.drawn = 0, []

    def __getitem__(self, index):
        self.drawn.append(self.level)
        return super().__getitem__(index)


class Curriculum(TrainerCallback):
    """Reads and writes attributes of data set and collator, and looks at batches."""

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        train_dataloader.dataset.level = round(state.epoch or 0)
        train_dataloader.collate_fn.max_length += 1

    def on_step_end(self, args, state, control, model, train_dataloader, **kwargs):
        if state.global_step % 3 == 1:
            with torch.no_grad():
                model(**next(iter(train_dataloader)))
        self.seen = (
            isinstance(train_dataloader, DataLoader),
            type(train_dataloader),
            type(train_dataloader.dataset),
            type(train_dataloader.collate_fn),
            type(train_dataloader.sampler),
            sorted(next(iter(train_dataloader))),
            len(train_dataloader),
            train_dataloader.total_batch_size,
        )


@pytest.mark.parametrize("kind", ["torch", "datasets"])
@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_callbacks_see_and_change_the_loader_of_the_trainer(kind, strategy, tmp_path):
    """The user's own data set and collator, batches without row numbers, and training as with the Trainer."""

    def run(base):
        class Watched(base):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.add_callback(watch)

        watch, collator = Curriculum(), Collator()
        dataset = Levels(list(make_dataset())) if kind == "torch" else make_dataset()
        options = {"train_sampling_strategy": strategy, "remove_unused_columns": False, "perturbations": []}
        trainer = train(tmp_path, dataset, cls=Watched, collator=collator, **options)
        return trainer, watch.seen, collator.lengths, dataset.drawn if kind == "torch" else None

    ours, *seen = run(LPGTrainer)
    plain, *expected = run(Trainer)
    assert seen == expected and seen[0][0]
    assert set(seen[1]) == {3, 4, 5} and (kind == "datasets" or set(seen[2]) == {0, 1, 2})
    assert torch.equal(flat_parameters(ours.model), flat_parameters(plain.model))
    assert ours.label_issues().num_rows == ROWS


class NewCollator(TrainerCallback):
    """Puts another collator into a loader of torch."""

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        if state.epoch and state.epoch > 1.5:
            train_dataloader.collate_fn = self.collator = Collator()


def test_a_collator_that_a_callback_replaces_is_used_from_the_next_epoch_on(tmp_path):
    class Replaced(OwnLoader):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(callback)

    callback = NewCollator()
    assert train(tmp_path, cls=Replaced).label_issues()["visits"][:] == [3] * ROWS
    assert len(callback.collator.lengths) == 4


def test_no_batch_outlives_the_training(tmp_path):
    assert train(tmp_path)._lpg_row_tracker._step == []


def test_the_weight_of_a_subclass_is_the_one_that_is_booked(tmp_path):
    class Half(ClassRelativeDampening):
        def weight(self, gradient, batch, statistics):
            return torch.full_like(gradient[:, 0], 0.5)

    assert set(train(tmp_path, perturbations=[Half()]).label_issues()["weight"]) == {0.5}


class Overwriting(LPGTrainer):
    """What a step computed is gone after it, as where a compiled graph uses its memory again."""

    def compute_loss(self, *args, **kwargs):
        loss, self.outputs = super().compute_loss(*args, **(kwargs | {"return_outputs": True}))
        return loss

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        with torch.no_grad():
            self.outputs["logits"].fill_(torch.nan)
            self.lpg_loss.perturbations[0].last_weight.fill_(torch.nan)
        return loss


def test_visits_outlive_the_memory_of_their_step(tmp_path):
    issues, expected = (
        train(tmp_path, perturbations=[OPEN_GATES], cls=cls).label_issues().to_dict()
        for cls in (Overwriting, LPGTrainer)
    )
    assert issues == expected
