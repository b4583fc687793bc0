"""Activations that the backward pass computes anew: nothing is counted, booked or perturbed twice."""

import pytest
import torch
from clients import OPEN_GATES, assert_dampened, confident_bert, distance, few_rows, run
from tiny import class_means, flat_parameters, make_batch, make_model, make_trainer, split
from torch.utils.checkpoint import checkpoint
from transformers import BertForSequenceClassification

from lpg_hf import LPGTrainer


CHAIN = ["auto", "logit_clipping(max_norm=0.3)"]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "distilbert", "vit", "wav2vec2"])
def test_gradient_checkpointing_changes_nothing(name, use_reentrant, tmp_path):
    def train(**args):
        torch.manual_seed(0)
        batches = split(make_batch(name, 48, dtype=torch.float64), [8] * 6)
        args |= {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
        trainer = make_trainer(
            LPGTrainer, make_model(name, exact=True), batches, tmp_path, args=args, perturbations=CHAIN
        )
        trainer.train()
        return trainer

    kept = train()
    anew = train(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert torch.equal(flat_parameters(anew.model), flat_parameters(kept.model))
    assert torch.equal(class_means(anew.lpg_loss), class_means(kept.lpg_loss))
    assert anew.lpg_loss.statistics.seen_counts.sum() == 48


class Recomputed(BertForSequenceClassification):
    """All of it, the loss included."""

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        def whole(tokens):
            output = super(Recomputed, self).forward(tokens, attention_mask=attention_mask, labels=labels, **kwargs)
            return output.loss, output.logits

        loss, logits = checkpoint(whole, input_ids, use_reentrant=False)
        return {"loss": loss, "logits": logits}


class RecomputesLoss(LPGTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        def whole(tokens):
            batch = inputs | {"input_ids": tokens}
            return super(RecomputesLoss, self).compute_loss(model, batch, num_items_in_batch=num_items_in_batch)

        return checkpoint(whole, inputs["input_ids"], use_reentrant=False)


@pytest.mark.parametrize("chain", [CHAIN, OPEN_GATES], ids=["fixed", "running"])
@pytest.mark.parametrize(
    ("trainer_class", "model_class"), [(LPGTrainer, Recomputed), (RecomputesLoss, BertForSequenceClassification)]
)
def test_a_loss_that_is_computed_anew_counts_once(trainer_class, model_class, chain, tmp_path):
    kept = run(LPGTrainer, confident_bert(), tmp_path, few_rows(), perturbations=chain)
    anew = run(trainer_class, confident_bert(model_class), tmp_path, few_rows(), perturbations=chain)
    assert distance(anew, kept) < 1e-12
    torch.testing.assert_close(class_means(anew.lpg_loss), class_means(kept.lpg_loss), rtol=0, atol=1e-12)
    assert torch.equal(anew.lpg_loss.statistics.seen_counts, kept.lpg_loss.statistics.seen_counts)
    assert anew.label_issues()["visits"][:] == kept.label_issues()["visits"][:]
    if chain == OPEN_GATES:
        assert_dampened(kept)
