"""What a step costs, without a clock: nothing waits for the device, and matrices and operations are counted."""

import operator

import numpy as np
import pytest
import torch
from method_examples import LOGIT_METHODS, logit_variants
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lpg_hf import LPGLoss
from lpg_hf.perturbations import GradientClipping, LogitPerturbation


N, C = 6, 40
COUNTS = list(range(1, C + 1))
CHAINS = ["auto", *LOGIT_METHODS, *map(repr, logit_variants(C))]


# Nothing waits for the device.


class HostDeviceTrafficError(AssertionError):
    pass


class NoCopies(TorchFunctionMode):
    """Refuses tensors that are made on the device from values of the host, which dispatch modes do not see."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        makes_tensor = function in (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
        if makes_tensor and result.device.type == "meta" and result is not args[0]:
            raise HostDeviceTrafficError(f"{function.__name__} copies {args[-1]!r} to the device")
        return result


class NoSynchronization(TorchDispatchMode):
    """
    Refuses operations that make the host wait for the device, for which the device "meta" stands: its tensors have no
    values, so that torch itself refuses `item`, `bool`, `nonzero`, `unique` and the like.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # A scalar of the host is an argument of the kernel.
        devices = {tensor.device.type for tensor in tensors if tensor.device.type == "meta" or tensor.ndim > 0}
        aten = torch.ops.aten
        is_index = function.overloadpacket in (aten.index, aten.index_put, aten.index_put_)
        if is_index and any(tensor.dtype == torch.bool for tensor in tree_leaves(args[1]) if tensor is not None):
            raise HostDeviceTrafficError(f"{function} with a mask looks for its entries")
        result = function(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if tensors and len(devices | {tensor.device.type for tensor in results}) > 1:
            raise HostDeviceTrafficError(f"{function} copies between host and device")
        return result


def steps_without_synchronization(loss_fn, dtype=torch.float32):
    """Micro-batches, a second look as in SAM, and the end of the optimizer step, on a device without values."""
    logits = torch.empty(N, C, dtype=dtype, device="meta", requires_grad=True)
    labels = torch.empty(N, dtype=torch.int64, device="meta")
    loss_fn(logits, labels).backward()  # moves the state to the device, once
    with NoCopies(), NoSynchronization():
        loss_fn(logits, labels).backward()
        loss_fn(logits, labels, num_items_in_batch=2 * N).backward()
        with loss_fn.frozen():
            loss_fn(logits, labels, num_items_in_batch=torch.empty((), dtype=torch.int64, device="meta")).backward()
        loss_fn.step()
        loss_fn.end_epoch()
        loss_fn.step(reduce=lambda tensor: tensor + tensor)
    return logits


@pytest.mark.parametrize("counts", [None, COUNTS], ids=["counting", "counts"])
@pytest.mark.parametrize("chain", CHAINS)
def test_a_step_never_waits_for_the_device(chain, counts):
    logits = steps_without_synchronization(LPGLoss(C, [chain, "label_smoothing"], counts, managed=True))
    assert logits.grad.shape == (N, C)


@pytest.mark.parametrize("eval_shares", [None, [1.0] * C], ids=["training shares", "uniform"])
def test_a_bare_loss_finds_the_end_of_an_epoch_without_waiting_for_the_device(eval_shares):
    loss_fn = LPGLoss(C, "auto", COUNTS, eval_shares=eval_shares)
    assert steps_without_synchronization(loss_fn).grad.shape == (N, C)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_step_in_other_dtypes_never_waits_for_the_device(dtype):
    assert steps_without_synchronization(LPGLoss(C, "auto", COUNTS, managed=True), dtype).grad.dtype == dtype


def test_a_step_with_a_users_loss_never_waits_for_the_device():
    def squared_error(logits, labels):
        return (logits.softmax(-1) - F.one_hot(labels, C)).square().sum(-1)

    steps_without_synchronization(LPGLoss(C, "auto", COUNTS, base_loss=squared_error, managed=True))


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"max_value": 1.0}])
def test_gradient_clipping_never_waits_for_the_device(options):
    parameter = torch.nn.Parameter(torch.empty(3, 2, device="meta"))
    parameter.grad = torch.empty_like(parameter)
    method = GradientClipping(**options)
    method.perturb_([parameter])
    with NoCopies(), NoSynchronization():
        method.perturb_([parameter])


