"""Trials of the knobs as real runs: each plan beside plain PyTorch, and which plans are not worth one.

Compiling is tried first on plain PyTorch, and by itself only where it can be expected to fit half of what is left of
the budget. Other plans are compiled when that went well, and are expected to cost what the first one did. The same goes
for `cpp_wrapper`, which plain PyTorch is compiled with first, and without it after that, as the second guard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from autoplace.choose import COMPILED
from autoplace.measure.compiling import compiler_refusal, estimate_compile_s
from autoplace.plan import Plan
from autoplace.proposals import with_unique_labels
from autoplace.result import Candidate
from autoplace.rounds import COMPILED_CPP, Rounds
from autoplace.workload import Workload

if TYPE_CHECKING:
    from autoplace.tuner import TuneConfig

__all__ = ["Trials"]

_HOPELESS = 0.9
"""Where compiled plain PyTorch is this much slower than plain PyTorch, no other plan is compiled so."""
_ALONE = (COMPILED, COMPILED_CPP)
"""Plain PyTorch, compiled."""


class Trials:
    """What `knob_search` asks of the machine.

    Args:
        workload: Model and inputs.
        config: What is allowed.
        rounds: Measures.
        known: What was measured before.
        num_ops: Captured operations of the model.
    """

    def __init__(
        self, workload: Workload, config: TuneConfig, rounds: Rounds, known: Sequence[Candidate], *, num_ops: int
    ) -> None:
        self._workload, self._config, self._rounds, self._known = workload, config, rounds, known
        self._num_ops = num_ops
        self.rows: list[Candidate] = []
        """The trials so far."""
        self.not_compiled = ""
        """Why not even plain PyTorch was compiled, as half a sentence."""

    def measure(self, plan: Plan, label: str, report: Callable[[Sequence[float]], bool]) -> float | None:
        """Run a plan; see `knob_search.Measure`."""
        candidate = Candidate(label=label, plan=plan)
        *_, candidate = with_unique_labels([*self._known, *self.rows, candidate])
        # Who asks for compiling by name gets it, even where it takes longer than the budget.
        unbounded = plan in _ALONE and self._config.compile is True
        row = self._rounds.trial(candidate, report, None if unbounded else self._rounds.until_s("search"))
        self.rows.append(row)
        return row.gain

    def knows(self, plan: Plan) -> bool:
        """Return whether a plan has had its trial, or is refused one."""
        return any(c.plan == plan for c in self.rows) or bool(self.refuse(plan))

    def bar(self) -> float:
        """Return the gain that is safely reached: the largest lower end of the gains of all that ran to the end."""
        whole = [c for c in (*self._known, *self.rows) if not c.stopped]
        return max((c.gain_low for c in whole if c.gain_low is not None), default=1.0)

    def refuse(self, plan: Plan) -> str:
        """Return why a plan is not to be run, or nothing."""
        reason = self._rounds.unfit(plan)
        if not plan.compiled:
            return reason
        tried = [c for c in self.rows if c.plan in _ALONE]
        if not tried:
            self.not_compiled = self.not_compiled or reason or self._cannot_compile()
            return self.not_compiled or ("" if plan in _ALONE else "plain PyTorch is compiled first")
        asked = plan in _ALONE and self._config.compile is True
        if not asked and max(c.compile_s for c in tried) > self._rounds.left_s("decide") / 2:
            return "compiling it does not fit the budget"
        first = next((c for c in tried if c.plan.cpp_wrapper == plan.cpp_wrapper), None)
        if first is None:
            return reason if plan in _ALONE else "plain PyTorch is compiled first"
        return "compiling plain PyTorch did not help" if (first.speedup or 0.0) < _HOPELESS else reason

    def _cannot_compile(self) -> str:
        if self._config.compile == "auto":
            needed_s = estimate_compile_s(self._num_ops, training=self._workload.training)
            left_s = max(0.0, self._rounds.left_s("decide"))
            if needed_s > left_s / 2:
                return (
                    f"torch.compile may take {needed_s:.0f} s for this model, and {left_s:.0f} s of the budget were "
                    "left; give budget_s more, or compile=True"
                )
        return compiler_refusal(self._workload.model)
