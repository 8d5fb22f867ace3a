"""Latency and bandwidth between the devices of this machine, measured by real copies.

Between core groups: a thread pinned to the source's cores writes a buffer, then one pinned to the target's copies it,
so the bytes really come from where they were made. A border between stages also costs the hand-over from thread to
thread (half a round trip through two queues), which is added to the latency.
With a GPU: a copy from or to pinned memory, or from GPU to GPU, timed by CUDA events; the hand-over is what the host
spends beside it on launching a small copy and waiting for it.

Medians over sizes are fitted by latency + bytes / bandwidth → `fit_link`. Knows nothing of links between hosts.
"""

from __future__ import annotations

import queue
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol

import torch

from autoplace.errors import InputError
from autoplace.hardware._pinned import PinnedThread
from autoplace.hardware.cluster import Device, Link

__all__ = ["fit_link", "measure_links"]

_SIZES_BYTES = (1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 24)
_ROUND_TRIPS = 50
_MIN_REPEATS, _MAX_REPEATS = 3, 30
# Above this many devices, pairs of the same two kinds are taken to be alike and one of them is measured.
_MAX_MEASURED_ONE_BY_ONE = 4

Progress = Callable[[int, int, str], None]
Pair = tuple[Device, Device]


class _Route(Protocol):
    """One way between two devices, ready to be timed."""

    def handover_ms(self) -> float:
        """Return what a transfer costs beside the bytes, ms."""

    def copy_ms(self, num_bytes: int) -> Callable[[], float]:
        """Return a call that copies once and returns the time, ms."""


def measure_links(
    devices: Sequence[Device], *, budget_s: float = 1.5, progress: Progress | None = None
) -> dict[tuple[str, str], Link]:
    """Measure the directed link between every two devices of the same host, on this machine.

    Args:
        devices: Devices of this machine, `cpu` ones with their cores; pairs across hosts are left out.
        budget_s: Seconds to spend in all; each size of each pair is copied three times at least.
        progress: Called with (pairs done, pairs in all, `source -> target`).

    Returns:
        (source name, target name) to link.

    Raises:
        ExecutionError: If a core group names cores that this process may not use.
    """
    pairs = [(s, t) for s in devices for t in devices if s is not t and s.host == t.host]
    alike: dict[tuple[str, str], list[Pair]] = {}
    for source, target in pairs:
        one_by_one = len(devices) <= _MAX_MEASURED_ONE_BY_ONE
        key = (source.name, target.name) if one_by_one else (source.kind, target.kind)
        alike.setdefault(key, []).append((source, target))
    links: dict[tuple[str, str], Link] = {}
    threads_before = torch.get_num_threads()
    try:
        with ExitStack() as stack:
            workers = {d.name: stack.enter_context(PinnedThread(d.name, d.cores)) for d in devices if d.kind == "cpu"}
            for done, group in enumerate(alike.values()):
                source, target = group[0]
                if progress:
                    progress(done, len(alike), f"{source.name} -> {target.name}")
                link = _measure(_route(source, target, workers), budget_s / len(alike))
                links.update({(s.name, t.name): link for s, t in group})
    finally:
        torch.set_num_threads(threads_before)
    if progress:
        progress(len(alike), len(alike), "links measured")
    return {(s.name, t.name): links[s.name, t.name] for s, t in pairs}


def fit_link(sizes_bytes: Sequence[float], times_ms: Sequence[float], *, handover_ms: float = 0.0) -> Link:
    """Fit times by latency + bytes / bandwidth: least squares of the relative errors, neither term negative.

    Relative, because times span four orders of magnitude and the largest would alone decide otherwise.

    Args:
        sizes_bytes: Bytes per copy, two different sizes or more.
        times_ms: Time of each, ms, above 0.
        handover_ms: Added to the fitted latency, ms.

    Raises:
        InputError: If there are fewer than two different sizes, or a time is not above 0.
    """
    if len(set(sizes_bytes)) < 2 or len(sizes_bytes) != len(times_ms) or min(times_ms) <= 0:
        raise InputError("a link is fitted to times above 0 of two different sizes or more; measure again")
    # Weights relative to the fastest, and sums about the means: the plain sums cancel where one time is far smaller.
    rows = [((min(times_ms) / t) ** 2, x, t) for x, t in zip(sizes_bytes, times_ms, strict=True)]
    total = sum(w for w, _, _ in rows)
    mean_x, mean_t = sum(w * x for w, x, _ in rows) / total, sum(w * t for w, _, t in rows) / total
    spread = sum(w * (x - mean_x) ** 2 for w, x, _ in rows)
    slope = sum(w * (x - mean_x) * (t - mean_t) for w, x, t in rows) / spread if spread > 0 else 0.0
    latency_ms = mean_t - slope * mean_x
    if latency_ms < 0:
        latency_ms, slope = 0.0, sum(w * x * t for w, x, t in rows) / sum(w * x * x for w, x, _ in rows)
    if slope <= 0:
        # Times that do not grow with size: the largest copy alone bounds the bandwidth from below.
        most_bytes, its_ms = max(zip(sizes_bytes, times_ms, strict=True))
        latency_ms, slope = min(times_ms), its_ms / most_bytes
    return Link(latency_ms=latency_ms + handover_ms, bytes_per_ms=1.0 / slope)


