"""`MeasuredEvaluator`: plans in, Outcomes of short real runs out, by the protocol of `measure.protocol`.

For every plan: refuse what cannot fit in memory, build the executor, check that it computes the same thing, then time
the survivors round by round against each other. A plan that raises, runs out of memory, computes something else or
overruns its limit becomes an infeasible Outcome with a reason. The model is left as it was: gradients, buffers,
train/eval flags, random state.

1. A pass is `Workload.step`: the forward, and in training loss and backward into `.grad`. Setting `.grad` to None
   before it is not timed.
2. A plan that hangs is given up; what its threads do goes on, and may keep cores busy and disturb what is measured
   after it.
3. Energy is counted over the timed passes themselves; where GPU counters are read, which tick slowly, over a stretch of
   `energy_stretch_s` after them.
4. Executors are kept from one call to the next when `keep` says so; `close` then ends them. → `measure.pool`
5. Peak memory of CPU groups is the process's growth, under the plan's first CPU device, since groups share the host's
   memory. → `measure.memory`
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from autoplace.errors import InputError
from autoplace.hardware.cluster import Cluster
from autoplace.hardware.energy import EnergyMeter, best_meter
from autoplace.outcome import Outcome, Span
from autoplace.plan import Plan
from autoplace.problem import Objective
from autoplace.runtime import Executor
from autoplace.runtime.fitness import unfit
from autoplace.workload import Workload

from .check import CheckConfig, Reference, check_plan
from .figures import memory_reason, peak_bytes, plain_busy_ms, sentence
from .memory import PeakMemory, SavedBytes
from .pool import ExecutorPool, plan_key
from .preserve import clear_gradients, preserved
from .protocol import Guard, interleave, summary

__all__ = ["MeasuredEvaluator"]

_PLAIN_LIMIT_FACTOR = 10.0
"""The plain plan may take this many times the limit: what takes long on plain PyTorch must still be measured."""
_COMPILE_LIMIT_S = 180.0
"""A compiled plan's pass may take this long: the first ones compile, for the check and for the timed runs."""
_LEAST_ROUNDS = 3
"""Counted rounds of a run that `until_s` ends."""
Drop = Callable[[Sequence[Outcome]], Collection[int]]
"""Told the Outcomes so far, one per plan, after every counted round; returns which plans take no further part."""
_ENERGY_STRETCH_S = 0.5
"""Passes are repeated this long where counters tick every 20 to 100 ms (NVML)."""


@dataclass
class _Candidate:
    """A plan on its way to an Outcome."""

    plan: Plan
    executor: Executor | None = None
    reason: str = ""
    energy_j: list[float | None] = field(default_factory=list)
    busy_ms: list[dict[str, float]] = field(default_factory=list)
    timeline: tuple[Span, ...] = ()
    memory: PeakMemory = field(default_factory=PeakMemory)
    passes: int = 0
    first_s: float = 0.0
    """Seconds of the check."""
    compiled_s: float = 0.0
    """Seconds of compiling up to then."""


