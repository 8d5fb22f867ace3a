"""Local moves: what a changed plan costs, asked by compiled search loops one move at a time.

The figures are those of `SimulatedEvaluator.score`. A search fills `Local.plan`, calls `begin`, then `trial` for every
move it thinks of and `keep` for those it takes. All three are compiled, allocate nothing, and may be called from
compiled code of other rooms; what does so and is cached on disk closes over `local_version()`, since a cache notices
changes of its own file only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.simulate.evaluator import SimulatedEvaluator
from autoplace.simulate.kernels import evaluate_plans
from autoplace.simulate.primitives import INF, compiled, sources_version

__all__ = ["Local", "begin", "keep", "local_version", "new_local", "trial"]


class Local(NamedTuple):
    """A plan, and all that its changes are evaluated with. N ops, D devices. Two threads must not share one."""

    plan: NDArray[np.int32]
    """int32[1, N], the current plan: device index of every op. Filled by the caller before `begin`, then by `keep`."""
    whole: tuple[Any, ...]
    """`Arrays` with the latencies of plans on one device."""
    spread: tuple[Any, ...]
    """`Arrays` with the latencies of plans on several devices; its other arrays are those of `whole`."""
    op_counts: NDArray[np.int64]
    """int64[D], ops of the current plan on each device."""
    moved: NDArray[np.int32]
    """int32[2, N], ops and devices of the last trial."""
    moved_count: NDArray[np.int64]
    """int64[1], length of the last trial."""
    before: NDArray[np.int32]
    """int32[N], scratch: where the moved ops were."""
    figures: NDArray[np.float64]
    """float64[4, 1], scratch of `evaluate_plans`."""
    status: NDArray[np.int8]
    """int8[1], scratch of `evaluate_plans`."""


def new_local(evaluator: SimulatedEvaluator) -> Local:
    """Return the state of a search by local moves, with arrays of its own; the plan is all zeros."""
    arrays = evaluator._arrays
    own = arrays._replace(**{name: getattr(arrays, name).copy() for name in _WRITTEN})
    spread = own if evaluator._spread_ms is None else own._replace(latency_ms=evaluator._spread_ms)
    ops, devices = evaluator.problem.num_ops, evaluator.problem.num_devices
    return Local(
        plan=np.zeros((1, ops), np.int32),
        whole=tuple(own),
        spread=tuple(spread),
        op_counts=np.zeros(devices, np.int64),
        moved=np.zeros((2, ops), np.int32),
        moved_count=np.zeros(1, np.int64),
        before=np.zeros(ops, np.int32),
        figures=np.zeros((4, 1)),
        status=np.zeros(1, np.int8),
    )


_WRITTEN = ("rules", "ops", "devices", "tensors", "edges", "links", "queue", "urgent", "legs", "waits")
"""The arrays that a run writes to."""


def local_version() -> int:
    """Return a number that changes with the sources of everything that a local move runs."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + str(sources_version()).encode())
    return int(digest.hexdigest()[:12], 16)


def _entries(version):  # type: ignore[no-untyped-def]
    """Build the entries for one version of the sources: what they close over is part of their key in the cache."""

    @compiled
    def put(local, op, device):
        """Move one op of the current plan."""
        local.op_counts[local.plan[0, op]] -= version // version
        local.op_counts[device] += 1
        local.plan[0, op] = device

    @compiled
    def evaluate(local):
        """Return J of the current plan."""
        used = 0
        for d in range(len(local.op_counts)):
            used += local.op_counts[d] > 0
        if used > 1:
            evaluate_plans(local.spread, local.plan, False, local.figures, local.status)
        else:
            evaluate_plans(local.whole, local.plan, False, local.figures, local.status)
        return local.figures[0, 0]

    @compiled
    def begin(local):
        """Evaluate `local.plan` in full and make it the plan that moves start from; return J, inf if infeasible."""
        for d in range(len(local.op_counts)):
            local.op_counts[d] = 0
        for i in range(local.plan.shape[1]):
            local.op_counts[local.plan[0, i]] += 1
        local.moved_count[0] = 0
        return evaluate(local)

    @compiled
    def trial(local, ops, devices, count, limit):
        """Return what the current plan would cost with some ops on other devices; it stays as it is.

        Args:
            local: `Local`, begun.
            ops: int32[K], ops to move; K at least `count`. One named twice goes to the last of its devices.
            devices: int32[K], where each goes; neither is checked.
            count: How many of them, at most N.
            limit: What the caller can still use, may be inf.

        Returns:
            J of the changed plan; inf where it is infeasible or J exceeds the limit.
        """
        for k in range(count):
            local.before[k] = local.plan[0, ops[k]]
            local.moved[0, k] = ops[k]
            local.moved[1, k] = devices[k]
            put(local, ops[k], devices[k])
        local.moved_count[0] = count
        objective = evaluate(local)
        for k in range(count - 1, -1, -1):
            put(local, ops[k], local.before[k])
        return INF if objective > limit else objective

    @compiled
    def keep(local):
        """Make the plan of the last trial, which returned a finite J, the current one."""
        for k in range(local.moved_count[0]):
            put(local, local.moved[0, k], local.moved[1, k])
        local.moved_count[0] = 0

    return begin, trial, keep


begin, trial, keep = _entries(local_version())
