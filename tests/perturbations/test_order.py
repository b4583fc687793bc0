"""The order of a chain: one warning where a weight stands in front of the logit adjustment, and what that would do."""

import ast
import logging
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from text_cases import bert, plain_args, text_dataset

from lpg_hf import LPGLoss, LPGTrainer
from lpg_hf.perturbations import SampleReweighting, build_chain


ADJUSTMENT = "logit_adjustment(learned=(0.05, 0.2), target='evaluation')"
DAMPENING = "class_relative_dampening()"
WRONG = {
    "focal loss": (["focal_loss", "auto"], [ADJUSTMENT, DAMPENING, "focal_loss()"]),
    "an adjustment of one's own": (["auto", "logit_adjustment(tau=1.5)"], ["logit_adjustment(tau=1.5)", DAMPENING]),
    "dampening of one's own": (["class_relative_dampening", "auto"], [ADJUSTMENT, DAMPENING]),
    "several": (
        ["logit_clipping", "lpg", "generalized_cross_entropy", "auto"],
        ["lpg()", ADJUSTMENT, DAMPENING, "logit_clipping()", "generalized_cross_entropy()"],
    ),
}
# The second of these makes no adjustment in `auto`. Smoothing and LPG do not weight.
RIGHT = [
    ["auto"],
    ["class_weighting", "auto"],
    ["auto", "focal_loss"],
    ["label_smoothing", "auto", "logit_clipping"],
    ["lpg", "auto"],
    ["focal_loss", "label_smoothing"],
    [],
]


def warnings(caplog):
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def order_in(message):
    text = re.search(r"The right order is (\[.*\]): ", message)[1]
    return [repr(method) for method in build_chain([ast.unparse(call) for call in ast.parse(text).body[0].value.elts])]


@pytest.mark.parametrize("case", WRONG)
def test_one_warning_names_the_right_order(case, caplog):
    chain, expected = WRONG[case]
    LPGLoss(3, chain)
    (message,) = warnings(caplog)
    assert order_in(message) == expected and "does not weight its delta" in message
    LPGLoss(3, order_in(message))
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("chain", RIGHT, ids=str)
def test_no_warning_of_another_order(chain, caplog):
    LPGLoss(3, chain)
    assert warnings(caplog) == []


@given(st.permutations(["focal_loss", "logit_adjustment", "logit_clipping", "lpg", "label_smoothing"]))
def test_the_warning_follows_the_places(names):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("lpg_hf.perturbations.order")
    logger.addHandler(handler)
    try:
        LPGLoss(3, names)
    finally:
        logger.removeHandler(handler)
    place = names.index("logit_adjustment")
    in_front = [method for method in build_chain(names[:place]) if isinstance(method, SampleReweighting)]
    assert len(messages) == bool(in_front)
    if in_front:
        assert messages[0].startswith(f"{in_front} in front of logit_adjustment() ")
        behind = [f"{name}()" for name in names if f"{name}()" not in map(repr, in_front)]
        assert order_in(messages[0]) == [*behind, *map(repr, in_front)]


def test_a_training_warns_once(tmp_path, caplog):
    LPGTrainer(
        model=bert(),
        args=plain_args(tmp_path, max_steps=4),
        train_dataset=text_dataset([0] * 12 + [1, 2, 3, 3]),
        perturbations=["focal_loss", "auto"],
    ).train()
    assert len([message for message in warnings(caplog) if "right order" in message]) == 1


def test_in_front_a_fitted_sample_keeps_the_whole_delta():
    """By hand: `w g + d` in front, and `w (g + d)` behind, for the weight w of focal loss and the delta d."""
    counts, labels = [90, 9, 1], torch.tensor([0, 0, 1, 2])
    logits = torch.tensor([[5.0, 0, 0], [1, 0, 0], [0, 5, 0], [0, 0, 5]], dtype=torch.float64)

    def gradient(chain):
        values = logits.clone().requires_grad_()
        LPGLoss(3, chain, counts).double()(values, labels).backward()
        return values.grad * len(labels)

    p = logits.softmax(-1)
    own = p[range(4), labels]
    weight = ((1 - own) ** 2 - 2 * (1 - own) * own * own.log())[:, None]
    onehot = torch.nn.functional.one_hot(labels, 3)
    adjusted = (logits + torch.tensor(counts).double().log()).softmax(-1)
    behind, in_front = weight * (adjusted - onehot), weight * (p - onehot) + adjusted - p
    torch.testing.assert_close(gradient(["logit_adjustment", "focal_loss"]), behind)
    torch.testing.assert_close(gradient(["focal_loss", "logit_adjustment"]), in_front)
    # The first sample has p = 0.987. In front it is pushed 50 times as far, and away from its label.
    assert own[0] == pytest.approx(0.987, abs=1e-3)
    ratio = in_front.norm(dim=-1) / behind.norm(dim=-1)
    assert ratio[0] > 50 and in_front[0, 0] > 0 > behind[0, 0]
