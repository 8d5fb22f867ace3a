"""`profile_groups`: the time of every group on one device, by running the model there.

Forward: whole passes with marks where another cut module begins → `calls.marked_runs`; medians over the repeats, scaled
so that the groups sum to the median of passes without hooks.
Backward: each cut module's calls are made again alone, on detached inputs, and the backward of each is timed. What the
whole model's loss and backward take beyond their sum is the glue's, shared out by its forward time; then scaled so that
the sum is the whole.
Overhead: the same at half the batch. With t(share) = overhead + share * (t - overhead), the part that a smaller batch
does not save is 2 t(1/2) - t, held between 0 and t(1/2).
Where a device has no room for the whole batch, a part of it and the half of that part are measured, and the same line
gives the whole batch's times.

It leaves the model as it was (→ `preserve_model`). It does not know how devices slow each other down.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

from autoplace.costs.calls import Call, GroupIndex, captured_calls, marked_runs
from autoplace.costs.timers import Timer, differences_ms
from autoplace.graph.coarsen import Grouping
from autoplace.graph.module_tree import op_cost
from autoplace.graph.preserve import preserve_model
from autoplace.hardware.cluster import Device
from autoplace.measure.memory import HeapLine
from autoplace.runtime.worker import DeviceWorker, torch_device
from autoplace.workload import Workload, default_loss

__all__ = ["GroupTimes", "measure_total_ms", "on_device", "profile_groups", "smaller_batch"]

_WARM_UPS = 2
_LONG_PASS_S = 1.0
"""A pass that takes longer is repeated at most twice; what is left of warming up is small beside it."""
_LONG_CALL_S = 0.1
"""A call of a module alone that takes longer counts at once; it has run before, in whole passes."""

_MAX_GLUE_BACKWARD = 4.0
"""The glue's backward takes no more than this many times its forward; a larger rest is noise and scales all groups."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupTimes:
    """Milliseconds of every group on one device; G groups."""

    forward_ms: NDArray[np.float64]
    """float64[G]"""
    backward_ms: NDArray[np.float64] | None = None
    """float64[G]; None for inference."""
    forward_overhead_ms: NDArray[np.float64]
    """float64[G], the part that a smaller batch does not save."""
    backward_overhead_ms: NDArray[np.float64] | None = None
    """float64[G]; None for inference."""
    total_ms: float
    """One whole pass: the sum of the above without the overheads."""
    notes: tuple[str, ...] = ()
    """What could not be measured as planned, in sentences."""


def profile_groups(
    workload: Workload,
    grouping: Grouping,
    device: Device,
    *,
    threads: int | None = None,
    repeats: int = 5,
    samples: int | None = None,
) -> GroupTimes:
    """Measure every group's latency on a device of this machine.

    Args:
        workload: Model, inputs and mode.
        grouping: Groups of the model's graph.
        device: Where to run.
        threads: Intra-op threads of a CPU device; None = one per core.
        repeats: Passes to take medians over.
        samples: Of the batch, that a pass may have; the times are the whole batch's even so. None = all.

    Raises:
        ExecutionError: If the device is not on this machine.
        Exception: Whatever the model raises there, out of memory included.
    """
    worker = DeviceWorker(device, threads)
    try:
        return worker.run(lambda: _profile(workload, grouping, device, repeats, samples))
    finally:
        worker.close()


def measure_total_ms(workload: Workload, device: Device, *, threads: int | None = None, repeats: int = 5) -> float:
    """Measure one whole pass of the model on a device, ms (median).

    Raises:
        ExecutionError: If the device is not on this machine.
        Exception: Whatever the model raises there.
    """
    worker = DeviceWorker(device, threads)

    def run() -> float:
        local = on_device(workload, torch_device(device))
        with preserve_model(local.model), local.mode():
            forward_ms, backward_ms = _whole(local, _Passes(device, repeats))
        return forward_ms + backward_ms

    try:
        return worker.run(run)
    finally:
        worker.close()


