"""`build_problem`: from a workload and a cluster to a Problem, every group's latency measured where it can be.

The graph is that of the groups in program order, as the executors run them (→ `graph.program_order`).

Devices of the same kind, model and number of cores on this host share one measurement. A device that is not here, or
on which the model cannot run, gets an estimate (→ `roofline`) and is labelled so. Measurements are cached by everything
that changes them (→ `cache`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

from autoplace.costs import cache
from autoplace.costs.measure import GroupTimes, measure_total_ms, profile_groups
from autoplace.costs.roofline import Peaks, assumed_peaks, measure_peaks, scaled_ms
from autoplace.errors import AutoplaceError, InputError
from autoplace.graph.backward import with_backward
from autoplace.graph.coarsen import Grouping
from autoplace.graph.program_order import in_program_order
from autoplace.hardware.cluster import Cluster, Device
from autoplace.hardware.cores import cpu_model
from autoplace.problem import Objective, Problem, Semantics
from autoplace.runtime.worker import DeviceWorker
from autoplace.workload import Workload

__all__ = ["CostReport", "build_problem", "mirrored"]

Progress = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps in all)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CostReport:
    """Where a problem's latencies come from."""

    labels: NDArray[np.str_]
    """str[G, D], `measured` or `estimated`, per group of the forward graph and device."""
    total_ms: dict[str, float] = field(default_factory=dict)
    """Device name to the latency of one whole pass there, ms."""
    cache_hits: int = 0
    """Measurements that an earlier run had made."""
    notes: tuple[str, ...] = ()
    """What the user should know, in sentences."""


def build_problem(
    workload: Workload,
    grouping: Grouping,
    cluster: Cluster,
    *,
    objective: Objective | None = None,
    semantics: Semantics | None = None,
    name: str = "",
    progress: Progress | None = None,
    use_cache: bool = True,
    repeats: int = 5,
) -> tuple[Problem, CostReport]:
    """Measure or estimate every group on every device.

    Args:
        workload: Model, inputs and mode.
        grouping: Groups of the model's graph.
        cluster: The devices. The host of its first device is taken for this machine.
        objective: What the problem asks for; None = latency.
        semantics: How time passes; None = the defaults.
        name: The problem's name; empty = the workload's.
        progress: Told after every measurement.
        use_cache: Whether measurements of an earlier run may be used; new ones are kept anyhow.
        repeats: Passes to take medians over.

    Returns:
        The problem over the groups in program order (`with_backward` in training), and where its figures come from.

    Raises:
        InputError: If the model runs on none of the devices that are here.
    """
    builder = _Builder(workload, grouping, cluster, use_cache, repeats, progress)
    times, labels = builder.times(), builder.labels
    graph = in_program_order(grouping.graph)
    graph = with_backward(graph) if workload.training else graph
    problem = Problem(
        graph=graph,
        cluster=cluster,
        latency_ms=np.stack([mirrored(t.forward_ms, t.backward_ms) for t in times], axis=1),
        overhead_ms=np.stack([mirrored(t.forward_overhead_ms, t.backward_overhead_ms) for t in times], axis=1),
        objective=objective or Objective(),
        semantics=semantics or Semantics(),
        name=name or workload.name,
        batch_size=workload.batch_size,
        thread_scale=builder.thread_scale(times),
    )
    report = CostReport(
        labels=np.repeat(np.asarray(labels)[None, :], grouping.graph.num_ops, axis=0),
        total_ms={device.name: t.total_ms for device, t in zip(cluster.devices, times, strict=True)},
        cache_hits=builder.hits,
        notes=tuple(dict.fromkeys(builder.notes)),
    )
    return problem, report


