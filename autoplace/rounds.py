"""Interleaved rounds of candidates beside plain PyTorch, on a budget of wall seconds that the steps of a tuning share.

Each step has to leave the later ones their part (→ `SHARES`); what one leaves over goes to the next. A pass that
overruns its limit is given up; what its threads still do may disturb what runs after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

from autoplace import choose as choosing
from autoplace.errors import InputError
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.result import Candidate
from autoplace.runtime.fitness import unfit
from autoplace.workload import Workload

if TYPE_CHECKING:
    from autoplace.tuner import TuneConfig

__all__ = ["COMPILED_CPP", "Rounds"]

SHARES = {"screen": 0.25, "again": 0.1, "search": 0.35, "decide": 0.3}
"""Step to its part of the budget, in the order of the steps."""
_LEAST_SHARE = 0.5
"""What a step may have of its share whatever the steps before it took."""
COMPILED_CPP = choosing.COMPILED.with_(cpp_wrapper=True)
"""Plain `torch.compile` with C++ that calls the kernels."""
_WARMUP = 2
"""Rounds before the counted ones."""
_LEAST_ROUNDS = 5
"""Fewer rounds give no quartiles worth the name."""
_DECIDING_ROUNDS = 11
"""The interval of a median of fewer rounds is nearly all of them: a few per cent would never be believed."""
_MOST_OVER = 0.5
"""Part of the budget that the deciding run may have beyond it."""
_TRIAL_ROUNDS = 5
"""Pairs of a trial, at most."""
_SLOW_PASS_S = 0.5
"""Passes that take longer are timed without an untimed one right before, and warmed up once: what their neighbours left
in the caches is small against them."""
_MOST_ABOVE_USUAL = 5.0
"""A plan is taken to need no more than this many times what others do: a prediction may be an outlier."""
_KEPT_EXECUTORS, _KEPT_EXECUTORS_GPU = 16, 4
"""Executors kept for the next run; those on a GPU may hold a copy of the weights each."""
_PLAIN_ROW = Candidate(label="plain PyTorch", plan=Plan.plain(), speedup=1.0, gain=1.0, check="reference")


class Rounds:
    """Measures candidates beside plain PyTorch. Close it, or use it as a context: it keeps executors.

    Args:
        workload: Model and inputs.
        problem: The devices.
        config: Budget, objective, and the length of the run that compiling has to pay back in.
        record: Given every label and Outcome.
        step: Told how many passes are done, of how many.
    """

    def __init__(
        self,
        workload: Workload,
        problem: Problem,
        config: TuneConfig,
        *,
        record: Callable[[str, Outcome], None],
        step: Callable[[int, int], None],
    ) -> None:
        from autoplace.measure.evaluator import MeasuredEvaluator

        self._workload, self._config, self._record, self._step = workload, config, record, step
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
        """A/A noise of the last run with plain PyTorch twice."""

    def __enter__(self) -> Rounds:
        self._start_s = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._evaluator.close()

    def until_s(self, step: str) -> float:
        """Return when a step has to end, by `time.perf_counter`."""
        names = list(SHARES)
        share = sum(SHARES[name] for name in names[: names.index(step) + 1])
        return self._start_s + share * self._config.budget_s

    def left_s(self, step: str) -> float:
        """Return the seconds until a step has to end."""
        return self.until_s(step) - time.perf_counter()

    def unfit(self, plan: Plan) -> str:
        """Return why a plan would not keep the model's habits, or nothing."""
        with self._workload.mode():
            return unfit(self._workload.model, plan, training=self._workload.training)

    def affordable(self, chosen: Sequence[Candidate], step: str) -> list[Candidate]:
        """Return as many of the plans, from the first on, as a step has time for, two at least."""
        unique = list({c.label: c for c in chosen}.values())
        while len(unique) > 2:
            settle, warmup = self._care(unique)
            passes = (settle + 1) * (warmup + _LEAST_ROUNDS)
            if passes * self._round_s(unique) <= self.left_s(step):
                break
            unique.pop()
        return unique

    def _round_s(self, chosen: Sequence[Candidate]) -> float:
        """Return the seconds of a pass of each plan and two of plain PyTorch, as far as they are known."""
        known = [o.latency_ms for c in chosen if (o := c.measured or c.predicted) is not None and o.feasible]
        usual_ms = self._plain_ms or (median(known) if known else 1.0)
        likely = [min(latency_ms, _MOST_ABOVE_USUAL * usual_ms) for latency_ms in known]
        return (sum(likely) + (len(chosen) - len(known) + 2) * usual_ms) / 1e3

    def _care(self, chosen: Sequence[Candidate]) -> tuple[int, int]:
        """Return the untimed passes before each timed one, and the warm-up rounds."""
        mean_s = self._round_s(chosen) / (len(chosen) + 2)
        return (0, 1) if mean_s > _SLOW_PASS_S else (1, _WARMUP)

    def beside_plain(self, chosen: Sequence[Candidate], wanted: int, step: str) -> list[Candidate]:
        """Measure plans interleaved with plain PyTorch, which runs twice a round; returns plain first."""
        settle, warmup = self._care(chosen)
        round_s = max((settle + 1) * self._round_s(chosen), 1e-6)
        able = int(self.left_s(step) / round_s) - warmup
        least = _DECIDING_ROUNDS if step == "decide" else _LEAST_ROUNDS
        # Where plans may leave the deciding run, the others have as many rounds as fit: `until_s` ends it.
        rounds = wanted if step == "decide" else max(min(wanted, least), min(wanted, able))
        plans = [Plan.plain(), Plan.plain(), *(c.plan for c in chosen)]
        self._total += len(plans) * (warmup + min(rounds, max(able, least)))
        # A step that overran, by a pass that was waited for or by compiling, must not take the deciding run away.
        least_s = _LEAST_SHARE * SHARES[step] * self._config.budget_s
        if step == "decide":
            over_s = _MOST_OVER * self._config.budget_s
            if self._config.compile is not True:  # who asks for compiling by name gets it beyond the budget
                over_s += self.left_s("decide")
            least_s = max(least_s, min((warmup + least) * round_s, over_s))
        until_s = max(self.until_s(step), time.perf_counter() + least_s)
        taken_out: set[int] = set()

        def drop(outcomes: Sequence[Outcome]) -> Collection[int]:
            plain, _, *others = outcomes
            taken_out.update(choosing.beaten([self._gains(c, plain, o) for c, o in zip(chosen, others, strict=True)]))
            left = len(chosen) - len(taken_out)
            return [2 + i for i in taken_out] if left else range(len(plans))

        plain, again, *outcomes = self._evaluator.evaluate_interleaved(
            plans, rounds, warmup=warmup, settle=settle, drop=drop if step == "decide" else None, until_s=until_s
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
        return choosing.judged(row, plain, outcome, self._config.objective, **self._cost(candidate))

    def _gains(self, candidate: Candidate, plain: Outcome, outcome: Outcome) -> list[float]:
        return choosing.pair_gains(plain, outcome, self._config.objective, **self._cost(candidate))

    def _cost(self, candidate: Candidate) -> dict[str, float]:
        """Return the seconds to compile a plan, and of the run that they have to be paid back in."""
        return {"compile_s": self.compile_s(candidate.plan), "run_s": self._config.run_s}

    def compile_s(self, plan: Plan) -> float:
        """Return the seconds to compile a plan.

        What one plan has compiled of the model the next may use: one that compiled nothing counts as plain PyTorch.
        """
        if not plan.compiled:
            return 0.0
        alone = choosing.COMPILED.with_(cpp_wrapper=plan.cpp_wrapper)
        return self._evaluator.compile_s(plan) or self._evaluator.compile_s(alone)

    def trial(
        self, candidate: Candidate, report: Callable[[Sequence[float]], bool], until_s: float | None
    ) -> Candidate:
        """Run a plan in pairs with plain PyTorch until `report`, told the gains of all pairs, ends it."""
        stopped = False
        plans = [Plan.plain(), candidate.plan]

        def drop(outcomes: Sequence[Outcome]) -> Collection[int]:
            nonlocal stopped
            stopped = report(self._gains(candidate, *outcomes))
            return range(len(plans)) if stopped else ()

        settle, _ = self._care([candidate])
        self._total += len(plans) * (1 + _TRIAL_ROUNDS)
        plain, outcome = self._evaluator.evaluate_interleaved(
            plans, _TRIAL_ROUNDS, warmup=1, settle=settle, drop=drop, until_s=until_s
        )
        if stopped:
            candidate = replace(candidate, label=f"{candidate.label} (stopped early)", stopped=True)
        self._record(candidate.label, outcome)
        return self._judged(candidate, plain, outcome)

    def _advance(self) -> None:
        self._done += 1
        self._step(self._done, max(self._done, self._total))