class MeasuredEvaluator:
    """Measures plans on the real devices.

    Args:
        workload: Model and inputs, inference or training.
        cluster: The devices that plans name.
        objective: What `Outcome.objective` is computed by; None = latency.
        limit_s: Seconds that one pass of a plan, or its check, may take.
        repeats: Counted passes of each plan.
        warmup: Passes before them.
        meter: Energy meter; None = `best_meter` of the cluster.
        check: Whether plans are compared with plain PyTorch before they are timed.
        check_config: Tolerances of that; None = the usual ones.
        keep: Executors that are kept for plans that come again; call `close`, or use it as a context, if any are.
        record: Called with each plan and its Outcome as soon as it is known.
        progress: Called with the plan and the round after each pass.

    Raises:
        InputError: If the objective weighs energy and there is no source for it.
    """

    def __init__(
        self,
        workload: Workload,
        cluster: Cluster,
        *,
        objective: Objective | None = None,
        limit_s: float = 10.0,
        repeats: int = 5,
        warmup: int = 2,
        meter: EnergyMeter | None = None,
        check: bool = True,
        check_config: CheckConfig | None = None,
        keep: int = 0,
        record: Callable[[Plan, Outcome], None] | None = None,
        progress: Callable[[Plan, int], None] | None = None,
    ) -> None:
        self.workload = workload
        self.cluster = cluster
        self.objective = objective = objective or Objective()
        self.meter = best_meter(cluster) if meter is None else meter
        self.evaluations = 0
        """Number of plans evaluated so far."""
        self._limit_s, self._repeats, self._warmup = limit_s, repeats, warmup
        self._check, self._check_config = check, check_config or CheckConfig()
        self._record, self._progress = record, progress
        self._reference: Reference | None = None
        self._versions: list[int] = []
        self._verdicts: dict[str, str] = {}
        self._compile_s: dict[str, float] = {}
        self._pool = ExecutorPool(workload.model, cluster, keep)
        self._activation_bytes: int | None = None
        if objective.energy_weight > 0 and self.meter.source == "none":
            raise InputError(
                "the objective weighs energy and this machine has no source for it; "
                "add idle_watts and busy_watts to the cluster file"
            )

    def evaluate(self, plans: Sequence[Plan]) -> list[Outcome]:
        """Measure plans against each other; see `autoplace.outcome.Evaluator.evaluate`."""
        return self.evaluate_interleaved(plans, self._repeats)

    def evaluate_interleaved(
        self,
        plans: Sequence[Plan],
        rounds: int,
        *,
        warmup: int | None = None,
        settle: int = 1,
        drop: Drop | None = None,
        until_s: float | None = None,
    ) -> list[Outcome]:
        """Measure plans against each other, with a number of counted rounds of its own.

        Args:
            plans: Any; the same one may be there twice.
            rounds: Counted passes of each plan, at most.
            warmup: Passes before them; None = as the evaluator has it.
            settle: Untimed passes right before each counted one.
            drop: Ends the run early for some of the plans, or all.
            until_s: When to end, by `time.perf_counter`: plans whose turn comes later are not tried, and no round
                begins later once there are three.

        Returns:
            One Outcome per plan. `samples_ms` of feasible plans have one entry per round, for `pair_ratios`; those that
            were dropped have the first ones.
        """
        self.evaluations += len(plans)
        candidates = [_Candidate(plan) for plan in plans]
        with self.workload.mode(), preserved(self.workload.model):
            try:
                self._forget_if_changed()
                for candidate in candidates:
                    self._prepare(candidate, until_s)
                counts = {"repeats": rounds, "warmup": self._warmup if warmup is None else warmup, "settle": settle}
                samples = self._time(candidates, counts, drop, until_s)
            finally:
                for candidate in candidates:
                    self._count_compiling(candidate)
                    if candidate.reason:
                        self._pool.drop(candidate.plan)
                self._pool.trim()
        outcomes = [self._outcome(c, samples.get(str(i), [])) for i, c in enumerate(candidates)]
        if self._record is not None:
            for plan, outcome in zip(plans, outcomes, strict=True):
                self._record(plan, outcome)
        return outcomes

    def compile_s(self, plan: Plan) -> float:
        """Return the seconds that compiling a plan took when it was measured; 0 for one that is not compiled."""
        return self._compile_s.get(plan_key(plan), 0.0)

    def close(self) -> None:
        """Close the executors that were kept; the next call builds its own again."""
        self._pool.close()

    def __enter__(self) -> MeasuredEvaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, candidate: _Candidate, until_s: float | None) -> None:
        """Build and check; leaves a reason in a candidate that fails."""
        plan = candidate.plan
        try:
            candidate.reason = self._refusal(plan, until_s)
            if candidate.reason:
                return
            executor = candidate.executor = self._pool.take(plan)
            key = plan_key(plan)
            if self._check and not self._is_reference(plan) and key not in self._verdicts:
                reference = self._plain_results()
                start = time.perf_counter()
                report = check_plan(
                    self.workload,
                    executor,
                    config=self._check_config,
                    reference=reference,
                    limit_s=self._limit_of(plan, until_s),
                )
                candidate.first_s = time.perf_counter() - start
                candidate.compiled_s = executor.compile_s()
                self._verdicts[key] = report.reason
            candidate.reason = self._verdicts.get(key, "")
        except Exception as error:
            candidate.reason = sentence(error)

    def _refusal(self, plan: Plan, until_s: float | None) -> str:
        """Return why a plan is not even built, or nothing."""
        if until_s is not None and not self._is_reference(plan) and time.perf_counter() > until_s:
            return "the budget was spent before its turn"
        reason = unfit(self.workload.model, plan, training=self.workload.training) if self._check else ""
        return reason or self._memory_reason(plan)

    def _count_compiling(self, candidate: _Candidate) -> None:
        """Note what a user of the plan would wait for: one compilation, not those of the check and the runs together.

        The check runs without dropout, which is another function to the compiler. An executor that counts nothing is
        taken to have compiled during its check.
        """
        if not candidate.plan.compiled or candidate.executor is None:
            return
        before_s, after_s = candidate.compiled_s, candidate.executor.compile_s()
        key = plan_key(candidate.plan)
        self._compile_s[key] = max(before_s, after_s - before_s, self._compile_s.get(key, 0.0)) or candidate.first_s

    def _limit_of(self, plan: Plan, until_s: float | None) -> float:
        """Return the seconds that one pass of a plan may take; to compile, at most what is left."""
        limit_s = self._limit_s * (_PLAIN_LIMIT_FACTOR if plan.is_plain and not plan.compiled else 1.0)
        if not plan.compiled:
            return limit_s
        left_s = _COMPILE_LIMIT_S if until_s is None else min(_COMPILE_LIMIT_S, until_s - time.perf_counter())
        return max(limit_s, left_s)

    @staticmethod
    def _is_reference(plan: Plan) -> bool:
        return plan == Plan.plain()

    def _forget_if_changed(self) -> None:
        """Forget plain PyTorch's results, and the verdicts, once a parameter has changed."""
        versions = [p._version for p in self.workload.model.parameters()]
        if versions != self._versions:
            self._versions, self._reference = versions, None
            self._verdicts.clear()

    def _plain_results(self) -> Reference:
        if self._reference is None:
            self._reference = Reference(self.workload, step_size=self._check_config.step_size)
        return self._reference

    def _memory_reason(self, plan: Plan) -> str:
        """Return why the plan is not even tried, or nothing."""
        if plan.is_plain:
            return ""
        if self._activation_bytes is None:
            count = SavedBytes()
            with preserved(self.workload.model), count:
                self.workload.forward()
            self._activation_bytes = count.total(self.workload.model)
        return memory_reason(self.workload, self.cluster, plan, self._activation_bytes)

    def _time(
        self,
        candidates: Sequence[_Candidate],
        counts: Mapping[str, int],
        drop: Drop | None,
        until_s: float | None,
    ) -> dict[str, list[float]]:
        runs: dict[str, Callable[[], None]] = {}
        limits: dict[str, float] = {}
        for i, candidate in enumerate(candidates):
            if candidate.executor is not None and not candidate.reason:
                runs[str(i)] = self._pass_of(candidate.executor)
                limits[str(i)] = self._limit_of(candidate.plan, until_s)
        if not runs:
            return {}
        slow_counters = "nvml" in self.meter.source

        def before(name: str) -> None:
            candidate = candidates[int(name)]
            clear_gradients(self.workload.model)
            assert candidate.executor is not None  # only those with one are run
            candidate.executor.busy_ms()
            candidate.executor.timeline()
            candidate.memory.begin(trim=candidate.passes == 0)
            candidate.passes += 1
            self.meter.begin()

        def after(name: str, elapsed_ms: float) -> None:
            candidate = candidates[int(name)]
            busy_ms = self._busy_ms(candidate, elapsed_ms)
            candidate.busy_ms.append(busy_ms)
            if candidate.executor is not None:
                candidate.timeline = candidate.executor.timeline()
            if not slow_counters:
                candidate.energy_j.append(self.meter.end(elapsed_ms, busy_ms))

        def progress(name: str, number: int) -> None:
            candidates[int(name)].memory.end()
            if self._progress is not None:
                self._progress(candidates[int(name)].plan, number)

        def failed(name: str, error: Exception) -> None:
            candidates[int(name)].reason = sentence(error)

        def dropped(samples: Mapping[str, Sequence[float]]) -> Collection[str]:
            if (
                until_s is not None
                and time.perf_counter() > until_s
                and max(map(len, samples.values())) >= _LEAST_ROUNDS
            ):
                return list(runs)
            if drop is None:
                return ()
            return [str(i) for i in drop([self._outcome(c, samples.get(str(i), [])) for i, c in enumerate(candidates)])]

        samples = interleave(
            runs,
            **counts,
            deadline_s=limits,
            progress=progress,
            before=before,
            after=after,
            failed=failed,
            drop=dropped,
        )
        if slow_counters:
            for name in runs:
                self._count_energy(candidates[int(name)], runs[name], limits[name])
        return samples

    def _pass_of(self, executor: Executor) -> Callable[[], None]:
        def run() -> None:
            self.workload.step(executor)

        return run

    def _count_energy(self, candidate: _Candidate, run: Callable[[], None], limit_s: float) -> None:
        """Count the energy of passes over a stretch that is long against the counters' ticks."""
        if candidate.reason or candidate.executor is None:
            return

        def stretch() -> float | None:
            assert candidate.executor is not None  # tested above
            candidate.executor.busy_ms()
            self.meter.begin()
            start, passes = time.perf_counter(), 0
            while passes == 0 or time.perf_counter() - start < _ENERGY_STRETCH_S:
                clear_gradients(self.workload.model)
                run()
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()
                passes += 1
            elapsed_ms = (time.perf_counter() - start) * 1e3
            joules = self.meter.end(elapsed_ms, self._busy_ms(candidate, elapsed_ms))
            return None if joules is None else joules / passes

        guard = Guard()
        try:
            candidate.energy_j.append(guard.run(stretch, limit_s + _ENERGY_STRETCH_S))
        except Exception as error:
            candidate.reason = sentence(error)
        finally:
            guard.close()

    def _busy_ms(self, candidate: _Candidate, elapsed_ms: float) -> dict[str, float]:
        busy = {device.name: 0.0 for device in self.cluster.devices}
        if candidate.plan.is_plain:
            busy.update(plain_busy_ms(self.workload.model, self.cluster, elapsed_ms))
        elif candidate.executor is not None:
            busy.update(candidate.executor.busy_ms())
        return busy

    def _outcome(self, candidate: _Candidate, samples: Sequence[float]) -> Outcome:
        if candidate.reason or not samples:
            return Outcome(source="measured", feasible=False, reason=candidate.reason or "it was not measured")
        latency_ms, _ = summary(samples)
        known = [joules for joules in candidate.energy_j if joules is not None]
        energy_j = summary(known)[0] if known and len(known) == len(candidate.energy_j) else None
        try:
            objective = self.objective.value(latency_ms, energy_j)
        except InputError as error:
            return Outcome(source="measured", feasible=False, reason=str(error))
        busy = {name: summary([run[name] for run in candidate.busy_ms])[0] for name in (candidate.busy_ms or [{}])[0]}
        return Outcome(
            source="measured",
            latency_ms=latency_ms,
            period_ms=latency_ms,
            throughput_sps=self.workload.batch_size / latency_ms * 1e3,
            energy_j=energy_j,
            energy_source=self.meter.source if energy_j is not None else None,
            objective=objective,
            peak_memory_bytes=peak_bytes(self.workload.model, self.cluster, candidate.plan, candidate.memory),
            busy_ms=busy,
            samples_ms=tuple(samples),
            timeline=candidate.timeline,
        )