def mirrored(forward: NDArray[np.float64], backward: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """In the order of `with_backward`: forward, the loss (0), backward mirrored."""
    return forward if backward is None else np.concatenate([forward, [0.0], backward[::-1]])


class _Builder:
    """The measurements of one call of `build_problem`."""

    def __init__(
        self,
        workload: Workload,
        grouping: Grouping,
        cluster: Cluster,
        use_cache: bool,
        repeats: int,
        progress: Progress | None,
    ) -> None:
        self.workload, self.grouping, self.cluster = workload, grouping, cluster
        self.use_cache, self.repeats, self.progress = use_cache, repeats, progress
        self.devices = cluster.devices
        self.labels = ["estimated"] * len(self.devices)
        self.notes: list[str] = []
        self.hits = 0
        self.local = [_is_local(device, cluster) for device in self.devices]
        self.here = [d for d, local in zip(self.devices, self.local, strict=True) if local]
        self.host_cores = sorted({core for device in self.here for core in device.cores})
        self.done, self.steps = 0, len({_kind(device) for device in self.here}) + int(self._wide_device() is not None)

    def times(self) -> list[GroupTimes]:
        """The times of every device, in the cluster's order."""
        measured: dict[tuple[Any, ...], GroupTimes | str] = {}
        for device in self.here:
            if _kind(device) not in measured:
                measured[_kind(device)] = self._measure(device)
        if not any(isinstance(times, GroupTimes) for times in measured.values()):
            why = next(
                (text for text in measured.values() if isinstance(text, str)), "no device of the cluster is here"
            )
            raise InputError(f"the model runs on none of the devices of this machine ({why}); check inputs and cluster")
        reference = next(d for d in self.devices if isinstance(measured.get(_kind(d)), GroupTimes))
        result = []
        for index, (device, here) in enumerate(zip(self.devices, self.local, strict=True)):
            times = measured.get(_kind(device))
            if isinstance(times, GroupTimes):
                self.labels[index] = "measured" if here else "estimated"
                if not here:
                    self.notes.append(
                        f"{device.name} is not on this machine; it is taken to be as fast as its like here"
                    )
                result.append(times)
            else:
                base = measured[_kind(reference)]
                assert isinstance(base, GroupTimes)
                result.append(self._estimate(device, here, times or "it is not on this machine", reference, base))
        return result

    def _measure(self, device: Device) -> GroupTimes | str:
        """Measured or cached times, or in words why there are none."""
        key = cache.cache_key(self._facts(device) | {"groups": self.grouping.graph.fingerprint})
        times = _times_from_json(cache.load(key), self.grouping.graph.num_ops) if self.use_cache else None
        if times is not None:
            self.hits += 1
        else:
            try:
                times = profile_groups(self.workload, self.grouping, device, repeats=self.repeats)
            except Exception as error:
                self._step(f"{device.name} cannot run the model")
                return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            cache.store(key, _times_to_json(times))
        self.notes += [f"{device.name}: {note}" for note in times.notes]
        self._step(f"measured {device.name}")
        return times

    def _estimate(self, device: Device, here: bool, why: str, reference: Device, base: GroupTimes) -> GroupTimes:
        here_peaks, its_peaks = _peaks(reference), _peaks(device) if here else None
        source = "measured peaks"
        if its_peaks is None:  # two assumptions keep their proportion; an assumption against a measurement would not
            source, here_peaks, its_peaks = "assumed peaks", assumed_peaks(reference), assumed_peaks(device)
        elif here_peaks is None:
            here_peaks = assumed_peaks(reference)
        self.notes.append(f"latencies on {device.name} are estimated from {reference.name} by {source} ({why})")
        graph = self.grouping.graph

        def carried(values: NDArray[np.float64]) -> NDArray[np.float64]:
            if not graph.flops.any():  # one op of unknown cost
                return values * float(here_peaks.flops_per_ms / its_peaks.flops_per_ms)
            return scaled_ms(values, graph, here_peaks, its_peaks)

        forward = carried(base.forward_ms)
        backward = None if base.backward_ms is None else carried(base.backward_ms)
        launch = np.minimum(its_peaks.launch_ms, forward)
        return GroupTimes(
            forward_ms=forward,
            backward_ms=backward,
            forward_overhead_ms=launch,
            backward_overhead_ms=None if backward is None else np.minimum(its_peaks.launch_ms, backward),
            total_ms=float(forward.sum() + (0.0 if backward is None else backward.sum())),
        )

    def _wide_device(self) -> Device | None:
        """The first CPU device here that has fewer cores than its host, if there is one."""
        fewer = (d for d in self.here if d.kind == "cpu" and 0 < len(d.cores) < len(self.host_cores))
        return next(fewer, None)

    def thread_scale(self, times: list[GroupTimes]) -> dict[str, dict[int, float]]:
        """The whole model on all cores of the host, relative to one core group, for every CPU device like it."""
        device = self._wide_device()
        if device is None or self.labels[self.cluster.index[device.name]] != "measured":
            return {}
        threads = len(self.host_cores)
        key = cache.cache_key(self._facts(device) | {"threads": threads})
        found = cache.load(key) if self.use_cache else None
        total = found.get("total_ms") if found else None
        if isinstance(total, int | float) and total > 0:
            self.hits += 1
        else:
            try:
                total = measure_total_ms(self.workload, device, threads=threads, repeats=self.repeats)
            except Exception as error:
                self.notes.append(f"{threads} threads on {device.name} could not be measured ({type(error).__name__})")
                return {}
            cache.store(key, {"total_ms": total})
        self._step(f"measured {threads} threads on {device.name}")
        ratio = total / times[self.cluster.index[device.name]].total_ms
        return {d.name: {threads: float(ratio)} for d in self.here if _kind(d) == _kind(device)}

    def _facts(self, device: Device) -> dict[str, Any]:
        """All that changes a measurement on a device, besides the groups."""
        loss = self.workload.loss if self.workload.training else None
        leaves = pytree.tree_leaves((self.workload.args, dict(self.workload.kwargs)))
        weights = [*self.workload.model.parameters(), *self.workload.model.buffers()]
        return {
            "model": f"{type(self.workload.model).__module__}.{type(self.workload.model).__qualname__}",
            "weights": [(tuple(w.shape), str(w.dtype)) for w in weights],
            "device": [device.kind, device.model, len(device.cores)],
            "threads": len(device.cores),
            "torch": torch.__version__,
            "training": self.workload.training,
            "loss": getattr(loss, "__qualname__", type(loss).__name__),
            "batch": self.workload.batch_size,
            "inputs": [(tuple(t.shape), str(t.dtype)) if isinstance(t, torch.Tensor) else repr(t)[:80] for t in leaves],
        }

    def _step(self, message: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(message, min(self.done, self.steps), self.steps)


def _kind(device: Device) -> tuple[Any, ...]:
    return device.kind, device.model, len(device.cores)


def _is_local(device: Device, cluster: Cluster) -> bool:
    """Whether a device can be run on: of this host, of a kind that runs models, and its hardware is really here."""
    if device.host != cluster.devices[0].host:
        return False
    if device.kind == "cpu":
        same = not device.model or device.model == cpu_model()
        return same and set(device.cores) <= os.sched_getaffinity(0)
    if device.kind != "cuda" or not torch.cuda.is_available():
        return False
    tail = device.name.rsplit(":", 1)[-1]
    index = int(tail) if tail.isdigit() else 0
    return index < torch.cuda.device_count()


def _peaks(device: Device) -> Peaks | None:
    try:
        worker = DeviceWorker(device)
    except AutoplaceError:
        return None
    try:
        return measure_peaks(device, worker)
    except RuntimeError:
        return None
    finally:
        worker.close()


_ARRAYS = ("forward_ms", "backward_ms", "forward_overhead_ms", "backward_overhead_ms")


def _times_to_json(times: GroupTimes) -> dict[str, Any]:
    arrays = {key: getattr(times, key) for key in _ARRAYS}
    data = {key: None if array is None else array.tolist() for key, array in arrays.items()}
    return data | {"total_ms": times.total_ms, "notes": list(times.notes)}


def _times_from_json(data: dict[str, Any] | None, count: int) -> GroupTimes | None:
    """Read an entry back; anything unexpected is a miss."""
    if data is None:
        return None
    try:
        arrays = {key: None if data[key] is None else np.asarray(data[key], np.float64) for key in _ARRAYS}
        total, notes = float(data["total_ms"]), tuple(str(note) for note in data["notes"])
    except (KeyError, TypeError, ValueError):
        return None
    present = [array for array in arrays.values() if array is not None]
    right = all(a.shape == (count,) and np.isfinite(a).all() and (a >= 0).all() for a in present)
    if not right or arrays["forward_ms"] is None or arrays["forward_overhead_ms"] is None:
        return None
    return GroupTimes(total_ms=total, notes=notes, **arrays)  # type: ignore[arg-type]