def on_device(workload: Workload, device: torch.device) -> Workload:
    """Return the workload with model and inputs on a device: itself where it is there already, else a copy."""
    tensors = [*workload.model.parameters(), *workload.model.buffers()]
    same = all(t.device == device for t in tensors)
    model = workload.model if same else copy.deepcopy(workload.model).to(device)
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (workload.args, dict(workload.kwargs)))
    return replace(workload, model=model, args=args, kwargs=kwargs)


def smaller_batch(workload: Workload, size: int) -> Workload:
    """Return the workload on the first `size` samples: every tensor as long as the batch is cut."""
    batch = workload.batch_size

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:size] if tensor.dim() > 0 and tensor.shape[0] == batch else tensor

    args, kwargs = pytree.tree_map_only(torch.Tensor, cut, (workload.args, dict(workload.kwargs)))
    return replace(workload, args=args, kwargs=kwargs)


class _Passes:
    """Repeats passes on a device: with a timer, and with an eye on what the process holds where a CPU's is limited."""

    def __init__(self, device: Device, repeats: int) -> None:
        self.timer, self.repeats = Timer(torch_device(device)), repeats
        self._heap = HeapLine.of(device)

    def run(self, once: Callable[[], list[float]]) -> list[list[float]]:
        """Return what the counted passes measured; those before them are for warming up."""
        start = time.perf_counter()
        self._next(once)
        if time.perf_counter() - start > _LONG_PASS_S:
            return [self._next(once) for _ in range(min(self.repeats, 2))]
        for _ in range(_WARM_UPS - 1):
            self._next(once)
        return [self._next(once) for _ in range(self.repeats)]

    def _next(self, once: Callable[[], list[float]]) -> list[float]:
        self._heap.keep()
        return once()


def _profile(workload: Workload, grouping: Grouping, device: Device, repeats: int, samples: int | None) -> GroupTimes:
    local = on_device(workload, torch_device(device))
    passes = _Passes(device, repeats)
    batch, notes = local.batch_size, list[str]()
    if samples is not None and samples < batch:
        local = smaller_batch(local, samples)
        notes.append(f"times of {batch} samples follow from passes of {samples}, which is what memory has room for")
    with preserve_model(local.model), local.mode():
        forward, backward = _measure(local, grouping, passes, notes)
        overheads: list[NDArray[np.float64]] = [np.zeros_like(forward), np.zeros_like(forward)]
        size = local.batch_size // 2
        if size:
            try:
                halves = _measure(smaller_batch(local, size), grouping, passes, [])
                pairs = zip((forward, backward), halves, strict=True)
                overheads = [_overhead(full, half, size / local.batch_size) for full, half in pairs]
            except Exception as error:
                notes.append(f"half the batch does not run ({type(error).__name__}); overheads are taken as 0")
    share = local.batch_size / batch
    forward, backward = (o + (t - o) / share for t, o in zip((forward, backward), overheads, strict=True))
    training = workload.training
    return GroupTimes(
        forward_ms=forward,
        backward_ms=backward if training else None,
        forward_overhead_ms=overheads[0],
        backward_overhead_ms=overheads[1] if training else None,
        total_ms=float(forward.sum() + backward.sum()),
        notes=tuple(notes),
    )


