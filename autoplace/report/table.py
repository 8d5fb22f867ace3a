"""The candidates as rows of plain text, which the terminal's table and the HTML report share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.result import Candidate, TuneResult

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "COLUMNS",
    "MOST_ROWS",
    "CandidateRow",
    "candidate_rows",
    "candidates_table",
    "describe_plan",
    "figure",
    "is_reference",
    "left_out",
    "time_ms",
]

COLUMNS = ("candidate", "placement", "predicted ms", "measured ms", "energy J", "speed-up", "kept, or why not")
MOST_ROWS = 12
"""Candidates that a table for people shows; a search of the knobs makes dozens."""
NOTHING = "–"
"""Stands where there is no figure."""
_PREDICTED = ", predicted)"


@dataclass(frozen=True, kw_only=True)
class CandidateRow:
    """One candidate as text; every field but the flags is a column."""

    label: str
    placement: str
    predicted_ms: str
    measured_ms: str
    energy: str
    """J, with the source and whether it was measured or predicted."""
    speedup: str
    """Over plain PyTorch, with quartiles."""
    verdict: str
    kept: bool
    baseline: bool

    @property
    def cells(self) -> tuple[str, ...]:
        """The columns' texts, in the order of `COLUMNS`."""
        return (
            self.label,
            self.placement,
            self.predicted_ms,
            self.measured_ms,
            self.energy,
            self.speedup,
            self.verdict,
        )


def candidate_rows(result: TuneResult, most: int | None = None) -> list[CandidateRow]:
    """Return one row per candidate: plain PyTorch, then those measured (fastest first), then the rest.

    Args:
        result: The tuning.
        most: Rows at most, plain PyTorch and the kept plan always among them; None = all.
    """
    goal = result.objective.goal
    ranked = sorted(result.candidates, key=lambda c: _rank(c, goal))
    if most is not None:
        first = [c for c in ranked if c.kept or is_reference(c)]
        best = [*first, *(c for c in ranked if c not in first)][:most]
        ranked = [c for c in ranked if c in best]
    return [
        CandidateRow(
            label=c.label,
            placement=describe_plan(c.plan),
            predicted_ms=_time(c.forecast if c.measured else c.predicted, goal),
            measured_ms=_time(c.measured, goal),
            energy=_energy(c),
            speedup=_speedup(c),
            verdict=_verdict(c),
            kept=c.kept,
            baseline=is_reference(c),
        )
        for c in ranked
    ]


def left_out(result: TuneResult) -> str:
    """Return a sentence about the candidates that a table of `MOST_ROWS` rows leaves out, or nothing."""
    count = len(result.candidates) - MOST_ROWS
    return f" {count} more candidates are in the result's JSON file." if count > 0 else ""


