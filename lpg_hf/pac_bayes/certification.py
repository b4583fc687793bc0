"""`certify`: from a trained model, its prior and a set of rows to a certificate."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from .bounds import (
    balanced_error_bound,
    clean_error_bound,
    draws_upper_limit,
    error_bound,
    kl_inverse,
    log_xi,
)
from .certificate import Certificate, ErrorBound, ScaleChoice
from .checks import (
    check_draws_suffice,
    check_independent_rows,
    check_label_noise,
    check_same_rows,
    check_settings,
    compare_with_prior,
)
from .gibbs import (
    CERTIFICATION,
    SELECTION,
    WeightNoise,
    count_labels,
    count_wrong,
    evaluating,
    make_loader,
    parameters_in_scope,
    pretrained_model,
)


# Half octaves from 4 down to 1e-4: coarse enough to cost 3.4 nats, fine enough to lose less than that.
DEFAULT_SIGMA_GRID = tuple(4 * 2 ** (-step / 2) for step in range(31))

# Of what one certificate may fail, the part for the certificate set; the rest is for the draws, whose price falls with
# their number.
_SAMPLE_SHARE = 0.8
_NUM_CERTIFICATES = 3


def certify(
    model: nn.Module,
    dataset: Dataset,
    *,
    prior: nn.Module,
    prior_dataset: Dataset | None = None,
    scope: str = "trained",
    sigma_grid: Sequence[float] = DEFAULT_SIGMA_GRID,
    delta: float = 0.05,
    num_draws: int = 1000,
    num_selection_draws: int = 20,
    label_noise: float | None = None,
    data_collator: Callable | None = None,
    batch_size: int = 64,
    seed: int = 0,
    disable_tqdm: bool = False,
) -> Certificate:
    r"""
    Bounds the true error of a trained classifier whose weights carry Gaussian noise, with confidence `1 - delta`.

    The bounds are on the overall error, the error of each class, the mean of the classes' errors, and, for noisy
    labels, the error under the true ones. **All bounds of the returned certificate hold at once** with probability at
    least `1 - delta` over the certificate set and the draws: each of the three certificates (overall with clean, per
    class, balanced) gets a third of `delta`.

    The model may have been trained in any way and on any data, the certificate set included. The prior may not: its
    weights, and everything else that shaped the inputs or the architecture, must not depend on the certificate set.
    See [`split_for_certificate`].

    What makes the numbers true, and is checked: the prior has the same architecture; whatever has no noise, buffers
    (BatchNorm statistics) included, equals the prior's; the rows read the same each time (no augmentation); no row is
    there twice or in `prior_dataset`; the scale is chosen on other draws than those that certify. What is not: that
    the rows are independent draws from what the model will meet; that a prior trained without `prior_dataset` never
    saw them; that nothing else (a normaliser, a vocabulary, `sigma_grid`) was fitted on them; that no other prior or
    seed was tried and dropped (for k of them, pass `delta / k`).

    Args:
        model (`torch.nn.Module`): Trained classifier of `transformers` (or of peft around one) whose forward returns
            logits `[N, C]`. It stays as it is, on its device.
        dataset: The certificate set: map-style, with labels, as for the Trainer's `train_dataset`. Without
            augmentation.
        prior (`torch.nn.Module`): The same architecture with weights that have not seen `dataset`: trained on other
            rows, or a copy of `model` before its training (`copy.deepcopy`).
        prior_dataset (*optional*):
            The rows that the prior was trained on, to check that none of them is in `dataset`. `None` for a prior
            that was trained elsewhere, or not at all.
        scope (`str`, *optional*, defaults to `"trained"`):
            Which parameters get noise: `"trained"` (all that require a gradient), `"head"` (all outside the base
            model) or `"lora"` (adapters of peft, with the modules saved beside them).
        sigma_grid (`Sequence[float]`, *optional*): Standard deviations to choose from, all above 0, fixed before the
            data was seen. Defaults to 31 values from 4 down to 1.2e-4.
        delta (`float`, *optional*, defaults to 0.05): Probability of failure, in (0, 1).
        num_draws (`int`, *optional*, defaults to 1000): Draws of the weights that certify. Each costs one evaluation
            on `dataset` (of the head alone, where only the head is noisy), and the fewer, the larger the correction.
        num_selection_draws (`int`, *optional*, defaults to 20): Draws for each scale of the grid to choose it by.
        label_noise (`float`, *optional*):
            If the labels of `dataset` are noisy: the probability, in [0, (C-1)/C), that a label is not the true one
            but one of the others, each equally likely; or a lower limit of it.
        data_collator (`Callable`, *optional*): As for the Trainer.
            Defaults to [`~transformers.default_data_collator`].
        batch_size (`int`, *optional*, defaults to 64): Rows per forward pass.
        seed (`int`, *optional*, defaults to 0): Of the draws. The same seed gives the same certificate, however many
            processes share the draws.
        disable_tqdm (`bool`, *optional*, defaults to `False`): No progress bars.

    Returns:
        [`Certificate`]: Prints as a table, and saves as JSON.

    Raises:
        ValueError: If an argument is out of range, the prior doesn't fit, something without noise differs from the
            prior's, BatchNorm is in training mode or without running statistics, rows change from one reading to the
            next, are there twice or in `prior_dataset`, or there are fewer draws than the bound can use.

    Example:

    ```python
    >>> import copy, torch
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    >>> model = BertForSequenceClassification(BertConfig(vocab_size=200, **sizes))
    >>> prior = copy.deepcopy(model)  # before `model` is trained
    >>> rows = [{"input_ids": [row], "labels": row % 2} for row in range(200)]
    >>> certificate = certify(model, rows, prior=prior, sigma_grid=[0.1], num_draws=50, disable_tqdm=True)
    >>> certificate.kl, certificate.overall.bound > certificate.overall.error
    (0.0, True)

    ```
    """
    sigma_grid = check_settings(sigma_grid, delta, num_draws, num_selection_draws)
    names = parameters_in_scope(model, scope)
    squared_distance = compare_with_prior(model, prior, names)
    loader = make_loader(model, dataset, data_collator, batch_size)
    noise = WeightNoise(model, names, seed)
    sample_level = _SAMPLE_SHARE * delta / _NUM_CERTIFICATES
    draw_level = (1 - _SAMPLE_SHARE) * delta / _NUM_CERTIFICATES

    with evaluating(model):
        class_counts = count_labels(model, loader)
        check_independent_rows(loader.collate_fn, prior_dataset)
        rows = loader.collate_fn.take_rows()
        num_labels, num_samples = len(class_counts), int(class_counts.sum())
        check_draws_suffice(num_draws, num_labels, draw_level)
        check_label_noise(label_noise, num_labels)

        selection = ()
        if len(sigma_grid) > 1:
            wrong = count_wrong(noise, loader, num_labels, sigma_grid, num_selection_draws, SELECTION, disable_tqdm)
            errors = (wrong.sum(-1) / num_samples).mean(-1).tolist()
            selection = _weigh_scales(sigma_grid, errors, squared_distance, num_samples, sample_level)
            check_same_rows(rows, loader.collate_fn.take_rows())
        sigma = min(selection, key=lambda choice: choice.bound).sigma if selection else sigma_grid[0]

        wrong = count_wrong(noise, loader, num_labels, [sigma], num_draws, CERTIFICATION, disable_tqdm)[0]
        check_same_rows(rows, loader.collate_fn.take_rows())

    kl = squared_distance / (2 * sigma**2)
    counts = class_counts.long().tolist()
    names_of_classes = _label_names(model, num_labels)
    overall = _certify_overall(wrong, num_samples, kl, len(sigma_grid), sample_level, draw_level)
    per_class = tuple(
        _certify_class(wrong[:, label], count, kl, len(sigma_grid) * num_labels, sample_level, draw_level / num_labels)
        for label, count in enumerate(counts)
    )
    return Certificate(
        overall=overall,
        per_class=per_class,
        balanced=_certify_balanced(per_class, kl, len(sigma_grid), sample_level),
        clean=None if label_noise is None else _certify_clean(overall, label_noise, num_labels),
        delta=delta,
        sample_level=sample_level,
        draw_level=draw_level,
        kl=kl,
        distance=math.sqrt(squared_distance),
        sigma=sigma,
        sigma_grid=sigma_grid,
        num_draws=num_draws,
        num_samples=num_samples,
        num_labels=num_labels,
        label_names=names_of_classes,
        scope=scope,
        num_parameters=sum(weight.numel() for weight in noise.weights.values()),
        label_noise=label_noise,
        num_prior_rows=None if prior_dataset is None else len(prior_dataset),
        seed=seed,
        selection=selection,
    )


# From counts to bounds


def _weigh_scales(
    sigma_grid: Sequence[float], errors: Sequence[float], squared_distance: float, num_samples: int, level: float
) -> tuple[ScaleChoice, ...]:
    choices = []
    for sigma, error in zip(sigma_grid, errors, strict=True):
        kl = squared_distance / (2 * sigma**2)
        complexity = (kl + log_xi(num_samples) + math.log(len(sigma_grid) / level)) / num_samples
        choices.append(ScaleChoice(sigma, error, kl, complexity, kl_inverse(error, complexity)))
    return tuple(choices)


def _certify_overall(
    wrong: Tensor, num_samples: int, kl: float, num_events: int, sample_level: float, draw_level: float
) -> ErrorBound:
    errors = (wrong.sum(-1) / num_samples).numpy()
    limit = draws_upper_limit(errors, draw_level)
    return ErrorBound(
        error_bound(limit, kl, num_samples, num_events, sample_level), errors.mean().item(), limit, num_samples
    )


def _certify_class(
    wrong: Tensor, count: int, kl: float, num_events: int, sample_level: float, draw_level: float
) -> ErrorBound:
    if count == 0:
        return ErrorBound(math.nan, math.nan, math.nan, 0, "no sample of this class in the certificate set")
    return _certify_overall(wrong[:, None], count, kl, num_events, sample_level, draw_level)


def _certify_balanced(per_class: Sequence[ErrorBound], kl: float, num_events: int, level: float) -> ErrorBound:
    limits, counts = [entry.error_limit for entry in per_class], [entry.num_samples for entry in per_class]
    joint = balanced_error_bound(limits, counts, kl, num_events, level)
    # The classes' own bounds hold at the same time, so their mean is a bound, too.
    bounds = [1.0 if count == 0 else entry.bound for entry, count in zip(per_class, counts, strict=True)]
    num_empty = counts.count(0)
    return ErrorBound(
        float(min(joint, np.mean(bounds))),
        float(np.mean([entry.error for entry in per_class])),
        float(np.mean(limits)),
        sum(counts),
        f"{num_empty} of {len(counts)} classes have no sample and count with an error of 1" if num_empty else "",
    )


def _certify_clean(overall: ErrorBound, label_noise: float, num_labels: int) -> ErrorBound:
    bound = clean_error_bound(overall.bound, label_noise, num_labels)
    reason = "if labels flip uniformly"
    if overall.bound < label_noise:
        reason = f"the bound on the noisy error is below `label_noise` {label_noise:g}, which therefore is too high"
    elif math.isnan(bound):
        reason = "the bound on the noisy error is above (C-1)/C, where it says nothing about the true labels"
    return ErrorBound(bound, math.nan, math.nan, overall.num_samples, reason)


def _label_names(model: nn.Module, num_labels: int) -> tuple[str, ...]:
    inner = pretrained_model(model)
    names = inner.config.id2label if isinstance(inner, PreTrainedModel) else {}
    return tuple(names.get(label, str(label)) for label in range(num_labels))