SYNCHRONIZING = {
    "item": lambda gradient, labels: gradient * gradient.sum().item(),
    "tolist": lambda gradient, labels: gradient * sum(labels.tolist()),
    "bool": lambda gradient, labels: gradient if gradient.sum() > 0 else -gradient,
    "cpu": lambda gradient, labels: gradient * gradient.sum().cpu(),
    "to the device": lambda gradient, labels: gradient * torch.ones(C).to(gradient),
    "new tensor": lambda gradient, labels: gradient * torch.tensor([2.0], device=gradient.device),
    "as tensor": lambda gradient, labels: gradient * torch.as_tensor([2.0] * C, device=gradient.device),
    "nonzero": lambda gradient, labels: gradient * len(labels.nonzero()),
    "mask": lambda gradient, labels: gradient * gradient[labels > 0].sum(),
    "assignment by mask": lambda gradient, labels: gradient.index_put((labels > 0,), gradient.sum()),
    "unique": lambda gradient, labels: gradient * len(labels.unique()),
    "index on the host": lambda gradient, labels: gradient[torch.arange(N)],
    "repeat": lambda gradient, labels: gradient.repeat_interleave(labels, dim=0),
}


@pytest.mark.parametrize("delta", SYNCHRONIZING.values(), ids=SYNCHRONIZING)
def test_the_test_sees_a_method_that_waits_for_the_device(delta):
    class Waiting(LogitPerturbation):
        name = "waiting"

        def delta(self, gradient, batch, statistics):
            # Not in the first call, whose step is not looked at.
            self.calls = getattr(self, "calls", 0) + 1
            return delta(gradient, batch.labels) if self.calls > 1 else gradient

    with pytest.raises((HostDeviceTrafficError, RuntimeError, NotImplementedError, TypeError)):
        steps_without_synchronization(LPGLoss(C, Waiting(), managed=True))


# Matrices and operations.


