"""`Problem`: all that a planner may see. An OpGraph, a Cluster, every op's latency on every device, an objective.

The file format `autoplace.problem/1` is read and written by `autoplace.problem_file`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import InputError
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster

__all__ = ["Objective", "Problem", "Semantics"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a planner minimises: J = latency^(1-w) * energy^w, → `value`."""

    goal: str = "latency"
    """`latency` = makespan of one pass; `throughput` = steady-state time per pass when passes are pipelined."""
    energy_weight: float = 0.0
    """w in [0, 1]; 0.5 is the energy-delay product."""

    def __post_init__(self) -> None:
        if self.goal not in ("latency", "throughput"):
            raise InputError(f"objective goal {self.goal!r} is unknown; use 'latency' or 'throughput'")
        if not 0.0 <= self.energy_weight <= 1.0:
            raise InputError(f"energy_weight {self.energy_weight} is outside [0, 1]; 0 ignores energy")

    def value(self, time_ms: float, energy_j: float | None) -> float:
        """Return J for a time (ms; makespan or steady-state period, by goal) and an energy (J).

        Raises:
            InputError: If energy counts and there is no figure for it.
        """
        if self.energy_weight == 0.0:
            return time_ms
        if energy_j is None:
            raise InputError(
                "the objective weighs energy and no device states its watts; add idle_watts and busy_watts"
            )
        return float(time_ms ** (1.0 - self.energy_weight) * energy_j**self.energy_weight)


@dataclass(frozen=True, kw_only=True)
class Semantics:
    """How time passes in the simulator; the executors follow the same rules."""

    transfers: str = "overlapped"
    """`overlapped` = a transfer keeps the link busy; `blocking` = both ends' devices as well."""
    route: str = "direct"
    """`direct` = the sender pays once per receiving device; `host` = staged in host memory."""
    contention: str = "link"
    """`none`, or `link` = one transfer at a time per directed link."""
    queue: str = "fifo"
    """`fifo` = ops run in the order in which they become ready; `priority` = longest path to the end first."""
    microbatches: int = 1
    """Parts into which a pass is split; each runs all ops on its share of the batch."""

    def __post_init__(self) -> None:
        choices = {
            "transfers": ("overlapped", "blocking"),
            "route": ("direct", "host"),
            "contention": ("none", "link"),
            "queue": ("fifo", "priority"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise InputError(f"semantics {key} is {getattr(self, key)!r}; use one of {', '.join(allowed)}")
        if self.microbatches < 1:
            raise InputError(f"semantics microbatches is {self.microbatches}; use 1 or more")


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """An OpGraph, a Cluster, the latency of every op on every device, and an objective."""

    graph: OpGraph
    cluster: Cluster
    latency_ms: NDArray[np.float64]
    """float64[N, D] for the whole batch; inf = cannot run there."""
    overhead_ms: NDArray[np.float64] | None = None
    """float64[N, D], the part of `latency_ms` that a smaller batch does not save; None = 0.

    Running a share s of the batch takes overhead + s * (latency - overhead).
    """
    objective: Objective = field(default_factory=Objective)
    semantics: Semantics = field(default_factory=Semantics)
    name: str = "problem"
    batch_size: int = 1
    """Samples in one pass; turns a period into samples per second."""
    part: NDArray[np.int32] | None = None
    """int32[N], the part of a split batch that each op works on, where → `simulate.expand` made the problem.

    A device then takes the op of the earliest part first, so that microbatches follow each other as in a pipeline.
    """
    thread_scale: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Device name to {threads: latency relative to `latency_ms`}, where measured."""
    concurrency_scale: float = 1.0
    """Factor, 1 or more, on all latencies of a plan that splits the batch into parts over several devices: devices that
    work at once slow each other → `costs.calibrate`."""
    dispatch_ms: float = 0.0
    """Added to the latency of every op, in each part of the batch, of a replica on several devices: its ops are called
    one by one in the devices' threads → `costs.calibrate`."""
    resting_bytes: Mapping[str, float] = field(default_factory=dict)
    """Device name to the bytes of its memory that its rank holds whatever it runs, all the model's weights among them,
    where measured → `costs.footprint`."""

    def __post_init__(self) -> None:
        shape = (self.graph.num_ops, self.cluster.num_devices)
        for label, array in (("latency_ms", self.latency_ms), ("overhead_ms", self.overhead_ms)):
            if array is not None and array.shape != shape:
                raise InputError(f"{label} has shape {array.shape}; expected (ops, devices) = {shape}")
            if array is not None and (np.isnan(array).any() or (array < 0).any()):
                raise InputError(f"{label} holds NaN or negative numbers; every latency must be 0 or more")
        if not 1.0 <= self.concurrency_scale < float("inf"):
            raise InputError(f"concurrency_scale is {self.concurrency_scale}; use 1 or more")
        if not 0.0 <= self.dispatch_ms < float("inf"):
            raise InputError(f"dispatch_ms is {self.dispatch_ms}; use 0 or more")

    @property
    def num_ops(self) -> int:
        """Number of ops N."""
        return self.graph.num_ops

    @property
    def num_devices(self) -> int:
        """Number of devices D."""
        return self.cluster.num_devices

    @cached_property
    def can_run(self) -> NDArray[np.bool_]:
        """bool[N, D]: the op, and every op co-located with it, has a finite latency there."""
        allowed = np.isfinite(self.latency_ms)
        members = np.flatnonzero(self.graph.colocate >= 0)
        keys, group = np.unique(self.graph.colocate[members], return_inverse=True)
        shared = np.ones((len(keys), self.num_devices), np.bool_)
        np.logical_and.at(shared, group, allowed[members])
        allowed[members] = shared[group]
        return allowed

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 (first 16 hex digits) of everything that changes the answer."""
        digest = hashlib.sha256(self.graph.fingerprint.encode())
        digest.update(self.cluster.fingerprint.encode())
        arrays = [self.latency_ms, self.cluster.link_latency_ms, self.cluster.link_bytes_per_ms]
        for array in arrays + ([self.overhead_ms] if self.overhead_ms is not None else []):
            digest.update(np.ascontiguousarray(array).tobytes())
        watts = [(d.idle_watts, d.busy_watts) for d in self.cluster.devices]
        digest.update(repr((watts, asdict(self.objective), asdict(self.semantics), self.batch_size)).encode())
        if (self.concurrency_scale, self.dispatch_ms) != (1.0, 0.0):
            digest.update(repr((self.concurrency_scale, self.dispatch_ms)).encode())
        if self.resting_bytes:
            digest.update(repr(sorted(self.resting_bytes.items())).encode())
        return digest.hexdigest()[:16]

    def with_(self, **changes: object) -> Problem:
        """Return a copy with some fields replaced, for example `semantics` or `objective`."""
        return replace(self, **changes)  # type: ignore[arg-type]
