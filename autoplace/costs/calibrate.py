"""`calibrate`: what real runs teach the simulator. A few factors that mean something, fitted to measured Outcomes.

Three factors stand between the simulator and the executors:

- `handover_ms`, on top of the latency of every link between two devices: a dispatch to another device's thread, waiting
  for a turn and for the interpreter, which a profiled copy does not see. Each microbatch pays it at each crossing.
- `concurrency_scale`, on all latencies of plans that work on parts of the batch on several devices at once, which share
  caches and memory. → `Problem.concurrency_scale`
- `dispatch_ms`, on every op, in each part of the batch, of plans in stages: those call op by op in devices' threads,
  where other plans make one call. Without it the other two could not explain plans in stages and replicas together: the
  loss after the fit to five runs was 30 instead of 16. [measured: 2 cores, BERT, 2026-11-23]  → `Problem.dispatch_ms`

They minimise, over the feasible runs i,

    sum_i huber(log(measured_i / predicted_i) / 0.05)
        + ((handover - prior) / 0.5 ms)^2 + ((dispatch - prior) / 0.2 ms)^2 + (log(scale / prior) / 0.3)^2

so that few runs move them only as far as those ask for, and a run that fits nothing pulls with bounded force. The
search is a grid, then damped Gauss-Newton steps: deterministic, a few hundred evaluations at most.

It does not know why a plan in stages is slow: with a handful of runs, hand-over and dispatch trade against each other.
An executor calls a module that lies wholly on one device once, however many ops it has, so that dispatch per op makes
contiguous plans look too slow where only scattered ones were measured.
Nor does it know a machine that became slower as a whole, which ends up in the factors of plans on several devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoplace.costs import cache
from autoplace.errors import AutoplaceError, InputError
from autoplace.hardware.cluster import Link
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.simulate import SimulatedEvaluator

__all__ = ["Calibration", "PredictionError", "calibrate", "load_calibration", "store_calibration"]

Point = tuple[float, float, float]
"""Hand-over (ms), concurrency scale, dispatch (ms)."""

_NOISE = 0.05
"""Relative error of a prediction that is as good as a short real run can tell."""
_HUBER = 2.0
"""Errors beyond this many times the noise count linearly."""
_SPREAD = (0.5, 0.3, 0.2)
"""How far the factors usually stray: hand-over (ms), logarithm of the contention, dispatch (ms)."""
_GRID = ((0.0, 0.03, 0.3, 1.5), (1.0, 1.1, 1.4), (0.0, 0.05, 0.2, 0.6))
"""Where the search begins, factor by factor."""
_NEUTRAL = (0.0, 1.0, 0.0)
_DIFFERENCE = 1e-3
_MOST_STEPS = 25
_MOST_DAMPING = 1e4
_LEAST_GAIN = 1e-4


@dataclass(frozen=True, kw_only=True)
class PredictionError:
    """How well the simulator foretells real runs."""

    median: float
    """Median of |predicted / measured - 1|; 0 without runs."""
    kendall_tau: float
    """Agreement of the two orders, tau-b in [-1, 1]; 0 where fewer than two runs differ."""
    runs: int
    """Feasible runs compared."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The simulator's fitted factors; the default changes nothing."""

    handover_ms: float = 0.0
    """Added to the latency of every link between two devices, ms, 0 or more."""
    concurrency_scale: float = 1.0
    """Factor, 1 or more, on latencies where several devices work at once."""
    dispatch_ms: float = 0.0
    """Added to every op, in each part of the batch, of plans in stages, ms, 0 or more."""
    runs: int = 0
    """Real runs that it was fitted to."""

    def __post_init__(self) -> None:
        added = (self.handover_ms, self.concurrency_scale - 1.0, self.dispatch_ms)
        if not all(0.0 <= value < math.inf for value in added):
            raise InputError(
                "a calibration makes nothing faster; handover_ms and dispatch_ms are 0 or more, the scale 1"
            )

    @property
    def factors(self) -> Point:
        """Hand-over (ms), concurrency scale, dispatch (ms)."""
        return self.handover_ms, self.concurrency_scale, self.dispatch_ms

    @property
    def sentence(self) -> str:
        """The factors in words, those that change something."""
        texts = [
            (self.handover_ms >= 0.0005, f"hand-over +{self.handover_ms:.2g} ms"),
            (self.dispatch_ms >= 0.0005, f"dispatch +{self.dispatch_ms:.2g} ms an op in stages"),
            (self.concurrency_scale >= 1.0005, f"devices at once ×{self.concurrency_scale:.2f}"),
        ]
        return ", ".join(text for counts, text in texts if counts) or "no correction"

    def apply(self, problem: Problem) -> Problem:
        """Return the problem with the factors on top of what was profiled; fingerprints of graph and cluster stay."""
        cluster = problem.cluster

        def longer(link: Link) -> Link:
            return replace(link, latency_ms=link.latency_ms + self.handover_ms)

        links = {pair: longer(link) if pair[0] != pair[1] else link for pair, link in cluster.links.items()}
        default = None if cluster.default_link is None else longer(cluster.default_link)
        return problem.with_(
            cluster=replace(cluster, links=links, default_link=default),
            concurrency_scale=problem.concurrency_scale * self.concurrency_scale,
            dispatch_ms=problem.dispatch_ms + self.dispatch_ms,
        )

    def error(self, problem: Problem, plans: Sequence[Plan], outcomes: Sequence[Outcome]) -> PredictionError:
        """Compare the predictions under this calibration with real runs.

        Args:
            problem: Without any calibration.
            plans: What ran.
            outcomes: What it took; infeasible ones, and plans that cannot be simulated, are left out.
        """
        simulated = SimulatedEvaluator(self.apply(problem)).evaluate(plans)
        pairs = [
            (p.latency_ms, m.latency_ms)
            for p, m in zip(simulated, outcomes, strict=True)
            if p.feasible and m.feasible and m.latency_ms > 0
        ]
        if not pairs:
            return PredictionError(median=0.0, kendall_tau=0.0, runs=0)
        median = float(np.median([abs(predicted / measured - 1.0) for predicted, measured in pairs]))
        return PredictionError(median=median, kendall_tau=_kendall_tau(pairs), runs=len(pairs))

    def to_json(self) -> dict[str, Any]:
        """Return the calibration as JSON-ready data."""
        return asdict(self)

    @staticmethod
    def from_json(data: Any) -> Calibration:
        """Read a calibration back.

        Raises:
            InputError: If the data is no calibration.
        """
        try:
            return Calibration(
                handover_ms=float(data["handover_ms"]),
                concurrency_scale=float(data["concurrency_scale"]),
                dispatch_ms=float(data["dispatch_ms"]),
                runs=int(data["runs"]),
            )
        except (KeyError, TypeError, ValueError):
            raise InputError("this is no calibration; tune again to make one") from None


