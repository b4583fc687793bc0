"""The picture of all methods: it shows each one, and the arrows are those of the formulas."""

import gradient_field
import numpy as np
import pytest
import reference
import torch

from lpg_hf.perturbations import METHODS, ClassRelativeDampening, LogitClipping


def test_the_picture_shows_every_method(tmp_path, monkeypatch):
    path = tmp_path / "field.png"
    monkeypatch.setattr("sys.argv", ["gradient_field.py", "--points", "3", "--output_file", str(path)])
    titles = []
    draw = gradient_field.draw
    monkeypatch.setattr(
        gradient_field, "draw", lambda axes, title, *rest: (titles.append(title), draw(axes, title, *rest))
    )
    gradient_field.main()
    assert path.stat().st_size > 10_000
    assert titles == [title for title, _ in gradient_field.METHODS]
    assert {method.name for _, method in gradient_field.METHODS} == set(METHODS)


@pytest.mark.parametrize("bound", [0.2, 0.8])
def test_an_arrow_is_the_perturbed_gradient(bound):
    logits, labels = gradient_field.simplex_grid(4).log(), torch.zeros(10, dtype=torch.int64)
    gradient = reference.logit_gradient(logits.numpy(), labels.tolist())
    expected = gradient + reference.clip_delta(gradient, bound)
    perturbed = gradient_field.perturbed_gradient(LogitClipping(bound), logits, labels)
    np.testing.assert_allclose(perturbed.numpy(), expected, rtol=0, atol=1e-12)


def test_the_arrows_of_the_dampening_are_shorter_where_the_label_is_contradicted():
    """By the formula with open gates."""
    logits, labels = gradient_field.simplex_grid(4).log(), torch.zeros(10, dtype=torch.int64)
    gradient = reference.logit_gradient(logits.numpy(), labels.tolist())
    statistics = gradient_field.trained_statistics()
    means = (statistics.last_label_prob, statistics.confidence_ratio, statistics.decidedness)
    means = [tensor.tolist() for tensor in (*means, statistics.noise_evidence, statistics.memorizing)]
    weight = reference.dampening_weight(logits.numpy(), labels.tolist(), *means)
    perturbed = gradient_field.perturbed_gradient(ClassRelativeDampening(), logits, labels)
    np.testing.assert_allclose(perturbed.numpy(), weight[:, None] * gradient, rtol=0, atol=1e-9)
    assert weight.min() < 0.3 and weight.max() == 1