def _overhead(full: NDArray[np.float64], part: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Solve t(share) = o + share * (t - o) for o, held between 0 and the smaller of both times."""
    return np.clip((part - share * full) / (1.0 - share), 0.0, np.minimum(part, full))


def _measure(
    workload: Workload, grouping: Grouping, passes: _Passes, notes: list[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Forward and backward times of the groups, float64[G] each; the latter zero for inference."""
    index = GroupIndex(grouping.graph.names)
    forward_ms, backward_ms = _whole(workload, passes)
    cost = op_cost(grouping.graph)
    times, glue = _forward_groups(workload, index, passes, cost, notes)
    forward = _scaled(times, forward_ms)
    if not workload.training:
        return forward, np.zeros_like(forward)
    raw = _backward_groups(workload, index, passes, forward, notes)
    if glue.sum() > 0:
        rest = min(max(0.0, backward_ms - raw.sum()), _MAX_GLUE_BACKWARD * glue.sum())
        raw = raw + rest * glue / glue.sum()
    return forward, _scaled(raw, backward_ms)


def _scaled(values: NDArray[np.float64], total: float) -> NDArray[np.float64]:
    if values.sum() <= 0.0:
        return np.full(len(values), total / len(values))
    return values * (total / values.sum())


def _whole(workload: Workload, passes: _Passes) -> tuple[float, float]:
    """Median milliseconds of the forward, and of loss and backward (0 for inference)."""
    timer = passes.timer

    def once() -> list[float]:
        for parameter in workload.model.parameters():
            parameter.grad = None
        marks = [timer.mark()]
        output = workload.forward()
        marks.append(timer.mark())
        if workload.training:
            (workload.loss or default_loss)(output).backward()
        marks.append(timer.mark())
        timer.finish()
        return differences_ms(marks)

    forward, backward = zip(*passes.run(once), strict=True)
    return statistics.median(forward), statistics.median(backward) if workload.training else 0.0


def _forward_groups(
    workload: Workload, index: GroupIndex, passes: _Passes, cost: NDArray[np.float64], notes: list[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Median milliseconds of every group within whole passes, and of its glue among them; float64[G] each."""
    timer = passes.timer

    def once() -> list[float]:
        start = timer.mark()
        with marked_runs(workload.model, index, timer.mark) as runs:
            workload.forward()
        end = timer.mark()
        timer.finish()
        times = np.zeros((2, index.count))
        if runs:  # what comes before the first cut module is its group's glue
            paths = [runs[0].path, *(run.path for run in runs)]
            glue = [1, *(int(run.glue) for run in runs)]
            stretches = differences_ms([start, *(run.mark for run in runs), end])
            np.add.at(times, (glue, index.assign(paths)), stretches)
        return times.ravel().tolist()

    inside, glue = np.median(np.asarray(passes.run(once)), axis=0).reshape(2, index.count)
    times = inside + glue
    missing = times == 0.0
    if missing.any() and cost[missing].sum() > 0 and not missing.all():
        count = int(missing.sum())
        notes.append(f"{count} groups were not seen to run alone; they get a share of the pass by their cost")
        times[missing] = times.sum() * cost[missing] / max(cost[~missing].sum(), 1.0)
    return (times, glue) if times.sum() > 0 else (cost + 1.0, glue)


def _backward_groups(
    workload: Workload,
    index: GroupIndex,
    passes: _Passes,
    forward: NDArray[np.float64],
    notes: list[str],
) -> NDArray[np.float64]:
    """Median milliseconds of every group's backward, from calls of its modules alone."""
    repeats = min(passes.repeats, 3)
    with captured_calls(workload.model, index) as calls, torch.no_grad():
        workload.model(*workload.args, **workload.kwargs)
    times, failed = np.zeros(index.count), set()
    for call, group in zip(calls, index.assign([call.path for call in calls]), strict=True):
        try:
            times[group] += _repeated_backward_ms(call, passes.timer, repeats)
        except (RuntimeError, TypeError, ValueError):
            failed.add(group)
    if failed:
        notes.append(f"the backward of {len(failed)} groups could not be run alone; it is taken as twice the forward")
        for group in failed:
            times[group] = 2.0 * forward[group]
    return times


def _repeated_backward_ms(call: Call, timer: Timer, repeats: int) -> float:
    """Return the median of a call's backward after one for warming up; of a long one, that one."""
    start = time.perf_counter()
    first = _backward_ms(call, timer)
    if time.perf_counter() - start > _LONG_CALL_S:
        return first
    return statistics.median(_backward_ms(call, timer) for _ in range(repeats))


def _backward_ms(call: Call, timer: Timer) -> float:
    """Run one call again with gradients on and time its backward alone."""
    leaves: list[torch.Tensor] = []

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1].clone()  # not a leaf itself: the module may change it in place

    with torch.enable_grad():
        args, kwargs = pytree.tree_map_only(torch.Tensor, leaf, (call.args, call.kwargs))
        output = call.module(*args, **kwargs)
        outputs = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
        inputs = [*leaves, *(p for p in call.module.parameters() if p.requires_grad)]
        if not outputs or not inputs:
            return 0.0
        gradients = [torch.ones_like(t) for t in outputs]
        marks = [timer.mark()]
        torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
        marks.append(timer.mark())
        timer.finish()
    return differences_ms(marks)[0]