def candidates_table(result: TuneResult) -> Table:
    """Return the candidates as a table for the terminal; it reads well from 80 columns on."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    what = "time per pass" if result.objective.goal == "latency" else "steady-state time per pass"
    title = Text(f"{result.model_name}, {result.mode}, batch {result.batch_size}: {what}, medians of real runs")
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0)
    )
    table.add_column("candidate and placement", overflow="fold", ratio=3)
    for column in COLUMNS[2:]:
        wide = column == COLUMNS[-1]
        table.add_column(
            column.replace(" ms", "\nms") if column.endswith(" ms") else column,
            justify="right" if column.endswith(" ms") else "left",
            overflow="fold",
            ratio=2 if wide else None,
            no_wrap=not wide,
        )
    for row in candidate_rows(result, MOST_ROWS):
        style = "bold green" if row.kept else ""
        name = Text.assemble((row.label, style or "bold"), "\n", (row.placement, "green" if row.kept else "dim"))
        table.add_row(
            name,
            *(Text(_narrow(cell), style=style) for cell in row.cells[2:-1]),
            Text(row.verdict, style=style),
        )
    table.caption = (
        "≈ predicted, not measured. Speed-ups compare each plan with plain PyTorch round by round; "
        "plain PyTorch and the plans that gained show a second, longer run, which decided." + left_out(result)
    )
    table.caption_justify = "left"
    return table


def _narrow(cell: str) -> str:
    """Put what stands in brackets on a line of its own, and a sign for `predicted`."""
    if cell.endswith(_PREDICTED):
        cell = f"≈{cell.removesuffix(_PREDICTED)})"
    return cell.replace(" (", "\n(")


def describe_plan(plan: Plan) -> str:
    """Return where and how a plan runs, in a few words."""
    knobs = []
    if plan.microbatches > 1:
        knobs.append(f"{plan.microbatches} microbatches")
    if plan.engine != "threads":
        knobs.append(f"by {plan.engine}")
    if plan.compiled:
        knobs.append("compiled" + " with the C++ wrapper" * plan.cpp_wrapper)
    if plan.channels_last:
        knobs.append("channels last")
    if plan.precision != "float32":
        knobs.append(plan.precision)
    return ", ".join([_where(plan), *knobs])


def is_reference(candidate: Candidate) -> bool:
    """Return whether this is plain PyTorch, no knob turned, which all others are compared with."""
    return candidate.plan == Plan.plain()


def time_ms(outcome: Outcome | None, goal: str) -> float | None:
    """Return the time that the goal counts (latency, or steady-state period), ms; None when there is none."""
    if outcome is None or not outcome.feasible:
        return None
    value = outcome.period_ms if goal == "throughput" else outcome.latency_ms
    return value if math.isfinite(value) else None


def figure(value: float | None) -> str:
    """Return a number with three digits that matter, never in scientific notation for usual sizes."""
    if value is None or not math.isfinite(value):
        return NOTHING
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def _where(plan: Plan) -> str:
    if plan.is_plain:
        return "as PyTorch runs it"
    hosts = {d.partition("/")[0] for d in plan.devices}
    counts = [plan.threads.get(device) for device in plan.devices]
    alike = len(set(counts)) == 1

    def short(device: str) -> str:
        name = device.partition("/")[2] if len(hosts) == 1 and "/" in device else device
        return name if alike else f"{name} ({_threads(plan.threads.get(device))})"

    parts = [" → ".join(short(d) for d in replica.devices) for replica in plan.replicas]
    if len(parts) > 1:
        shares = [f"{replica.share:.0%} {part}" for replica, part in zip(plan.replicas, parts, strict=True)]
        text = "replicas: " + " + ".join(shares)
    else:
        text = f"stages: {parts[0]}" if plan.shape == "stages" else parts[0]
    if alike and counts[0]:
        text += f", {_threads(counts[0])}" + (" each" if len(counts) > 1 else "")
    return text


def _threads(count: int | None) -> str:
    return "all threads" if count is None else f"{count} thread{'s' * (count != 1)}"


def _rank(candidate: Candidate, goal: str) -> tuple[int, float]:
    """Sort plain PyTorch first, then by measured time, then by predicted time, and what cannot run last."""
    if is_reference(candidate):
        return (0, 0.0)
    measured, predicted = time_ms(candidate.measured, goal), time_ms(candidate.predicted, goal)
    if measured is not None:
        return (1, measured)
    if candidate.measured is not None:
        return (3, predicted or 0.0)
    return (2, predicted) if predicted is not None else (4, 0.0)


def _time(outcome: Outcome | None, goal: str) -> str:
    if outcome is not None and not outcome.feasible:
        return "failed"
    return figure(time_ms(outcome, goal))


def _energy(candidate: Candidate) -> str:
    for outcome, kind in ((candidate.measured, ""), (candidate.predicted, _PREDICTED[:-1])):
        if outcome is not None and outcome.feasible and outcome.energy_j is not None:
            return f"{figure(outcome.energy_j)} ({outcome.energy_source or 'unknown source'}{kind})"
    return NOTHING


def _speedup(candidate: Candidate) -> str:
    if is_reference(candidate):
        return "1 (reference)"
    if candidate.speedup is None:
        return NOTHING
    text = f"{candidate.speedup:.2f}×"
    if candidate.speedup_interval is not None:
        low, high = candidate.speedup_interval
        text += f" ({low:.2f}–{high:.2f})"
    return text


def _verdict(candidate: Candidate) -> str:
    if candidate.verdict:
        return candidate.verdict
    for outcome in (candidate.measured, candidate.predicted):
        if outcome is not None and not outcome.feasible:
            return outcome.reason
    return "kept" if candidate.kept else NOTHING
