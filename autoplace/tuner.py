"""`tune()`: the whole road from a model to a measured plan.

    capture → discover → profile → propose → simulate → measure the best few → check → choose
                                      ↑                          │
                                      └──────── calibrate ◀──────┘

It composes the rooms and holds no knowledge of its own about any of them; the rules by which a plan is kept are in
`autoplace.choose`. It reaches up to the zoo for the policy and for tracking, lazily.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from autoplace import choose as choosing
from autoplace.errors import InputError, PolicyError
from autoplace.hardware.cluster import Cluster
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.problem import Objective, Problem
from autoplace.proposals import merge, predict_again, propose, select, select_new
from autoplace.result import Candidate, TuneResult
from autoplace.workload import Workload

if TYPE_CHECKING:
    from autoplace.costs.calibrate import Calibration
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
    """Wall seconds for the real runs that decide; planning comes on top."""
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
    """Interleaved rounds of the first measurement; the finalists get three times as many."""
    compile: bool = False
    """Whether plain `torch.compile` is a candidate too."""
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
        measurement = _Measurement(workload, problem, config, prior, search, record, step)
        candidates = measurement.run(candidates)
    labels = [str(label) for label in costs.labels.ravel()]
    return TuneResult(
        model_name=workload.name,
        mode="training" if workload.training else "inference",
        batch_size=workload.batch_size,
        objective=config.objective,
        cluster=cluster,
        candidates=tuple(candidates),
        noise=measurement.noise,
        capture_rung=captured.rung,
        capture_reason=captured.reason,
        num_ops=captured.graph.num_ops,
        num_groups=grouping.graph.num_ops,
        cost_labels={label: labels.count(label) for label in dict.fromkeys(labels)},
        calibration=measurement.calibration,
        problem=problem,
        seconds=phases.seconds,
        notes=(*notes, *costs.notes, *measurement.notes),
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


class _Measurement:
    """Screens the best few plans beside plain PyTorch, learns from it, and decides among the finalists.

    Three interleaved runs share the budget: the screening; a second one for plans that the calibrated simulator found;
    and the finalists' own. → `_SCREENING`, `_SECOND`, `_FINAL`
    """

    def __init__(
        self,
        workload: Workload,
        problem: Problem,
        config: TuneConfig,
        prior: Calibration,
        search: Callable[[Problem], list[Candidate]],
        record: Record | None,
        step: Callable[[int, int], None],
    ) -> None:
        from autoplace.measure.evaluator import MeasuredEvaluator

        self._config, self._problem, self._prior, self._search = config, problem, prior, search
        self._record = record or (lambda _label, _outcome: None)
        self._step = step
        self._done = self._total = 0
        self._same = "same outputs" + (" and gradients" if workload.training else "")
        self._evaluator = MeasuredEvaluator(
            workload,
            problem.cluster,
            objective=config.objective,
            limit_s=config.budget_s / 6,
            warmup=_WARMUP,
            progress=lambda _plan, _round: self._advance(),
        )
        self.noise = choosing.NOISE_FLOOR
        self.calibration: dict[str, Any] = {}
        self.notes: list[str] = []

    def run(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return all candidates with verdicts, plain PyTorch first."""
        chosen = select(candidates, self._config.measured_plans)
        if self._config.compile:
            chosen.append(Candidate(label="plain torch.compile", plan=Plan.plain().with_(compiled=True)))
        screened = self._beside_plain(chosen, self._rounds(chosen, _SCREENING, self._config.rounds))
        labels = {c.label for c in screened}
        rows = self._learn([*screened, *(c for c in candidates if c.label not in labels)])
        finalists = choosing.finalists(rows)
        if finalists:
            # The best of several short runs is flattered by chance, so a run of their own decides, with its own noise.
            rounds = self._rounds(finalists, _FINAL, _FINAL_FACTOR * self._config.rounds)
            rows = _updated(rows, self._beside_plain(finalists, rounds))
        return choosing.choose(rows, {c.label for c in finalists}, noise=self.noise)

    def _learn(self, rows: list[Candidate]) -> list[Candidate]:
        """Calibrate the simulator on what ran, plan again with it, and screen the few new plans that promise more."""
        calibration = self._calibrated(rows)
        if calibration is None:
            return rows
        problem = calibration.apply(self._problem)
        rows = predict_again(rows, problem)
        known = {c.label for c in rows}
        if calibration.factors != self._prior.factors:
            rows, fresh = merge(rows, self._search(problem))
            for candidate in fresh:
                if candidate.predicted is not None:
                    self._record(candidate.label, candidate.predicted)
        picked = select_new(rows, _SECOND_PLANS)
        if picked:
            _, *second = self._beside_plain(picked, self._rounds(picked, _SECOND, self._config.rounds))
            rows = _updated(rows, second)
            calibration = self._calibrated(rows) or calibration
            rows = predict_again(rows, calibration.apply(self._problem))
        self._explain(calibration, rows, {c.label for c in picked})
        return [c for c in rows if c.label in known or c.measured is not None]

    def _calibrated(self, rows: Sequence[Candidate]) -> Calibration | None:
        """Fit the simulator to all real runs so far; None when none can tell anything."""
        from autoplace.costs.calibrate import calibrate

        ran = _ran(rows)
        calibration = calibrate(self._problem, [c.plan for c, _ in ran], [o for _, o in ran], prior=self._prior)
        return calibration if ran else None

    def _explain(self, calibration: Calibration, rows: Sequence[Candidate], second: set[str]) -> None:
        """Keep the calibration for the next tuning, and tell the user of it."""
        from autoplace.costs.calibrate import store_calibration

        store_calibration(self._problem, calibration)
        ran = _ran(rows)
        plans, outcomes = [c.plan for c, _ in ran], [o for _, o in ran]
        before = self._prior.error(self._problem, plans, outcomes)
        after = calibration.error(self._problem, plans, outcomes)
        self.calibration = {
            **calibration.to_json(),
            "prior": self._prior.to_json(),
            "median_error_before": before.median,
            "median_error_after": after.median,
            "kendall_tau_before": before.kendall_tau,
            "kendall_tau_after": after.kendall_tau,
            "second_plans": sorted(second),
        }
        self.notes.append(
            f"Calibrated on {calibration.runs} real runs: {calibration.sentence}; "
            f"median error of predictions {before.median:.0%} → {after.median:.0%}."
        )

    def _advance(self) -> None:
        self._done += 1
        self._step(self._done, max(self._done, self._total))

    def _rounds(self, chosen: Sequence[Candidate], share: float, wanted: int) -> int:
        """Return how many interleaved rounds fit into a share of the budget, judged by the predictions.

        Plain PyTorch is in each round twice, and every timed pass has an untimed one before it.
        """
        predicted_ms = [c.predicted.latency_ms for c in chosen if c.predicted is not None]
        budget_ms = share * self._config.budget_s * 1e3
        round_ms = 2 * (sum(predicted_ms) + 2 * max(predicted_ms, default=1.0))
        return max(min(wanted, _LEAST_ROUNDS), min(wanted, int(budget_ms / max(round_ms, 1e-3))))

    def _beside_plain(self, chosen: Sequence[Candidate], rounds: int) -> list[Candidate]:
        """Measure plans interleaved with plain PyTorch, which runs twice a round; returns plain first."""
        plans = [Plan.plain(), Plan.plain(), *(c.plan for c in chosen)]
        self._total += len(plans) * (_WARMUP + rounds)
        plain, again, *outcomes = self._evaluator.evaluate_interleaved(plans, rounds)
        if not plain.feasible:
            raise InputError(f"plain PyTorch cannot run this model on these inputs: {plain.reason}")
        self.noise = choosing.noise_of(plain, again)
        rows = [replace(_PLAIN_ROW, measured=plain)]
        self._record(_PLAIN_ROW.label, plain)
        for candidate, outcome in zip(chosen, outcomes, strict=True):
            self._record(candidate.label, outcome)
            rows.append(self._judged(candidate, plain, outcome))
        return rows

    def _judged(self, candidate: Candidate, plain: Outcome, outcome: Outcome) -> Candidate:
        row = replace(candidate, measured=outcome, check=self._same if outcome.feasible else outcome.reason)
        ratio = choosing.compare(plain, outcome, self._config.objective)
        if ratio is None:
            return row
        return replace(
            row,
            speedup=ratio.speedup,
            speedup_interval=ratio.speedup_interval,
            gain=ratio.gain,
            gain_low=ratio.gain_low,
        )


def _ran(rows: Sequence[Candidate]) -> list[tuple[Candidate, Outcome]]:
    """Return the placed plans that ran, and their Outcomes."""
    return [(c, c.measured) for c in rows if c.predicted is not None and c.measured is not None and c.measured.feasible]


def _updated(rows: Sequence[Candidate], newer: Sequence[Candidate]) -> list[Candidate]:
    by_label = {c.label: c for c in newer}
    return [by_label.get(c.label, c) for c in rows]


_SCREENING, _SECOND, _FINAL = 1 / 3, 1 / 6, 1 / 2
"""Shares of the budget."""
_SECOND_PLANS = 2
"""Plans in the second screening, at most."""
_FINAL_FACTOR = 3
"""The finalists are decided on with this many times the rounds of the first measurement."""
_WARMUP = 2
"""Rounds before the counted ones."""
_LEAST_ROUNDS = 5
"""Fewer rounds give no quartiles worth the name."""
_PLAIN_ROW = Candidate(label="plain PyTorch", plan=Plan.plain(), speedup=1.0, gain=1.0, check="reference")
