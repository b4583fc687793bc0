"""Formulas that several methods share: ramps, means per class, projections, and seeds."""

import torch
from torch import Tensor
from torch.nn import functional as F


def ramp(value: Tensor, start: float, end: float) -> Tensor:
    """0 at `start` and before, 1 at `end` and behind, linear in between. It falls where `end` is the smaller one."""
    return ((value - start) / (end - start)).clamp(0, 1)


def class_segments(labels: Tensor) -> Tensor:
    """Numbers the classes present 0, 1, ... and returns the number of each sample: `unique` without a wait."""
    ordered, order = labels.sort()
    starts_class = F.pad(ordered[1:] != ordered[:-1], (1, 0))
    return torch.zeros_like(labels).scatter_(0, order, starts_class.cumsum(0))


def per_sample(labels: Tensor, *values: Tensor) -> list[Tensor]:
    """For each tensor `[C]` the entry of every sample's class, `[N]`; 0 for ignored samples."""
    return [torch.where(labels >= 0, value[labels.clamp(min=0)], 0.0) for value in values]


def per_segment(labels: Tensor, segment: Tensor, *values: Tensor) -> list[Tensor]:
    """For each tensor `[C]` the entry of the class of segment s, at position s of `[N]`."""
    return [torch.zeros_like(value).scatter_(0, segment, value) for value in per_sample(labels, *values)]


def segment_means(gradient: Tensor, segment: Tensor) -> Tensor:
    """Mean gradient of segment s in row s of `[N, C]`: a batch of N has at most N classes, however large C is."""
    sums = torch.zeros_like(gradient).index_add_(0, segment, gradient)
    sizes = torch.zeros_like(gradient[:, 0]).index_add_(0, segment, torch.ones_like(gradient[:, 0]))
    return sums.div_(sizes.clamp(min=1)[:, None])


def project_l2_ball(point: Tensor, bound: Tensor) -> Tensor:
    """Nearest point of norm at most `bound`, row by row."""
    return point * (bound / point.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(point.dtype).tiny)).clamp(max=1)


def draw_seed(seed: int, draw: int, process: int = 0) -> int:
    """A different seed for every draw and process, so that a counter is all the state to save."""
    # Odd multipliers: distinct counters stay distinct modulo 2^63.
    return (seed * 0x9E3779B97F4A7C15 + draw * 0xBF58476D1CE4E5B9 + process * 0x94D049BB133111EB) % 2**63