class Counter(TorchDispatchMode):
    """Counts operations, those of them that read or write a whole matrix `[N, C]`, and the matrices they make."""

    # No kernel runs for them. `lpg_hf` makes no matrix with them.
    NOT_COUNTED = (torch.ops.aten.detach, torch.ops.aten.new_empty)
    operations = passes = matrices = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.is_view or function.overloadpacket in self.NOT_COUNTED:
            return result
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.operations += 1
        # Several matrices may be one tensor, `[k, N, C]`.
        self.passes += max((tensor.numel() // (N * C) for tensor in inputs + outputs), default=0)
        self.matrices += sum(t.numel() // (N * C) for t in outputs if t.untyped_storage()._cdata not in known)
        return result


def count(function):
    function()  # whatever is done once
    with Counter() as counter:
        function()
    return counter.operations, counter.passes, counter.matrices


def a_batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, C, generator=generator).to(dtype).requires_grad_()
    return logits, torch.randint(C, (N,), generator=generator)


def count_step(loss_fn):
    logits, labels = a_batch()

    def step():
        logits.grad = None
        loss_fn(logits, labels).backward()
        if loss_fn.managed:
            loss_fn.step()

    return count(step)


@pytest.mark.parametrize(
    ("chain", "operations", "passes", "matrices"),
    [
        # Measured with torch 2.13, as all that follow. Three ways to look at the logits are three matrices.
        ("auto", 60, 39, 5),
        ("lpg", 103, 22, 5),
        ("logit_clipping", 48, 16, 4),
        ("focal_loss", 66, 15, 3),
        ("label_smoothing", 46, 16, 4),
        ("lpl", 270, 100, 26),
    ],
)
def test_a_step_takes_few_operations_and_matrices(chain, operations, passes, matrices):
    """The bounds leave room for a few small operations, but not for another matrix."""
    found = count_step(LPGLoss(C, chain, COUNTS, managed=True))
    assert all(map(operator.le, found, (operations, passes, matrices))), found


def test_a_step_on_many_logits_takes_few_passes_and_matrices(monkeypatch):
    """There, operations cost less than passes, and memory most."""
    monkeypatch.setattr("lpg_hf.batch.MAX_STACKED", 0)
    found = count_step(LPGLoss(C, "auto", COUNTS, managed=True))
    assert all(map(operator.le, found, (92, 30, 3))), found


def test_terms_per_class_follow_the_step_and_not_each_of_its_micro_batches():
    """Measured: 45 of the 60 operations of a step."""
    logits, labels = a_batch()
    loss_fn = LPGLoss(C, "auto", COUNTS, managed=True)

    def micro_batch():
        logits.grad = None
        loss_fn(logits, labels).backward()

    micro_batch()
    loss_fn.step()
    operations, passes, matrices = count(micro_batch)
    assert operations <= 46 and passes <= 39 and matrices <= 5
    assert count_step(loss_fn)[0] - operations >= 14


@pytest.mark.parametrize(("managed", "operations"), [(False, 116), (True, 122)])  # measured: 114, 120
def test_a_step_takes_few_operations_while_classes_are_counted(managed, operations):
    """Their shares change with every step, and each term that follows is computed once."""
    found = count_step(LPGLoss(C, "auto", managed=managed))
    assert found[0] <= operations and found[1:] == (40, 5), found


@pytest.mark.parametrize("chain", ["auto", "label_smoothing"])
def test_a_bare_loss_costs_what_a_managed_one_does_until_an_epoch_may_end(chain):
    bare, managed = (count_step(LPGLoss(C, chain, COUNTS, managed=managed)) for managed in (False, True))
    assert bare == managed


@pytest.mark.parametrize(("chain", "operations"), [("auto", 89), ("label_smoothing", 58)])  # measured: 87, 57
def test_a_bare_loss_looks_for_the_end_of_an_epoch_in_few_operations_per_class(chain, operations):
    """And asks how many samples are left. Whoever looks at every step, as a compiled function does, does not ask."""
    looking, managed = (LPGLoss(C, chain, COUNTS, managed=managed) for managed in (False, True))
    watch = looking.statistics._epoch_watch
    tell, ask, questions = watch.count_step, watch.ask, []

    def knowing_nothing(*args):
        watch.forget()
        return tell(*args)

    watch.count_step = knowing_nothing
    watch.ask = lambda samples_left: questions.append(ask(samples_left))
    bare, managed = map(count_step, (looking, managed))
    assert bare[0] <= managed[0] + operations and bare[1:] == managed[1:], (bare, managed)
    assert len(questions) == 2 and watch._answer() is not None


@pytest.mark.parametrize(("chain", "matrices"), [("auto", 2.2), ("lpg", 3.1), ("lpl", 6.1), ("logit_clipping", 2.2)])
def test_a_step_holds_few_matrices_at_once(chain, matrices):
    """The one that is the logits' gradient included. Small batches hold more at once."""
    num_samples, num_classes = 64, 2100
    logits = torch.randn(num_samples, num_classes, requires_grad=True)
    labels = torch.randint(num_classes, (num_samples,), generator=torch.Generator().manual_seed(0))
    loss_fn = LPGLoss(num_classes, chain, list(range(1, num_classes + 1)))
    loss_fn(logits, labels).backward()
    logits.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as measured:
        loss_fn(logits, labels).backward()
    events = sorted(measured.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = np.cumsum([event.nbytes() for event in events if event.name() == "[memory]"])
    assert held[-1] >= logits.nbytes  # the gradient is seen
    assert held.max() <= matrices * logits.nbytes
