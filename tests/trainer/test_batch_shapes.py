"""Batches that differ from the others, and models whose config tells another number of classes than their head has."""

import itertools

import pytest
import torch
from clients import exact_bert, run, token_rows, warnings_of, weights_of
from odd_batches import HARD, NONE, SOFT, Consistent, make_batches, train
from text_cases import bert, plain_args, text_dataset
from torch import nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification, BertModel, BertPreTrainedModel, Trainer
from transformers.modeling_outputs import SequenceClassifierOutput

from lpg_hf import LPGTrainer
from lpg_hf.trainer.batch_shapes import MAX_FIRST_BATCHES


CHAIN = ["logit_adjustment", "logit_clipping(max_norm=0.3)"]
COUNTS = [9, 5, 1]


def perturbed(batches, path, **options):
    return train(LPGTrainer, batches, path, perturbations=CHAIN, class_counts=COUNTS, **options)


# Batches of another kind


@pytest.mark.parametrize("kinds", [kinds for kinds in itertools.product([HARD, SOFT], repeat=3) if HARD in kinds])
def test_every_batch_trains_as_its_kind_does(kinds, tmp_path, caplog):
    """Step by step: hard labels as with the chain, soft labels as with Trainer."""
    batches = make_batches(kinds)
    together = perturbed(batches, tmp_path)
    messages = warnings_of(caplog)
    state = None
    for kind, batch in zip(kinds, batches, strict=True):
        if kind == HARD:
            step = perturbed([batch], tmp_path, state=state)
        else:
            step = train(Trainer, [batch], tmp_path, state=state)
        state = step.model.state_dict()
    assert torch.equal(together.model.head.weight, state["head.weight"])
    assert len(messages) == (1 if SOFT in kinds else 0)
    assert together.lpg_loss.statistics.seen_counts.sum() == 4 * kinds.count(HARD)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kinds", [(HARD, NONE, HARD, NONE), (HARD, SOFT, NONE, HARD), (SOFT, HARD, HARD, NONE)])
def test_without_methods_every_kind_trains_as_with_trainer(kinds, accumulation, tmp_path, caplog):
    batches = make_batches(kinds)
    ours = train(LPGTrainer, batches, tmp_path, perturbations=[], accumulation=accumulation)
    plain = train(Trainer, batches, tmp_path, accumulation=accumulation)
    torch.testing.assert_close(ours.model.head.weight, plain.model.head.weight, rtol=0, atol=1e-12)
    assert not warnings_of(caplog)


def test_a_batch_without_labels_is_told_and_trains_as_with_trainer(tmp_path, caplog):
    batches = make_batches([HARD, NONE, HARD])
    together = perturbed(batches, tmp_path)
    (message,) = warnings_of(caplog)
    assert "A batch of step 2 cannot be perturbed: its batches have no `labels`" in message
    first = perturbed(batches[:1], tmp_path)
    second = train(Trainer, batches[1:2], tmp_path, state=first.model.state_dict())
    third = perturbed(batches[2:], tmp_path, state=second.model.state_dict())
    assert torch.equal(together.model.head.weight, third.model.head.weight)


def test_auto_waits_for_labels(tmp_path, caplog):
    batches = make_batches([NONE] * 3 + [HARD] * 3)
    trainer = train(LPGTrainer, batches, tmp_path, class_counts=COUNTS)
    assert trainer.lpg_loss.statistics.steps == 3
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("kind", [SOFT, NONE])
def test_a_training_of_odd_batches_alone_is_that_of_trainer(kind, tmp_path, caplog):
    batches = make_batches([kind] * (MAX_FIRST_BATCHES + 4))
    ours = train(LPGTrainer, batches, tmp_path, class_counts=COUNTS)
    messages = warnings_of(caplog)
    plain = train(Trainer, batches, tmp_path)
    assert torch.equal(ours.model.head.weight, plain.model.head.weight)
    assert len(messages) == 1 and f"If the first {MAX_FIRST_BATCHES} batches are all like it" in messages[0]


def test_methods_asked_for_by_name_do_not_stay_away_silently(tmp_path):
    with pytest.raises(ValueError, match="is not a single-label classifier"):
        perturbed(make_batches([SOFT] * (MAX_FIRST_BATCHES + 1)), tmp_path)


