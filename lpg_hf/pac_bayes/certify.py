"""`certify`: computes a certificate from a trained model, its prior, and a set of rows."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor, nn
from transformers.utils import logging

from ..class_names import find_class_names
from ..weights_hash import weights_hash
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
    check_label_noise,
    check_processes_agree,
    check_settings,
    squared_distance_to_prior,
)
from .drawn_logits import DrawnLogits
from .gibbs import count_errors, evaluation_mode
from .independence import check_independent_rows, check_same_reading
from .loaded_weights import LoadedWeights
from .loading import FingerprintingCollator, MapStyleDataset, count_labels, make_loader
from .prior_function import check_prior_computes_the_same
from .row_mixing import check_rows_do_not_mix
from .scope import find_pretrained_model, parameters_in_scope
from .stale_weights import check_noise_reaches_logits
from .weight_noise import CERTIFICATION, SELECTION, WeightNoise


logger = logging.get_logger(__name__)

# Half octaves from 4 down to 1e-4. The union over the 31 scales costs 3.4 nats, more than a finer grid could save.
DEFAULT_SIGMA_GRID = tuple(4 * 2 ** (-step / 2) for step in range(31))

# The certificate set's share of a certificate's probability of failure. The draws get the rest, whose price falls with
# their number.
_SAMPLE_SHARE = 0.8
_NUM_CERTIFICATES = 3


def certify(
    model: nn.Module,
    dataset: MapStyleDataset,
    *,
    prior: nn.Module,
    prior_dataset: MapStyleDataset | None = None,
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
    Bounds the true error of a trained classifier with Gaussian noise on its weights, with confidence `1 - delta`.

    It bounds the overall error, the error of each class, the mean of the classes' errors, and, for noisy labels, the
    error under the true labels. **All bounds of the returned certificate hold at once** with probability at least
    `1 - delta` over the certificate set and the draws. Each of the three certificates (overall with clean, per class,
    balanced) gets a third of `delta`.

    The model may have been trained in any way and on any data, including the certificate set. The prior may not
    depend on the certificate set, neither by its weights nor by anything else that shaped the inputs or the
    architecture. See [`split_for_certificate`].

    The bounds rest on these conditions, which are checked:

    - The prior has the same architecture, and weights of its own. With the weights of `model`, and with noise on them,
      it predicts the same.
    - Everything without noise, including buffers such as BatchNorm statistics, equals the prior's.
    - The predictions are those of the drawn weights. For every batch, one draw is compared with weights that are
      loaded as from a checkpoint. A module that goes on with values of old weights is refused.
    - Parameters are whole, not shards. All processes that share the draws have the same weights, rows and settings.
    - The logits of a row do not depend on the other rows of its batch (seen on the first batch).
    - A row and a batch read the same each time (no augmentation), and so does a row of `prior_dataset`.
    - No row occurs twice in `dataset`, and none of them is in `prior_dataset`, in whatever container, dtype or
      padding under an attention mask, or under whatever transform of the same stored rows. The collator makes one
      entry of a row. A warning names rows that differ from another one of `dataset`, or from one of the prior's, in
      case and spacing alone, or in rounding, a little noise or zeros at the end of 16 numbers or more.

    The scale is chosen on other draws than the ones that certify. These conditions cannot be checked:

    - The rows are independent draws from the distribution that the model will meet.
    - The prior has seen no other rows than those of `prior_dataset`. As an `eval_dataset`, too, rows are seen:
      [`LPGTrainer`] counts their classes, and early stopping picks by them.
    - A copy of a row that was changed for good (another resolution, a crop, a paraphrase) is not known as one. Nor are
      samples of one source, such as windows of one document, or frames of one video. Rows are compared by all columns
      that the model's `forward` takes, so an identifier among them hides copies.
    - The logits of a row do not depend on how far its batch is padded.
    - No module keeps values of old weights that model and prior share, such as in a global cache of one entry, or
      under `torch.nn.utils.parametrize.cached()`.
    - Nothing else (a normalizer, a vocabulary, `sigma_grid`) was fitted to the rows.
    - No label of the rows was changed, and no row left out, because of what a model says that has seen them.
    - No other certificate (of another model, prior, scope or seed) was computed and dropped. If k were computed, pass
      `delta / k`. The model itself may be stopped, tuned and picked by the rows, before its only certificate.

    A certificate belongs to the weights of `model` as they are, bit for bit, and keeps their hash. Dropout that stays
    active in evaluation mode is part of the certified classifier.

    Args:
        model (`torch.nn.Module`): Trained classifier of `transformers` (or a peft model around one) whose forward
            returns logits `[N, C]`. Draws are loaded into it; at the end it is as before. It stays on its device.
        dataset: The certificate set, a map-style data set with labels and without augmentation, as for the Trainer's
            `train_dataset`.
        prior (`torch.nn.Module`): A model of the same architecture that has not seen `dataset`, either trained on
            other rows or copied from `model` before its training (`copy.deepcopy`).
        prior_dataset (*optional*):
            The rows that the prior was trained on, without augmentation, to check that none of them is in `dataset`.
            They are read twice. `None` for a prior that was trained elsewhere, or not at all.
        scope (`str`, *optional*, defaults to `"trained"`):
            Parameters that get noise: `"trained"` (all that require a gradient), `"head"` (all outside the base
            model) or `"lora"` (adapters of peft, with the modules saved with them).
        sigma_grid (`Sequence[float]`, *optional*): Standard deviations to choose from, all above 0, fixed before the
            data was seen. Defaults to 31 values from 4 down to 1.2e-4.
        delta (`float`, *optional*, defaults to 0.05): Probability of failure, in (0, 1).
        num_draws (`int`, *optional*, defaults to 1000): Draws of the weights that certify. Each draw costs one
            evaluation on `dataset` (of what lies behind the base model if its inputs and weights have no noise). Fewer
            draws loosen the bounds.
        num_selection_draws (`int`, *optional*, defaults to 20): Draws to evaluate each scale of the grid by.
        label_noise (`float`, *optional*):
            For noisy labels in `dataset`, the probability in [0, (C-1)/C) that a label is one of the wrong classes,
            each equally likely; or a lower limit of this probability. A rate above the true one gives a bound that is
            too low.
        data_collator (`Callable`, *optional*): As for the Trainer.
            Defaults to [`~transformers.default_data_collator`].
        batch_size (`int`, *optional*, defaults to 64): Rows per forward pass.
        seed (`int`, *optional*, defaults to 0): Seed of the draws. The same seed gives the same certificate, whatever
            the number of processes that share the draws.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide the progress bars.

    Returns:
        [`Certificate`]: It prints as a table and is saved as JSON.

    Raises:
        ValueError: If an argument is out of range, the prior does not fit, lies in the memory of the model or predicts
            differently, a tensor without noise differs from the prior's, parameters are sharded, BatchNorm is in
            training mode or has no running statistics, the rows of a batch depend on each other, a module keeps values
            of old weights, rows change from one reading to the next, occur twice or in `prior_dataset`, the collator
            repeats them, processes differ, or there are fewer draws than the bound can use.

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
    squared_distance = squared_distance_to_prior(model, prior, names)
    if squared_distance == 0:
        logger.warning(
            "`prior` has the weights of `model`, so the bound pays for no training. It holds only if `model` has "
            "never seen the rows of `dataset`. If it was trained on them, pass a copy from before that training."
        )
    certified_hash = weights_hash(model)
    collator = FingerprintingCollator(model, data_collator)
    loader = make_loader(dataset, collator, batch_size)
    noise = WeightNoise(model, names, seed)
    sample_level = _SAMPLE_SHARE * delta / _NUM_CERTIFICATES
    draw_level = (1 - _SAMPLE_SHARE) * delta / _NUM_CERTIFICATES

    with evaluation_mode(model), LoadedWeights(model, noise.weights) as loaded:
        class_counts, inputs = count_labels(model, loader)
        num_near_copies = check_independent_rows(collator, dataset, prior_dataset)
        reading = collator.take_reading()
        settings = (scope, sigma_grid, num_draws, num_selection_draws, batch_size, seed)
        check_processes_agree(certified_hash, weights_hash(prior), reading, settings)
        num_labels, num_samples = len(class_counts), int(class_counts.sum())
        check_draws_suffice(num_draws, num_labels, draw_level)
        check_label_noise(label_noise, num_labels)
        check_rows_do_not_mix(model, inputs)
        check_noise_reaches_logits(noise, loaded, inputs)
        check_prior_computes_the_same(noise, loaded, prior, inputs)
        drawn = DrawnLogits(noise, loaded)

        selection: tuple[ScaleChoice, ...] = ()
        if len(sigma_grid) > 1:
            errors = count_errors(drawn, loader, num_labels, sigma_grid, num_selection_draws, SELECTION, disable_tqdm)
            rates = (errors.sum(-1) / num_samples).mean(-1).tolist()
            selection = _evaluate_scales(sigma_grid, rates, squared_distance, num_samples, sample_level)
            check_same_reading(reading, collator.take_reading())
        sigma = min(selection, key=lambda choice: choice.bound).sigma if selection else sigma_grid[0]

        errors = count_errors(drawn, loader, num_labels, [sigma], num_draws, CERTIFICATION, disable_tqdm)[0]
        check_same_reading(reading, collator.take_reading())

    kl = squared_distance / (2 * sigma**2)
    counts = class_counts.long().tolist()
    num_scales = len(sigma_grid)
    overall = _certify_overall(errors, num_samples, kl, num_scales, sample_level, draw_level)
    per_class = tuple(
        _certify_class(errors[:, label], count, kl, num_scales * num_labels, sample_level, draw_level / num_labels)
        for label, count in enumerate(counts)
    )
    return Certificate(
        overall=overall,
        per_class=per_class,
        balanced=_certify_balanced(per_class, kl, num_scales, sample_level),
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
        label_names=tuple(find_class_names(num_labels, dataset, find_pretrained_model(model))),
        scope=scope,
        num_parameters=sum(weight.numel() for weight in noise.weights.values()),
        label_noise=label_noise,
        num_prior_rows=None if prior_dataset is None else len(prior_dataset),
        seed=seed,
        selection=selection,
        num_near_copies=num_near_copies,
        weights_hash=certified_hash,
    )


# From counts to bounds


def _evaluate_scales(
    sigma_grid: Sequence[float], rates: Sequence[float], squared_distance: float, num_samples: int, level: float
) -> tuple[ScaleChoice, ...]:
    choices = []
    for sigma, error in zip(sigma_grid, rates, strict=True):
        kl = squared_distance / (2 * sigma**2)
        complexity = (kl + log_xi(num_samples) + math.log(len(sigma_grid) / level)) / num_samples
        choices.append(ScaleChoice(sigma, error, kl, complexity, kl_inverse(error, complexity)))
    return tuple(choices)


def _certify_overall(
    errors: Tensor, num_samples: int, kl: float, num_events: int, sample_level: float, draw_level: float
) -> ErrorBound:
    rates = (errors.sum(-1) / num_samples).numpy()
    limit = float(draws_upper_limit(rates, draw_level))
    return ErrorBound(
        error_bound(limit, kl, num_samples, num_events, sample_level), rates.mean().item(), limit, num_samples
    )


def _certify_class(
    errors: Tensor, count: int, kl: float, num_events: int, sample_level: float, draw_level: float
) -> ErrorBound:
    if count == 0:
        return ErrorBound(math.nan, math.nan, math.nan, 0, "no sample of this class in the certificate set")
    return _certify_overall(errors[:, None], count, kl, num_events, sample_level, draw_level)


def _certify_balanced(per_class: Sequence[ErrorBound], kl: float, num_events: int, level: float) -> ErrorBound:
    limits, counts = [entry.error_limit for entry in per_class], [entry.num_samples for entry in per_class]
    joint = balanced_error_bound(limits, counts, kl, num_events, level)
    # The classes' own bounds hold at the same time, so their mean is also a bound.
    bounds = [1.0 if count == 0 else entry.bound for entry, count in zip(per_class, counts, strict=True)]
    num_empty = counts.count(0)
    return ErrorBound(
        min(joint, float(np.mean(bounds))),
        float(np.mean([entry.error for entry in per_class])),
        float(np.mean(limits)),
        sum(counts),
        f"{num_empty} of {len(counts)} classes have no sample and count with an error of 1" if num_empty else "",
    )


def _certify_clean(overall: ErrorBound, label_noise: float, num_labels: int) -> ErrorBound:
    bound = clean_error_bound(overall.bound, label_noise, num_labels)
    reason = "if labels flip uniformly"
    if overall.bound < label_noise:
        reason = f"the bound on the noisy error is below `label_noise` {label_noise:g}, so this rate is too high"
    elif math.isnan(bound):
        reason = "the bound on the noisy error is above (C-1)/C, so it says nothing about the true labels"
    return ErrorBound(bound, math.nan, math.nan, overall.num_samples, reason)
