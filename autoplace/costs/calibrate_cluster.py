"""`calibrate_cluster`: what real runs over several ranks teach → `simulate.collectives`.

The factors are those of `ClusterFactors`: a speed a device, the all-reduce, the transfers, the dispatch of a stage,
and the part of the overlap that is real. Those that some run depends on minimise, over the runs i,

    sum_i huber(log(measured_i / predicted_i) / noise_i) + sum_f ((factor_f - prior_f) / spread_f)^2

in the logarithms of the scales. The noise of a run is 5 %, and on top of it, in squares, what its samples' usual
deviation leaves in the median of as many (→ `_with_noise`): on a busy machine runs say less. The prior decides what the
runs leave open: with data parallelism alone, a slow all-reduce and a poor overlap look the same. Solved by scipy's
trust-region least squares, from the prior and from a prior with some dispatch; deterministic.

It does not know that a device slows down as the ranks of its host work, other than in its one speed, nor links that
differ from what was measured in other ways than all alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.costs.calibrate import PredictionError, _kendall_tau
from autoplace.errors import PlanFileError
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.simulate.cluster_factors import ClusterFactors
from autoplace.simulate.collectives import ClusterEvaluator

__all__ = ["ClusterCalibration", "calibrate_cluster", "prediction_error"]

_NOISE = 0.05
"""Relative error of a prediction that is as good as a short real run on an idle machine can tell."""
_OF_MEDIAN = 1.2533
"""Standard error of a median over that of a mean, of many samples of a normal distribution: sqrt(pi / 2)."""
_HUBER = 2.0
"""Errors beyond this many times the noise count linearly."""
_SOME_DISPATCH_MS = 0.5
_LEAST_GAIN = 1e-6
"""Relative gains below this end the search."""
_WIDEST = math.log(50.0)
"""No scale is fitted beyond 50 or below 1/50."""


@dataclass(frozen=True, kw_only=True)
class ClusterCalibration:
    """Fitted factors, and how well they foretell the runs that they were fitted to."""

    factors: ClusterFactors
    runs: int
    """Real runs that they were fitted to."""
    before: PredictionError
    """Under the prior."""
    after: PredictionError
    """Under the fitted factors."""

    @property
    def sentence(self) -> str:
        """The fit in words."""
        if not self.runs:
            return "no run to calibrate with"
        return (
            f"{self.factors.sentence}; median error of {self.runs} runs {self.before.median:.0%} → "
            f"{self.after.median:.0%}, order {self.before.kendall_tau:.2f} → {self.after.kendall_tau:.2f}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the calibration as JSON-ready data."""
        return {
            "factors": self.factors.to_json(),
            "runs": self.runs,
            "before": asdict(self.before),
            "after": asdict(self.after),
        }


def calibrate_cluster(
    problem: Problem,
    plans: Sequence[Plan],
    outcomes: Sequence[Outcome],
    *,
    prior: ClusterFactors | None = None,
    gpipe: bool = False,
) -> ClusterCalibration:
    """Fit the factors of plans over several ranks to real runs.

    Args:
        problem: As profiled.
        plans: What ran.
        outcomes: What it took. Infeasible ones, and plans that cannot be simulated, are left out.
        prior: What the factors are drawn to; None = → `ClusterFactors.assumed`.
        gpipe: Whether pipelines ran GPipe where 1F1B could run as well.

    Returns:
        The fitted factors; the prior where no run tells anything.
    """
    prior = ClusterFactors.assumed(problem.cluster) if prior is None else prior
    evaluator = ClusterEvaluator(problem, factors=prior, gpipe=gpipe)
    runs = _able(evaluator, plans, outcomes)
    before = _error(evaluator, runs)
    knobs = _knobs(evaluator, [run.plan for run in runs], prior)
    fitted = _fit(evaluator, runs, knobs, prior) if runs else prior
    after = _error(evaluator.with_factors(fitted), runs)
    return ClusterCalibration(factors=fitted, runs=len(runs), before=before, after=after)


def prediction_error(
    problem: Problem,
    plans: Sequence[Plan],
    outcomes: Sequence[Outcome],
    *,
    factors: ClusterFactors | None = None,
    gpipe: bool = False,
) -> PredictionError:
    """Compare predictions with real runs, for example ones that nothing was fitted to.

    Args:
        problem: As profiled.
        plans: What ran.
        outcomes: What it took; infeasible ones, and plans that cannot be simulated, are left out.
        factors: Corrections; None = → `ClusterFactors.assumed`.
        gpipe: Whether pipelines ran GPipe where 1F1B could run as well.
    """
    evaluator = ClusterEvaluator(problem, factors=factors, gpipe=gpipe)
    return _error(evaluator, _able(evaluator, plans, outcomes))


class _Run(NamedTuple):
    plan: Plan
    measured_ms: float
    noise: float = _NOISE
    """Relative error that the run may have."""


class _Knob(NamedTuple):
    """One number that is fitted: a logarithm, but for the dispatch and the overlap."""

    name: str
    """A field of the factors, or `speed <device>`."""
    prior: float
    spread: float
    """How far it usually strays."""
    low: float
    high: float


