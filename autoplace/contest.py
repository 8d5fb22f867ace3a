"""The real runs of a tuning: which plans run beside plain PyTorch, in which order, and for how long.

    screen the best predicted → calibrate, screen what that finds → compile → search the knobs → decide

All of them are interleaved with plain PyTorch and share one budget of wall seconds (→ `_SHARES`); each step has to
leave the later ones their part. What decides is the last run, of the finalists alone, with plain PyTorch twice for the
noise and plain `torch.compile` beside them; its rules are in `autoplace.choose`.

1. Compiling is tried once, on plain PyTorch, and only where it can be expected to fit half of what is left of the
   budget. Other plans are compiled when that went well, and then cost what the first one did.
2. A pass that overruns its limit is left behind in its threads, which may disturb what runs after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autoplace import choose as choosing
from autoplace.errors import InputError
from autoplace.knob_bases import host_cores, knob_bases, runs_on_cpu
from autoplace.knobs import KnobSpace, has_images, in_line_threads, knob_label, with_threads
from autoplace.measure.pool import plan_key
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.proposals import merge, predict_again, select, select_new, with_unique_labels
from autoplace.result import Candidate
from autoplace.runtime.fitness import unfit
from autoplace.workload import Workload

if TYPE_CHECKING:
    from autoplace.costs.calibrate import Calibration
    from autoplace.graph.capture import Capture
    from autoplace.tuner import TuneConfig

__all__ = ["Contest"]

_SHARES = {"screen": 0.25, "again": 0.1, "search": 0.35, "decide": 0.3}
"""Parts of the budget; what a step leaves over goes to the next ones."""
_SECOND_PLANS = 2
"""Plans in the second screening, at most."""
_FINAL_FACTOR = 3
"""The finalists are decided on with this many times the rounds of the first measurement."""
_WARMUP = 2
"""Rounds before the counted ones."""
_LEAST_ROUNDS = 5
"""Fewer rounds give no quartiles worth the name."""
_TRIAL_ROUNDS = 5
"""Pairs of a trial of the search, at most."""
_SLOW_PASS_S = 0.5
"""Passes that take longer are timed without an untimed one right before, and warmed up once: what their neighbours left
in the caches is small against them."""
_COMPILE_HOPELESS = 0.9
"""Where plain `torch.compile` gains less, no other plan is compiled."""
_KEPT_EXECUTORS, _KEPT_EXECUTORS_GPU = 16, 4
"""Executors kept for the next run; those on a GPU may hold a copy of the weights each."""
_PLAIN_ROW = Candidate(label="plain PyTorch", plan=Plan.plain(), speedup=1.0, gain=1.0, check="reference")
_COMPILED = Plan.plain().with_(compiled=True)


class Contest:
    """Measures candidates beside plain PyTorch until one is kept.

    Args:
        workload: Model and inputs.
        problem: Its devices and uncalibrated latencies.
        config: Budget and what is allowed.
        captured: What was captured of the model.
        prior: Calibration that the candidates were predicted with.
        search: Proposes candidates for a problem.
        record: Given every label and Outcome.
        step: Told how many passes are done, of how many.
    """

    def __init__(
        self,
        workload: Workload,
        problem: Problem,
        config: TuneConfig,
        *,
        captured: Capture,
        prior: Calibration,
        search: Callable[[Problem], list[Candidate]],
        record: Callable[[str, Outcome], None],
        step: Callable[[int, int], None],
    ) -> None:
        from autoplace.measure.evaluator import MeasuredEvaluator

        self._workload, self._problem, self._config = workload, problem, config
        self._captured, self._prior, self._search = captured, prior, search
        self._record, self._step = record, step
        self._done = self._total = 0
        self._same = "same outputs" + (" and gradients" if workload.training else "")
        gpus = any(d.kind == "cuda" for d in problem.cluster.devices)
        self._evaluator = MeasuredEvaluator(
            workload,
            problem.cluster,
            objective=config.objective,
            limit_s=config.budget_s / 6,
            progress=lambda _plan, _round: self._advance(),
            keep=_KEPT_EXECUTORS_GPU if gpus else _KEPT_EXECUTORS,
        )
        self._plain_ms: float | None = None
        self._start_s = time.perf_counter()
        self.noise = choosing.NOISE_FLOOR
        """A/A noise of the last interleaved run with plain PyTorch twice."""
        self.calibration: dict[str, Any] = {}
        """See `TuneResult.calibration`."""
        self.notes: list[str] = []
        """Sentences for the user."""

    def run(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return all candidates with verdicts, plain PyTorch first."""
        self._start_s = time.perf_counter()
        with self._evaluator:
            fit = self._fit(candidates)
            chosen = self._affordable([*self._in_line(fit), *select(_able(fit), self._config.measured_plans)])
            rows = self._beside_plain(chosen, self._config.rounds, "screen")
            labels = {c.label for c in rows}
            rows = self._learn([*rows, *(c for c in fit if c.label not in labels)])
            rows += self._compile_plain()
            rows += self._search_knobs(rows)
            finalists = choosing.finalists(rows)
            if finalists:
                # The best of several short runs is flattered by chance, so a run of their own decides, with its own
                # noise.
                guard = [c for c in rows if c.plan == _COMPILED and c.gain is not None and c not in finalists]
                deciding = [*finalists, *guard]
                rows = _updated(rows, self._beside_plain(deciding, _FINAL_FACTOR * self._config.rounds, "decide"))
        return choosing.choose(rows, {c.label for c in finalists}, noise=self.noise, run_s=self._config.run_s)

    def _until_s(self, step: str) -> float:
        """Return when a step has to end, by `time.perf_counter`."""
        names = list(_SHARES)
        share = sum(_SHARES[name] for name in names[: names.index(step) + 1])
        return self._start_s + share * self._config.budget_s

    def _left_s(self, step: str) -> float:
        return self._until_s(step) - time.perf_counter()

    def _advance(self) -> None:
        self._done += 1
        self._step(self._done, max(self._done, self._total))

    def _unfit(self, plan: Plan) -> str:
        with self._workload.mode():
            return unfit(self._workload.model, plan, training=self._workload.training)

    def _fit(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates, those that would not keep the model's habits with the reason in `check`."""
        return [replace(c, check=self._unfit(c.plan)) if c.measured is None else c for c in candidates]

    def _in_line(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return the plans that cost nothing to try: the whole model on one and on all threads, and channels last."""
        found = []
        single = next((c for c in candidates if c.plan.shape == "single" and runs_on_cpu(self._problem, c.plan)), None)
        if single is not None:
            for count in in_line_threads(host_cores(self._problem))[:2]:
                plan = with_threads(single.plan, self._problem.cluster, count)
                same = (c for c in candidates if plan_key(c.plan) == plan_key(plan))
                found.append(next(same, Candidate(label=knob_label(plan), plan=plan)))
        if has_images(self._workload):
            plan = Plan.plain().with_(channels_last=True)
            found.append(Candidate(label=knob_label(plan), plan=plan))
        return [c for c in self._fit(found) if not c.check]

    def _affordable(self, chosen: Sequence[Candidate]) -> list[Candidate]:
        """Return as many of the plans, from the first on, as can be screened in time, two at least."""
        unique = list({c.label: c for c in chosen}.values())
        while len(unique) > 2:
            settle, warmup = self._care(unique)
            passes = (settle + 1) * (warmup + _LEAST_ROUNDS)
            if passes * self._round_s(unique) <= self._left_s("screen"):
                break
            unique.pop()
        return unique

    def _round_s(self, chosen: Sequence[Candidate]) -> float:
        """Return the seconds of a pass of each plan and two of plain PyTorch, as far as they are known."""
        known = [o.latency_ms for c in chosen if (o := c.measured or c.predicted) is not None and o.feasible]
        plain_ms = self._plain_ms or max(known, default=1.0)
        return (sum(known) + (len(chosen) - len(known) + 2) * plain_ms) / 1e3

    def _care(self, chosen: Sequence[Candidate]) -> tuple[int, int]:
        """Return the untimed passes before each timed one, and the warm-up rounds."""
        mean_s = self._round_s(chosen) / (len(chosen) + 2)
        return (0, 1) if mean_s > _SLOW_PASS_S else (1, _WARMUP)

    def _beside_plain(self, chosen: Sequence[Candidate], wanted: int, step: str) -> list[Candidate]:
        """Measure plans interleaved with plain PyTorch, which runs twice a round; returns plain first."""
        settle, warmup = self._care(chosen)
        able = int(self._left_s(step) / max((settle + 1) * self._round_s(chosen), 1e-6)) - warmup
        rounds = max(min(wanted, _LEAST_ROUNDS), min(wanted, able))
        plans = [Plan.plain(), Plan.plain(), *(c.plan for c in chosen)]
        self._total += len(plans) * (warmup + rounds)
        plain, again, *outcomes = self._evaluator.evaluate_interleaved(
            plans, rounds, warmup=warmup, settle=settle, until_s=self._until_s(step)
        )
        if not plain.feasible:
            raise InputError(f"plain PyTorch cannot run this model on these inputs: {plain.reason}")
        self._plain_ms = plain.latency_ms
        self.noise = choosing.noise_of(plain, again)
        rows = [replace(_PLAIN_ROW, measured=plain)]
        self._record(_PLAIN_ROW.label, plain)
        for candidate, outcome in zip(chosen, outcomes, strict=True):
            self._record(candidate.label, outcome)
            rows.append(self._judged(candidate, plain, outcome))
        return rows

    def _judged(self, candidate: Candidate, plain: Outcome, outcome: Outcome) -> Candidate:
        row = replace(candidate, check=self._same if outcome.feasible else outcome.reason)
        cost = {"compile_s": self._compile_s(candidate.plan), "run_s": self._config.run_s}
        return choosing.judged(row, plain, outcome, self._config.objective, **cost)

    def _compile_s(self, plan: Plan) -> float:
        """Return the seconds to compile a plan.

        What one plan has compiled of the model the next may use: one that compiled nothing counts as plain PyTorch.
        """
        if not plan.compiled:
            return 0.0
        return self._evaluator.compile_s(plan) or self._evaluator.compile_s(_COMPILED)

    # -- the simulator learns ------------------------------------------------------------------------------------------

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
            rows = self._fit(rows)
            for candidate in fresh:
                if candidate.predicted is not None:
                    self._record(candidate.label, candidate.predicted)
        picked = select_new([c for c in rows if c.measured is not None or not c.check], _SECOND_PLANS)
        if picked and self._left_s("again") > 0:
            _, *second = self._beside_plain(picked, self._config.rounds, "again")
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

    # -- compiling and the knobs ---------------------------------------------------------------------------------------

    def _compile_plain(self) -> list[Candidate]:
        """Return plain `torch.compile`, measured; nothing where it is not allowed or cannot be had."""
        if self._config.compile is False:
            return []
        reason = self._compile_refusal()
        if reason:
            self.notes.append(f"Plans were not compiled: {reason}.")
            return []
        candidate = Candidate(label=knob_label(_COMPILED), plan=_COMPILED)
        # Who asks for compiling by name gets it, even where it takes longer than the budget.
        until_s = None if self._config.compile is True else self._until_s("search")
        return [self._trial(candidate, lambda _gains: False, until_s)]

    def _compile_refusal(self) -> str:
        from autoplace.measure.compiling import compiler_refusal, estimate_compile_s

        if self._config.compile == "auto":
            needed_s = estimate_compile_s(self._captured.graph.num_ops, training=self._workload.training)
            left_s = self._left_s("decide")
            if needed_s > left_s / 2:
                return (
                    f"torch.compile may take {needed_s:.0f} s for this model, and {max(left_s, 0.0):.0f} s of the "
                    "budget were left; give budget_s more, or compile=True"
                )
        return self._unfit(_COMPILED) or compiler_refusal(self._workload.model)

    def _trial(
        self, candidate: Candidate, report: Callable[[Sequence[float]], bool], until_s: float | None
    ) -> Candidate:
        """Run a plan in pairs with plain PyTorch until `report`, told the gains of all pairs, ends it."""
        stopped = False
        plans = [Plan.plain(), candidate.plan]
        cost = {"compile_s": self._compile_s(candidate.plan), "run_s": self._config.run_s}

        def enough(outcomes: Sequence[Outcome]) -> bool:
            nonlocal stopped
            plain, outcome = outcomes
            stopped = report(choosing.pair_gains(plain, outcome, self._config.objective, **cost))
            return stopped

        settle, _ = self._care([candidate])
        self._total += len(plans) * (1 + _TRIAL_ROUNDS)
        plain, outcome = self._evaluator.evaluate_interleaved(
            plans, _TRIAL_ROUNDS, warmup=1, settle=settle, enough=enough, until_s=until_s
        )
        if stopped:
            candidate = replace(candidate, label=f"{candidate.label} (stopped early)", stopped=True)
        self._record(candidate.label, outcome)
        return self._judged(candidate, plain, outcome)

    def _search_knobs(self, rows: Sequence[Candidate]) -> list[Candidate]:
        """Return the trials of the knobs around the best placements that were measured."""
        from autoplace.knob_search import search_knobs

        if self._config.knob_trials == 0 or self._left_s("search") <= 0:
            return []
        compiled = next((c for c in rows if c.plan == _COMPILED), None)
        space = KnobSpace(
            bases=tuple(knob_bases(rows, self._workload, self._problem, exported=self._captured.rung == "export")),
            cluster=self._problem.cluster,
            batch_size=self._workload.batch_size,
            compiled=compiled is not None and (compiled.speedup or 0.0) > _COMPILE_HOPELESS,
            channels_last=has_images(self._workload),
            precisions=self._precisions(),
        )
        found: list[Candidate] = []
        taken = {c.label for c in rows}

        def measure(plan: Plan, label: str, report: Callable[[Sequence[float]], bool]) -> float | None:
            row = Candidate(label=label, plan=plan)
            *_, row = with_unique_labels([*(replace(row, label=t) for t in sorted(taken)), row])
            found.append(self._trial(row, report, self._until_s("search")))
            taken.add(found[-1].label)
            return found[-1].gain

        def refuse(plan: Plan) -> str:
            if plan.compiled and self._compile_s(_COMPILED) > self._left_s("decide") / 2:
                return "compiling it does not fit the budget"
            return self._unfit(plan)

        known = {plan_key(c.plan): c.gain or 0.0 for c in rows if c.measured is not None}
        search_knobs(
            space,
            measure,
            trials=self._config.knob_trials,
            seed=self._config.seed,
            known=known,
            refuse=refuse,
            spent=lambda: self._left_s("search") <= 0,
        )
        return found

    def _precisions(self) -> tuple[str, ...]:
        kinds = {str(p.dtype) for p in self._workload.model.parameters() if p.is_floating_point()}
        lower = self._config.precision == "auto" and kinds == {"torch.float32"}
        return ("float32", "bfloat16") if lower else ("float32",)


def _able(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [c for c in candidates if not c.check]


def _ran(rows: Sequence[Candidate]) -> list[tuple[Candidate, Outcome]]:
    """Return the placed plans that ran, and their Outcomes."""
    return [(c, c.measured) for c in rows if c.predicted is not None and c.measured is not None and c.measured.feasible]


def _updated(rows: Sequence[Candidate], newer: Sequence[Candidate]) -> list[Candidate]:
    by_label = {c.label: c for c in newer}
    return [by_label.get(c.label, c) for c in rows]
