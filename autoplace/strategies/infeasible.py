"""Why a problem has no feasible placement, as far as the ops and the memory alone can tell."""

from __future__ import annotations

import numpy as np

from autoplace.problem import Problem
from autoplace.strategies._support import View

__all__ = ["explain_infeasible", "prove_infeasible"]


def prove_infeasible(problem: Problem) -> str | None:
    """Return one sentence that names the op or the memory that no placement can satisfy; None where none is proven.

    Memory is counted at its least, with every activation freed that may be.
    """
    view = View.of(problem)
    able = np.ones((view.num_classes, problem.num_devices), np.bool_)
    np.logical_and.at(able, view.op_class, problem.can_run)
    return _stuck_op(view, able) or _large_op(view, able) or _full_device(view, able)


def explain_infeasible(problem: Problem) -> str:
    """Return one sentence on why no feasible placement was found: the proof, else what makes one hard to find."""
    if proof := prove_infeasible(problem):
        return proof
    view = View.of(problem)
    limits = ["memory"] if np.isfinite(view.capacity).any() else []
    limits += ["missing links"] if not view.talks.all() else []
    why = " and ".join(limits) or "the budget"
    return f"no placement was found that respects {why}; allow more evaluations, or loosen {why}"


def _called(view: View, one: int) -> str:
    """Return words for a class."""
    members = np.flatnonzero(view.op_class == one)
    first = repr(view.problem.graph.names[int(members[0])])
    return f"op {first}" if len(members) == 1 else f"the group of ops co-located with {first}"


def _stuck_op(view: View, able: np.ndarray) -> str | None:
    stuck = np.flatnonzero(~able.any(axis=1))
    if len(stuck) == 0:
        return None
    return f"{_called(view, int(stuck[0]))} can run on no device; give it a latency on one"


def _large_op(view: View, able: np.ndarray) -> str | None:
    largest = np.where(able, view.capacity, 0.0).max(axis=1)
    excess = view.held_bytes - largest
    one = int(np.argmax(np.where(np.isfinite(excess), excess, -1.0)))
    if not excess[one] > 0:
        return None
    return (
        f"{_called(view, one)} needs {view.held_bytes[one]:.0f} bytes and no device that can run it has more than "
        f"{largest[one]:.0f}; add memory"
    )


def _full_device(view: View, able: np.ndarray) -> str | None:
    total, room = float(view.held_bytes.sum()), float(view.capacity.sum())
    if total > room:
        return f"all ops together need {total:.0f} bytes and all devices together have {room:.0f}; add memory"
    alone = able.sum(axis=1) == 1
    for index, device in enumerate(view.problem.cluster.devices):
        bound = float(view.held_bytes[alone & able[:, index]].sum())
        if bound > view.capacity[index]:
            return (
                f"the ops that can run on {device.name!r} alone need {bound:.0f} bytes and it has "
                f"{view.capacity[index]:.0f}; add memory, or give them another device"
            )
    return None
