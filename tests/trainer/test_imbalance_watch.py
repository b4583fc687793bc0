"""An imbalance that is corrected outside of the chain: samplers, transforms, collators, and weighted losses."""

import logging

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, WeightedRandomSampler
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from lpg_hf import LPGTrainer
from lpg_hf.batch import LogitBatch
from lpg_hf.trainer.imbalance_watch import ImbalanceWatch, shares_differ


C = 4
COUNTS = [400, 120, 50, 30]
ROWS = sum(COUNTS)
CHANCE = settings(max_examples=200, deadline=None, derandomize=True)


# The test of shares


@CHANCE
@given(st.integers(0, 10**6), st.sampled_from([COUNTS, [200, 1, 1], [50] * 20, [300, 250, 50]]), st.integers(64, 600))
def test_samples_of_the_data_set_do_not_differ_from_it(seed, counts, size):
    rng = np.random.default_rng(seed)
    seen = rng.multinomial(size, np.array(counts) / sum(counts)).tolist()
    assert not shares_differ(seen, counts, is_epoch=False)
    assert not shares_differ(seen, counts, is_epoch=True)


@CHANCE
@given(st.integers(0, 10**6), st.floats(4.0, 100.0))
def test_balanced_samples_differ_from_a_long_tail(seed, ratio):
    rng = np.random.default_rng(seed)
    counts = [int(1000 * ratio ** (-c / 9)) for c in range(10)]
    seen = rng.multinomial(512, [0.1] * 10).tolist()
    assert shares_differ(seen, counts, is_epoch=True)


def test_sorted_samples_wait_for_the_end_of_the_epoch():
    assert not shares_differ([400, 112, 0, 0], COUNTS, is_epoch=False)
    assert shares_differ([400, 112, 0, 0], [100] * 4, is_epoch=True)


def test_a_class_that_should_not_exist_differs():
    assert shares_differ([200, 200, 112], [100, 100, 0], is_epoch=False)


def test_a_class_that_was_not_met_yet_counts_once():
    watch = ImbalanceWatch([700, 250, 50, 0], has_custom_loss=False)
    assert watch.judge_labels([200, 312, 0, 0], is_epoch=True)
    assert watch.found == [200, 312, 1, 0]


# The test of losses


def power_of(loss, logits, labels):
    watch = ImbalanceWatch(COUNTS, True)
    z = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z, labels), z)
    watch.add_pulls(LogitBatch(logits, labels), gradient, -LOG_PRIOR)
    return watch.judge_loss(Accelerator(cpu=True))


WEIGHTS = ROWS / (C * torch.tensor(COUNTS, dtype=torch.float64))
LOG_PRIOR = (torch.tensor(COUNTS, dtype=torch.float64) / ROWS).log()


def focal(z, y, weight=None):
    log_p = z.log_softmax(-1).gather(-1, y[:, None])[:, 0]
    weight = torch.ones(C, dtype=z.dtype) if weight is None else weight
    return (-weight[y] * (1 - log_p.exp()) ** 2 * log_p).mean()


