"""Batches of logits and statistics for the tests of the methods, with the comparisons that these share."""

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import reference
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lpg_hf.batch import IGNORE_INDEX, LogitBatch, Offsets
from lpg_hf.perturbations import LogitPerturbation, lpg
from lpg_hf.statistics import ClassStatistics


NUM_CLASSES = 5
COUNTS = [400, 90, 30, 11, 3]
WITH_ABSENT = [400, 0, 30, 0, 3]

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
few_examples = settings(max_examples=20, deadline=None, derandomize=True)
more_examples = settings(few_examples, max_examples=50)


def make_batch(
    num_samples: int = 30,
    scale: float = 2.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    num_classes: int = NUM_CLASSES,
) -> LogitBatch:
    """Random logits and labels; every ninth sample is ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,), generator=generator)
    logits = scale * torch.randn(num_samples, num_classes, dtype=torch.float64, generator=generator)
    labels[::9] = IGNORE_INDEX
    return LogitBatch(logits.to(dtype), labels)


def offsets_of(judged: Tensor | None = None, fitted: Tensor | None = None) -> Offsets | None:
    """Offsets for judged logits and for the fit excess, 0 where left out."""
    given = [offset for offset in (judged, fitted) if offset is not None]
    if not given:
        return None
    none = torch.zeros_like(given[0])
    return Offsets(torch.stack([none if offset is None else offset for offset in (judged, fitted, None)]), plain=2)


def make_statistics(class_counts: Sequence[int] | None = None, num_steps: int = 6, **options: bool) -> ClassStatistics:
    """Statistics in float64 after some steps on batches whose labels the model often contradicts."""
    statistics = ClassStatistics(NUM_CLASSES, class_counts, **options).double()
    for step in range(num_steps):
        batch = make_batch(seed=100 + step)
        logits, labels = batch.logits, batch.labels
        # Classes 0 to 2 are learned, more or less; class 4 is not.
        skill = torch.tensor([4.0, 3.0, 2.0, 1.0, -2.0]).double()
        logits[labels >= 0, labels[labels >= 0]] += skill[labels[labels >= 0]]
        statistics.update(LogitBatch(logits, labels))
        statistics.step()
    return statistics


def prepared(method: LogitPerturbation, num_classes: int = NUM_CLASSES) -> LogitPerturbation:
    """A copy that is ready for its first batch: examples are shared by many tests, and some methods have a state."""
    method = copy.deepcopy(method)
    method.setup(num_classes)
    return method


def delta_of(method: LogitPerturbation, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
    """The delta of a method that comes first in a chain."""
    return prepared(method, batch.logits.shape[1]).delta(batch.gradient, batch, statistics)


def extreme_batch(margin: float, dtype: torch.dtype) -> LogitBatch:
    """Samples fitted by a margin at which the probabilities round to 0 and 1, and as far on the wrong side."""
    labels = torch.arange(NUM_CLASSES).repeat(2)
    winners = torch.where(torch.arange(2 * NUM_CLASSES) < NUM_CLASSES, labels, (labels + 1) % NUM_CLASSES)
    return LogitBatch(margin * F.one_hot(winners, NUM_CLASSES).to(dtype), labels)


@dataclasses.dataclass
class DrawnBatch:
    """A batch of logits with a sign and a bound for every class; its gradient is the reference's."""

    logits: Tensor
    labels: Tensor
    signs: Tensor
    bounds: Tensor

    @property
    def batch(self) -> LogitBatch:
        return LogitBatch(self.logits, self.labels)

    @property
    def gradient(self) -> Tensor:
        return torch.from_numpy(reference.logit_gradient(self.logits.numpy(), self.labels.tolist()))

    @property
    def label_prob(self) -> Tensor:
        """By the reference; 1 for ignored samples."""
        rows = zip(reference.softmax(self.logits.numpy()), self.labels.tolist(), strict=True)
        return torch.tensor([1.0 if c == IGNORE_INDEX else p[c] for p, c in rows], dtype=torch.float64)

    @property
    def num_classes(self) -> int:
        return self.logits.shape[1]

    def lpg_delta(self, **options: object) -> Tensor:
        return lpg.lpg_delta(self.gradient, self.labels, self.signs, self.bounds, **options)

    def members(self) -> list[tuple[int, Tensor]]:
        """Class and rows of every class in the batch."""
        return [(c, self.labels == c) for c in self.labels.unique().tolist() if c != IGNORE_INDEX]


@st.composite
def drawn_batches(draw, min_classes=2, max_classes=7, max_samples=9, scales=(0.03, 1.0, 8.0), signs=(-1.0, 0.0, 1.0)):
    """Batches with absent classes, classes of one sample, ignored samples and bounds from 0 to more than any norm."""
    num_classes = draw(st.integers(min_classes, max_classes))
    labels = draw(st.lists(st.sampled_from([IGNORE_INDEX, *range(num_classes)]), min_size=1, max_size=max_samples))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from(scales))
    bounds = st.sampled_from([0.0, 0.01, 0.1, 0.4, 2.0])
    return DrawnBatch(
        logits=scale * torch.randn(len(labels), num_classes, dtype=torch.float64, generator=generator),
        labels=torch.tensor(labels),
        signs=torch.tensor(
            draw(st.lists(st.sampled_from(signs), min_size=num_classes, max_size=num_classes))
        ).double(),
        bounds=torch.tensor(draw(st.lists(bounds, min_size=num_classes, max_size=num_classes)), dtype=torch.float64),
    )


def random_batch(num_samples: int = 24, num_classes: int = 5, scale: float = 2.0, seed: int = 0) -> DrawnBatch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,), generator=generator)
    labels[::7] = IGNORE_INDEX
    return DrawnBatch(
        logits=scale * torch.randn(num_samples, num_classes, dtype=torch.float64, generator=generator),
        labels=labels,
        signs=torch.tensor([1.0, -1.0]).double().repeat(num_classes)[:num_classes],
        bounds=torch.linspace(0.02, 0.6, num_classes, dtype=torch.float64),
    )


@st.composite
def valid_batches(draw, num_classes=None):
    """Batches without ignored samples, with logits of any size up to 40."""
    if num_classes is None:
        num_classes = draw(st.integers(2, 6))
    labels = draw(st.lists(st.integers(0, num_classes - 1), min_size=1, max_size=6))
    logit = st.floats(-40, 40, width=32)
    rows = [draw(st.lists(logit, min_size=num_classes, max_size=num_classes)) for _ in labels]
    zeros = torch.zeros(num_classes, dtype=torch.float64)
    return DrawnBatch(torch.tensor(rows, dtype=torch.float64), torch.tensor(labels), zeros, zeros)


def positive(num_classes: int, seed: int) -> Tensor:
    """Random positive numbers, one per class."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_classes, dtype=torch.float64, generator=generator) + 1e-3


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def assert_equal(actual: object, expected: object, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=tolerance)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Up to the tolerance, which is absolute below 1 and relative above."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def assert_rows_close(actual: Tensor, expected: object, relative: float, smallest: float = 0.0) -> None:
    """Each row lies within `relative` of the length of the expected one."""
    expected = torch.as_tensor(expected)
    error = (actual.double() - expected).norm(dim=-1)
    assert (error <= relative * expected.norm(dim=-1) + smallest).all(), (error, expected.norm(dim=-1))


def assert_zero_sum_within(delta: Tensor, bound: object) -> None:
    norms = delta.norm(dim=-1)
    assert (norms <= torch.as_tensor(bound, dtype=norms.dtype) * (1 + 1e-9) + 1e-12).all(), (norms, bound)
    assert delta.sum(-1).abs().max() < 1e-12
