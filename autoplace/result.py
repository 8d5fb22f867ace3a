"""`TuneResult`: what a tuning found. Plain data that the report draws, the tracking logs and the wrapper explains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autoplace.hardware.cluster import Cluster
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.problem import Objective, Problem

__all__ = ["Candidate", "TuneResult"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One plan on its way through the tuner."""

    label: str
    """Unique short name in tables, for example `heft x4` or `replicas 0.50/0.50`."""
    plan: Plan
    predicted: Outcome | None = None
    """Outcome of the simulator; None for plain PyTorch, which has no placement."""
    predicted_first: Outcome | None = None
    """What the plan was proposed with, where `predicted` is the simulator's answer after calibration."""
    measured: Outcome | None = None
    """Outcome of real runs; None when it was not among the best few."""
    speedup: float | None = None
    """Plain PyTorch's latency over this plan's: median of the pairwise ratios of the interleaved run."""
    speedup_interval: tuple[float, float] | None = None
    """Quartiles of the pairwise ratios."""
    gain: float | None = None
    """Plain PyTorch's objective J over this plan's; equals the speed-up when energy does not count and nothing is
    compiled: compiling has to pay back first → `choose.paid_back`."""
    gain_low: float | None = None
    """Lower end of the 95 % interval of the median gain over the pairs of the interleaved run."""
    compile_s: float = 0.0
    """Seconds that compiling took; 0 when nothing is compiled."""
    stopped: bool = False
    """Whether its real run was ended early, because it could not win any more."""
    check: str = ""
    """What the check against plain PyTorch found, in words; of a plan that was not measured, why not, if known."""
    kept: bool = False
    """Whether this is the chosen plan."""
    verdict: str = ""
    """Kept, or why not, in one phrase."""

    @property
    def forecast(self) -> Outcome | None:
        """What was predicted before the plan ran; `predicted` may have learned from that run."""
        return self.predicted_first or self.predicted


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What a tuning found."""

    model_name: str
    mode: str
    """`inference` or `training`."""
    batch_size: int
    objective: Objective
    cluster: Cluster
    candidates: tuple[Candidate, ...]
    """Plain PyTorch first."""
    noise: float
    """A/A noise of the same run: see `measure.protocol.aa_noise`, as a fraction."""
    capture_rung: str
    """`export`, `dispatch` or `module`."""
    capture_reason: str = ""
    """Why not a higher rung; empty on the highest."""
    num_ops: int = 1
    num_groups: int = 1
    cost_labels: Mapping[str, int] = field(default_factory=dict)
    """`measured` and `estimated` to number of (group, device) latencies."""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """The simulator's factors and its errors before and after them → `costs.calibrate`; empty when none was made."""
    problem: Problem | None = None
    """What was planned, as profiled and without calibration; kept in the run's record for → `agents.experience`."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Phase name to wall seconds."""
    notes: tuple[str, ...] = ()
    """Sentences for the user."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Versions and machine facts."""

    @property
    def chosen(self) -> Candidate:
        """The kept candidate."""
        return next(c for c in self.candidates if c.kept)

    @property
    def baseline(self) -> Candidate:
        """Plain PyTorch."""
        return self.candidates[0]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-ready data."""
        return {
            "format": "autoplace.result/1",
            "model": self.model_name,
            "mode": self.mode,
            "batch_size": self.batch_size,
            "objective": {"goal": self.objective.goal, "energy_weight": self.objective.energy_weight},
            "devices": [d.name for d in self.cluster.devices],
            "noise": self.noise,
            "capture": {
                "rung": self.capture_rung,
                "reason": self.capture_reason,
                "ops": self.num_ops,
                "groups": self.num_groups,
            },
            "cost_labels": dict(self.cost_labels),
            "calibration": dict(self.calibration),
            "seconds": dict(self.seconds),
            "notes": list(self.notes),
            "environment": dict(self.environment),
            "candidates": [
                {
                    "label": c.label,
                    "plan": c.plan.to_json(),
                    "predicted": c.predicted.to_json() if c.predicted else None,
                    "predicted_first": c.predicted_first.to_json() if c.predicted_first else None,
                    "measured": c.measured.to_json() if c.measured else None,
                    "speedup": c.speedup,
                    "speedup_interval": list(c.speedup_interval) if c.speedup_interval else None,
                    "gain": c.gain,
                    "gain_low": c.gain_low,
                    "compile_s": c.compile_s,
                    "stopped": c.stopped,
                    "check": c.check,
                    "kept": c.kept,
                    "verdict": c.verdict,
                }
                for c in self.candidates
            ],
        }
