"""What earlier tunings measured, read back from their records: problems with the best plan of real runs.

Only plans that a placement alone describes count: one replica, no threads, compilation or precision of their own. The
number of microbatches is the problem's. Records without a problem (older ones, torn ones, trainings) are passed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import AutoplaceError, InputError
from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.problem_file import problem_from_json
from autoplace.records import read_records, records_directory

__all__ = ["Experience", "load_experience"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Experience:
    """A problem and the best placement that real runs found for it."""

    problem: Problem
    """As profiled; its microbatches are the plan's."""
    assignment: NDArray[np.int32]
    """int32[N], device index of every op."""
    objective: float
    """J as measured."""


def load_experience(records_dir: str | Path | None = None) -> list[Experience]:
    """Return the best measured single-replica plan of every tuned problem, in the order of the records' names.

    A problem that was tuned several times (same profile) comes once, with the best plan of all.

    Args:
        records_dir: Folder of records; None = the user's data directory, where tunings leave theirs.

    Raises:
        InputError: If a folder is named and is not there.
    """
    folder = Path(records_dir) if records_dir is not None else records_directory()
    if records_dir is not None and not folder.is_dir():
        raise InputError(f"{folder} is no folder; pass the one that holds the records (*.jsonl) of your tunings")
    best: dict[str, Experience] = {}
    for path in sorted(folder.glob("*.jsonl")):
        try:
            entries = read_records(path)[0]
        except AutoplaceError:
            continue
        for entry in entries:
            found = _read(entry) if entry.get("type") == "experience" else None
            if found is None:
                continue
            key = _with_microbatches(found.problem, 1).fingerprint
            if key not in best or found.objective < best[key].objective:
                best[key] = found
    return list(best.values())


def _read(entry: Mapping[str, Any]) -> Experience | None:
    """Return what one record line teaches; None where it is malformed or no plan of it counts."""
    try:
        problem = problem_from_json(entry["problem"], where="a record's problem")
        found = _best(entry["plans"], problem)
    except (AutoplaceError, KeyError, TypeError, ValueError, AttributeError):
        return None
    if found is None:
        return None
    objective, plan = found
    planned = _with_microbatches(problem, plan.microbatches)
    return Experience(problem=planned, assignment=plan.assignment_array(problem), objective=objective)


def _best(rows: Sequence[Mapping[str, Any]], problem: Problem) -> tuple[float, Plan] | None:
    able = []
    for row in rows:
        plan, outcome = Plan.from_json(row["plan"]), row["outcome"]
        knobs = plan.threads or plan.compiled or plan.channels_last or plan.engine != "threads"
        plain = not knobs and plan.precision == "float32"
        objective = outcome.get("objective")
        if not outcome.get("feasible") or objective is None or not plain or len(plan.replicas) != 1:
            continue
        if math.isfinite(objective) and set(plan.replicas[0].assignment) >= set(problem.graph.names):
            able.append((float(objective), plan))
    return min(able, key=lambda pair: pair[0]) if able else None


def _with_microbatches(problem: Problem, microbatches: int) -> Problem:
    return problem.with_(semantics=replace(problem.semantics, microbatches=microbatches))
