"""ImbalanceWatch: does training meet the imbalance that was counted, and is it corrected already?"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from scipy.stats import chi2
from torch import Tensor

from ..batch import LogitBatch


# Labels are compared after this many samples, and again after the first epoch.
WINDOW = 512
# Shares differ if their total variation is larger, and chance would do as much once in a million runs at most.
MIN_DISTANCE = 0.1
SIGNIFICANCE = 1e-6
# A loss corrects the imbalance if the pull of a class grows with this power of its rarity (balanced weights have 1),
# or if it adds this multiple of the logarithms of the class shares to the logits (balanced softmax has 1). Below it
# `auto` keeps its own correction, because belief is judged as if a loss that corrects did all of it.
MIN_POWER = 0.15
MIN_OFFSET = 0.7

UNDECIDED, NO, YES = range(3)


class ImbalanceWatch:
    """
    Watches the first batches of a training for an imbalance that is corrected outside of the chain.

    A weighted sampler, a transform that renumbers labels, or a collator that takes another column changes the labels
    that training meets. A `compute_loss_func` may weight classes. In both cases `auto` would correct twice.

    Args:
        counted (`Sequence[int]`, *optional*):
            The class counts that were read from the data set; `None` if there is nothing to compare with.
        has_custom_loss (`bool`): Whether the loss comes from the user.

    Attributes:
        counted (`Sequence[int]` or `None`): As given.
        found (`list[int]` or `None`): The counts to use where training meets other labels.
        begins_anew (`bool`): Whether a checkpoint was loaded that was written on labels of other counts.
    """

    def __init__(self, counted: Sequence[int] | None, has_custom_loss: bool):
        self.counted = counted
        # The counts that are used where training meets other labels.
        self.found: list[int] | None = None
        self.begins_anew = False
        # Whether other labels are met, whether the loss corrects the imbalance, and whether an epoch has been judged.
        self._verdicts = [UNDECIDED, UNDECIDED if has_custom_loss else NO, NO]
        # The optimizer step at which it began to look at labels; -1 before.
        self._start = -1
        # Products of the variables of the fit, summed over samples: 1, rarity, log(1 - p_y), log of the relative pull.
        self._moments = torch.zeros(4, 4, dtype=torch.float64)
        # The same for the classes besides the label, within each sample: log share, log p, log of the relative pull.
        self._offset_moments = torch.zeros(3, 3, dtype=torch.float64)

    @property
    def met_other_labels(self) -> bool:
        """Whether training meets other labels than the data set has."""
        return self._verdicts[0] == YES

    @property
    def loss_corrects(self) -> bool:
        """Whether the user's loss corrects the imbalance. Until the first batches have shown it, it counts as such."""
        return self._verdicts[1] != NO

    @property
    def watches_loss(self) -> bool:
        """Whether the user's loss is still to be judged."""
        return self._verdicts[1] == UNDECIDED

    def begin(self, step: int) -> None:
        """Begins to watch with optimizer step `step`, unless a checkpoint has told when the watch began."""
        if self._start < 0:
            self._start = step

    def is_due(self, step: int, step_size: int, epoch: float) -> bool:
        """
        Whether something is to be judged now: after the first samples, and after the first epoch.

        Args:
            step (`int`): Optimizer steps before the present one.
            step_size (`int`): Samples of a step, by the settings of the training.
            epoch (`float`): Epochs before the present step.
        """
        if self._start < 0:
            return False
        is_window = (step - self._start) * step_size >= WINDOW
        window = is_window and (self.watches_loss or self._verdicts[0] == UNDECIDED)
        return window or (epoch >= 1 and self._verdicts[2] == NO)

    def add_pulls(self, batch: LogitBatch, gradient: Tensor, log_rarity: Tensor) -> None:
        """
        Adds a micro-batch to the two fits of [`ImbalanceWatch.judge_loss`].

        Args:
            batch ([`LogitBatch`]): The micro-batch.
            gradient (`torch.Tensor` of shape `[N, C]`): The gradient of the user's loss at the logits, in any unit.
            log_rarity (`torch.Tensor` of shape `[C]`): Minus the logarithm of the class shares, up to a constant.
        """
        plain = 1 - batch.label_prob.double()
        custom = -gradient.double().gather(-1, batch.classes[:, None])[:, 0]
        # Samples that the model fits pull too little to be compared.
        counts = batch.valid_mask & (plain > 0.1) & (custom > 0)
        plain, custom = torch.where(counts, plain, 1.0), torch.where(counts, custom, 1.0)
        rarity = log_rarity.to(plain)[batch.classes]
        rows = torch.stack([torch.ones_like(plain), rarity, plain.log(), (custom / plain).log()]) * counts
        self._moments = self._moments.to(rows.device) + rows @ rows.T
        self._add_offsets(batch, gradient.double(), log_rarity)

    def _add_offsets(self, batch: LogitBatch, gradient: Tensor, log_rarity: Tensor) -> None:
        log_prob = batch.logits.double().log_softmax(-1)
        counts = batch.valid_mask[:, None] & (gradient > 0) & gradient.isfinite() & log_prob.isfinite()
        counts = counts.scatter(-1, batch.classes[:, None], False)
        log_prob = torch.where(counts, log_prob, 0.0)
        pull = torch.where(counts, gradient, 1.0).log() - log_prob
        columns = torch.stack([-log_rarity.to(pull).expand_as(pull), log_prob, pull])
        # The weight and the unit of a sample are its mean, and fall out.
        means = (columns * counts).sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp(min=1)
        centered = ((columns - means) * counts).flatten(1)
        self._offset_moments = self._offset_moments.to(centered.device) + centered @ centered.T

    def judge_loss(self, accelerator: Accelerator) -> bool:
        """
        Decides whether the user's loss corrects the imbalance. All processes must call it.

        The pull of a sample on the logit of its label, relative to cross-entropy, is fitted by a power of the rarity
        of its class and a power of `1 - p_y`. Cross-entropy, label smoothing and focal loss have a power of rarity
        near 0, and balanced class weights have 1.

        An offset of the logits shows in the other classes: cross-entropy at `z + a` pulls class j by `p_j exp(a_j)`,
        up to a factor of the sample. This pull, relative to `p_j`, is fitted by powers of the class share and of
        `p_j`. Balanced softmax has 1 and 0, and losses without an offset have 0 and some power of `p_j`.

        Args:
            accelerator (`accelerate.Accelerator`): The accelerator of the training.
        """
        _, power, _ = _fit(self._moments, accelerator)
        offset, _ = _fit(self._offset_moments, accelerator)
        self._verdicts[1] = YES if power > MIN_POWER or offset > MIN_OFFSET else NO
        return self.loss_corrects

    def judge_labels(self, seen: Sequence[int], is_epoch: bool) -> bool:
        """
        Decides whether training meets other labels than the data set has.

        Args:
            seen (`Sequence[int]`): Samples of each class that training has met.
            is_epoch (`bool`): Whether these are a whole epoch, and not its beginning.

        Returns:
            `bool`: Whether the shares differ.
        """
        differ = self.counted is not None and shares_differ(seen, self.counted, is_epoch)
        # A class that was not met yet counts once.
        pairs = zip(seen, self.counted or [], strict=False)
        self.found = [met or int(count > 0) for met, count in pairs] if differ else None
        self._verdicts[0] = YES if differ else NO
        self._verdicts[2] = YES if is_epoch else NO
        return differ

    def state_dict(self) -> dict[str, Tensor]:
        """The verdicts, for a checkpoint."""
        counts = {"counted": self.counted or [], "found": self.found or []}
        tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in counts.items()}
        return tensors | {"verdicts": torch.tensor(self._verdicts), "start": torch.tensor(self._start)}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """
        Restores the verdicts. On labels of other counts the labels are judged anew, from the first samples on.

        Raises:
            ValueError: If the state is not one of [`~ImbalanceWatch.state_dict`].
        """
        _check_state(tensors)
        verdicts = tensors["verdicts"].tolist()
        if tensors["counted"].tolist() == list(self.counted or []):
            self._verdicts, self.found = verdicts, tensors["found"].tolist() or None
            self._start = int(tensors["start"])
        else:
            self._verdicts, self.begins_anew = [UNDECIDED, verdicts[1], YES], True


