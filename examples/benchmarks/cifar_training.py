"""
One run: a bare loop around LPGLoss. On a GPU a step is one replay of a CUDA graph.

Batches, crops and learning rates of the whole run lie on the device before it begins. A counter on the device says
which of them is next. So a step needs nothing from the host, and several runs can take turns in one thread.
"""

import gc
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from accuracy_metrics import score
from cifar_data import IMAGE_SIZE, NUM_LABELS, PADDING, Cifar, crop_and_flip, make_task
from cifar_networks import build_network
from cifar_settings import RunSettings, batch_plan, epoch_ends, learning_rates
from torch import Tensor, nn
from torch.nn import functional as F

from lpg_hf import LogitNoise, LPGLoss
from lpg_hf.perturbations import SampleReweighting


# Steps that are started at once. While the device works on one turn, the host starts the next one. Few, since a launch
# waits where many are pending, and with it the launches of the runs beside it.
STEPS_PER_TURN = 8
EVAL_BATCH_SIZE = 1000
# In the first steps CUDA sets up libraries and their memory, which a capture does not allow.
NUM_REHEARSALS = 3


class CifarRun:
    """
    A training that is started turn by turn.

    Args:
        settings ([`RunSettings`]): What to train.
        cifar ([`Cifar`]): The data set. Its device is the run's.
        stream (`torch.cuda.Stream`, *optional*): Where a GPU does its work, not the default stream. Left out on a CPU.
        uses_graph (`bool`, *optional*, defaults to `True`):
            Whether a GPU replays CUDA graphs of the step and of the evaluation.

    Attributes:
        steps (`int`): Steps that were started.

    Raises:
        ValueError: If the rows do not fill a batch, or a method cannot be part of a graph.

    Example:

    ```python
    run = CifarRun(RunSettings("worst", "resnet18", "auto", epochs=36), cifar, torch.cuda.Stream())
    while not run.is_done:
        if run.is_ready:
            run.advance()
    run.result()
    ```
    """

    def __init__(
        self,
        settings: RunSettings,
        cifar: Cifar,
        stream: torch.cuda.Stream | None = None,
        uses_graph: bool = True,
    ):
        self.settings = settings
        self.steps = 0
        self._cifar = cifar
        self._stream = stream
        self._turns: deque[torch.cuda.Event] = deque()
        with self._on_stream():
            self._prepare()
            self._step: Callable[[], None] = self._train_step
            self._evaluate: Callable[[], None] = self._evaluation
            self.uses_graph = stream is not None and uses_graph
            if self.uses_graph:
                self._check_chain()
                self._rehearse()
                self._step, self._evaluate = (self._captured(part) for part in (self._train_step, self._evaluation))
        self._begin = time.perf_counter()

    def _prepare(self) -> None:
        """Puts all that the run needs on the device."""
        settings, device = self.settings, self._cifar.train_images.device
        self._task = task = make_task(self._cifar, settings.task, settings.seed, settings.num_train)
        num_rows = len(task.rows)
        self._epoch_ends = epoch_ends(num_rows, settings)
        self._last_epoch_begin = [0, *self._epoch_ends][-2]
        self._num_evaluations = 0

        rows, views = batch_plan(num_rows, settings)
        self._rows, self._views = rows.to(device), views.to(device)
        self._learning_rates = learning_rates(num_rows, settings).to(device)
        self._positions = torch.from_numpy(task.rows).to(device)
        self._labels = torch.from_numpy(task.labels).to(device)
        self._is_wrong = torch.from_numpy(task.is_wrong).to(device, torch.int64)
        self._counter = torch.zeros(1, dtype=torch.int64, device=device)

        self.network = build_network(settings.network, NUM_LABELS, settings.seed).to(device)
        self.loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
        self._reweighting: list[SampleReweighting] = []
        if settings.chain is not None:
            loss_fn = LPGLoss(NUM_LABELS, settings.chain, task.class_counts)
            self.loss_fn = loss_fn.to(device)
            self._reweighting = [method for method in loss_fn.perturbations if isinstance(method, SampleReweighting)]
        self.optimizer = NesterovSGD(list(self.network.parameters()), settings.momentum, settings.weight_decay)
        # Number and summed weights of the right and of the wrong rows in the last epoch.
        self._weight_sums = torch.zeros(2, 2, device=device)

        num_test = len(self._cifar.test_labels)
        self._test_logits = torch.zeros(num_test, NUM_LABELS, device=device)
        self._predictions = torch.zeros(settings.epochs, num_test, dtype=torch.int64, device=device)

    # A step

    def _train_step(self) -> None:
        chosen = self._rows.index_select(0, self._counter)[0]
        views = self._views.index_select(0, self._counter)[0]
        images = crop_and_flip(self._cifar.train_images, self._positions[chosen], views)
        with self._autocast():
            logits = self.network(images)
        loss = self.loss_fn(logits.float(), self._labels[chosen])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step(self._learning_rates.index_select(0, self._counter)[0])
        if self._reweighting:
            self._add_weights(chosen)
        self._counter += 1

    @torch.no_grad()
    def _add_weights(self, chosen: Tensor) -> None:
        weight = torch.stack([method.last_weight for method in self._reweighting]).prod(0)
        self._weight_sums.index_add_(0, self._is_wrong[chosen], torch.stack([torch.ones_like(weight), weight], 1))

    @torch.no_grad()
    def _evaluation(self) -> None:
        self._test_logits.copy_(self._logits_of(self._cifar.test_images))

    def _logits_of(self, images: Tensor) -> Tensor:
        """Logits `[n, C]` of images `[n, 32, 32, 3]` in evaluation mode."""
        self.network.eval()
        with self._autocast():
            logits = [self.network(batch.permute(0, 3, 1, 2)).float() for batch in images.split(EVAL_BATCH_SIZE)]
        self.network.train()
        return torch.cat(logits)

    def _autocast(self) -> AbstractContextManager:
        device = self._cifar.train_images.device.type
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    # CUDA graphs

    def _check_chain(self) -> None:
        if isinstance(self.loss_fn, LPGLoss):
            for method in self.loss_fn.perturbations:
                if isinstance(method, LogitNoise):
                    raise ValueError(
                        f"`{method!r}` draws numbers on the host, so each replay of a CUDA graph would add the same "
                        "noise. Run it with `--no_graph`."
                    )

    def _state(self) -> list[Tensor]:
        """All that a step or an evaluation changes."""
        state = [*self.network.parameters(), *self.network.buffers(), *self.optimizer.velocities]
        if isinstance(self.loss_fn, LPGLoss):
            state += self.loss_fn.buffers()
        return [*state, self._counter, self._weight_sums, self._test_logits]

    def _rehearse(self) -> None:
        """First steps that leave no trace. The state is put back in place: graphs hold its addresses."""
        kept = [tensor.detach().clone() for tensor in self._state()]
        for _ in range(NUM_REHEARSALS):
            self._train_step()
        self._evaluation()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for tensor, value in zip(self._state(), kept, strict=True):
                tensor.copy_(value)

    def _captured(self, part: Callable[[], None]) -> Callable[[], None]:
        """The part as a CUDA graph, captured on the stream of the run, whose workspaces no other run uses."""
        # A graph that is collected during a capture would end it.
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            part()
        return graph.replay

    # Turns

    def _on_stream(self) -> AbstractContextManager:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @property
    def is_ready(self) -> bool:
        """Whether the next turn may be started: at most one is waiting."""
        self._forget_finished_turns()
        return len(self._turns) < 2

    @property
    def is_done(self) -> bool:
        """Whether all steps are over."""
        self._forget_finished_turns()
        return self.steps == self._epoch_ends[-1] and not self._turns

    def _forget_finished_turns(self) -> None:
        while self._turns and self._turns[0].query():
            self._turns.popleft()

    def advance(self) -> None:
        """Starts the steps of a turn, and the evaluation where an epoch ends with it."""
        if self.steps == self._epoch_ends[-1]:
            return
        with self._on_stream():
            if self.steps == self._last_epoch_begin:
                self._weight_sums.zero_()
            epoch_end = self._epoch_ends[self._num_evaluations]
            turn_end = min(self.steps + STEPS_PER_TURN, epoch_end)
            for _ in range(turn_end - self.steps):
                self._step()
            self.steps = turn_end
            if self.steps == epoch_end:
                self._evaluate()
                self._predictions[self._num_evaluations].copy_(self._test_logits.argmax(1))
                self._num_evaluations += 1
            if self._stream is not None:
                event = torch.cuda.Event()
                event.record(self._stream)
                self._turns.append(event)

    # The result

    def result(self) -> dict[str, object]:
        """
        What was measured, whether or not the run is done. It waits for the device.

        Raises:
            FloatingPointError: If a logit of the last evaluation is not finite.
        """
        if self._stream is not None:
            self._stream.synchronize()
        seconds = time.perf_counter() - self._begin
        result: dict[str, object] = {
            "rows": len(self._task.rows),
            "steps": self.steps,
            "is_finished": self.steps == self._epoch_ends[-1],
            "seconds": round(seconds, 2),
            "ms_per_step": round(1000 * seconds / max(self.steps, 1), 3),
            "wrong_rows": int(self._task.is_wrong.sum()),
        }
        if self._num_evaluations > 0:
            with self._on_stream(), torch.no_grad():
                result |= self._scores() | self._weights() | self._fit()
        return result

    def _scores(self) -> dict[str, object]:
        logits = self._test_logits.cpu()
        if not logits.isfinite().all():
            raise FloatingPointError(
                f"{self.settings}: logits are not finite after step {self.steps}. Lower the learning rate."
            )
        predictions = self._predictions[: self._num_evaluations].cpu().numpy()
        accuracies = (predictions == self._cifar.test_labels).mean(1)
        best = int(accuracies.argmax())
        scores = {name: round(value, 5) for name, value in score(logits, self._cifar.test_labels).items()}
        return scores | {
            "best_accuracy": round(float(accuracies[best]), 5),
            "best_epoch": best + 1,
            "accuracies": [round(value, 5) for value in accuracies.tolist()],
        }

    def _weights(self) -> dict[str, object]:
        """Mean weights of right and wrong rows in the last epoch, where the chain weights samples."""
        if not self._reweighting or self.steps < self._epoch_ends[-1]:
            return {}
        means = self._weight_sums.tolist()
        return {
            f"weight_{name}": round(total / count, 4)
            for name, (count, total) in zip(("right", "wrong"), means, strict=True)
            if count > 0
        }

    def _fit(self) -> dict[str, object]:
        """How many of the wrong labels the network predicts for its training images, without crops."""
        if not self._task.is_wrong.any():
            return {}
        wrong = torch.from_numpy(np.flatnonzero(self._task.is_wrong)).to(self._positions.device)
        inner = slice(PADDING, PADDING + IMAGE_SIZE)
        images = self._cifar.train_images[self._positions[wrong]][:, inner, inner]
        is_fitted = self._logits_of(images).argmax(1) == self._labels[wrong]
        return {"wrong_fitted": round(is_fitted.float().mean().item(), 5)}


class NesterovSGD:
    """
    `torch.optim.SGD(nesterov=True)` with the learning rate as a tensor, which a CUDA graph reads anew at each replay.

    Args:
        parameters (`list[torch.nn.Parameter]`): All of them must get a gradient.
        momentum (`float`): Of the velocities.
        weight_decay (`float`): On all parameters.
    """

    def __init__(self, parameters: list[nn.Parameter], momentum: float, weight_decay: float):
        self.parameters = parameters
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.velocities = [torch.zeros_like(parameter) for parameter in parameters]

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: Tensor) -> None:
        """
        Args:
            learning_rate (`torch.Tensor`, scalar): On the device of the parameters.
        """
        gradients = [parameter.grad for parameter in self.parameters]
        updates = torch._foreach_add(gradients, self.parameters, alpha=self.weight_decay)
        torch._foreach_mul_(self.velocities, self.momentum)
        torch._foreach_add_(self.velocities, updates)
        torch._foreach_add_(updates, self.velocities, alpha=self.momentum)
        torch._foreach_mul_(updates, learning_rate)
        torch._foreach_sub_(self.parameters, updates)