LOSSES = {
    "cross-entropy": (F.cross_entropy, False),
    "cross-entropy, in another unit": (lambda z, y: 1000 * F.cross_entropy(z, y, reduction="sum"), False),
    "label smoothing": (lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), False),
    "focal": (focal, False),
    "balanced weights": (lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS), True),
    "square roots of them": (lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS.sqrt()), True),
    "weighted focal": (lambda z, y: focal(z, y, WEIGHTS), True),
    "weights against the rare": (lambda z, y: F.cross_entropy(z, y, weight=1 / WEIGHTS), False),
    "balanced softmax": (lambda z, y: F.cross_entropy(z + LOG_PRIOR, y), True),
    "half of its offset": (lambda z, y: F.cross_entropy(z + 0.5 * LOG_PRIOR, y), True),
    "an offset against the rare": (lambda z, y: F.cross_entropy(z - 0.5 * LOG_PRIOR, y), False),
    "temperature": (lambda z, y: F.cross_entropy(z / 2, y), False),
    "squared error of probabilities": (lambda z, y: (z.softmax(-1) - F.one_hot(y, C)).square().sum(-1).mean(), False),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("learned", [0.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_corrects_the_imbalance_is_told_from_one_that_does_not(name, seed, learned):
    loss, corrects = LOSSES[name]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor(COUNTS) / ROWS, 512, True, generator=generator)
    logits = 0.3 * torch.randn(512, C, dtype=torch.float64, generator=generator)
    logits[labels == 0, 0] += learned  # the head is learned first
    assert power_of(loss, logits, labels) == corrects


@pytest.mark.parametrize("learned", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("multiple", "corrects"), [(-0.5, False), (0.0, False), (0.3, False), (0.8, True), (1.0, True)]
)
def test_offsets_show_among_many_classes_that_noise_has_made_alike(multiple, corrects, dtype, learned):
    """The label's own pull hardly differs between classes there."""
    shares = torch.tensor([93, 75, 64, 45, 33, 27, 20, 21, 13, 14], dtype=torch.float64) / 405
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(shares, 512, True, generator=generator)
    logits = (torch.randn(512, 10, generator=generator) + learned * F.one_hot(labels, 10)).to(dtype).requires_grad_()
    loss = F.cross_entropy(logits + multiple * shares.log().to(dtype), labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    watch = ImbalanceWatch(None, True)
    watch.add_pulls(LogitBatch(logits.float(), labels), gradient, -shares.log())
    assert watch.judge_loss(Accelerator(cpu=True)) == corrects


# In training


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, C))

    def forward(self, x=None, labels=None):
        logits = self.net(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def rows(order="shuffled", column="labels"):
    labels = np.repeat(np.arange(C), COUNTS)
    if order == "shuffled":
        labels = np.random.default_rng(0).permutation(labels)
    x = np.random.default_rng(1).normal(size=(ROWS, 6)) + 2 * np.eye(C, 6)[labels]
    return Dataset.from_dict({"x": x.astype(np.float32).tolist(), column: labels.tolist()})


class WeightedSampler(LPGTrainer):
    def _get_train_sampler(self, train_dataset=None):
        labels = np.array(self.train_dataset["labels"])
        generator = torch.Generator().manual_seed(0)
        return WeightedRandomSampler(torch.tensor(1 / np.bincount(labels)[labels]), ROWS, generator=generator)


class WeightedLoader(LPGTrainer):
    def get_train_dataloader(self):
        sampler = WeightedSampler._get_train_sampler(self)
        loader = DataLoader(self.train_dataset, batch_size=16, sampler=sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


def train(tmp_path, trainer_class=LPGTrainer, dataset=None, resume=None, args=None, **kwargs):
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 16,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    } | (args or {})
    trainer = trainer_class(
        model=Head(),
        args=TrainingArguments(**settings),
        train_dataset=rows() if dataset is None else dataset,
        **{"data_collator": default_data_collator} | kwargs,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def warnings_of(caplog):
    return [record.message for record in caplog.records if record.name.startswith("lpg_hf")]


@pytest.mark.parametrize("trainer_class", [WeightedSampler, WeightedLoader])
@pytest.mark.parametrize("chain", [None, ["logit_adjustment"], ["lpg"], ["class_weighting", "auto"]], ids=str)
def test_with_a_weighted_sampler_the_shares_that_training_meets_count(trainer_class, chain, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        trainer = train(tmp_path, trainer_class, perturbations=chain)
    (message,) = warnings_of(caplog)
    assert "class 0 makes 2" in message and "instead of 66.7%" in message and "`class_counts`" in message
    statistics = trainer.lpg_loss.statistics
    assert (statistics.prior - 0.25).abs().max() < 0.06
    # The whole first epoch counts in the second one.
    assert statistics.class_counts.sum() == ROWS
    assert statistics.seen_counts.sum() == 2 * ROWS
    assert statistics.steps == trainer.state.global_step


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("strategy", ["random", "sequential"])
@pytest.mark.parametrize("order", ["shuffled", "sorted"])
def test_without_a_correction_nothing_changes(order, strategy, accumulation, tmp_path, caplog):
    args = {"gradient_accumulation_steps": accumulation, "train_sampling_strategy": strategy}
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        trainer = train(tmp_path, dataset=rows(order), args=args)
    assert not warnings_of(caplog)
    assert trainer.lpg_loss.statistics.class_counts.tolist() == COUNTS
    assert trainer.lpg_loss.perturbations[0].name == "logit_adjustment"


def test_a_transform_that_renumbers_labels_is_met(tmp_path, caplog):
    def renumber(batch):
        return {"x": batch["x"], "labels": [C - 1 - label for label in batch["labels"]]}

    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        trainer = train(tmp_path, dataset=rows().with_transform(renumber))
    assert len(warnings_of(caplog)) == 1
    assert trainer.lpg_loss.statistics.class_counts.tolist() == COUNTS[::-1]


def test_a_collator_that_takes_another_column_is_met(tmp_path, caplog):
    dataset = rows().add_column("label", [row % C for row in range(ROWS)])

    def collate(items):
        labels = torch.tensor([item["label"] for item in items])
        return {"x": torch.tensor([item["x"] for item in items]), "labels": labels}

    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        trainer = train(tmp_path, dataset=dataset, data_collator=collate)
    assert len(warnings_of(caplog)) == 1
    assert trainer.lpg_loss.statistics.class_counts.tolist() == [ROWS // C] * C
    (adjustment, _) = trainer.lpg_loss.perturbations
    assert adjustment.name == "logit_adjustment"
    assert adjustment.log_correction(trainer.lpg_loss.statistics).tolist() == [0.0] * C


def test_counts_of_the_user_are_kept(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        trainer = train(tmp_path, WeightedSampler, class_counts=[5, 6, 7, 8])
    assert trainer.lpg_loss.statistics.class_counts.tolist() == [5, 6, 7, 8]
    assert not warnings_of(caplog)


@pytest.mark.parametrize("name", LOSSES)
def test_auto_corrects_what_a_loss_of_the_user_does_not(name, tmp_path, caplog):
    loss, corrects = LOSSES[name]

    def function(outputs, labels, num_items_in_batch=None):
        return loss(outputs["logits"].double(), labels).float()

    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        trainer = train(tmp_path, compute_loss_func=function)
    names = [method.name for method in trainer.lpg_loss.perturbations]
    assert ("logit_adjustment" in names) != corrects
    assert len(warnings_of(caplog)) == corrects
    assert trainer.lpg_loss.statistics.steps == trainer.state.global_step


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


@pytest.mark.parametrize("step", [20, 36, 50])
@pytest.mark.parametrize("loss", ["balanced weights", None])
def test_a_resumed_training_knows_what_the_first_one_found(loss, step, tmp_path):
    """Before the first look, between the two, and after both."""

    def function(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs["logits"], labels, weight=WEIGHTS.float())

    kwargs = {} if loss is None else {"compute_loss_func": function}
    trainer_class = WeightedSampler if loss is None else LPGTrainer
    args = {"save_strategy": "steps", "save_steps": step}
    unbroken = train(tmp_path / "a", trainer_class, args=args, **kwargs)
    train(tmp_path / "b", trainer_class, args=args, callbacks=[Interrupt(step)], **kwargs)
    resumed = train(
        tmp_path / "b", trainer_class, args=args, resume=str(tmp_path / "b" / f"checkpoint-{step}"), **kwargs
    )
    assert list(map(repr, resumed.lpg_loss.perturbations)) == list(map(repr, unbroken.lpg_loss.perturbations))
    assert torch.equal(resumed.lpg_loss.statistics.class_counts, unbroken.lpg_loss.statistics.class_counts)
    if loss is not None:  # the sampler draws anew
        for ours, theirs in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


# The scale of a loss of the user


def mean_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs["logits"], labels)


def counting_loss(outputs, labels, num_items_in_batch=None):
    total = F.cross_entropy(outputs["logits"], labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def step_of(tmp_path, function, chain, batch_size, accumulation):
    model = Head().double()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    dataset = rows().with_format("torch", dtype=torch.float64, columns=["x"], output_all_columns=True)
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = (Trainer if chain is None else LPGTrainer)(
        model=model,
        args=arguments,
        train_dataset=dataset,
        compute_loss_func=function,
        **({} if chain is None else {"perturbations": chain}),
    )
    trainer.train()
    return torch.cat([(b - p.detach()).flatten() for b, p in zip(before, model.parameters(), strict=True)])


@pytest.mark.parametrize(("function", "factor"), [(counting_loss, 1), (mean_loss, 4)])
def test_base_and_delta_have_the_same_scale_under_accumulation(function, factor, tmp_path):
    """A loss that ignores the count is added up by Trainer; the delta follows it."""
    whole = step_of(tmp_path, function, ["logit_adjustment"], 16, 1)
    plain_whole = step_of(tmp_path, function, None, 16, 1)
    split = step_of(tmp_path, function, ["logit_adjustment"], 4, 4)
    plain_split = step_of(tmp_path, function, None, 4, 4)
    torch.testing.assert_close(plain_split, factor * plain_whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(split, factor * whole, rtol=0, atol=1e-12)
    assert (whole - plain_whole).norm() > 0.1 * plain_whole.norm()