def _fit(moments: Tensor, accelerator: Accelerator) -> list[float]:
    """Coefficients of a linear fit of the last variable by the others, from the products of all processes."""
    products = accelerator.reduce(moments.to(accelerator.device), "sum").cpu().numpy()
    ridge = 1e-6 * np.eye(len(products) - 1)
    return np.linalg.lstsq(products[:-1, :-1] + ridge, products[:-1, -1], rcond=None)[0].tolist()


def _check_state(tensors: Mapping[str, Tensor]) -> None:
    names = ("counted", "found", "verdicts", "start")
    if set(tensors) != set(names) or any(tensor.dtype != torch.int64 for tensor in tensors.values()):
        raise ValueError(f"it must have the integers {', '.join(names)}; found {', '.join(tensors)}")
    counted, found, verdicts, start = (tensors[name].tolist() for name in names)
    is_count = all(isinstance(counts, list) and all(count >= 0 for count in counts) for counts in (counted, found))
    is_found = is_count and len(found) in (0, len(counted))
    if not is_found or not isinstance(start, int) or start < -1:
        raise ValueError(f"counts {counted} and {found} or the start {start} are out of range")
    if not isinstance(verdicts, list) or len(verdicts) != 3 or not set(verdicts) <= {UNDECIDED, NO, YES}:
        raise ValueError(f"the verdicts must be 3 numbers from 0 to 2; found {verdicts}")


