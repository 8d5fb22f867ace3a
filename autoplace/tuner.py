"""`tune()`: the whole road from a model to a measured plan.

    capture → discover → profile → propose → simulate → measure the best few → search the knobs → choose
                                      ↑                          │
                                      └──────── calibrate ◀──────┘

It composes the rooms and holds no knowledge of its own about any of them; the real runs are in `autoplace.contest`, the
rules by which a plan is kept in `autoplace.choose`. It reaches up to the zoo for the policy and for tracking, lazily.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch

from autoplace.contest import Contest
from autoplace.errors import InputError, PolicyError
from autoplace.hardware.cluster import Cluster
from autoplace.outcome import Outcome
from autoplace.problem import Objective
from autoplace.proposals import propose
from autoplace.result import TuneResult
from autoplace.workload import Workload

if TYPE_CHECKING:
    from autoplace.policy.policy import Policy

__all__ = ["Progress", "Record", "TuneConfig", "tune"]

Progress = Callable[[str, int, int], None]
"""Called with a phase's name, the steps done and the steps in all."""

Record = Callable[[str, Outcome], None]
"""Called with a candidate's label and its Outcome."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What to tune for, and how much may be spent."""

    objective: Objective = field(default_factory=Objective)
    """Latency, or latency and energy."""
    budget_s: float = 60.0
    """Wall seconds for all real runs, compiling included; planning comes on top."""
    run_s: float = 600.0
    """Seconds for which the model is to run; compiling must pay back within them."""
    policy: str | None = "default"
    """Name, directory or `models:/` URI of the learned policy; None plans without one."""
    microbatches: tuple[int, ...] = (1, 2, 4)
    """Numbers of microbatches that the strategies plan for."""
    evaluations: int = 2000
    """Simulated plans that each searching strategy may spend per number of microbatches."""
    max_groups: int = 64
    """Op groups that the planner places; at most 256."""
    measured_plans: int = 5
    """How many of the best predicted plans are measured."""
    rounds: int = 7
    """Interleaved rounds of the first measurement; the finalists get up to fifteen times as many."""
    compile: bool | Literal["auto"] = "auto"
    """Whether plain `torch.compile` is a candidate, and plans may be compiled; `"auto"` = where it can be expected to
    fit the budget and this machine has a compiler. True tries it even where it takes longer than the budget."""
    precision: Literal["float32", "auto"] = "float32"
    """`"auto"` lets plans run under bfloat16 autocast; their check has a wider tolerance."""
    knob_trials: int = 16
    """Real runs that the search of the knobs may make; 0 = no search."""
    use_cache: bool = True
    """Whether measured costs of an earlier run may be used."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.budget_s <= 0:
            raise InputError(f"a tuning budget of {self.budget_s} s allows nothing; use more than 0")
        if not 1 <= self.max_groups <= 256:
            raise InputError(f"max_groups is {self.max_groups}; use 1 to 256")
        if self.measured_plans < 1 or self.rounds < 3:
            raise InputError("measured_plans must be 1 or more and rounds 3 or more")
        if not self.run_s > 0:
            raise InputError(f"run_s is {self.run_s}; give the seconds for which the model is to run, more than 0")
        if self.compile not in (True, False, "auto"):
            raise InputError(f"compile is {self.compile!r}; use True, False or 'auto'")
        if self.precision not in ("float32", "auto"):
            raise InputError(f"precision is {self.precision!r}; use 'float32' or 'auto'")
        if self.knob_trials < 0:
            raise InputError(f"knob_trials is {self.knob_trials}; use 0 or more")


class _Phases:
    """Times the phases and tells the user about them."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress or (lambda *_: None)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Run one phase; yields a function that takes the steps done and the steps in all."""
        start = time.perf_counter()
        self._progress(name, 0, 1)
        yield lambda done, total: self._progress(name, done, total)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self._progress(name, 1, 1)


def tune(
    workload: Workload,
    config: TuneConfig | None = None,
    *,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
    record: Record | None = None,
) -> TuneResult:
    """Find the plan under which a workload runs best on these devices.

    Args:
        workload: Model, example inputs, inference or training. The model is left as it was found.
        config: What to tune for.
        cluster: The devices; None discovers and measures this machine's.
        progress: Told about every phase.
        record: Given every candidate's label and Outcome as soon as it is known, simulated or measured.

    Returns:
        All candidates with predictions and measurements; `TuneResult.chosen` is never slower than plain PyTorch.

    Raises:
        InputError: If the model cannot run on the inputs.
        PolicyError: If the policy is unknown or damaged.
    """
    from autoplace.costs.build import build_problem
    from autoplace.costs.calibrate import Calibration, load_calibration
    from autoplace.graph.capture import capture
    from autoplace.graph.coarsen import coarsen

    config = config or TuneConfig()
    policy, notes = _policy(config)
    phases = _Phases(progress)
    with phases.phase("discover devices"):
        cluster = cluster or Cluster.discover()
    with phases.phase("capture the model"):
        captured = capture(workload)
        grouping = coarsen(captured.graph, max_groups=config.max_groups, called=captured.called)
    with phases.phase("profile costs") as step:
        problem, costs = build_problem(
            workload,
            grouping,
            cluster,
            objective=config.objective,
            name=workload.name,
            progress=lambda _message, done, total: step(done, total),
            use_cache=config.use_cache,
        )
        prior = (load_calibration(problem) if config.use_cache else None) or Calibration()
    search = partial(
        propose, policy=policy, microbatches=config.microbatches, evaluations=config.evaluations, seed=config.seed
    )
    with phases.phase("propose and simulate") as step:
        candidates = search(prior.apply(problem), step=step)
        for candidate in candidates:
            if record is not None and candidate.predicted is not None:
                record(candidate.label, candidate.predicted)
    with phases.phase("measure") as step:
        contest = Contest(
            workload,
            problem,
            config,
            captured=captured,
            prior=prior,
            search=search,
            record=record or (lambda _label, _outcome: None),
            step=step,
        )
        candidates = contest.run(candidates)
    labels = [str(label) for label in costs.labels.ravel()]
    return TuneResult(
        model_name=workload.name,
        mode="training" if workload.training else "inference",
        batch_size=workload.batch_size,
        objective=config.objective,
        cluster=cluster,
        candidates=tuple(candidates),
        noise=contest.noise,
        capture_rung=captured.rung,
        capture_reason=captured.reason,
        num_ops=captured.graph.num_ops,
        num_groups=grouping.graph.num_ops,
        cost_labels={label: labels.count(label) for label in dict.fromkeys(labels)},
        calibration=contest.calibration,
        problem=problem,
        seconds=phases.seconds,
        notes=(*notes, *costs.notes, *contest.notes),
        environment=_environment(),
    )


def _environment() -> dict[str, str]:
    import autoplace

    return {
        "autoplace": autoplace.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads of plain PyTorch": str(torch.get_num_threads()),
    }


def _policy(config: TuneConfig) -> tuple[Policy | None, list[str]]:
    """Load the learned policy; also what to tell the user when there is none."""
    if config.policy is None:
        return None, ["Planned without a learned policy, as asked."]
    from autoplace.zoo import load_policy

    try:
        return load_policy(config.policy), []
    except PolicyError:
        if config.policy != "default":
            raise
        return None, ["Planned without a learned policy: none named 'default' is installed."]
