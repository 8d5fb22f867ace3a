"""`Outcome`: what a plan costs, one type for simulated and measured; and `Evaluator`, plans in, Outcomes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from autoplace.plan import Plan

__all__ = ["Evaluator", "Outcome", "Span"]


@dataclass(frozen=True, kw_only=True)
class Span:
    """One stretch of work on a device or link, for timelines."""

    resource: str
    """Device name, or `source -> target` for a transfer."""
    label: str
    """Op or tensor name."""
    start_ms: float
    end_ms: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a plan costs."""

    source: str
    """`simulated` or `measured`."""
    feasible: bool = True
    reason: str = ""
    """Why not feasible, in one sentence; empty when feasible."""
    latency_ms: float = float("inf")
    """Time of one pass, ms (makespan; median of the repeats when measured)."""
    period_ms: float = float("inf")
    """Steady-state time per pass when passes are pipelined, ms; the latency where passes are not."""
    throughput_sps: float = 0.0
    """Samples per second: batch size / period for the goal `throughput`, batch size / latency otherwise."""
    energy_j: float | None = None
    """Energy of one pass, J; None when there is no source."""
    energy_source: str | None = None
    """`nvml`, `rapl` or `model`; figures of different sources are never compared."""
    objective: float = float("inf")
    """J of the problem's Objective; inf when infeasible."""
    peak_memory_bytes: Mapping[str, float] = field(default_factory=dict)
    """Device name to bytes."""
    busy_ms: Mapping[str, float] = field(default_factory=dict)
    """Device name to busy time of one pass, ms."""
    samples_ms: tuple[float, ...] = ()
    """The single repeats, when measured."""
    timeline: tuple[Span, ...] = ()
    """What ran when, where asked for."""

    def to_json(self, *, timeline: bool = False) -> dict[str, Any]:
        """Return the outcome as JSON-ready data; infinities become null."""

        def finite(value: float | None) -> float | None:
            return None if value is None or value in (float("inf"), float("-inf")) else float(value)

        data: dict[str, Any] = {
            "source": self.source,
            "feasible": self.feasible,
            "reason": self.reason,
            "latency_ms": finite(self.latency_ms),
            "period_ms": finite(self.period_ms),
            "throughput_sps": float(self.throughput_sps),
            "energy_j": finite(self.energy_j),
            "energy_source": self.energy_source,
            "objective": finite(self.objective),
            "peak_memory_bytes": {k: finite(v) for k, v in self.peak_memory_bytes.items()},
            "busy_ms": {k: float(v) for k, v in self.busy_ms.items()},
        }
        if self.samples_ms:
            data["samples_ms"] = list(self.samples_ms)
        if timeline:
            data["timeline"] = [[s.resource, s.label, s.start_ms, s.end_ms] for s in self.timeline]
        return data


@runtime_checkable
class Evaluator(Protocol):
    """Plans in, Outcomes out. `SimulatedEvaluator` and `MeasuredEvaluator` share this face."""

    evaluations: int
    """Number of plans evaluated so far."""

    def evaluate(self, plans: Sequence[Plan]) -> list[Outcome]:
        """Return one Outcome per plan; a plan that fails is an infeasible Outcome with a reason, never an exception."""
        ...
