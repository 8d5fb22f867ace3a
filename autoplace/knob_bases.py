"""Which measured placements are worth a search of their knobs, and what may be turned on each."""

from __future__ import annotations

from collections.abc import Sequence

from autoplace.knobs import Base, in_line_threads
from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.result import Candidate
from autoplace.workload import Workload

__all__ = ["host_cores", "knob_bases", "lock_bound", "runs_on_cpu"]

_HOPELESS = 0.5
"""Placements that gain less than this have no knob that could make up for it."""
_LOCK_FACTOR = 1.3
"""Replicas in threads that take this many times what their parts take alone wait for the interpreter lock."""
_MICROBATCHES = (1, 2, 4, 8)


def knob_bases(rows: Sequence[Candidate], workload: Workload, problem: Problem, *, exported: bool) -> list[Base]:
    """Return plain PyTorch and the best measured placement of each kind that is not hopeless.

    Args:
        rows: What was measured so far.
        workload: Model and inputs.
        problem: Its devices.
        exported: Whether the model was captured by `torch.export`, so that stages can be cut from its graph.
    """
    ran = [c for c in rows if c.measured is not None and c.measured.feasible and (c.gain or 0.0) >= _HOPELESS]
    ran = [c for c in ran if c.gain is not None and not c.plan.compiled]
    best = {c.plan.shape: c for c in sorted(ran, key=lambda c: c.gain or 0.0)}
    bases = [Base(name="plain", plan=Plan.plain())]
    if "single" in best:
        plan = best["single"].plan
        bases.append(Base(name="single", plan=plan, threads=_threads(plan, problem)))
    if "replicas" in best:
        eaten = lock_bound(best["replicas"], rows, problem) and not _processes_refusal(workload)
        engines = ("threads", "processes") if eaten else ()
        bases.append(Base(name="replicas", plan=best["replicas"].plan, engines=engines, shares=True))
    staged = [best[shape] for shape in ("stages", "hybrid") if shape in best]
    if staged:
        plan = max(staged, key=lambda c: c.gain or 0.0).plan
        counts = dict.fromkeys([plan.microbatches, *(m for m in _MICROBATCHES if m <= workload.batch_size)])
        engines = ("threads", "graph") if exported else ()
        bases.append(Base(name="stages", plan=plan, microbatches=tuple(counts), engines=engines))
    return bases


def lock_bound(replicas: Candidate, rows: Sequence[Candidate], problem: Problem) -> bool:
    """Return whether replicas in threads take clearly more than their parts would take alone.

    Args:
        replicas: A measured plan of replicas.
        rows: What was measured; the whole model on one of the devices, with that device's own threads, among it.
        problem: The devices.
    """
    if replicas.measured is None or not runs_on_cpu(problem, replicas.plan):
        return False
    cores = {d.name: len(d.cores) for d in problem.cluster.devices}

    def alone(device: str) -> float | None:
        found = [
            c.measured.latency_ms
            for c in rows
            if c.measured is not None
            and c.measured.feasible
            and c.plan.shape == "single"
            and c.plan.devices[0] in replicas.plan.devices
            and cores[c.plan.devices[0]] == cores[device]
            and c.plan.threads.get(c.plan.devices[0], cores[device]) == cores[device]
        ]
        return min(found, default=None)

    parts = [(r.share, alone(r.devices[0])) for r in replicas.plan.replicas]
    expected_ms = [share * whole_ms for share, whole_ms in parts if whole_ms is not None]
    return bool(expected_ms) and replicas.measured.latency_ms > _LOCK_FACTOR * max(expected_ms)


def _processes_refusal(workload: Workload) -> str:
    from autoplace.runtime.processes import supported

    return supported(workload.model)


def _threads(plan: Plan, problem: Problem) -> tuple[int, ...]:
    if not runs_on_cpu(problem, plan):
        return ()
    name = plan.devices[0]
    cores = next(len(d.cores) for d in problem.cluster.devices if d.name == name)
    return tuple(dict.fromkeys([plan.threads.get(name, cores), *in_line_threads(host_cores(problem))]))


def host_cores(problem: Problem) -> int:
    """Return the cores of all CPU devices together, one at least."""
    return max(1, sum(len(d.cores) for d in problem.cluster.devices if d.kind == "cpu"))


def runs_on_cpu(problem: Problem, plan: Plan) -> bool:
    """Return whether all devices of a plan are groups of CPU cores."""
    kinds = {d.name: d.kind for d in problem.cluster.devices}
    return all(kinds.get(name) == "cpu" for name in plan.devices)
