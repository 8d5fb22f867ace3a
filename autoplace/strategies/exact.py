"""The exact optimum of small problems, with a proof: by trying every placement, or by a mixed-integer programme.

1. `enumeration`: every assignment of classes to devices is simulated, all but the mirror images of devices that are
   the same. Exact whatever the objective; used where there are `MOST_ASSIGNMENTS` at most and the time suffices.
2. `milp` → `_milp`: a lower bound for every placement, and a placement, which the simulator then scores. With the goal
   throughput and an energy weight of 0 or 1 the two meet. With the goal latency the bound is that of the best schedule,
   which a device's queue need not reach. With an energy weight w between, the bound is T*^(1-w) · E*^w of the two
   separate optima. Proven is what the bound says to be within `TOLERANCE` of the optimum, and nothing else.

Larger problems are refused: up to `MOST_PLACES` classes times devices, and with the goal latency up to `MOST_OPS` ops.
The heuristics' placements are scored first, so that an answer exists when the time is up.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import InputError
from autoplace.problem import Problem
from autoplace.strategies._base import Budget
from autoplace.strategies._search import Found, Placer, Scorer
from autoplace.strategies._support import View
from autoplace.strategies.heuristics import construct

__all__ = ["MOST_ASSIGNMENTS", "MOST_OPS", "MOST_PLACES", "TOLERANCE", "ExactResult", "ExactStrategy", "solve"]

MOST_ASSIGNMENTS = 2_000_000
"""Assignments that are simulated one by one."""
MOST_PLACES = 1_200
"""Classes times devices of a mixed-integer programme."""
MOST_OPS = 48
"""Ops, those of all microbatches, of a mixed-integer programme with the goal latency."""
TOLERANCE = 1e-6
"""Relative distance from the bound at which a placement counts as optimal."""
DEFAULT_SECONDS = 60.0
"""Time limit where none is given, s."""
_BATCH = 4096
"""Assignments that are simulated in one call."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExactResult:
    """What is known of the optimum."""

    assignment: NDArray[np.int32] | None
    """int32[N], the best placement found; None when none was."""
    objective: float
    """Its J, simulated; inf when there is none."""
    lower_bound: float | None
    """No placement has a lower J; inf when none is feasible; None when nothing is known."""
    proven: bool
    """Whether the placement is optimal, or the problem infeasible, within `TOLERANCE`."""
    method: str
    """`enumeration` or `milp`."""
    seconds: float
    """Time taken, s."""


class ExactStrategy(Placer):
    """Propose the optimum of a small problem, or the best that is found in the time."""

    name = "exact"
    result: ExactResult | None = None
    """What the last search knows of the optimum."""

    def search(self, scorer: Scorer, *, seed: int) -> Found:
        """Score the heuristics, then solve.

        Raises:
            InputError: If the problem is too large.
        """
        left = scorer.clock.remaining()
        seconds = DEFAULT_SECONDS if left is None or left.seconds is None else left.seconds
        found, self.result = _solve(scorer, seconds)
        return found[: self.keep]


def solve(problem: Problem, *, seconds: float) -> ExactResult:
    """Find the optimum of a small problem and prove it.

    Args:
        problem: What to place.
        seconds: Time limit; the best so far comes back when it is reached.

    Raises:
        InputError: If the problem is too large for both methods.
    """
    return _solve(Scorer(problem, Budget(seconds=seconds).start()), seconds)[1]


def _solve(scorer: Scorer, seconds: float) -> tuple[Found, ExactResult]:
    """Return what was scored, best first, and what is known of the optimum."""
    begin = time.perf_counter()
    upper = _rounded(scorer.view)
    view = upper.relaxed() or upper
    alike = _alike(view)
    linear, few = _fits_programme(view), _few(view, alike)
    if not linear and not few:
        raise InputError(_why_too_large(view))
    found = _best(*construct(scorer).values())
    most = scorer.clock.allowed(MOST_ASSIGNMENTS)
    rows = _assignments(view, alike, most) if few else None
    if rows is None and not linear and most == MOST_ASSIGNMENTS:
        raise InputError(_why_too_large(view))
    bound: float | None = None
    method = "milp" if linear else "enumeration"
    if rows is not None:
        more, complete = _enumerate(scorer, rows, seconds - (time.perf_counter() - begin), hurry=linear)
        found = _best(found, more)
        if complete:
            method, bound = "enumeration", found[0][0] if found else np.inf
    if method == "milp":
        placed, bound = _programme(scorer, upper, alike, found, seconds - (time.perf_counter() - begin))
        found = _best(found, scorer.rank(placed))
    objective = found[0][0] if found else np.inf
    proven = bound is not None and (objective == bound or objective <= bound + TOLERANCE * abs(bound))
    if bound is not None:
        bound = min(bound, objective)  # a bound above what was simulated is the solver's rounding
    return found, ExactResult(
        assignment=found[0][1] if found else None,
        objective=objective,
        lower_bound=bound,
        proven=proven,
        method=method,
        seconds=time.perf_counter() - begin,
    )