def _able(evaluator: ClusterEvaluator, plans: Sequence[Plan], outcomes: Sequence[Outcome]) -> list[_Run]:
    """Return the runs that can be compared with a prediction."""
    runs, samples = [], []
    for plan, outcome in zip(plans, outcomes, strict=True):
        if plan.is_plain or not outcome.feasible or not 0.0 < outcome.latency_ms < math.inf:
            continue
        try:
            if 0.0 < evaluator.predict_ms(plan) < math.inf:
                runs.append(_Run(plan, outcome.latency_ms))
                samples.append(outcome.samples_ms)
        except PlanFileError:
            continue
    return _with_noise(runs, samples)


def _with_noise(runs: Sequence[_Run], samples: Sequence[Sequence[float]]) -> list[_Run]:
    """Return the runs with their noise; the deviation of single samples is taken to be the same for all."""
    spreads = [float(np.std(s, ddof=1) / np.mean(s)) for s in samples if len(s) > 1]
    spread = float(np.median(spreads)) if spreads else 0.0
    return [
        run._replace(noise=math.hypot(_NOISE, _OF_MEDIAN * spread / math.sqrt(max(1, len(of_run)))))
        for run, of_run in zip(runs, samples, strict=True)
    ]


def _error(evaluator: ClusterEvaluator, runs: Sequence[_Run]) -> PredictionError:
    if not runs:
        return PredictionError(median=0.0, kendall_tau=0.0, runs=0)
    pairs = [(evaluator.predict_ms(run.plan), run.measured_ms) for run in runs]
    median = float(np.median([abs(predicted / measured - 1.0) for predicted, measured in pairs]))
    return PredictionError(median=median, kendall_tau=_kendall_tau(pairs), runs=len(runs))


def _knobs(evaluator: ClusterEvaluator, plans: Sequence[Plan], prior: ClusterFactors) -> list[_Knob]:
    """Return the factors that some of the plans depend on."""
    used = {name for plan in plans for name in plan.devices}
    knobs = [
        _Knob(f"speed {device.name}", math.log(prior.speed.get(device.name, 1.0)), 0.3, -_WIDEST, _WIDEST)
        for device in evaluator.problem.cluster.devices
        if device.name in used
    ]
    sums = {plan.shape for plan in plans if evaluator.exposed_ms(evaluator.jobs(plan), overlap=False)[1]}
    if sums:
        knobs.append(_Knob("sync_scale", math.log(prior.sync_scale), 0.7, -_WIDEST, _WIDEST))
    if "replicas" in sums:
        knobs.append(_Knob("overlap_share", prior.overlap_share, 0.3, 0.0, 1.0))
    if any(plan.shape in ("stages", "hybrid") for plan in plans):
        knobs.append(_Knob("link_scale", math.log(prior.link_scale), 0.7, -_WIDEST, _WIDEST))
        knobs.append(_Knob("dispatch_ms", prior.dispatch_ms, 1.0, 0.0, math.inf))
    return knobs


def _factors(values: NDArray[np.float64], knobs: Sequence[_Knob], prior: ClusterFactors) -> ClusterFactors:
    speed, changes = dict(prior.speed), dict[str, Any]()
    for value, knob in zip(values.tolist(), knobs, strict=True):
        if knob.name.startswith("speed "):
            speed[knob.name.removeprefix("speed ")] = math.exp(value)
        else:
            direct = knob.name in ("dispatch_ms", "overlap_share")
            changes[knob.name] = min(max(value, knob.low), knob.high) if direct else math.exp(value)
    return replace(prior, speed=speed, **changes)


def _fit(
    evaluator: ClusterEvaluator, runs: Sequence[_Run], knobs: Sequence[_Knob], prior: ClusterFactors
) -> ClusterFactors:
    from scipy.optimize import least_squares

    start = np.asarray([knob.prior for knob in knobs])
    spreads = np.asarray([knob.spread for knob in knobs])

    noises = np.asarray([run.noise for run in runs])

    def errors(values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the runs' errors and then the strays, each over its usual size."""
        other = evaluator.with_factors(_factors(values, knobs, prior))
        logs = [math.log(run.measured_ms / other.predict_ms(run.plan)) for run in runs]
        return np.concatenate([np.asarray(logs) / noises, (values - start) / spreads])

    def huber(squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the loss of squared errors and its two derivatives; the strays, which come last, count in full."""
        size = np.sqrt(squares)
        far = size > _HUBER
        far[len(runs) :] = False
        size = np.where(far, size, 1.0)
        return np.stack(
            [
                np.where(far, _HUBER * (2.0 * size - _HUBER), squares),
                np.where(far, _HUBER / size, 1.0),
                np.where(far, -0.5 * _HUBER / (size * size * size), 0.0),
            ]
        )

    bounds = ([knob.low for knob in knobs], [knob.high for knob in knobs])
    starts = [start]
    if any(knob.name == "dispatch_ms" for knob in knobs):
        # The foot of another valley: much dispatch and quick devices, or links.
        starts.append(np.asarray([k.prior + _SOME_DISPATCH_MS * (k.name == "dispatch_ms") for k in knobs]))
    found = [
        least_squares(
            errors, x0, bounds=bounds, loss=huber, x_scale=spreads, ftol=_LEAST_GAIN, xtol=_LEAST_GAIN, max_nfev=50
        )
        for x0 in starts
    ]
    return _factors(min(found, key=lambda f: f.cost).x, knobs, prior)
