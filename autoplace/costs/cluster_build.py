"""`profile_cluster`: every rank measures the groups on its own device; together they make one Problem.

    profile       times of the groups in the proportions of single passes            → `costs.measure.profile_groups`
    steady pace   mean time of passes that follow each other for seconds             → `steady_ms`
    latency     = profile · pace, with pace = steady time / the profile's whole pass

The second step is there because ranks may live under a quota of CPU time: a cgroup lets a process run for a part of
each 100 ms and then stops it, which a median of short passes does not see. A mean over many such periods does. All
ranks measure at the same time, as they will train, so that devices of one host slow each other as they will then.

A rank whose memory has no room for a pass of the whole batch measures one of fewer samples (→ `footprint`), and what
it found of activations counts in the problem. Ranks that have no room for one sample get estimates from one that has
(→ `roofline`); any other failure of one rank is raised on all of them. Nothing is cached: quotas and neighbours change.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from autoplace.costs.build import CostReport, mirrored
from autoplace.costs.footprint import Footprint, measure_footprint, resting_bytes, scaled_activations
from autoplace.costs.measure import GroupTimes, on_device, profile_groups, smaller_batch
from autoplace.costs.roofline import assumed_peaks, scaled_ms
from autoplace.costs.timers import Timer, differences_ms
from autoplace.errors import InputError
from autoplace.graph.backward import with_backward
from autoplace.graph.coarsen import Grouping
from autoplace.graph.preserve import preserve_model
from autoplace.graph.program_order import in_program_order
from autoplace.hardware.cluster import Cluster, Device
from autoplace.measure.memory import HeapLine, give_back
from autoplace.problem import Objective, Problem, Semantics
from autoplace.runtime.worker import DeviceWorker, torch_device
from autoplace.workload import Workload, default_loss

if TYPE_CHECKING:
    from autoplace.runtime.distributed.session import Session

__all__ = ["profile_cluster", "steady_ms"]

_WINDOW_S = 0.5
"""Five periods of a cgroup's quota: what the window's ends cut off is less than its fifth."""
_WINDOWS = 4
_STEADY_S = 4.0
"""After which no further window begins: the windows of slow hosts are long passes, which average by themselves."""
_MOST_PACE = 100.0
"""A pace beyond this is no quota but an accident, and so is one below its inverse."""


@dataclass(frozen=True, kw_only=True)
class _Room:
    """What memory allows a rank."""

    samples: int = 0
    """That a pass may have; 0 = none at all."""
    resting_bytes: float | None = None
    """See `Problem`; None where memory is not limited, or raises."""
    footprint: Footprint | None = None
    """Measured, where the graph's estimate does not fit."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Measured:
    """What one rank found; all that travels."""

    device: str
    times: GroupTimes | None
    """None where the model does not fit on the device."""
    pace: float = 1.0
    why: str = ""
    """Why there are no times."""
    room: _Room = _Room()


def profile_cluster(
    workload: Workload,
    grouping: Grouping,
    session: Session,
    *,
    objective: Objective | None = None,
    semantics: Semantics | None = None,
    name: str = "",
    repeats: int = 5,
    window_s: float = _WINDOW_S,
) -> tuple[Problem, CostReport]:
    """Measure every group on every rank's device; every rank has to call it.

    Args:
        workload: Model, inputs of the whole batch, and mode; the same on every rank.
        grouping: Groups of the model's graph; the same on every rank.
        session: The ranks.
        objective: What the problem asks for; None = latency.
        semantics: How time passes; None = the defaults.
        name: The problem's name; empty = the workload's.
        repeats: Passes to take medians over.
        window_s: Seconds of each of the windows in which passes follow each other; 0 leaves the steady pace out.

    Returns:
        The problem over the groups in program order (`with_backward` in training) and the session's cluster, the same
        on all ranks, and where its figures come from. A device that no rank runs can run nothing.

    Raises:
        ExecutionError: If a rank fails to measure, or the ranks have different models or batches.
        InputError: If the model fits on none of the devices.
    """
    graph = grouping.graph
    session.agree(
        {
            "the model's groups": graph.fingerprint,
            "the batch size": str(workload.batch_size),
            "training": str(workload.training),
        },
        what="the ranks do not measure the same",
    )
    device = session.device
    room = session.together(lambda: _room(workload, grouping, session))
    times, samples, why = session.together(lambda: _profiled(workload, grouping, device, repeats, room.samples))
    # All have profiled: from here on everybody runs passes at the same time.
    pace = session.together(lambda: _pace(workload, device, times, samples, window_s))
    found = session.gather(_Measured(device=device.name, times=times, pace=pace, why=why, room=room))

    def assemble() -> tuple[Problem, CostReport] | None:
        if session.rank != 0:
            return None
        return _assembled(
            workload, grouping, session.cluster, found, objective=objective, semantics=semantics, name=name
        )

    return session.broadcast(session.together(assemble))


