"""LPGLoss: a base loss whose gradient at the logits is perturbed by a chain of methods."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from .added_gradient import add_gradient
from .batch import IGNORE_INDEX, LogitBatch, cross_entropy, logits_of, stack_rows, summed_cross_entropy, zero_ignored_
from .chain import last_weights, reweighting_methods, run_chain
from .input_checks import check_inputs, divisor_of
from .loss_graphs import LossGraphs
from .perturbations import LogitPerturbation, build_chain
from .perturbations.base import uncompensated_weight
from .statistics import ClassStatistics
from .telemetry import Telemetry, head_and_tail_accuracy, mean_norms_and_weights


#: Sees the sum of all deltas of a micro-batch, `[N, C]` in per-sample units.
DeltaObserver = Callable[[Tensor], None]


class LPGLoss(nn.Module):
    r"""
    Cross-entropy (or another loss) whose value stays as it is, and whose logit gradient is perturbed by a chain of
    methods.

    With `g_i` the gradient of sample i's loss at its logits, `.backward()` sends exactly
    `g_i + delta_1 + delta_2 + ...` into the model, divided like the loss. Each method gets the gradient that the one
    before left, always in per-sample units. Nothing is perturbed in `eval()` mode or without gradients. The gradient
    cannot be differentiated again.

    It works in any PyTorch loop, as `compute_loss_func` of the plain `Trainer`, and inside [`LPGTrainer`].

    Args:
        num_labels (`int`): Number of classes C.
        perturbations (`str`, [`LogitPerturbation`] or a sequence of them, *optional*, defaults to `"auto"`):
            The chain, as objects (which are copied) or strings; `[]` for none.
        class_counts (`Sequence[int]`, *optional*):
            Training samples of each class. Left out, the samples that training sees are counted. Class-relative
            dampening then waits for a call of [`~LPGLoss.end_epoch`], since nobody else knows when all were seen.
        base_loss (`Callable[[Tensor, Tensor], Tensor]`, *optional*):
            Maps logits `[N, C]` and labels `[N]` to one loss per sample, `[N]`; cross-entropy when left out.
        eval_shares (`Sequence[float]`, *optional*):
            Share of each class in the data that the model will meet, up to a factor. Left out, it is the one in the
            training set. `"auto"` trains the logits for shares a third of the way from these to all classes alike.
        managed (`bool`, *optional*, defaults to `False`):
            Whether the caller ends each optimizer step with [`~LPGLoss.step`], over all micro-batches and processes,
            and the first epoch with [`~LPGLoss.end_epoch`], as [`LPGTrainer`] does. Otherwise each call is a step.

    Attributes:
        statistics ([`ClassStatistics`]): What training has seen of each class.
        perturbations (`torch.nn.ModuleList`): The methods of the chain, copies of the objects given.
        is_frozen (`bool`): Whether the loss perturbs without learning, see [`~LPGLoss.frozen`].
        smooths_labels (`bool`): Whether `base_loss` is cross-entropy with smoothed labels, which may be set.
        graphs ([`LossGraphs`]): On a GPU, runs the loss as CUDA graphs if `graphs.is_enabled` is set to `True`.

    Raises:
        ValueError: If `num_labels` is below 2, a perturbation is unknown, or counts or shares do not fit.

    Example:

    ```python
    >>> import torch
    >>> loss_fn = LPGLoss(num_labels=3, perturbations="logit_clipping(max_norm=0.5)")
    >>> logits = torch.tensor([[4.0, 0.0, 0.0]], requires_grad=True)
    >>> loss = loss_fn(logits, torch.tensor([1]))
    >>> loss.backward()
    >>> loss  # cross-entropy
    tensor(4.0360, grad_fn=<_AddGradientBackward>)
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
        eval_shares: Sequence[float] | None = None,
        *,
        managed: bool = False,
    ):
        super().__init__()
        if num_labels < 2:
            raise ValueError(f"`num_labels` must be at least 2; found {num_labels}. Pass the number of classes.")
        # Copies: the state of a method belongs to one loss. They are moved and loaded before the statistics, which
        # then tell them what follows from the state of both.
        self.perturbations = nn.ModuleList(copy.deepcopy(build_chain(perturbations)))
        self.statistics = ClassStatistics(num_labels, class_counts, managed, eval_shares)
        for method in self.perturbations:
            if not isinstance(method, LogitPerturbation):
                raise ValueError(
                    f"`{method!r}` perturbs the gradient of the parameters, which a loss does not see. Pass it to "
                    "`LPGTrainer(perturbations=...)`."
                )
            method.setup(num_labels)
            if type(method).log_correction is not LogitPerturbation.log_correction:
                self.statistics.add_correction(method.log_correction)
            method.attach(self.statistics)
        self.base_loss = base_loss
        self.managed = managed
        self.is_frozen = False
        self.smooths_labels = False
        self._telemetry = Telemetry(len(self.perturbations))
        self.graphs = LossGraphs()

    @property
    def num_labels(self) -> int:
        return self.statistics.num_labels

    @property
    def _methods(self) -> Sequence[LogitPerturbation]:
        # `ModuleList` says nothing about the type of its items.
        return cast(Sequence[LogitPerturbation], self.perturbations)

    def forward(
        self,
        outputs: Tensor | Mapping | tuple,
        labels: Tensor,
        num_items_in_batch: Tensor | float | None = None,
        model_loss: Tensor | None = None,
        observer: DeltaObserver | None = None,
    ) -> Tensor:
        """
        The loss of one micro-batch.

        Args:
            outputs (`torch.Tensor`, `ModelOutput` or `tuple`):
                Logits `[N, C]`, or the outputs of a model with the logits under `logits` or as their first item.
            labels (`torch.Tensor` of shape `[N]` or `[N, 1]`): Class indices; -100 for samples to ignore.
            num_items_in_batch (`torch.Tensor` or `float`, *optional*):
                Divisor of the summed loss; the labeled samples of this micro-batch when left out.
            model_loss (`torch.Tensor`, *optional*):
                The same loss as the model computed it, divided in the same way. It keeps its gradient, terms that the
                model adds to cross-entropy included, and the deltas join it. Without a labeled sample it counts as 0.
            observer (`Callable[[Tensor], None]`, *optional*):
                Called with the sum of all deltas, `[N, C]` in per-sample units, if there are any.

        Returns:
            `torch.Tensor`: The base loss, a scalar in float32 or float64.

        Raises:
            ValueError: If logits and labels do not fit together or a label is out of range.
        """
        logits, labels = check_inputs(logits_of(outputs), labels, self.num_labels)
        z = logits if logits.dtype == torch.float64 else logits.float()
        perturbs = self.training and torch.is_grad_enabled() and logits.requires_grad and len(self.perturbations) > 0
        if model_loss is not None:
            # The mean over no sample is NaN.
            model_loss = torch.where((labels != IGNORE_INDEX).any(), model_loss.to(z.dtype), 0.0)
        if not perturbs:
            if model_loss is not None:
                return model_loss
            return self._values(z, labels).sum() / divisor_of(labels, num_items_in_batch)

        if self.base_loss is not None:
            # The base loss keeps its own graph (it may have parameters), and the delta joins it at the logits.
            batch, divisor = self.batch_of(z.detach(), labels), divisor_of(labels, num_items_in_batch)
            value = self._values(z, labels).sum() / divisor
            return self.perturb_loss(value, z, batch, divisor, observer, logits.dtype)
        step = self._whole_gradient if model_loss is None else self._sum_of_deltas
        if self.is_frozen or observer is not None:
            results: Sequence[Tensor] = step(z.detach(), labels, observer)
        else:
            results = self._run(step, z.detach(), labels, device=z.device)
        gradient, *weights = results if model_loss is not None else results[2:]
        for method, weight in zip(reweighting_methods(self._methods), weights, strict=True):
            method.last_weight = weight
        is_counted = model_loss is None and num_items_in_batch is None
        divisor = results[1] if is_counted else divisor_of(labels, num_items_in_batch)
        gradient = self._watched(gradient, divisor, logits.dtype)
        if model_loss is None:
            return add_gradient(results[0], logits, gradient, divisor, divides_value=True)
        return add_gradient(model_loss, logits, gradient, divisor)

    def batch_of(self, logits: Tensor, labels: Tensor) -> LogitBatch:
        """A micro-batch of logits in float32 or float64, with the offsets of the statistics."""
        self._match(logits)
        return LogitBatch(logits, labels, self.statistics.offsets)

    def _whole_gradient(self, z: Tensor, labels: Tensor, observer: DeltaObserver | None = None) -> list[Tensor]:
        """What [`summed_cross_entropy`] returns, the perturbed gradient, and the weights of samples."""
        batch = self.batch_of(z, labels)
        perturbed = self.perturb(batch.gradient, batch, observer)
        return [*summed_cross_entropy(batch), perturbed, *last_weights(self._methods)]

    def _sum_of_deltas(self, z: Tensor, labels: Tensor, observer: DeltaObserver | None = None) -> list[Tensor]:
        """The sum of all deltas, and the weights."""
        batch = self.batch_of(z, labels)
        return [self.perturb(batch.gradient, batch, observer).sub_(batch.gradient), *last_weights(self._methods)]

    def _run(self, step: Callable[..., Sequence[Tensor]], *inputs: Tensor, device: torch.device) -> Sequence[Tensor]:
        parts = [self, self.statistics, self._telemetry, *self._methods]
        offsets = self.statistics.offsets
        return self.graphs.run(self, step, inputs, parts, device, rule=offsets and (len(offsets.rows), offsets.plain))

    def perturb_loss(
        self,
        loss: Tensor,
        logits: Tensor,
        batch: LogitBatch,
        divisor: Tensor | float,
        observer: DeltaObserver | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """
        Adds the deltas to the gradient that any loss has at the logits. The loss keeps its graph.

        Args:
            loss (`torch.Tensor`): A scalar that depends on `logits`.
            logits (`torch.Tensor` of shape `[N, C]`): The logits of the model, with their graph.
            batch ([`LogitBatch`]): The micro-batch with these logits, in float32 or float64.
            divisor (`torch.Tensor`, scalar, or `float`): The number by which the loss of a sample has been divided.
            observer (`Callable[[Tensor], None]`, *optional*): As for [`LPGLoss.forward`].
            dtype (`torch.dtype`, *optional*): Precision of the model's logits, if `logits` are a copy in another one.

        Returns:
            `torch.Tensor`: The loss.

        Raises:
            ValueError: If the loss does not depend on the logits.
        """
        per_sample = torch.as_tensor(divisor).to(loss)
        (gradient,) = torch.autograd.grad(loss, logits, per_sample, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError(
                "The loss does not depend on the logits that the model returned, so there is no gradient to perturb. "
                "Compute it from `outputs.logits`, or pass `perturbations=[]`."
            )
        # Where a loss reaches ignored samples, its gradient there is left alone.
        gradient = gradient.to(batch.logits.dtype, copy=True, memory_format=torch.contiguous_format)
        gradient = zero_ignored_(gradient, batch.labels, batch.valid_mask)
        perturbed = self._watched(self.perturb(gradient, batch, observer), divisor, dtype or logits.dtype)
        return add_gradient(loss, logits, perturbed.sub_(gradient), divisor)

    def _watched(self, gradient: Tensor, divisor: Tensor | float, dtype: torch.dtype) -> Tensor:
        if dtype == torch.float16:  # the others hold all numbers of float32
            has_ended = not (self.managed or self.is_frozen)
            self._telemetry.note_overflow(gradient, divisor, self.statistics.steps - int(has_ended))
        return gradient

    @torch.no_grad()
    def perturb(self, gradient: Tensor, batch: LogitBatch, observer: DeltaObserver | None = None) -> Tensor:
        """
        Runs the chain on the logit gradient of a micro-batch and updates statistics and telemetry.

        Args:
            gradient (`torch.Tensor` of shape `[N, C]`):
                Gradient of the base loss, in per-sample units; zero for ignored samples.
            batch ([`LogitBatch`]): The micro-batch.
            observer (`Callable[[Tensor], None]`, *optional*): As for [`LPGLoss.forward`].

        Returns:
            `torch.Tensor` of shape `[N, C]`: The perturbed gradient.
        """
        self._match(batch.logits)
        is_cross_entropy = gradient is batch.gradient or self.smooths_labels
        perturbed, rows = run_chain(
            self._methods, gradient, batch, self.statistics, not self.is_frozen, is_cross_entropy
        )
        if not self.is_frozen:
            # One table for both: each of its operations takes longer than all of its numbers.
            of_classes = self.statistics.rows_of(batch, uncompensated_weight(self._methods))
            table = stack_rows([*of_classes, batch.is_valid, *rows], batch)
            self.statistics.add(batch, table[: len(of_classes)])
            self._telemetry.record(table[len(of_classes) :], self.statistics.steps)
            if not self.managed:
                # A graph replays steps that the host does not see.
                self._step(is_seen=not self.graphs.is_enabled)
        if observer is not None:
            observer(perturbed - gradient)
        return perturbed

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within it the loss perturbs but learns nothing: for a second look at the same batch, as in SAM."""
        before, self.is_frozen = self.is_frozen, True
        try:
            yield
        finally:
            self.is_frozen = before

    def step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """
        Ends an optimizer step: the sums of its micro-batches move the statistics and the methods that learn.

        Args:
            reduce (`Callable`, *optional*): Sums a tensor over processes.
        """
        if reduce is None:
            self._run(self._step, device=self._telemetry.device)
        else:
            self._step(reduce)

    def _step(self, reduce: Callable[[Tensor], Tensor] | None = None, is_seen: bool = False) -> list[Tensor]:
        self.statistics.step(reduce, is_seen)
        for method in self._methods:
            method.step(reduce)
        return []

    def end_epoch(self) -> None:
        """Ends an epoch. From then on dampening may act, and classes that are being counted have a prior."""
        self.statistics.end_epoch()

    def telemetry(self, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """
        Means over the samples since the last call. Only here do values travel to the host.

        Args:
            gather (`Callable`, *optional*): Stacks a tensor of every process along a new leading axis.

        Returns:
            `dict[str, float]`: The entries that `docs/logged_keys.md` describes, as far as they are about the logits.
            Empty if there was no sample.

        Raises:
            FloatingPointError: If a logit gradient was not finite; the message names the first step.
        """
        report = mean_norms_and_weights(self._telemetry.read(gather), self._methods)
        return report | head_and_tail_accuracy(self.statistics) if report else {}

    def _values(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Base loss of each sample, `[N]`; 0 for ignored ones."""
        if self.base_loss is None:
            return cross_entropy(logits, labels)
        valid_mask = labels != IGNORE_INDEX
        values = self.base_loss(logits, torch.where(valid_mask, labels, 0))
        if values.shape != labels.shape:
            raise ValueError(
                f"`base_loss` must return one loss per sample, shape {list(labels.shape)}; found "
                f"{list(values.shape)}. Use reduction='none'."
            )
        return torch.where(valid_mask, values, 0.0)

    def _match(self, logits: Tensor) -> None:
        """Moves the state to the device of the logits, and to float64 where they are."""
        telemetry = self._telemetry
        if telemetry.device == logits.device and telemetry.dtype in (logits.dtype, torch.float64):
            return
        dtype = torch.promote_types(logits.dtype, telemetry.dtype)
        # Not the base loss, which belongs to the user.
        for module in (self.perturbations, self.statistics, telemetry):
            module.to(device=logits.device, dtype=dtype)