def _rounded(view: View) -> View:
    """Return the view with the memory that the simulator counts: every microbatch rounds activations up to whole bytes.

    Without it the programme's optimum may exceed a device's memory by a few bytes, and is then no placement at all.
    """
    from autoplace.simulate.expand import expand_equal  # numba: only when something is placed

    problem = view.problem
    if problem.semantics.microbatches == 1:
        return view
    larger, source = expand_equal(problem, problem.semantics.microbatches)
    graph, classes = larger.graph, view.op_class[source]
    whole = graph.weight_bytes + graph.activation_bytes
    held = graph.weight_bytes + np.where(graph.frees, 0, graph.activation_bytes)
    class_bytes, held_bytes = (
        np.bincount(classes, weights=part, minlength=view.num_classes).astype(np.float64) for part in (whole, held)
    )
    allowed = view.allowed & (class_bytes[:, None] <= view.capacity)
    return replace(view, class_bytes=class_bytes, held_bytes=held_bytes, allowed=allowed)


def _best(*found: Found) -> Found:
    unique = {a.tobytes(): (value, a) for pairs in found for value, a in pairs}
    return sorted(unique.values(), key=lambda pair: pair[0])


def _fits_programme(view: View) -> bool:
    from autoplace.strategies._milp import ops_in_time  # numba: only when something is placed

    if view.num_classes * len(view.capacity) > MOST_PLACES:
        return False
    return view.problem.objective.goal == "throughput" or ops_in_time(view.problem) <= MOST_OPS


def _why_too_large(view: View) -> str:
    limit = f"{MOST_PLACES} ops times devices"
    if view.problem.objective.goal == "latency":
        limit = f"{MOST_OPS} ops (of all microbatches)"
    return (
        f"the exact optimum of {view.problem.num_ops} ops on {len(view.capacity)} devices is out of reach (at most "
        f"{limit}, or {MOST_ASSIGNMENTS} placements); use --strategy auto"
    )


def _alike(view: View) -> list[list[int]]:
    """Return groups of two devices or more of which any two can change places without changing any figure.

    With the goal latency and `blocking` transfers, ties are broken by device index: then no two are alike.
    """
    problem = view.problem
    cluster, semantics = problem.cluster, problem.semantics
    if semantics.transfers == "blocking" and (problem.objective.goal == "latency" or problem.graph.frees.any()):
        return []
    links = np.stack([cluster.link_latency_ms, cluster.link_bytes_per_ms])
    overhead = problem.latency_ms if problem.overhead_ms is None else problem.overhead_ms
    groups: list[list[int]] = []
    for one in range(problem.num_devices):
        for group in groups:
            other = group[0]
            swapped = np.arange(problem.num_devices)
            swapped[[one, other]] = other, one
            same = [
                np.array_equal(problem.latency_ms[:, one], problem.latency_ms[:, other]),
                np.array_equal(overhead[:, one], overhead[:, other]),
                np.array_equal(links, links[:, swapped][:, :, swapped]),
                _kind(problem, one) == _kind(problem, other),
            ]
            if all(same):
                group.append(one)
                break
        else:
            groups.append([one])
    return [g for g in groups if len(g) > 1]


def _kind(problem: Problem, index: int) -> tuple:
    """Return what a device is besides its links; with the route `host`, also its legs to and from host memory."""
    device = problem.cluster.devices[index]
    what = (device.memory_bytes, device.idle_watts, device.busy_watts)
    if problem.semantics.route != "host":
        return what
    from autoplace.simulate.arrays import link_matrices

    legs = [matrix[ends] for matrix in link_matrices(problem.cluster, host=True) for ends in ((index, -1), (-1, index))]
    return (*what, device.kind, *legs)


def _few(view: View, alike: Sequence[Sequence[int]]) -> bool:
    """Return whether there may be few enough placements to try them all: memory may exclude nine in ten and more."""
    if len(view.capacity) > 127:
        return False
    choices = float(np.log(np.maximum(view.allowed.sum(axis=1), 1)).sum())
    mirrored = sum(math.lgamma(len(group) + 1) for group in alike)
    spare = math.log(100.0) if np.isfinite(view.capacity).any() else 0.0
    return choices - mirrored <= math.log(max(MOST_ASSIGNMENTS, 1)) + spare


