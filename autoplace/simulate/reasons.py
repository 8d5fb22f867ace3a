"""Why an assignment cannot run, in one sentence. Off the hot path: the kernels give a number, people want a name."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoplace.problem import Problem
from autoplace.simulate.arrays import Arrays

__all__ = ["why_not_runnable", "why_too_large"]


def why_not_runnable(problem: Problem, arrays: Arrays, plan: NDArray[np.int32]) -> str:
    """Return which op, co-location or link forbids an assignment, int32[N]; empty when none does."""
    graph, names = problem.graph, [d.name for d in problem.cluster.devices]
    bad = np.flatnonzero(~np.isfinite(problem.latency_ms[np.arange(len(plan)), plan]))
    if len(bad):
        return f"op {graph.names[bad[0]]!r} cannot run on {names[plan[bad[0]]]!r}; place it elsewhere"
    bad = np.flatnonzero(plan != plan[arrays.colocate_first])
    if len(bad):
        first = arrays.colocate_first[bad[0]]
        return (
            f"ops {graph.names[first]!r} on {names[plan[first]]!r} and {graph.names[bad[0]]!r} on "
            f"{names[plan[bad[0]]]!r} are co-located; place them on one device"
        )
    return _missing_link(problem, arrays, plan) if arrays.rules["may_not_talk"][0] else ""


def _missing_link(problem: Problem, arrays: Arrays, plan: NDArray[np.int32]) -> str:
    graph, names, host = problem.graph, [d.name for d in problem.cluster.devices], problem.num_devices
    latency_ms, stays = arrays.links["latency_ms"], arrays.devices["stays"]
    for producer, consumer, _ in graph.edge_list:
        s, d = int(plan[producer]), int(plan[consumer])
        if arrays.rules["host"][0]:
            legs = [leg for leg, end in (((s, host), s), ((host, d), d)) if not stays[end]]
        else:
            legs = [(s, d)]
        if s != d and any(np.isinf(latency_ms[leg]) for leg in legs):
            return (
                f"op {graph.names[consumer]!r} on {names[d]!r} needs a tensor of {graph.names[producer]!r} on "
                f"{names[s]!r}, and no link joins the two; place them together or add the link"
            )
    return ""


def why_too_large(problem: Problem, arrays: Arrays) -> str:
    """Return which device's memory the plan that the kernels prepared last exceeds."""
    peak, limits = arrays.devices["peak_bytes"], arrays.devices["memory_bytes"]
    worst = int(np.argmax(peak > limits))
    return (
        f"device {problem.cluster.devices[worst].name!r} would hold {peak[worst]:.0f} bytes and has "
        f"{limits[worst]:.0f}; move ops off it"
    )
