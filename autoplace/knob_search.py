"""The search over scalar knobs: Optuna's TPE proposes, short real runs answer, runs that cannot win end early.

Optuna's multivariate TPE (Falkner et al. 2018, as in `optuna.samplers.TPESampler`), on groups of knobs that go
together, after the natural points of `KnobSpace.moves`. A trial reports the running median gain after every pair of
runs; its pruner (→ `_cannot_win`) ends it when, after two pairs or more,

- even its best pair is below the bar: the gain that is safely reached already, or
- its best pair is below 0.9 of plain PyTorch.

1. A plan that has run is not run again: its trial is told the gain that is known.
2. A plan that fails is told as gain 0, for Optuna forgets trials that fail and would propose them again.
3. The search ends when it proposes nothing new any more, `_MOST_REPEATS` times in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from autoplace.hands_off import silent
from autoplace.knobs import KnobSpace, Point, knob_label
from autoplace.measure.pool import plan_key
from autoplace.plan import Plan

if TYPE_CHECKING:
    from optuna import Study, Trial

__all__ = ["Measure", "search_knobs"]

_LEAST_PAIRS = 2
_FAR_BELOW_PLAIN = 0.9
_MOST_REPEATS = 12
_STARTUP = 8
"""Trials, the natural ones among them, before TPE models anything."""

Report = Callable[[Sequence[float]], bool]
"""Told the gains of all pairs so far; True = end the run."""


class Measure(Protocol):
    """Runs one plan beside plain PyTorch."""

    def __call__(self, plan: Plan, label: str, report: Report) -> float | None:
        """Return the median gain over plain PyTorch; None when the plan failed.

        Args:
            plan: What to run.
            label: Its name.
            report: To be called after every pair; True means to stop.
        """


def search_knobs(
    space: KnobSpace,
    measure: Measure,
    *,
    trials: int,
    seed: int,
    known: Mapping[str, float],
    bar: Callable[[], float] | None = None,
    refuse: Callable[[Plan], str] = lambda _plan: "",
    spent: Callable[[], bool] = lambda: False,
) -> int:
    """Search for the knobs with the largest gain; what was found is what `measure` has seen.

    Args:
        space: What may be turned.
        measure: Runs a plan for real.
        trials: Real runs, at most.
        seed: Of the sampler.
        known: `plan_key` to gain of plans that have run already.
        bar: Says which gain a plan must be able to reach to win; None = the best gain so far.
        refuse: Says why a plan is not to be run, or nothing.
        spent: Says whether the time is up.

    Returns:
        The number of real runs.
    """
    with _quiet():
        return _Search(space, measure, seed, known, bar).run(trials, refuse, spent)


class _Search:
    def __init__(
        self,
        space: KnobSpace,
        measure: Measure,
        seed: int,
        known: Mapping[str, float],
        bar: Callable[[], float] | None,
    ) -> None:
        import optuna

        self._space, self._measure = space, measure
        gains = self._gains = dict(known)
        self._bar = bar or (lambda: max(gains.values(), default=1.0))
        self._best_points: dict[str, tuple[float, Point]] = {}
        sampler = optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed, n_startup_trials=_STARTUP)
        self._study = optuna.create_study(direction="maximize", sampler=sampler, pruner=_pruner())

    def run(self, trials: int, refuse: Callable[[Plan], str], spent: Callable[[], bool]) -> int:
        ran = repeats = 0
        points = self._natural_points()
        while ran < trials and repeats < _MOST_REPEATS and not spent():
            point = next(points, None)
            if point is not None:
                self._study.enqueue_trial(dict(point))
            trial = self._study.ask()
            asked = self._space.suggest(trial)
            plan = self._space.plan(asked)
            if plan is None or refuse(plan):
                self._study.tell(trial, 0.0)
            elif (gain := self._gains.get(plan_key(plan))) is not None:
                self._note(asked, gain)
                self._study.tell(trial, gain)
            else:
                self._try(trial, asked, plan)
                ran, repeats = ran + 1, 0
                continue
            repeats += point is None
        return ran

    def _natural_points(self) -> Iterator[Point]:
        """Yield every base's own point, then the natural moves from the best point of each base at that time."""
        for base in self._space.bases:
            yield self._space.start(base)
        for name, change in self._space.moves():
            _, best = self._best_points.get(name, (0.0, self._space.start(self._space.base(name))))
            _, leader = max(self._best_points.values(), key=lambda pair: pair[0], default=(0.0, best))
            yield self._space.moved(change, best, leader)

    def _note(self, point: Point, gain: float) -> None:
        name = str(point["base"])
        if gain > self._best_points.get(name, (0.0, point))[0]:
            self._best_points[name] = (gain, point)

    def _try(self, trial: Trial, point: Point, plan: Plan) -> None:
        from optuna.trial import TrialState

        bar = self._bar()
        stopped = False

        def report(gains: Sequence[float]) -> bool:
            nonlocal stopped
            if gains:
                trial.set_user_attr("best_pair", max(gains))
                trial.set_user_attr("bar", bar)
                trial.report(median(gains), len(gains))
                stopped = trial.should_prune()
            return stopped

        gain = self._measure(plan, knob_label(plan), report)
        self._gains[plan_key(plan)] = gain or 0.0
        if gain is not None and stopped:
            self._study.tell(trial, state=TrialState.PRUNED)
            return
        self._note(point, gain or 0.0)
        self._study.tell(trial, gain or 0.0)


def _cannot_win(pairs: int, best_pair: float, bar: float) -> bool:
    return pairs >= _LEAST_PAIRS and (best_pair < bar or best_pair < _FAR_BELOW_PLAIN)


def _pruner() -> Any:
    import optuna

    class CannotWin(optuna.pruners.BasePruner):
        """Ends a trial whose best pair so far says that it cannot win; see the module."""

        def prune(self, study: Study, trial: optuna.trial.FrozenTrial) -> bool:
            attrs = trial.user_attrs
            return _cannot_win(trial.last_step or 0, attrs["best_pair"], attrs["bar"])

    return CannotWin()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold Optuna's own messages back, and give the user's level back after."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with silent():
            yield
    finally:
        optuna.logging.set_verbosity(level)
