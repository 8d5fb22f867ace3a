"""What a pass over n samples adds to the memory that a process holds, and how many samples a device has room for.

    room       = memory of the device - what its process holds at rest - a reserve            → `resting_bytes`
    footprint  = gradients + n · activations of a sample, as the graph has them               → `Footprint.of_graph`
               | the line through the peaks of passes that ran                                → `measure_footprint`
    samples    = the batch, or its half, its quarter, …: the most whose footprint fits        → `Footprint.samples_in`

A process that exceeds the limit of its control group is killed: there is no error to catch, so what may not fit is
never tried. A graph counts every op's result, of which autograd keeps some alone, and nothing of the heap's gaps: 0.8
to 2.6 times what a pass takes [measured: transformers' bert, gpt2, llama, t5, vit at 32 samples, and a chain of linear
layers, CPU, glibc, 2026-11]. Where that does not fit, passes of 2, 4, 8, … samples are measured, each one only when the
line through those before it says that it fits.

A CPU's memory is what its process may hold in all, as a control group counts it. At rest that process holds the
interpreter, its libraries and the model, which every rank has whole. GPUs are left out: what does not fit there raises.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from autoplace.costs.measure import smaller_batch
from autoplace.graph.opgraph import OpGraph
from autoplace.graph.preserve import preserve_model
from autoplace.hardware.cgroups import memory_held_bytes
from autoplace.hardware.cluster import Cluster, Device
from autoplace.measure.memory import PeakMemory, give_back, process_bytes
from autoplace.problem import Problem
from autoplace.runtime.worker import DeviceWorker
from autoplace.simulate.stage_line import forward_ops
from autoplace.workload import Workload

__all__ = ["Footprint", "few_samples", "measure_footprint", "resting_bytes", "samples_on", "scaled_activations"]

_GROWTH_BYTES = 48 << 20
"""What exported programs, connections, and pieces of the heap add to a rank while it measures plans: 8 to 46 MB
[measured: two ranks, nine plans of a small and of a large batch, CPU, 2026-11]."""
_PLANNER_BYTES = 48 << 20
"""What strategies and their compiled loops add to the rank that plans: 38 to 48 MB [measured: the same]."""
_SLACK = 0.1
"""Part of the room that is left free: peaks of one pass differ by up to 8 % from each other [measured: the same]."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that a pass adds, as a line over its samples."""

    fixed_bytes: float
    sample_bytes: float
    measured: bool = False
    """Whether passes ran for it."""

    @staticmethod
    def of_graph(graph: OpGraph, batch: int, *, training: bool) -> Footprint:
        """Return the estimate from a graph.

        Args:
            graph: Of the forward pass of a whole batch.
            batch: Its samples.
            training: Whether there are gradients.
        """
        weights = float(graph.weight_bytes.sum()) if training else 0.0
        return Footprint(fixed_bytes=weights, sample_bytes=float(graph.activation_bytes.sum()) / batch)

    @staticmethod
    def through(peaks: list[tuple[int, float]]) -> Footprint:
        """Return the line through the last two peaks, (samples, bytes); of one peak, a line from zero."""
        (size, peak), (smaller, lower) = peaks[-1], peaks[-2] if len(peaks) > 1 else (0, 0.0)
        slope = max(0.0, (peak - lower) / (size - smaller))
        return Footprint(fixed_bytes=peak - slope * size, sample_bytes=slope, measured=True)

    def bytes_of(self, samples: float) -> float:
        """Return what so many samples add."""
        return self.fixed_bytes + self.sample_bytes * samples

    def samples_in(self, room_bytes: float, batch: int) -> int:
        """Return the batch, or the largest of its halves, quarters, … that fits; 0 where not even one sample does."""
        size = batch
        while size and self.bytes_of(size) > room_bytes:
            size //= 2
        return size


def resting_bytes(device: Device, *, ranks: int = 1, planner: bool = False) -> float:
    """Return the bytes of a CPU that plans cannot have: what this process holds now, and a reserve.

    Args:
        device: That this process runs, whose memory is what it may hold.
        ranks: Processes that share this host's limit, all much alike.
        planner: Whether this process will plan.
    """
    _tidy()
    held = max(process_bytes(), memory_held_bytes() / ranks) + _GROWTH_BYTES + (_PLANNER_BYTES if planner else 0)
    return held + _SLACK * max(0.0, device.memory_bytes - held)


