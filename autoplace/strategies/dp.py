"""The pipeline dynamic programme: contiguous pieces of the graph, one a device, with the least load of the busiest.

J. Tarnawski, A. Phanishayee, N. Devanur, D. Mahajan, F. N. Paravecino, "Efficient Algorithms for Device Placement of
DNN Graph Operators", NeurIPS 2020. A piece is the difference of two order ideals of the graph of co-location classes;
F[ideal, devices used] = the least load of the busiest device and link → `_dp_kernels`. Exact over all ideals while
their number stays under a bound, over a line beyond it: the classes' own order and a depth-first one. A line that is
too long is cut at some positions only, those that few bytes cross, and then again with every position near the best
cuts.

The load of a piece is its ops; what it receives and sends besides where transfers are `blocking`; and beside it the
loads of its links where they are contended. With the goal latency, what it receives is always load, and a second
programme takes the least sum of the pieces instead of the greatest.

What is exact: everything with the route `host`, with transfers that cost nothing, and with two devices. With the route
`direct` and three devices or more a tensor counts once for its sender and once for each piece that reads it, as if it
came from the piece before and all went to the next one: exact for chains, else an estimate that the evaluator corrects.

Departures from the paper:

1. Unequal devices: the state is the set of devices used, identical ones counted, or the set and the sequence's end, or
   a position in one of a few orders where there are too many → `_dp_states`.
2. Training: a backward op is placed with its forward op by their class. The tensors that go forward bind; those that
   go back are charged to both ends.
3. One plan for every number of devices, so that an objective that weighs energy has something to choose from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autoplace.strategies._search import Constructive
from autoplace.strategies._support import View

if TYPE_CHECKING:
    from autoplace.strategies._dp_tables import Found

__all__ = ["PipelineDpStrategy"]

_MOST_IDEALS = 2000
"""Order ideals beyond which a line is cut instead."""
_MOST_PLANS = 24
"""Plans returned at most."""


class PipelineDpStrategy(Constructive):
    """Propose the contiguous pieces with the least greatest load, for every number of devices."""

    name = "dp"

    def __init__(self, *, most_ideals: int = _MOST_IDEALS) -> None:
        self.most_ideals = most_ideals
        """Order ideals beyond which a line is cut instead; 0 = always a line."""

    def candidates(self, view: View) -> list[NDArray[np.int32]]:
        """Return, for every number of devices, the best cut, best estimate first."""
        if not view.num_classes or not view.allowed.any(axis=1).all():
            return []
        from autoplace.strategies._dp_tables import Search  # numba: only when something is placed

        found = Search(view).run(self.most_ideals)
        by_set = view.problem.objective.energy_weight > 0
        summed = view.problem.objective.goal == "latency"
        best: dict[tuple, Found] = {}
        for plan in found:
            key = (plan.summed == summed, plan.devices if by_set else len(plan.devices))
            if key not in best or plan.cost < best[key].cost:
                best[key] = plan
        ranked = sorted(
            best.values(), key=lambda f: (f.summed != summed, _estimate(view, f), len(f.devices), f.devices)
        )
        unique = {f.class_device.tobytes(): view.spread(f.class_device) for f in ranked}
        return list(unique.values())[:_MOST_PLANS]


def _estimate(view: View, found: Found) -> float:
    """Return J of a plan, with the programme's cost for its time and its ops alone for its devices' busy time."""
    objective, cluster = view.problem.objective, view.problem.cluster
    if objective.energy_weight == 0.0:
        return found.cost
    idle = np.asarray([d.idle_watts or 0.0 for d in cluster.devices])
    extra = np.asarray([d.busy_watts or 0.0 for d in cluster.devices]) - idle
    busy_ms = view.class_latency_ms[np.arange(view.num_classes), found.class_device]
    energy_j = (idle.sum() * found.cost + (extra[found.class_device] * busy_ms).sum()) / 1000.0
    return objective.value(found.cost, float(energy_j))