def shares_differ(seen: Sequence[int], counted: Sequence[int], is_epoch: bool) -> bool:
    """
    Whether samples come from another distribution of classes than the one that was counted.

    The likelihood-ratio test, and a smallest distance. Before the end of an epoch the samples may be in an order: if a
    class that should have been met is missing, the question is left to the end of the epoch.

    Args:
        seen (`Sequence[int]`): Samples of each class that training has met.
        counted (`Sequence[int]`): Samples of each class in the data set.
        is_epoch (`bool`): Whether `seen` is a whole epoch.

    Example:

    ```python
    >>> shares_differ([260, 252], [1000, 50], is_epoch=False), shares_differ([490, 22], [1000, 50], is_epoch=False)
    (True, False)
    >>> shares_differ([512, 0], [1000, 1000], is_epoch=False)  # sorted, as it seems
    False

    ```
    """
    observed, shares = np.asarray(seen, dtype=np.float64), np.asarray(counted, dtype=np.float64)
    shares = shares / shares.sum()
    expected = observed.sum() * shares
    if not is_epoch and ((expected >= 10) & (observed == 0)).any():
        return False
    distance = np.abs(observed - expected).sum() / (2 * max(observed.sum(), 1.0))
    if distance <= MIN_DISTANCE:
        return False
    present = observed > 0
    # A class that should not exist has a share of nearly zero here, not a division by zero.
    ratio = observed[present] / np.maximum(expected[present], 1e-9)
    statistic = 2 * (observed[present] * np.log(ratio)).sum()
    return bool(statistic > chi2.isf(SIGNIFICANCE, max((shares > 0).sum() - 1, 1)))


def describe_difference(seen: Sequence[int], counted: Sequence[int]) -> str:
    """The warning that training meets other labels than the data set has."""
    shares = [[count / sum(counts) for count in counts] for counts in (seen, counted)]
    gaps = [abs(met - told) for met, told in zip(*shares, strict=True)]
    label = gaps.index(max(gaps))
    return (
        f"Training meets other labels than the label column of `train_dataset` has: class {label} makes "
        f"{shares[0][label]:.1%} of the samples instead of {shares[1][label]:.1%}. A sampler, a transform or the "
        "collator changes them. From here on the perturbations use the shares that training meets. To set them "
        "yourself, pass `class_counts`."
    )