def test_a_first_loss_that_has_overflowed_leaves_the_decision_open(tmp_path, caplog):
    batches = make_batches([HARD] * 3)
    batches[0]["values"][0, 0] = torch.inf

    class Clipped(torch.optim.SGD):
        def step(self, closure=None):
            if all(p.grad.isfinite().all() for group in self.param_groups for p in group["params"]):
                return super().step(closure)
            return None

    model = Consistent()
    optimizer = Clipped(model.parameters(), lr=0.5)
    trainer = LPGTrainer(
        model=model,
        args=plain_args(tmp_path, per_device_train_batch_size=1, max_steps=3, max_grad_norm=0.0),
        train_dataset=batches,
        data_collator=lambda items: items[0],
        class_counts=COUNTS,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    )
    trainer.args.remove_unused_columns = False
    trainer.train()
    assert trainer.lpg_loss.statistics.steps == 2
    (message,) = warnings_of(caplog)
    assert "A batch of step 1 cannot be perturbed: its loss is not finite" in message or "instead of" in message


# Models


class OwnHead(BertPreTrainedModel):
    """`config.num_labels` is left at 2, and the head has four classes."""

    def __init__(self, config, classes=4):
        super().__init__(config)
        self.bert = BertModel(config)
        self.classifier = nn.Linear(config.hidden_size, classes)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        logits = self.classifier(self.bert(input_ids, attention_mask=attention_mask).pooler_output)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class OwnHeadForSequenceClassification(OwnHead):
    """transformers reads the name of the class to guess its loss."""


def test_the_head_tells_the_number_of_classes_and_not_the_config(tmp_path, caplog):
    def trained(**config):
        return run(
            LPGTrainer, exact_bert(OwnHeadForSequenceClassification, **config), tmp_path, perturbations=["auto"]
        )

    other, declared = trained(num_labels=2), trained(num_labels=4)
    assert other.lpg_loss.num_labels == 4
    assert other.lpg_loss.statistics.class_counts.tolist() == [24, 10, 6, 4]
    assert torch.equal(weights_of(other), weights_of(declared))
    assert not warnings_of(caplog)


def test_a_swapped_head_is_perturbed(tmp_path):
    model = exact_bert(BertForSequenceClassification, num_labels=2)
    model.classifier = nn.Linear(16, 4).double()
    model.num_labels = 4
    # BERT's forward reshapes its logits to `model.num_labels`; its config was forgotten.
    trainer = run(LPGTrainer, model, tmp_path, perturbations=CHAIN)
    assert trainer.lpg_loss.num_labels == 4


def test_class_counts_belong_to_the_head(tmp_path):
    model = exact_bert(OwnHeadForSequenceClassification, num_labels=2)
    trainer = run(LPGTrainer, model, tmp_path, class_counts=[24, 10, 6, 4])
    assert trainer.lpg_loss.statistics.class_counts.tolist() == [24, 10, 6, 4]


def test_nothing_is_asked_of_counts_and_labels_before_training(tmp_path):
    rows = token_rows()
    model = exact_bert(OwnHeadForSequenceClassification, num_labels=2)
    trainer = LPGTrainer(model=model, args=plain_args(tmp_path), train_dataset=rows, eval_dataset=rows)
    expected = Trainer(model=model, args=plain_args(tmp_path), eval_dataset=rows).evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == expected
    wrong = LPGTrainer(model=bert(), args=plain_args(tmp_path), train_dataset=text_dataset([0, 7]), eval_dataset=rows)
    assert wrong.predict(rows).predictions.shape == (44, 4)


class TwoHeads(OwnHead):
    """The logits are a tuple, and the losses of both heads are added."""

    def __init__(self, config):
        super().__init__(config)
        self.second = nn.Linear(config.hidden_size, 3)

    def forward(self, input_ids=None, attention_mask=None, labels=None, level=None):
        hidden = self.bert(input_ids, attention_mask=attention_mask).pooler_output
        logits = self.classifier(hidden), self.second(hidden)
        return {"loss": F.cross_entropy(logits[0], labels) + F.cross_entropy(logits[1], level), "logits": logits}


class TwoHeadsForSequenceClassification(TwoHeads):
    pass


@pytest.mark.parametrize("model_class", [TwoHeads, TwoHeadsForSequenceClassification])
def test_two_heads_train_as_with_trainer(model_class, tmp_path, caplog):
    rows = token_rows(column="labels")
    rows = rows.add_column("level", [label % 3 for label in rows["labels"]])
    args = {"label_names": ["labels", "level"]}
    ours = run(LPGTrainer, exact_bert(model_class), tmp_path, rows, args=args)
    plain = run(Trainer, exact_bert(model_class), tmp_path, rows, args=args)
    assert torch.equal(weights_of(ours), weights_of(plain))
    (message,) = warnings_of(caplog)
    assert "its outputs have no tensor of `logits`" in message