def measure_footprint(workload: Workload, device: Device, room_bytes: float, guess: Footprint) -> Footprint:
    """Run passes of ever more samples on a CPU, as long as they are sure to fit, and return the line that they give.

    Args:
        workload: Model, inputs of the whole batch, and mode.
        device: Of this process.
        room_bytes: That the passes may add.
        guess: By which the first pass has to fit.

    Returns:
        The guess where nothing may run, or nothing can be learnt from what ran.

    Raises:
        Exception: Whatever the model raises.
    """
    batch = workload.batch_size
    size = next((n for n in (2, 1) if n <= batch and guess.bytes_of(n) <= room_bytes), 0)
    if not size:
        return guess
    worker = DeviceWorker(device)

    def run() -> Footprint:
        with preserve_model(workload.model), workload.mode():
            return _climbed(lambda n: _peak_bytes(smaller_batch(workload, n)), size, batch, room_bytes, guess)

    try:
        return worker.run(run)
    finally:
        worker.close()
        _tidy()


def _climbed(
    peak_bytes: Callable[[int], float], size: int, batch: int, room_bytes: float, guess: Footprint
) -> Footprint:
    peaks: list[tuple[int, float]] = []
    found = guess
    while size <= batch and (not peaks or found.bytes_of(size) <= room_bytes):
        peak = peak_bytes(size)
        if peak <= 0.0:  # a system that does not tell
            return guess
        peaks.append((size, peak))
        found = Footprint.through(peaks)
        size *= 2
    return found


def _peak_bytes(workload: Workload) -> float:
    """Return what two passes add at most: the second finds a heap that the first has left in pieces."""
    memory = PeakMemory()
    memory.begin(trim=True)
    for _ in range(2):
        for parameter in workload.model.parameters():
            parameter.grad = None
        workload.step()
    memory.end()
    for parameter in workload.model.parameters():
        parameter.grad = None
    return memory.host_bytes


def scaled_activations(graph: OpGraph, batch: int, sample_bytes: float) -> OpGraph:
    """Return a graph whose activations add up to what passes were measured to take a sample.

    Args:
        graph: Of the forward pass of a whole batch.
        batch: Its samples.
        sample_bytes: Measured.
    """
    total = float(graph.activation_bytes.sum())
    if total <= 0.0:
        return graph
    scaled = np.ceil(graph.activation_bytes * (sample_bytes * batch / total)).astype(graph.activation_bytes.dtype)
    return replace(graph, activation_bytes=scaled)


def samples_on(problem: Problem, device: str) -> int:
    """Return how many samples of a problem's batch the whole model can run on one device, in halves of the batch.

    Args:
        problem: As `profile_cluster` leaves it.
        device: Its name.
    """
    graph = problem.graph
    count, training = forward_ops(graph)
    weights = float(graph.weight_bytes[:count].sum())
    resting = problem.resting_bytes.get(device)
    fixed = (weights if training else 0.0) + (weights if resting is None else 0.0)
    footprint = Footprint(
        fixed_bytes=fixed, sample_bytes=float(graph.activation_bytes[:count].sum()) / problem.batch_size
    )
    memory_bytes = problem.cluster.devices[problem.cluster.index[device]].memory_bytes
    return footprint.samples_in(memory_bytes - (resting or 0.0), problem.batch_size)


def few_samples(workload: Workload, cluster: Cluster) -> Workload:
    """Return what may run before anything is known of memory: two samples where it is limited, else the whole batch.

    Args:
        workload: Of the whole batch.
        cluster: The ranks' devices; all ranks get the same.
    """
    limited = any(d.kind == "cpu" and not math.isinf(d.memory_bytes) for d in cluster.devices)
    return smaller_batch(workload, min(2, workload.batch_size)) if limited else workload


def _tidy() -> None:
    gc.collect()
    give_back()
