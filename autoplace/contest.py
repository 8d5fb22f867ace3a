"""The real runs of a tuning: which plans run beside plain PyTorch, in which order, and for how long.

    screen the best predicted → calibrate, screen what that finds → search the knobs → decide

All of them are interleaved with plain PyTorch and share one budget (→ `rounds`). What decides is the last run, of the
finalists alone, with plain PyTorch twice for the noise and plain `torch.compile` beside them. → `choose`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from autoplace import choose as choosing
from autoplace.knob_bases import host_cores, knob_bases, runs_on_cpu
from autoplace.knob_trials import Trials
from autoplace.knobs import KnobSpace, has_images, in_line_threads, knob_label, with_threads
from autoplace.measure.pool import plan_key
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.proposals import merge, predict_again, select, select_new
from autoplace.result import Candidate
from autoplace.rounds import COMPILED_CPP, Rounds
from autoplace.workload import Workload

if TYPE_CHECKING:
    from autoplace.costs.calibrate import Calibration
    from autoplace.graph.capture import Capture
    from autoplace.tuner import TuneConfig

__all__ = ["Contest"]

_SECOND_PLANS = 2
"""Plans in the second screening, at most."""
_FINAL_FACTOR = 15
"""The finalists are decided on with this many times the rounds of the first measurement, as time allows."""


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
        self._workload, self._problem, self._config = workload, problem, config
        self._captured, self._prior, self._search, self._record = captured, prior, search, record
        self._rounds = Rounds(workload, problem, config, record=record, step=step)
        self.calibration: dict[str, Any] = {}
        """See `TuneResult.calibration`."""
        self.notes: list[str] = []
        """Sentences for the user."""

    @property
    def noise(self) -> float:
        """A/A noise of the last run with plain PyTorch twice."""
        return self._rounds.noise

    def run(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return all candidates with verdicts, plain PyTorch first."""
        wanted = self._config.rounds
        with self._rounds as rounds:
            fit = self._fit(candidates)
            chosen = rounds.affordable(
                [*self._in_line(fit), *select(_able(fit), self._config.measured_plans)], "screen"
            )
            rows = rounds.beside_plain(chosen, wanted, "screen")
            labels = {c.label for c in rows}
            rows = self._learn([*rows, *(c for c in fit if c.label not in labels)])
            rows += self._turn_knobs(rows)
            final = choosing.finalists(rows)
            if final:
                # The best of several short runs is flattered by chance, so a run of their own decides, with its own
                # noise.
                final += [c for c in rows if c.plan == choosing.COMPILED and c.gain is not None and c not in final]
                rows = _updated(rows, rounds.beside_plain(final, _FINAL_FACTOR * wanted, "decide"))
        return choosing.choose(rows, {c.label for c in final}, noise=self.noise, run_s=self._config.run_s)

    def _fit(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates, those that would not keep the model's habits with the reason in `check`."""
        return [replace(c, check=self._rounds.unfit(c.plan)) if c.measured is None else c for c in candidates]

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
        picked: list[Candidate] = []
        if self._rounds.left_s("again") > 0:
            picked = select_new([c for c in rows if c.measured is not None or not c.check], _SECOND_PLANS)
        if picked:
            _, *second = self._rounds.beside_plain(picked, self._config.rounds, "again")
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

    def _turn_knobs(self, rows: Sequence[Candidate]) -> list[Candidate]:
        """Return plain `torch.compile` and the trials of the knobs around the best measured placements."""
        from autoplace.knob_search import search_knobs

        trials = Trials(self._workload, self._config, self._rounds, rows, num_ops=self._captured.graph.num_ops)
        allowed, asked = self._config.compile is not False, self._config.compile is True
        on_cpu = self._on_cpu()
        if self._config.knob_trials > 0 and self._rounds.left_s("search") > 0:
            exported = self._captured.rung == "export"
            space = KnobSpace(
                bases=tuple(knob_bases(rows, self._workload, self._problem, exported=exported)),
                cluster=self._problem.cluster,
                batch_size=self._workload.batch_size,
                compiled=allowed,
                cpp_wrapper=on_cpu,
                channels_last=has_images(self._workload),
                precisions=self._precisions(),
            )
            search_knobs(
                space,
                trials.measure,
                trials=self._config.knob_trials,
                seed=self._config.seed,
                known={plan_key(c.plan): c.gain or 0.0 for c in rows if c.measured is not None},
                bar=trials.bar,
                refuse=trials.refuse,
                spent=lambda: self._rounds.left_s("search") <= 0,
            )
        for plan in (COMPILED_CPP, choosing.COMPILED) if on_cpu else (choosing.COMPILED,):
            if allowed and not trials.knows(plan) and (asked or self._rounds.left_s("search") > 0):
                trials.measure(plan, knob_label(plan), lambda _gains: False)
        if trials.not_compiled:
            self.notes.append(f"Plans were not compiled: {trials.not_compiled}.")
        return trials.rows

    def _on_cpu(self) -> bool:
        """Return whether neither the model nor a plan has anything on a GPU, for which C++ that calls is untried."""
        held = [*self._workload.model.parameters(), *self._workload.model.buffers()]
        return all(t.device.type == "cpu" for t in held) and all(d.kind == "cpu" for d in self._problem.cluster.devices)

    def _precisions(self) -> tuple[str, ...]:
        kinds = {p.dtype for p in self._workload.model.parameters() if p.is_floating_point()}
        lower = self._config.precision == "auto" and kinds == {torch.float32}
        return ("float32", "bfloat16") if lower else ("float32",)


def _able(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [c for c in candidates if not c.check]


def _ran(rows: Sequence[Candidate]) -> list[tuple[Candidate, Outcome]]:
    """Return the placed plans that ran, and their Outcomes."""
    return [(c, c.measured) for c in rows if c.predicted is not None and c.measured is not None and c.measured.feasible]


def _updated(rows: Sequence[Candidate], newer: Sequence[Candidate]) -> list[Candidate]:
    by_label = {c.label: c for c in newer}
    return [by_label.get(c.label, c) for c in rows]