def _measure(route: _Route, budget_s: float) -> Link:
    handover_ms = route.handover_ms()
    medians = []
    for num_bytes in _SIZES_BYTES:
        copy = route.copy_ms(num_bytes)
        copy()  # the first touches fresh pages
        samples: list[float] = []
        end = time.perf_counter() + budget_s / len(_SIZES_BYTES)
        while len(samples) < _MIN_REPEATS or (len(samples) < _MAX_REPEATS and time.perf_counter() < end):
            samples.append(copy())
        medians.append(max(statistics.median(samples), 1e-6))
    return fit_link(_SIZES_BYTES, medians, handover_ms=handover_ms)


def _route(source: Device, target: Device, workers: dict[str, PinnedThread]) -> _Route:
    if source.kind == target.kind == "cpu":
        return _BetweenCoreGroups(workers[source.name], workers[target.name])
    near = workers.get(source.name) or workers.get(target.name) or next(iter(workers.values()))
    return _WithGpu(_torch_device(source), _torch_device(target), near)


def _torch_device(device: Device) -> torch.device:
    return torch.device("cpu" if device.kind == "cpu" else device.name.split("/", 1)[1])


class _BetweenCoreGroups:
    """Host memory, written by one pinned thread and copied by another."""

    def __init__(self, source: PinnedThread, target: PinnedThread) -> None:
        self._source, self._target = source, target

    def handover_ms(self) -> float:
        """Return half the median round trip through the two threads' queues, ms."""
        back: queue.SimpleQueue[None] = queue.SimpleQueue()

        def round_trip_ms() -> float:
            start = time.perf_counter()
            self._target.post(lambda: back.put(None))
            back.get()
            return (time.perf_counter() - start) * 1e3

        return self._source.run(lambda: statistics.median(round_trip_ms() for _ in range(_ROUND_TRIPS))) / 2

    def copy_ms(self, num_bytes: int) -> Callable[[], float]:
        """Return a call that writes at the source, copies at the target and returns the copy's time, ms."""
        written = self._source.run(lambda: torch.zeros(num_bytes, dtype=torch.uint8))
        received = self._target.run(lambda: torch.zeros(num_bytes, dtype=torch.uint8))

        def receive() -> float:
            start = time.perf_counter()
            received.copy_(written)
            return (time.perf_counter() - start) * 1e3

        def copy() -> float:
            self._source.run(lambda: written.add_(1))
            return self._target.run(receive)

        return copy


class _WithGpu:
    """A copy with a GPU at one end or at both, launched by a thread on the cores of the host's end."""

    def __init__(self, source: torch.device, target: torch.device, near: PinnedThread) -> None:
        self._source, self._target, self._near = source, target, near
        # torch copies between GPUs on the source's stream.
        self._gpu = source if source.type == "cuda" else target

    def handover_ms(self) -> float:
        """Return the median of what launching and awaiting a small copy costs beside the copy itself, ms."""
        copy = self.copy_ms(_SIZES_BYTES[0])

        def beside_ms() -> float:
            start = time.perf_counter()
            copied_ms = copy()
            return (time.perf_counter() - start) * 1e3 - copied_ms

        copy()
        return max(0.0, statistics.median(beside_ms() for _ in range(_ROUND_TRIPS)))

    def copy_ms(self, num_bytes: int) -> Callable[[], float]:
        """Return a call that copies once and returns the time between two CUDA events, ms."""

        def buffer(device: torch.device) -> torch.Tensor:
            return torch.zeros(num_bytes, dtype=torch.uint8, device=device, pin_memory=device.type == "cpu")

        sent, received = self._near.run(lambda: buffer(self._source)), self._near.run(lambda: buffer(self._target))

        def copy() -> float:
            with torch.cuda.device(self._gpu):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                received.copy_(sent, non_blocking=True)
                end.record()
                end.synchronize()
                return float(start.elapsed_time(end))

        return lambda: self._near.run(copy)
