"""`explain_ranks`: a plan over several ranks, and what was predicted and measured beside it, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table

from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.report.explain import as_text

if TYPE_CHECKING:
    from autoplace.group_tuner import GroupResult

__all__ = ["explain_ranks"]


def explain_ranks(plan: Plan, members: Sequence[str], result: GroupResult | None, *, width: int = 100) -> str:
    """Return which rank does what, and the candidates of the tuning.

    Args:
        plan: What runs.
        members: Device per rank.
        result: What tuning found; None where it did not run.
        width: Columns of the text.
    """
    shape = f"{plan.shape}, {plan.sharded:.0%} of the parameters with one owner" if plan.sharded else plan.shape
    where = Table(title=f"{shape}, proposed by {plan.strategy}, {plan.microbatches} microbatch(es)")
    for heading in ("rank", "device", "replica", "share of the batch", "op groups"):
        where.add_column(heading, justify="left" if heading == "device" else "right")
    for rank, name in enumerate(members):
        found = [(i, r) for i, r in enumerate(plan.replicas) if name in r.devices]
        if not found:
            where.add_row(str(rank), name, "-", "idle", "0")
        for i, replica in found:
            groups = sum(device == name for device in replica.assignment.values())
            where.add_row(str(rank), name, str(i), f"{replica.share:.1%}", str(groups))
    tables: list[RenderableType] = [where]
    if result is not None:
        rows = Table(title=f"candidates; A/A noise {result.noise:.1%}")
        for heading in ("plan", "predicted ms", "calibrated ms", "measured ms", "verdict"):
            rows.add_column(heading, justify="left" if heading in ("plan", "verdict") else "right")
        for row in result.rows:
            if row.measured is None:
                continue
            verdict = "kept" if row.plan == result.plan else row.measured.reason or ("baseline" if row.baseline else "")
            rows.add_row(row.label, _ms(row.predicted), _ms(row.calibrated), _ms(row.measured), verdict)
        tables.append(rows)
        if result.calibration is not None:
            tables.append(result.calibration.sentence)
    return as_text(tables, width)


def _ms(outcome: Outcome | None) -> str:
    return "-" if outcome is None or not outcome.feasible else f"{outcome.latency_ms:.1f}"