def calibrate(
    problem: Problem, plans: Sequence[Plan], outcomes: Sequence[Outcome], *, prior: Calibration | None = None
) -> Calibration:
    """Fit the simulator's factors to real runs.

    Args:
        problem: As profiled, without any calibration.
        plans: What ran.
        outcomes: What it took. Infeasible ones, and plans that cannot be simulated, are left out.
        prior: What the factors are drawn to, for example an earlier tuning's; None = the neutral one.

    Returns:
        The fitted factors; the prior where no run tells anything about them.
    """
    prior = prior or Calibration()
    runs = _runs(problem, plans, outcomes)
    if not runs:
        return prior
    telling = [run for run in runs if run.several]
    if not telling:
        return replace(prior, runs=len(runs))
    drawn_to = prior.factors

    def errors(point: Point) -> NDArray[np.float64]:
        """Return the runs' errors and then the strays, each over its usual size, float64[runs + 3]."""
        strays = (point[0] - drawn_to[0], math.log(point[1] / drawn_to[1]), point[2] - drawn_to[2])
        return np.asarray([*(run.log_error(point) / _NOISE for run in telling), *np.divide(strays, _SPREAD)])

    def loss(point: Point) -> float:
        return _loss(errors(point))

    # Hand-over and dispatch have valleys of their own: go down from the best point of each hand-over.
    starts = [min(product([handover_ms], *_GRID[1:]), key=loss) for handover_ms in _GRID[0]]
    best = min((_descend(errors, start) for start in [drawn_to, *starts]), key=loss)
    return Calibration(handover_ms=best[0], concurrency_scale=best[1], dispatch_ms=best[2], runs=len(runs))


def load_calibration(problem: Problem) -> Calibration | None:
    """Return what an earlier tuning of this graph on these devices found; None when there is none."""
    found = cache.load(_key(problem))
    try:
        return None if found is None else Calibration.from_json(found)
    except AutoplaceError:
        return None


def store_calibration(problem: Problem, calibration: Calibration) -> None:
    """Keep a calibration for the next tuning of this graph on these devices."""
    cache.store(_key(problem), calibration.to_json())


