"""`SimulatedEvaluator`: plans in, Outcomes out, by simulation. It knows the problem alone, never the model.

Two doors: `score` for search (device indices in, objectives out, one compiled call), and `outcome` and `evaluate` for
everything that is shown to people.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autoplace.errors import InputError, PlanFileError
from autoplace.outcome import Outcome, Span
from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.simulate import kernels
from autoplace.simulate.arrays import Arrays, build_arrays, with_log
from autoplace.simulate.expand import Part, expand, expand_equal
from autoplace.simulate.reasons import why_not_runnable, why_too_large

__all__ = ["SimulatedEvaluator"]


class SimulatedEvaluator:
    """Evaluates plans of one problem by simulation. Deterministic; not to be shared between threads.

    Args:
        problem: What is placed. `semantics.microbatches = m` splits every pass into m equal parts that share the
            assignment, in `score` and `outcome` alike.

    Raises:
        InputError: If the objective weighs energy and a device states no watts.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.evaluations = 0
        """Assignments and plans evaluated so far."""
        larger, source = expand_equal(problem, problem.semantics.microbatches)
        self._prepare(larger, source)

    def _prepare(self, larger: Problem, source: NDArray[np.int32]) -> None:
        self._larger = larger
        self._arrays: Arrays = build_arrays(larger, self.problem, source)
        scale = self.problem.concurrency_scale if self.problem.semantics.microbatches > 1 else 1.0
        dispatch_ms = self.problem.dispatch_ms
        same = scale == 1.0 and dispatch_ms == 0.0
        self._spread_ms = None if same else self._arrays.latency_ms * scale + dispatch_ms
        """Latencies of assignments to several devices, where they are others."""

    def score(self, assignments: ArrayLike) -> NDArray[np.float64]:
        """Return the objective J of assignments; inf where infeasible.

        Args:
            assignments: int[P, N] or int[N], device index of every op.

        Returns:
            float64[P]; P = 1 for a single assignment.

        Raises:
            InputError: If the shape does not fit, or an index names no device.
        """
        plans = self._checked(assignments)
        objective = self._run(plans, self._arrays, full=False)[0][0]
        self.evaluations += len(plans)
        return objective

    def outcome(self, assignment: ArrayLike, *, timeline: bool = False) -> Outcome:
        """Return all figures of one assignment.

        Args:
            assignment: int[N], device index of every op.
            timeline: Whether to list what ran when.

        Raises:
            InputError: If the shape does not fit, or an index names no device.
        """
        plans = self._checked(assignment)
        if len(plans) != 1:
            raise InputError(f"outcome takes one assignment and got {len(plans)}; use score for many")
        self.evaluations += 1
        return self._outcome(plans, timeline=timeline)

    def schedule(self, assignment: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return start and finish of every op, ms, float64[m, N] each: a row per microbatch.

        Barrier ops exist once and have the same times in every row. All are inf where the assignment is infeasible.

        Raises:
            InputError: If the shape does not fit, or an index names no device.
        """
        plans, count = self._checked(assignment), self.problem.semantics.microbatches
        status = self._run(plans[:1], self._arrays, full=True)[1]
        shape = (count, self.problem.num_ops)
        start, finish = np.full(shape, np.inf), np.full(shape, np.inf)
        if status[0] == kernels.FEASIBLE:
            source = self._arrays.ops["source"]
            new = np.zeros(shape, np.int64)
            seen = np.zeros(self.problem.num_ops, np.int64)
            for index, op in enumerate(source):
                new[seen[op] :, op] = index
                seen[op] += 1
            start, finish = self._arrays.ops["start_ms"][new], self._arrays.ops["finish_ms"][new]
        return start, finish

    def evaluate(self, plans: Sequence[Plan], *, timeline: bool = False) -> list[Outcome]:
        """Return one Outcome per plan: replicas with their shares, microbatches and threads.

        A plan that does not fit the problem, or has no placement (plain PyTorch), is infeasible with a reason.
        """
        outcomes = []
        for plan in plans:
            self.evaluations += 1
            try:
                outcomes.append(self._evaluate(plan, timeline=timeline))
            except PlanFileError as error:
                outcomes.append(Outcome(source="simulated", feasible=False, reason=str(error)))
        return outcomes

    def _evaluate(self, plan: Plan, *, timeline: bool) -> Outcome:
        if plan.is_plain:
            reason = "plain PyTorch has no placement to simulate; measure it"
            return Outcome(source="simulated", feasible=False, reason=reason)
        problem = self._threaded(plan)
        arrays = [plan.assignment_array(problem, r) for r in range(len(plan.replicas))]
        usual = problem is self.problem and plan.microbatches == problem.semantics.microbatches
        if len(arrays) == 1 and usual:
            return self._outcome(self._checked(arrays[0]), timeline=timeline)
        for row in arrays:
            if reason := why_not_runnable(problem, self._arrays, row):
                return Outcome(source="simulated", feasible=False, reason=reason)
        larger, device = self.expanded(plan)
        return SimulatedEvaluator(larger)._outcome(device[None, :], timeline=timeline)

    def expanded(self, plan: Plan) -> tuple[Problem, NDArray[np.int32]]:
        """Return the problem that a plan's parts make, threads and contention included, and its ops' devices, int32[M].

        Raises:
            PlanFileError: If the plan does not fit the problem.
        """
        problem = self._threaded(plan)
        arrays = [plan.assignment_array(problem, r) for r in range(len(plan.replicas))]
        parts = [
            Part(row, replica.share / plan.microbatches)
            for row, replica in zip(arrays, plan.replicas, strict=True)
            for _ in range(plan.microbatches)
        ]
        staged = np.asarray([len(np.unique(p.assignment)) > 1 for p in parts])
        if len(parts) == 1:  # as in `score`: a whole pass takes ops as they become ready, whatever part they are of
            larger, device = problem.with_(semantics=replace(problem.semantics, microbatches=1)), arrays[0]
        else:
            larger, device = expand(problem, parts)
        part = np.zeros(len(device), np.int32) if larger.part is None else larger.part
        scale = problem.concurrency_scale if len(parts) > 1 and len(plan.devices) > 1 else 1.0
        latency = larger.latency_ms * scale + problem.dispatch_ms * staged[part][:, None]
        # `overhead_ms` has done its work in `expand`; nothing splits the larger problem again.
        return larger.with_(latency_ms=latency, concurrency_scale=1.0, dispatch_ms=0.0), device

    def _threaded(self, plan: Plan) -> Problem:
        """Return the problem with the latencies of the threads that the plan asks for, where they were measured."""
        scale = np.ones(self.problem.num_devices)
        for name, threads in plan.threads.items():
            if name not in self.problem.cluster.index:
                raise PlanFileError(f"the plan sets threads of device {name!r}, which the cluster lacks; tune again")
            scale[self.problem.cluster.index[name]] = self.problem.thread_scale.get(name, {}).get(threads, 1.0)
        if (scale == 1.0).all():
            return self.problem
        overhead = self.problem.overhead_ms
        return self.problem.with_(
            latency_ms=self.problem.latency_ms * scale, overhead_ms=None if overhead is None else overhead * scale
        )

    def _checked(self, assignments: ArrayLike) -> NDArray[np.int32]:
        plans = np.asarray(assignments)
        if plans.ndim == 1:
            plans = plans[None, :]
        shape = (self.problem.num_ops, self.problem.num_devices)
        if plans.ndim != 2 or plans.shape[1] != shape[0] or not np.issubdtype(plans.dtype, np.integer):
            raise InputError(
                f"assignments have shape {plans.shape} and type {plans.dtype}; expected integers, (plans, {shape[0]})"
            )
        if plans.size and (plans.min() < 0 or plans.max() >= shape[1]):
            raise InputError(f"an assignment names a device outside 0 to {shape[1] - 1}")
        return np.ascontiguousarray(plans, np.int32)

    def _run(
        self, plans: NDArray[np.int32], arrays: Arrays, *, full: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
        """Return objective, time, makespan and energy, float64[4, P], and status, int8[P]."""
        figures, status = np.empty((4, len(plans))), np.empty(len(plans), np.int8)
        if self._spread_ms is None:
            kernels.evaluate_plans(tuple(arrays), plans, full, figures, status)
            return figures, status
        spread = (plans != plans[:, :1]).any(axis=1)
        for rows, view in (
            (np.flatnonzero(~spread), arrays),
            (np.flatnonzero(spread), arrays._replace(latency_ms=self._spread_ms)),
        ):
            if len(rows):
                some, codes = np.empty((4, len(rows))), np.empty(len(rows), np.int8)
                kernels.evaluate_plans(tuple(view), np.ascontiguousarray(plans[rows]), full, some, codes)
                figures[:, rows], status[rows] = some, codes
        return figures, status

    def _outcome(self, plans: NDArray[np.int32], *, timeline: bool) -> Outcome:
        arrays = with_log(self._arrays) if timeline else self._arrays
        figures, (status,) = self._run(plans, arrays, full=True)
        objective, time_ms, makespan_ms, energy_j = figures[:, 0].tolist()
        peak_bytes = arrays.devices["peak_bytes"].tolist()
        names = [d.name for d in self.problem.cluster.devices]
        if status != kernels.FEASIBLE:
            memory = dict(zip(names, peak_bytes, strict=True)) if status == kernels.MEMORY else {}
            reason = why_not_runnable(self.problem, arrays, plans[0]) or why_too_large(self.problem, arrays)
            return Outcome(source="simulated", feasible=False, reason=reason, peak_memory_bytes=memory)
        known = not np.isnan(energy_j)
        return Outcome(
            source="simulated",
            latency_ms=float(makespan_ms),
            period_ms=float(time_ms),
            throughput_sps=1000.0 * self.problem.batch_size / float(time_ms) if time_ms > 0 else 0.0,
            energy_j=float(energy_j) if known else None,
            energy_source="model" if known else None,
            objective=float(objective),
            peak_memory_bytes=dict(zip(names, peak_bytes, strict=True)),
            busy_ms=dict(zip(names, arrays.devices["busy_ms"].tolist(), strict=True)),
            timeline=self._spans(arrays) if timeline else (),
        )

    def _spans(self, arrays: Arrays) -> tuple[Span, ...]:
        """Return what ran when: ops on devices, then transfers, each by start."""
        graph, devices = self._larger.graph, [d.name for d in self.problem.cluster.devices]
        nodes = [*devices, "host memory"]
        rows = arrays.ops[["device", "start_ms", "finish_ms"]].tolist()
        ops = [
            Span(resource=devices[device], label=name, start_ms=start, end_ms=end)
            for name, (device, start, end) in zip(graph.names, rows, strict=True)
        ]
        transfers = [
            Span(
                resource=f"{nodes[source]} -> {nodes[target]}",
                label=graph.names[graph.tensor_producer[tensor]],
                start_ms=start,
                end_ms=end,
            )
            for tensor, source, target, start, end in arrays.log[: int(arrays.rules["lines"][0])].tolist()
        ]
        return tuple(sorted(ops, key=_when) + sorted(transfers, key=_when))


def _when(span: Span) -> tuple[float, str, str]:
    return span.start_ms, span.resource, span.label
