"""Splitting a batch into parts and merging the parts' outputs.

An input tensor is split along dimension 0 when that has the batch's size (the size of the first input tensor that has a
dimension); everything else goes whole to every part. An output tensor is joined along dimension 0 when in every part
that has the part's size, or the same multiple of it (a row per token); a floating-point scalar, such as a mean loss, is
averaged with the parts' sizes as weights. A model for which these rules are wrong gives other results than plain
PyTorch, and `measure.check` throws the plan out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from autoplace.errors import ExecutionError
from autoplace.plan import Plan

from .tree import Tree

__all__ = ["CAT", "MEAN", "PASS", "batch_size", "join_kinds", "largest_remainder", "part_sizes"]

CAT, MEAN, PASS = "cat", "mean", "pass"


def largest_remainder(total: int, shares: Sequence[float]) -> list[int]:
    """Split `total` samples by shares that sum to 1: floors, then one more each by largest remainder, ties in order."""
    exact = [total * share for share in shares]
    sizes = [int(value + 1e-9) for value in exact]
    order = sorted(range(len(shares)), key=lambda i: (sizes[i] - exact[i], i))
    for i in order[: total - sum(sizes)]:
        sizes[i] += 1
    return sizes


def part_sizes(plan: Plan, batch: int) -> list[tuple[int, int]]:
    """Return (replica index, samples) of every part, in the batch's order.

    Parts that would get no sample are left out, so that a batch of one runs on one of two replicas, and a small last
    batch on fewer microbatches. An empty batch is one part, of the first replica.
    """
    parts: list[tuple[int, int]] = []
    for replica, samples in enumerate(largest_remainder(batch, [r.share for r in plan.replicas])):
        micro = largest_remainder(samples, [1.0 / plan.microbatches] * plan.microbatches)
        parts += [(replica, size) for size in micro if size > 0]
    return parts or [(0, 0)]


def batch_size(leaves: Sequence[Any]) -> int:
    """Return the size of the first dimension of the first tensor that has one.

    Raises:
        ExecutionError: If there is none.
    """
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
            return int(leaf.shape[0])
    raise ExecutionError("the inputs hold no tensor with a batch dimension to split; use a plan with one part")


def join_kinds(parts: Sequence[Tree], sizes: Sequence[int]) -> list[str]:
    """Say for every output leaf how the parts' values become one: `cat`, `mean` or `pass` (all equal).

    Args:
        parts: The outputs of the parts.
        sizes: Samples of each part.

    Raises:
        ExecutionError: If the parts' outputs differ in structure or a leaf cannot be merged.
    """
    first = parts[0]
    if not all(first.same_structure(part) for part in parts[1:]):
        raise ExecutionError("the parts of the batch gave outputs of different structure; use a plan with one part")
    return [_join_kind(values, sizes) for values in zip(*(part.leaves for part in parts), strict=True)]


def _join_kind(values: Sequence[Any], sizes: Sequence[int]) -> str:
    if all(isinstance(value, torch.Tensor) for value in values):
        if _rows_a_sample(values, sizes):
            return CAT
        if all(value.dim() == 0 and value.is_floating_point() for value in values):
            return MEAN
        if all(value.dim() == 0 for value in values) and len({value.item() for value in values}) == 1:
            return PASS
        raise ExecutionError(
            f"an output of shape {tuple(values[0].shape)} has no batch dimension to merge along; "
            "use a plan with one part"
        )
    if all(type(value) is type(values[0]) and _equal(value, values[0]) for value in values):
        return PASS
    raise ExecutionError(
        f"the parts gave different outputs of type {type(values[0]).__name__}, which cannot be merged; "
        "use a plan with one part, or switch that output off (for example use_cache=False)"
    )


def _rows_a_sample(values: Sequence[torch.Tensor], sizes: Sequence[int]) -> int:
    """Return how many rows along dimension 0 every sample has in every part; 0 when that is not one number."""
    rows = values[0].shape[0] // sizes[0] if values[0].dim() > 0 and sizes[0] > 0 else 0
    fits = all(v.dim() > 0 and v.shape[0] == rows * size for v, size in zip(values, sizes, strict=True))
    return rows if fits else 0


def _equal(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b)
    except (TypeError, ValueError, RuntimeError):
        return False