def steady_ms(workload: Workload, device: Device, *, window_s: float = _WINDOW_S, windows: int = _WINDOWS) -> float:
    """Measure one whole pass while passes follow each other without a pause: the median of the windows' means, ms.

    Args:
        workload: Model, inputs and mode.
        device: Of this machine.
        window_s: Least seconds of a window; longer passes make longer ones.
        windows: How many, at most; fewer where they take long.

    Raises:
        ExecutionError: If the device is not on this machine.
        Exception: Whatever the model raises there.
    """
    worker = DeviceWorker(device)

    def run() -> float:
        local = on_device(workload, torch_device(device))
        timer = Timer(torch_device(device))
        heap = HeapLine.of(device)
        with preserve_model(local.model), local.mode():
            start = time.perf_counter()
            _pass(local)
            found = [_window_ms(local, timer, window_s, heap)]
            while len(found) < windows and time.perf_counter() - start < _STEADY_S:
                found.append(_window_ms(local, timer, window_s, heap))
            return statistics.median(found)

    try:
        return worker.run(run)
    finally:
        worker.close()
        give_back()


def _window_ms(workload: Workload, timer: Timer, window_s: float, heap: HeapLine) -> float:
    """Return the mean time of a pass over a window, ms; the window ends early where the heap has grown too far."""
    heap.keep()
    passes, start = 0, time.perf_counter()
    marks = [timer.mark()]
    while passes == 0 or (time.perf_counter() - start < window_s and not heap.crossed()):
        _pass(workload)
        passes += 1
        if timer.cuda:
            timer.finish()  # or the host would run far ahead of the device
    marks.append(timer.mark())
    timer.finish()
    return differences_ms(marks)[0] / passes


def _pass(workload: Workload) -> None:
    for parameter in workload.model.parameters():
        parameter.grad = None
    output = workload.forward()
    if workload.training:
        (workload.loss or default_loss)(output).backward()


def _room(workload: Workload, grouping: Grouping, session: Session) -> _Room:
    """Return how many samples this rank may run, by the graph, else by passes that are sure to fit."""
    device, batch = session.device, workload.batch_size
    if device.kind != "cpu" or math.isinf(device.memory_bytes):
        return _Room(samples=batch)
    neighbours = sum(other.host == device.host and other.kind == "cpu" for other in session.cluster.devices)
    resting = resting_bytes(device, ranks=neighbours, planner=session.rank == 0)
    left = device.memory_bytes - resting
    guess = Footprint.of_graph(grouping.graph, batch, training=workload.training)
    if guess.samples_in(left, batch) == batch:
        return _Room(samples=batch, resting_bytes=resting)
    found = measure_footprint(workload, device, left, guess)
    return _Room(
        samples=found.samples_in(left, batch),
        resting_bytes=resting,
        footprint=found if found.measured else None,
    )


def _profiled(
    workload: Workload, grouping: Grouping, device: Device, repeats: int, samples: int
) -> tuple[GroupTimes | None, int, str]:
    """Return the groups' times and the samples of a pass, or in words why the device cannot hold the model."""
    why = f"{device.memory_bytes:.3g} bytes have no room for a pass of one sample"
    while samples:
        try:
            return profile_groups(workload, grouping, device, repeats=repeats, samples=samples), samples, ""
        except torch.OutOfMemoryError as error:
            why = str(error).strip().splitlines()[0]
            samples //= 2
        finally:
            give_back()
    return None, 0, why


