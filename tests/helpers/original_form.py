"""Methods at the logits against their original form: a loss and autograd in float64, never our formula."""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from logit_batches import COUNTS, NUM_CLASSES, assert_close, delta_of, extreme_batch, make_batch
from torch import Tensor
from torch.nn import functional as F

from lpg_hf import LPGLoss
from lpg_hf.batch import LogitBatch
from lpg_hf.perturbations import LogitPerturbation
from lpg_hf.statistics import ClassStatistics


#: Maps logits and labels to a loss that is summed over samples.
Loss = Callable[[Tensor, Tensor], Tensor]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@dataclasses.dataclass
class OriginalForm:
    """A method and the loss that it stands for. `is_finite`: whether autograd copes with extreme logits."""

    method: LogitPerturbation
    loss: Loss
    is_finite: bool = True


def original_form_tests(cases: Sequence[OriginalForm]) -> type:
    """The tests that every method with an original form passes; a module binds them to a name with `Test`."""
    every_case = pytest.mark.parametrize("case", cases, ids=lambda case: repr(case.method))

    class OriginalFormTests:
        @every_case
        @every_dtype
        def test_gradient_plus_delta_is_the_gradient_of_the_original_loss(self, case, dtype):
            batch = make_batch(num_samples=40, scale=3.0, dtype=dtype)
            statistics = ClassStatistics(NUM_CLASSES, COUNTS).to(dtype)
            expected = gradient_of(case.loss, batch)
            assert_close(batch.gradient + delta_of(case.method, batch, statistics), expected, TOLERANCE[dtype])
            plain = gradient_of(cross_entropy, batch)
            assert (expected - plain).norm() > 0.1 or case.loss is cross_entropy

        @every_case
        @every_dtype
        def test_backward_through_the_loss_is_the_gradient_of_the_original_loss(self, case, dtype):
            batch = make_batch(num_samples=40, scale=3.0, seed=1, dtype=dtype)
            assert_close(gradient_through_loss(case.method, batch), gradient_of(case.loss, batch), TOLERANCE[dtype])

        @every_case
        @pytest.mark.parametrize("margin", [30.0, 80.0])
        @every_dtype
        def test_the_original_gradient_survives_extreme_logits(self, case, margin, dtype):
            batch = extreme_batch(margin, dtype)
            actual = gradient_through_loss(case.method, batch)
            assert actual.isfinite().all()
            if case.is_finite:
                assert_close(actual, gradient_of(case.loss, batch), TOLERANCE[dtype])

        @every_case
        @every_dtype
        def test_a_label_that_a_mask_excludes_gives_the_limit_of_the_gradient(self, case, dtype):
            masked, nearly = (torch.tensor([[0.0, logit, 1.0, -1.0, 2.0]], dtype=dtype) for logit in (-math.inf, -600))
            limit = gradient_through_loss(case.method, LogitBatch(nearly, torch.tensor([1])))
            actual = gradient_through_loss(case.method, LogitBatch(masked, torch.tensor([1])))
            torch.testing.assert_close(actual, limit, rtol=0, atol=1e-6)

    return OriginalFormTests


def gradient_of(loss: Loss, batch: LogitBatch) -> Tensor:
    """The gradient of a summed loss, by autograd in float64; zero for ignored samples."""
    z = batch.logits.detach().double().requires_grad_()
    loss(z[batch.valid_mask], batch.labels[batch.valid_mask]).backward()
    return z.grad


def gradient_through_loss(
    method: LogitPerturbation,
    batch: LogitBatch,
    counts: Sequence[int] = COUNTS,
    names: Mapping[str, int] | None = None,
) -> Tensor:
    """The gradient that `.backward()` of an LPGLoss leaves at the logits, in per-sample units."""
    z = batch.logits.clone().requires_grad_()
    method = copy.deepcopy(method)
    method.use_label_names(names or {})
    LPGLoss(z.shape[1], [method], counts)(z, batch.labels).backward()
    return z.grad * batch.valid_mask.sum()


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="sum")


def weighted(weights: Sequence[float]) -> Loss:
    weight = torch.tensor(weights, dtype=torch.float64)
    return lambda z, y: F.cross_entropy(z, y, weight=weight, reduction="sum")


def label_probability(z: Tensor, y: Tensor) -> Tensor:
    return z.softmax(-1).gather(-1, y[:, None])[:, 0]
