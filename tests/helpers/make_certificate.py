"""Certificates with made-up numbers."""

import dataclasses
from pathlib import Path

from torch import nn

from lpg_hf.pac_bayes import Certificate, ErrorBound
from lpg_hf.weights_hash import weights_hash


def make_certificate(model: nn.Module, **changes) -> Certificate:
    """A certificate for the weights of a model, with two classes."""
    bound = ErrorBound(bound=0.25, error=0.125, error_limit=0.15, num_samples=80)
    certificate = Certificate(
        overall=bound,
        per_class=(bound, bound),
        balanced=bound,
        clean=None,
        delta=0.05,
        sample_level=0.01,
        draw_level=0.0025,
        kl=1.5,
        distance=0.5,
        sigma=0.25,
        sigma_grid=(0.25,),
        num_draws=100,
        num_samples=160,
        num_labels=2,
        label_names=("no", "yes"),
        scope="trained",
        num_parameters=10,
        label_noise=None,
        num_prior_rows=None,
        seed=0,
        selection=(),
        weights_hash=weights_hash(model),
    )
    return dataclasses.replace(certificate, **changes)


def write_certificate(path: Path, model: nn.Module, **changes) -> None:
    make_certificate(model, **changes).save(path)