def _pace(workload: Workload, device: Device, times: GroupTimes | None, samples: int, window_s: float) -> float:
    if times is None or window_s <= 0.0 or times.total_ms <= 0.0:
        return 1.0
    share = samples / workload.batch_size
    fixed_ms = float(times.forward_overhead_ms.sum())
    if times.backward_overhead_ms is not None:
        fixed_ms += float(times.backward_overhead_ms.sum())
    part_ms = fixed_ms + share * (times.total_ms - fixed_ms)
    pace = steady_ms(smaller_batch(workload, samples), device, window_s=window_s) / part_ms
    return pace if 1.0 / _MOST_PACE < pace < _MOST_PACE else 1.0


def _assembled(
    workload: Workload,
    grouping: Grouping,
    cluster: Cluster,
    found: list[_Measured],
    *,
    objective: Objective | None,
    semantics: Semantics | None,
    name: str,
) -> tuple[Problem, CostReport]:
    """Put what the ranks found together, in the cluster's order."""
    by_device = {measured.device: measured for measured in found}
    able = [measured for measured in found if measured.times is not None]
    if not able:
        raise InputError(f"the model fits on none of the devices ({found[0].why}); use a smaller batch to measure with")
    forward = in_program_order(grouping.graph)
    footprints = [measured.room.footprint for measured in found if measured.room.footprint is not None]
    if footprints:
        sample_bytes = max(footprint.sample_bytes for footprint in footprints)
        forward = scaled_activations(forward, workload.batch_size, sample_bytes)
    graph = with_backward(forward) if workload.training else forward
    latency, overhead, labels, notes, total = [], [], [], [], {}
    for device in cluster.devices:
        measured = by_device.get(device.name)
        if measured is None:
            latency.append(np.full(graph.num_ops, np.inf))
            overhead.append(np.zeros(graph.num_ops))
            labels.append("estimated")
            notes.append(f"no process runs {device.name}; nothing is placed there")
            continue
        if measured.times is None:
            reference = able[0]
            columns = _estimated(grouping, reference, cluster, device)
            labels.append("estimated")
            notes.append(f"latencies on {device.name} are estimated from {reference.device} ({measured.why})")
        else:
            columns = _columns(measured)
            labels.append("measured")
            notes += [f"{device.name}: {note}" for note in measured.times.notes]
        latency.append(columns[0])
        overhead.append(columns[1])
        total[device.name] = float(columns[0].sum())
    problem = Problem(
        graph=graph,
        cluster=cluster,
        latency_ms=np.stack(latency, axis=1),
        overhead_ms=np.stack(overhead, axis=1),
        objective=objective or Objective(),
        semantics=semantics or Semantics(),
        name=name or workload.name,
        batch_size=workload.batch_size,
        resting_bytes={m.device: m.room.resting_bytes for m in found if m.room.resting_bytes is not None},
    )
    report = CostReport(
        labels=np.repeat(np.asarray(labels)[None, :], grouping.graph.num_ops, axis=0),
        total_ms=total,
        notes=tuple(dict.fromkeys(notes)),
    )
    return problem, report


def _columns(measured: _Measured) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return latency and overhead of every op on a rank's device, float64[N] each: its profile at its steady pace."""
    times = measured.times
    assert times is not None  # the caller looked
    return (
        measured.pace * mirrored(times.forward_ms, times.backward_ms),
        measured.pace * mirrored(times.forward_overhead_ms, times.backward_overhead_ms),
    )


def _estimated(
    grouping: Grouping, reference: _Measured, cluster: Cluster, device: Device
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Carry a rank's times over to a device by assumed peaks; overheads keep their part of the latency."""
    times, graph = reference.times, grouping.graph
    assert times is not None  # it is one that measured
    here, there = assumed_peaks(cluster.devices[cluster.index[reference.device]]), assumed_peaks(device)
    ratio = (
        scaled_ms(np.ones(graph.num_ops), graph, here, there)
        if graph.flops.any()
        else np.full(graph.num_ops, here.flops_per_ms / there.flops_per_ms)
    )
    whole = mirrored(ratio, None if times.backward_ms is None else ratio)
    latency, overhead = _columns(reference)
    return latency * whole, overhead * whole