def _key(problem: Problem) -> str:
    return cache.cache_key(
        {"what": "calibration/1", "cluster": problem.cluster.fingerprint, "graph": problem.graph.fingerprint}
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """One real run, and its plan ready to be simulated again."""

    measured_ms: float
    problem: Problem
    """The plan's parts as one graph."""
    device: NDArray[np.int32]
    """int32[M]."""
    staged: NDArray[np.bool_]
    """bool[M]: the op's replica is in stages."""
    several: bool
    """Whether it uses several devices; the factors change no other."""
    parts: bool
    """Whether the batch is split, so that devices work at once."""

    def log_error(self, point: Point) -> float:
        """Return log(measured / predicted)."""
        handover_ms, scale, dispatch_ms = point
        problem = Calibration(handover_ms=handover_ms).apply(self.problem)
        latency = problem.latency_ms * (scale if self.parts else 1.0) + dispatch_ms * self.staged[:, None]
        predicted_ms = SimulatedEvaluator(problem.with_(latency_ms=latency)).outcome(self.device).latency_ms
        return math.log(self.measured_ms / predicted_ms)


def _runs(problem: Problem, plans: Sequence[Plan], outcomes: Sequence[Outcome]) -> list[_Run]:
    simulator = SimulatedEvaluator(problem)
    runs = []
    for plan, predicted, measured in zip(plans, simulator.evaluate(plans), outcomes, strict=True):
        if not (predicted.feasible and measured.feasible and predicted.latency_ms > 0 and measured.latency_ms > 0):
            continue
        larger, device = simulator.expanded(plan)
        runs.append(
            _Run(
                measured_ms=measured.latency_ms,
                problem=larger,
                device=device,
                staged=_staged(plan)[np.zeros(len(device), np.int32) if larger.part is None else larger.part],
                several=len(plan.devices) > 1,
                parts=plan.microbatches * len(plan.replicas) > 1,
            )
        )
    return runs


def _staged(plan: Plan) -> NDArray[np.bool_]:
    """Return for each of a replica's parts whether it is in stages, bool[parts]."""
    return np.repeat([len(r.devices) > 1 for r in plan.replicas], plan.microbatches)


def _weights(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Huber's weights; the strays, which come last, always count in full."""
    weights = np.minimum(1.0, _HUBER / np.maximum(np.abs(errors), _HUBER))
    weights[-len(_SPREAD) :] = 1.0
    return weights


def _loss(errors: NDArray[np.float64]) -> float:
    runs, strays = np.abs(errors[: -len(_SPREAD)]), errors[-len(_SPREAD) :]
    robust = np.where(runs <= _HUBER, runs**2, _HUBER * (2.0 * runs - _HUBER))
    return float(robust.sum() + (strays**2).sum())


def _descend(errors_of: Callable[[Point], NDArray[np.float64]], start: Point) -> Point:
    """Return the factors at the foot of the start's valley: damped Gauss-Newton steps on reweighted errors.

    D. Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", 1963. A factor at its neutral
    value that wants to go below it is left out of the step.
    """
    point, damping = np.asarray(start), 1e-2
    errors = errors_of(start)
    for _ in range(_MOST_STEPS):
        moved = [errors_of(_point(point + _DIFFERENCE * axis)) for axis in np.eye(len(point))]
        slopes = (np.stack(moved, axis=1) - errors[:, None]) / _DIFFERENCE
        weights = _weights(errors)
        gradient = slopes.T @ (weights * errors)
        free = np.flatnonzero((point > _NEUTRAL) | (gradient < 0.0))
        curvature = (slopes.T @ (weights[:, None] * slopes))[np.ix_(free, free)]
        loss = gained = _loss(errors)
        while len(free) and damping < _MOST_DAMPING:
            step = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), gradient[free])
            trial = point.copy()
            trial[free] = np.maximum(np.asarray(_NEUTRAL)[free], point[free] - step)
            found = errors_of(_point(trial))
            if _loss(found) < loss:
                gained = loss - _loss(found)
                point, errors, damping = trial, found, damping / 5.0
                break
            damping *= 4.0
        else:
            break
        if gained < _LEAST_GAIN:
            break
    return _point(point)


def _point(values: NDArray[np.float64]) -> Point:
    return float(values[0]), float(values[1]), float(values[2])


def _kendall_tau(pairs: Sequence[tuple[float, float]]) -> float:
    """Return tau-b of (predicted, measured) pairs, O(n^2). M. G. Kendall, "Rank Correlation Methods", 1948."""
    agree = ties_left = ties_right = total = 0
    for (a, b), (c, d) in combinations(pairs, 2):
        left, right = int(a > c) - int(a < c), int(b > d) - int(b < d)
        agree += left * right
        ties_left += left == 0
        ties_right += right == 0
        total += 1
    scale = math.sqrt((total - ties_left) * (total - ties_right))
    return agree / scale if scale > 0 else 0.0