def _assignments(view: View, alike: Sequence[Sequence[int]], most: int) -> NDArray[np.int8] | None:
    """Return every placement of the classes within memory, int8[P, K]; None when there are more than `most`."""
    before = {device: earlier for group in alike for earlier, device in itertools.pairwise(group)}
    rows = np.zeros((1, 0), np.int8)
    held = np.zeros((1, len(view.capacity)))
    for one in range(view.num_classes):
        grown, weights = [], []
        for device in np.flatnonzero(view.allowed[one]).tolist():
            fits = held[:, device] + view.class_bytes[one] <= view.capacity[device]
            if device in before:
                fits &= (rows == before[device]).any(axis=1)
            kept = rows[fits]
            grown.append(np.concatenate([kept, np.full((len(kept), 1), device, np.int8)], axis=1))
            weights.append(held[fits])
            weights[-1][:, device] += view.class_bytes[one]
        if sum(len(g) for g in grown) > most:
            return None
        rows = np.concatenate(grown) if grown else np.zeros((0, one + 1), np.int8)
        held = np.concatenate(weights) if weights else held[:0]
    return rows


def _enumerate(scorer: Scorer, rows: NDArray[np.int8], seconds: float, *, hurry: bool) -> tuple[Found, bool]:
    """Simulate placements until they or the seconds end; with `hurry`, stop at once when the seconds will not suffice.

    Returns:
        The best one, and whether all were simulated.
    """
    begin, best = time.perf_counter(), np.inf
    found: Found = []
    for done in range(0, len(rows), _BATCH):
        spent = time.perf_counter() - begin
        if done and (spent > seconds or (hurry and spent * len(rows) > 0.8 * seconds * done and done == _BATCH)):
            return found, False
        batch = rows[done : done + _BATCH].astype(np.int32)[:, scorer.view.op_class]
        values = scorer.score(batch)
        index = int(values.argmin())
        if values[index] < best:
            best = float(values[index])
            found = [(best, batch[index])]
    return found, True


def _programme(
    scorer: Scorer, upper: View, alike: Sequence[Sequence[int]], found: Found, seconds: float
) -> tuple[list[NDArray[np.int32]], float | None]:
    """Return placements of mixed-integer programmes, not yet simulated, and a lower bound of J, None if unknown."""
    from autoplace.strategies._milp import solve_linear

    weight = scorer.problem.objective.energy_weight
    sums = [(1.0, 0.0, 1.0 - weight), (0.0, 1.0, weight)]
    sums = [terms for terms in sums if terms[2] > 0]
    relaxed, placed, bound = upper.relaxed(), [], 1.0
    begin = time.perf_counter()
    for number, (time_weight, energy_weight, exponent) in enumerate(sums):
        left = (seconds - (time.perf_counter() - begin)) / (len(sums) - number)
        # What memory holds at least bounds every placement; what it holds at most gives one that is feasible for sure.
        for view, part in ((relaxed, 0.6 * left), (upper, left)) if relaxed else ((upper, left),):
            solution = solve_linear(
                view,
                time_weight=time_weight,
                energy_weight=energy_weight,
                longest_ms=_longest_ms(scorer.problem, found),
                alike=alike,
                seconds=part,
            )
            if solution.class_device is not None:
                placed.append(upper.spread(solution.class_device))
            if view is not upper or relaxed is None:
                bound *= max(solution.bound, 0.0) ** exponent
    bound = min(bound, _single_bound(scorer))
    return placed, bound if bound > 0.0 else None


def _longest_ms(problem: Problem, found: Found) -> float:
    """Return a time that an optimal placement does not exceed, as one with a known J is no better; inf when unknown."""
    weight = problem.objective.energy_weight
    if found and weight == 0.0:
        return found[0][0]
    least_watts = sum(min(d.idle_watts or 0.0, d.busy_watts or 0.0) for d in problem.cluster.devices)
    if found and weight == 1.0 and least_watts > 0:
        return 1000.0 * found[0][0] / least_watts
    return np.inf


def _single_bound(scorer: Scorer) -> float:
    """Return the least J of all ops on one device where one device is cheaper than the programme thinks, else inf."""
    problem = scorer.problem
    if problem.dispatch_ms == 0.0 and (problem.concurrency_scale == 1.0 or problem.semantics.microbatches == 1):
        return np.inf
    rows = [np.full(problem.num_ops, d, np.int32) for d in range(problem.num_devices)]
    return min((value for value, _ in scorer.rank(rows)), default=np.inf)
