"""LPGLoss: a base loss whose gradient at the logits is perturbed by a chain of methods."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .batch import IGNORE_INDEX, Batch, cross_entropy
from .functional import zero_ignored_
from .perturbations import LogitPerturbation, Perturbation, Rescaling, build_chain
from .perturbations.base import check_shape
from .statistics import ClassStatistics


class LPGLoss(nn.Module):
    r"""
    Cross-entropy (or another loss) with the value left as it is and the logit gradient perturbed by a chain of
    methods.

    With `g_i` the gradient of sample i's loss at its logits, `.backward()` sends exactly
    `g_i + delta_1 + delta_2 + ...` into the model, divided like the loss. Each method gets the gradient that the one
    before left, always in per-sample units. Nothing is perturbed in `eval()` mode or without gradients.

    It works in any PyTorch loop, as `compute_loss_func` of the plain `Trainer`, and inside [`LPGTrainer`].

    Args:
        num_labels (`int`): Number of classes C.
        perturbations (`str`, [`LogitPerturbation`] or a sequence of them, *optional*, defaults to `"auto"`):
            The chain, as objects (which are copied) or strings; `[]` for none. `"auto"` looks at `class_counts`.
        class_counts (`Sequence[int]`, *optional*):
            Training samples of each class. Without them the samples seen are counted.
        base_loss (`Callable[[Tensor, Tensor], Tensor]`, *optional*):
            Maps logits `[N, C]` and labels `[N]` to one loss per sample, `[N]`; cross-entropy when left out.

    Attributes:
        statistics ([`ClassStatistics`]): What training has seen of each class.
        fold_every_call (`bool`):
            Whether each call is a whole optimizer step for the statistics. [`LPGTrainer`] sets it to `False` and folds
            once per step, over all micro-batches and processes.
        observer (`Callable[[Tensor], None]` or `None`):
            Is handed the sum of all deltas, `[N, C]` in per-sample units, whenever there is one.

    Raises:
        ValueError: If `num_labels` is below 2, a perturbation is unknown, or `class_counts` doesn't fit.

    Example:

    ```python
    >>> import torch
    >>> loss_fn = LPGLoss(num_labels=3, perturbations="logit_clipping(max_norm=0.5)")
    >>> logits = torch.tensor([[4.0, 0.0, 0.0]], requires_grad=True)
    >>> loss = loss_fn(logits, torch.tensor([1]))
    >>> loss.backward()
    >>> loss  # cross-entropy
    tensor(4.0360, grad_fn=<DivBackward0>)
    >>> logits.grad.norm()
    tensor(0.5000)

    ```
    """

    def __init__(
        self,
        num_labels: int,
        perturbations: str | LogitPerturbation | Sequence[str | LogitPerturbation] = "auto",
        class_counts: Sequence[int] | None = None,
        base_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        if num_labels < 2:
            raise ValueError(f"`num_labels` must be at least 2; found {num_labels}.")
        self.statistics = ClassStatistics(num_labels, class_counts)
        # Copies: the state of a method belongs to one loss.
        self.perturbations = nn.ModuleList(copy.deepcopy(build_chain(perturbations, class_counts)))
        for method in self.perturbations:
            if not isinstance(method, LogitPerturbation):
                raise ValueError(
                    f"`{method!r}` perturbs the gradient of the parameters, which a loss does not see: hand it to "
                    "`LPGTrainer(perturbations=...)`."
                )
            method.setup(num_labels)
        self.base_loss = base_loss
        self.fold_every_call = True
        self.observer = None
        self._is_frozen = False
        # Sums since the last report. Row 0: samples, norm of g; a row per method: norm of its delta, weight; last row:
        # the number of steps before the first one with values that are not finite.
        self.register_buffer("_telemetry", torch.zeros(len(self.perturbations) + 2, 2), persistent=False)
        self._clear_telemetry()

    @property
    def num_labels(self) -> int:
        return self.statistics.num_labels

    def forward(
        self,
        outputs: Tensor | Mapping | tuple,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        model_loss: Tensor | None = None,
    ) -> Tensor:
        """
        The loss of one micro-batch.

        Args:
            outputs (`torch.Tensor`, `ModelOutput` or `tuple`):
                Logits `[N, C]`, or a model's output that has them under `logits` or as its first item.
            labels (`torch.Tensor` of shape `[N]` or `[N, 1]`): Class indices; -100 for samples to ignore.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                What the summed loss is divided by; the labelled samples of this micro-batch when left out.
            model_loss (`torch.Tensor`, *optional*):
                The same loss as the model computed it, divided in the same way. It keeps its gradient, terms that the
                model adds to cross-entropy included, and the deltas join it. Without a labeled sample it counts as 0.

        Returns:
            `torch.Tensor`: The base loss, a scalar in float32 or float64.

        Raises:
            ValueError: If logits and labels don't fit together or a label is out of range.
        """
        logits, labels = self._check(logits_of(outputs), labels)
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        count = (labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        # A step without a labelled sample has loss and gradient zero, and not 0 / 0.
        divisor = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)

        perturbs = self.training and torch.is_grad_enabled() and logits.requires_grad and len(self.perturbations) > 0
        if model_loss is not None:
            # The mean over no sample is NaN.
            model_loss = torch.where((labels != IGNORE_INDEX).any(), model_loss.to(z.dtype), 0.0)
        if not perturbs:
            return self._values(z, labels).sum() / divisor if model_loss is None else model_loss

        if self.base_loss is None:
            z = z.detach()
            batch = Batch(z, labels)
            self.statistics.share(batch)
            perturbed = self.perturb(batch.gradient, z, labels)
            if model_loss is None:
                # Divided last, where it costs no pass over the matrix.
                return add_gradient(-batch.own_log_probability.sum(), logits, perturbed) / divisor
            return add_gradient(model_loss, logits, (perturbed - batch.gradient).div_(divisor))

        # The base loss keeps its own graph (it may have parameters), the delta joins it at the logits.
        values = self._values(z, labels)
        (gradient,) = torch.autograd.grad(values.sum(), z, retain_graph=True)
        # Where a loss over the whole batch reaches ignored samples, its gradient there is no method's business.
        gradient = zero_ignored_(gradient.clone(memory_format=torch.contiguous_format), labels)
        delta = self.perturb(gradient, z.detach(), labels) - gradient
        return add_gradient(values.sum() / divisor, logits, delta / divisor)

    @torch.no_grad()
    def perturb(self, gradient: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """
        Runs the chain on the logit gradient of a micro-batch and updates statistics and telemetry.

        Args:
            gradient (`torch.Tensor` of shape `[N, C]`):
                Of the base loss, in per-sample units; zero for ignored samples.
            logits (`torch.Tensor` of shape `[N, C]`): The model's own, detached, float32 or float64.
            labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.

        Returns:
            `torch.Tensor` of shape `[N, C]`: The perturbed gradient.
        """
        self._match(logits)
        batch = self.statistics.batch(logits, labels)
        self.statistics.share(batch)
        try:
            perturbed, rows = self._run_chain(gradient, logits, labels)
            if not self._is_frozen:
                # Nothing that is said of ignored samples counts.
                self._record(torch.stack(rows).masked_fill_(batch.ignored, 0.0))
                self.statistics.update(logits, labels)
                if self.fold_every_call:
                    self.fold()
        finally:
            self.statistics.share(None)
        if self.observer is not None:
            self.observer(perturbed - gradient)
        return perturbed

    def _run_chain(self, unperturbed: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The perturbed gradient, and for telemetry a pair of `[N]` for the gradient and for each method."""
        gradient = unperturbed
        batch = self.statistics.batch(logits, labels)
        norm = base_norm = gradient.norm(dim=-1)
        rows = [batch.labelled, norm]
        for method in self.perturbations:
            if not self._is_frozen:
                method.update(gradient, labels)
            # The first gradient is not ours to change, those after it are: new memory costs more than the arithmetic.
            in_place = gradient is not unperturbed
            if isinstance(method, Rescaling):
                weight = method.weight(gradient, logits, labels, self.statistics)
                check_shape(method, "weight", weight, gradient, base_norm.shape)
                # The gradient of ignored samples stays zero, whatever is said of them.
                weight = method.last_weight = weight.to(base_norm.dtype).masked_fill(batch.ignored, 1.0)
                norm = gradient.norm(dim=-1) if norm is None else norm
                rows += [(weight - 1).abs() * norm, weight]
                gradient = (gradient.mul_ if in_place else gradient.mul)(weight[:, None])
            else:
                gradient, delta_norm = method.add_delta(gradient, logits, labels, self.statistics, in_place)
                check_shape(method, "norm", delta_norm, gradient, base_norm.shape)
                # The second is only read where it is a weight.
                rows += [delta_norm] * 2
            norm = None
        return gradient, rows

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within it the loss perturbs but learns nothing: for a second look at the same batch, as in SAM."""
        self._is_frozen = True
        try:
            yield
        finally:
            self._is_frozen = False

    def fold(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """
        Ends an optimizer step: what its micro-batches added up moves the statistics and the methods that learn.

        Args:
            reduce (`Callable`, *optional*): Sums a tensor over processes.
        """
        self.statistics.fold(reduce)
        for method in self.perturbations:
            method.fold(reduce)

    def telemetry(self, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """
        Means over the samples since the last call, which is the one place where values travel to the host.

        Args:
            gather (`Callable`, *optional*): Stacks a tensor of every process along a new leading axis.

        Returns:
            `dict[str, float]`: Mean norm of the base gradient, and for each method the mean norm of its delta, its
            ratio to the norm of the base gradient, and the mean weight where the method only rescales; running
            training accuracy of the larger and the smaller third of the classes. Empty if there was no sample.

        Raises:
            FloatingPointError: If a logit gradient was not finite; the message names the first step.
        """
        stacked = self._telemetry[None] if gather is None else gather(self._telemetry)
        stacked = stacked.tolist()
        self._clear_telemetry()

        bad_step = min(rows[-1][0] for rows in stacked)
        if bad_step < math.inf:
            raise FloatingPointError(
                f"The logits of step {int(bad_step) + 1}, or the gradient that loss and methods make of them, were "
                "not finite (NaN or infinite). Lower the learning rate, clip gradients, or look for bad values in the "
                "inputs of that step."
            )
        sums = [[sum(values) for values in zip(*rows, strict=True)] for rows in zip(*stacked, strict=True)]
        samples, norm = sums[0]
        if samples == 0:
            return {}
        report = {"lpg/gradient_norm": norm / samples}
        names = numbered_names(self.perturbations)
        for name, method, (delta_norm, weight) in zip(names, self.perturbations, sums[1:-1], strict=True):
            report[f"lpg/{name}/delta_norm"] = delta_norm / samples
            report[f"lpg/{name}/delta_ratio"] = delta_norm / norm if norm > 0 else 0.0
            if isinstance(method, Rescaling):
                report[f"lpg/{name}/weight"] = weight / samples
        return report | self._head_and_tail_accuracy()

    def _check(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if logits.ndim != 2 or logits.shape[1] != self.num_labels or labels.numel() != len(logits):
            raise ValueError(
                f"`logits` must be [N, {self.num_labels}] and `labels` [N] or [N, 1]; found shapes "
                f"{list(logits.shape)} and {list(labels.shape)}. `num_labels` counts the model's logits per sample."
            )
        if labels.is_floating_point():
            raise ValueError(f"`labels` must be integer class indices; found {labels.dtype}.")
        return logits, labels.reshape(-1).long()

    def _values(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Base loss of each sample, `[N]`; 0 for ignored ones."""
        if self.base_loss is None:
            return cross_entropy(logits, labels)
        labelled = labels != IGNORE_INDEX
        values = self.base_loss(logits, torch.where(labelled, labels, 0))
        if values.shape != labels.shape:
            raise ValueError(
                f"`base_loss` must return one loss per sample, shape {list(labels.shape)}; found "
                f"{list(values.shape)}. Use reduction='none'."
            )
        return torch.where(labelled, values, 0.0)

    def _match(self, logits: Tensor) -> None:
        """Moves the state to the device of the logits, and to float64 where they are."""
        state = self._telemetry
        dtype = torch.promote_types(logits.dtype, state.dtype)
        if state.device != logits.device or state.dtype != dtype:
            # Not the base loss, which is the user's.
            for module in (self.statistics, self.perturbations):
                module.to(device=logits.device, dtype=dtype)
            self._telemetry = state.to(device=logits.device, dtype=dtype)

    def _clear_telemetry(self) -> None:
        self._telemetry.zero_()[-1] = torch.inf

    def _record(self, rows: Tensor) -> None:
        """Adds a micro-batch to the telemetry: a pair of rows `[N]` for g and for each method."""
        sums = rows.sum(-1)
        self._telemetry[:-1].add_(sums.view(-1, 2))
        # The sums of the norms are finite if and only if all gradients are (unless they are too large to sum up).
        total = sums.sum()
        is_finite = total - total == 0
        self._telemetry[-1, 0].clamp_(max=self.statistics.steps.to(total.dtype).masked_fill(is_finite, torch.inf))

    def _head_and_tail_accuracy(self) -> dict[str, float]:
        counts = self.statistics.class_counts.tolist()
        accuracy = self.statistics.accuracy.tolist()
        present = sorted((label for label, count in enumerate(counts) if count > 0), key=lambda label: -counts[label])
        third = max(len(present) // 3, 1)
        groups = {"head": present[:third], "tail": present[-third:]}
        return {f"lpg/{name}_accuracy": sum(accuracy[c] for c in group) / third for name, group in groups.items()}


def logits_of(outputs: Tensor | Mapping | tuple) -> Tensor:
    """The logits among a model's outputs: the tensor itself, the entry `logits`, or the first item of a tuple."""
    if isinstance(outputs, Tensor):
        return outputs
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]


def numbered_names(methods: Iterable[Perturbation]) -> list[str]:
    """A name for each method of a chain, with a number where one occurs again."""
    names = [method.name for method in methods]
    return [
        name if names.index(name) == position else f"{name}_{names[: position + 1].count(name)}"
        for position, name in enumerate(names)
    ]


def add_gradient(value: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
    """A scalar worth `value`, with its gradient, and a constant `gradient` at `logits` on top of that."""
    return _AddGradient.apply(logits, value, gradient)


class _AddGradient(torch.autograd.Function):
    # Half the time of the straight-through form `value + (g * (z - z.detach())).sum()` for [1024, 1000] and larger,
    # and free of its rounding error in the value.

    @staticmethod
    def forward(ctx, logits: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.logits_dtype = logits.dtype
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (grad_output * gradient).to(ctx.logits_dtype), grad_output, None
