"""Fitting classes into memory: largest first, each where most is left. Knows nothing of time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoplace.jit import compiled, inline
from autoplace.problem import Problem

__all__ = ["memory_arrays", "pack"]

HELD_SHARES = (1.0, 0.75, 0.5, 0.25, 0.125, 0.0)
"""How much of the activations that are freed early a device is taken to hold at once, first what is safe."""


def _pack(pack_order, need, can_run, left, first, skip, assignment):
    """Try to fit the classes from `first` on into the memory left, largest first, each where most is left.

    Args:
        pack_order: int32[C], classes by descending need.
        need: float64[C] bytes.
        can_run: bool[C, D].
        left: float64[D] bytes; changed.
        first: Classes before this one are placed already.
        skip: A class to leave out.
        assignment: int32[C]; filled for the classes that are packed.

    Returns:
        Whether all fit.
    """
    for k in range(len(pack_order)):
        index = pack_order[k]
        if index < first or index == skip:
            continue
        best = -1
        for d in range(left.shape[0]):
            if can_run[index, d] and need[index] <= left[d] and (best < 0 or left[d] > left[best]):
                best = d
        if best < 0:
            return False
        left[best] -= need[index]
        assignment[index] = best
    return True


pack = inline(_pack)
"""→ `_pack`, to be called from kernels."""
_pack_from_python = compiled(_pack)


def memory_arrays(
    problem: Problem, members: NDArray[np.int32], offsets: NDArray[np.int64], can_run: NDArray[np.bool_]
) -> tuple[dict[str, NDArray], bool]:
    """Return need, order of packing and certificate of the classes, and whether memory is limited.

    Of the activations that are freed early counts the largest of `HELD_SHARES` with which everything fits: what lives
    when depends on the schedule, and the evaluator, which knows it, has the last word.

    Args:
        problem: What is placed.
        members: int32[N], ops by class.
        offsets: int64[C + 1] into them.
        can_run: bool[C, D].
    """
    graph = problem.graph
    capacity = np.asarray([d.memory_bytes for d in problem.cluster.devices], np.float64)
    limited = bool(np.isfinite(capacity).any())
    shares = HELD_SHARES if graph.frees.any() else (1.0,)
    for share in shares:
        amounts = graph.weight_bytes + np.where(graph.frees, share, 1.0) * graph.activation_bytes
        need = np.add.reduceat(amounts[members], offsets[:-1])
        pack_order = np.argsort(-need, kind="stable").astype(np.int32)
        certificate = np.full(len(need), -1, np.int32)
        packed = limited and _pack_from_python(pack_order, need, can_run, capacity.copy(), 0, -1, certificate)
        if packed or not limited:
            break
        certificate[:] = -1
    arrays = {
        "need": need,
        "need_after": np.cumsum(need[::-1])[::-1].copy(),
        "pack_order": pack_order,
        "certificate": certificate,
    }
    return arrays, limited
