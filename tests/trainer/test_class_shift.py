"""Moving the head to other class shares: exactly Bayes' rule at the logits."""

import pytest
import torch
from clients import exact_bert, make_args, run, token_rows
from families import FAMILIES, inputs_of, make_family, make_family_batch
from tiny import MODELS, NUM_LABELS, make_batch, make_model, make_trainer, split
from torch import nn

from lpg_hf import LPGTrainer
from lpg_hf.trainer.class_shift import head_bias


SHARES = [0.1, 0.2, 0.3, 0.4]


def centered(values):
    values = torch.as_tensor(values, dtype=torch.float64)
    return values - values.mean(-1, keepdim=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_move_by_the_ratio_of_the_shares(name, tmp_path):
    batches = split(make_batch(name, 16, dtype=torch.float64), [8, 8])
    trainer = make_trainer(
        LPGTrainer, make_model(name, exact=True), batches, tmp_path, class_counts=[8, 4, 2, 2], eval_shares="train"
    )
    trainer.train()
    model = trainer.model.eval()
    inputs = {key: value for key, value in batches[0].items() if key != "labels"}
    before = model(**inputs).logits
    trainer.shift_class_shares(SHARES)
    # The logits were trained for shares proportional to those of the training to the power of 2/3.
    trained = torch.tensor([8, 4, 2, 2], dtype=torch.float64) ** (2 / 3)
    expected = centered((torch.tensor(SHARES) / trained).log())
    torch.testing.assert_close(centered(model(**inputs).logits - before), expected.expand(8, -1), rtol=0, atol=1e-6)
    # Once more, from where it is now.
    trainer.shift_class_shares([1.0] * NUM_LABELS)
    expected = centered(trained.log().neg())
    torch.testing.assert_close(centered(model(**inputs).logits - before), expected.expand(8, -1), rtol=0, atol=1e-6)


def test_a_new_training_begins_with_its_own_shares(tmp_path):
    trainer = run(LPGTrainer, exact_bert(), tmp_path, eval_shares="uniform")
    bias = trainer.model.classifier.bias
    trainer.shift_class_shares(SHARES)
    trainer.train()
    before = bias.detach().clone()
    trainer.shift_class_shares(SHARES)
    torch.testing.assert_close(bias - before, centered(torch.tensor(SHARES).log()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_its_head_found_or_an_error(name):
    model, inputs = make_family(name).eval(), inputs_of(make_family_batch(name, 8))
    num_labels = model.config.num_labels
    before = model(**inputs).logits
    try:
        bias = head_bias(model, num_labels)
    except ValueError as error:
        assert "has no bias that could be moved" in str(error)
        assert not any(module.bias is not None for module in model.modules() if is_head(module, num_labels))
        return
    offset = torch.linspace(-1, 1, num_labels)
    with torch.no_grad():
        bias.add_(offset)
    torch.testing.assert_close(model(**inputs).logits - before, offset.expand_as(before), rtol=0, atol=1e-4)


def is_head(module, num_labels):
    return isinstance(module, nn.Linear) and module.out_features == num_labels


def test_errors_name_the_cure(tmp_path):
    trainer = LPGTrainer(model=exact_bert(), args=make_args(tmp_path), train_dataset=token_rows())
    with pytest.raises(ValueError, match="`shares` must be 4 numbers"):
        trainer.shift_class_shares([0.5, 0.5])
    with pytest.raises(ValueError, match=r"`shares` must be 4 numbers, one per class.*found 'uniform'"):
        trainer.shift_class_shares("uniform")
    with pytest.raises(ValueError, match=r"no bias that could be moved.*`log\(shares\) - trainer"):
        head_bias(nn.Sequential(nn.Linear(3, 4, bias=False)), 4)
    with pytest.raises(ValueError, match="no layer with an output per class"):
        head_bias(nn.Sequential(nn.Linear(3, 5)), 4)
