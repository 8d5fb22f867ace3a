"""`OpGraph`: what is to be placed. Arrays, not objects per op.

An op is anything that runs on one device without interruption: an ATen op, a module call, a whole model. A tensor has
one producer and any number of consumers. The graph knows nothing of devices; latencies live in `Problem`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import AutoplaceError

__all__ = ["OpGraph"]


@dataclass(frozen=True, kw_only=True, eq=False)
class OpGraph:
    """Operations with costs and memory, and the tensors between them.

    N is the number of ops, T of tensors, C of (tensor, consumer) pairs.
    """

    names: tuple[str, ...]
    """N unique names. A group made from a module call is named by the module's path, see `graph.coarsen`."""
    kinds: tuple[str, ...]
    """N kinds such as "linear" or "layer_norm"; "barrier" marks an op that all parts of a split batch share."""
    modules: tuple[str, ...]
    """N qualified names of the innermost module each op belongs to; "" is the root."""
    flops: NDArray[np.float64]
    """N floating-point operations."""
    bytes_moved: NDArray[np.float64]
    """N bytes read and written."""
    weight_bytes: NDArray[np.int64]
    """N bytes of parameters and buffers held as long as the model is loaded."""
    activation_bytes: NDArray[np.int64]
    """N bytes of outputs held."""
    frees: NDArray[np.bool_]
    """N flags: outputs are freed after their last consumer (inference liveness)."""
    colocate: NDArray[np.int32]
    """N group ids; ops with the same id >= 0 share a device, -1 is free."""
    tensor_producer: NDArray[np.int32]
    """T op indices."""
    tensor_bytes: NDArray[np.float64]
    """T sizes in bytes."""
    consumer_offsets: NDArray[np.int32]
    """T + 1 offsets into `consumers`."""
    consumers: NDArray[np.int32]
    """C op indices, ascending and unique within a tensor."""

    @staticmethod
    def build(
        *,
        names: Sequence[str],
        edges: Sequence[tuple[int, Sequence[int], float]],
        kinds: Sequence[str] | None = None,
        modules: Sequence[str] | None = None,
        flops: Sequence[float] | NDArray | None = None,
        bytes_moved: Sequence[float] | NDArray | None = None,
        weight_bytes: Sequence[int] | NDArray | None = None,
        activation_bytes: Sequence[int] | NDArray | None = None,
        frees: Sequence[bool] | NDArray | None = None,
        colocate: Sequence[int] | NDArray | None = None,
    ) -> OpGraph:
        """Build a graph from plain sequences; what is left out is zero.

        Args:
            names: N unique op names.
            edges: One (producer, consumers, bytes) triple per tensor, by op index. Consumers may repeat.
            kinds, modules, flops, bytes_moved, weight_bytes, activation_bytes, frees, colocate: See the fields.

        Raises:
            AutoplaceError: If the edges have a cycle or name an op that does not exist.
        """
        count = len(names)
        offsets, consumers = _consumers([c for _, c, _ in edges])
        graph = OpGraph(
            names=tuple(names),
            kinds=tuple(kinds) if kinds is not None else ("op",) * count,
            modules=tuple(modules) if modules is not None else ("",) * count,
            flops=_array(flops, count, np.float64),
            bytes_moved=_array(bytes_moved, count, np.float64),
            weight_bytes=_array(weight_bytes, count, np.int64),
            activation_bytes=_array(activation_bytes, count, np.int64),
            frees=_array(frees, count, np.bool_),
            colocate=np.asarray(colocate, np.int32) if colocate is not None else np.full(count, -1, np.int32),
            tensor_producer=np.asarray([p for p, _, _ in edges], np.int32),
            tensor_bytes=np.asarray([b for _, _, b in edges], np.float64),
            consumer_offsets=offsets,
            consumers=consumers,
        )
        graph.topological_order  # noqa: B018 - raises on cycles and bad indices
        return graph

    @property
    def num_ops(self) -> int:
        """Number of ops N."""
        return len(self.names)

    @property
    def num_tensors(self) -> int:
        """Number of tensors T."""
        return len(self.tensor_producer)

    def tensors(self) -> list[tuple[int, list[int], float]]:
        """Return a (producer, consumers, bytes) triple per tensor, as `build` takes them."""
        starts = self.consumer_offsets.tolist()
        consumers = self.consumers.tolist()
        return [
            (producer, consumers[starts[t] : starts[t + 1]], size)
            for t, (producer, size) in enumerate(
                zip(self.tensor_producer.tolist(), self.tensor_bytes.tolist(), strict=True)
            )
        ]

    @cached_property
    def edge_list(self) -> NDArray[np.int32]:
        """All (producer, consumer, tensor) triples, int32[C, 3], sorted by tensor."""
        tensors = np.repeat(np.arange(self.num_tensors, dtype=np.int32), np.diff(self.consumer_offsets))
        if len(tensors) == 0:
            return np.zeros((0, 3), np.int32)
        return np.stack([self.tensor_producer[tensors], self.consumers, tensors], axis=1).astype(np.int32)

    @cached_property
    def topological_order(self) -> NDArray[np.int32]:
        """Op indices, producers first, ties by op index; int32[N].

        Raises:
            AutoplaceError: If the graph has a cycle or an index out of range.
        """
        import heapq

        edges = self.edge_list
        if len(edges) and (edges[:, :2].min() < 0 or edges[:, :2].max() >= self.num_ops):
            raise AutoplaceError("a tensor names an op that does not exist")
        degrees = np.bincount(edges[:, 1], minlength=self.num_ops)
        heap = np.flatnonzero(degrees == 0).tolist()  # ascending, so a heap
        # Lists: reading single items of arrays takes several times as long.
        indegree, (starts, targets) = degrees.tolist(), (part.tolist() for part in self._successors)
        order: list[int] = []
        while heap:
            op = heapq.heappop(heap)
            order.append(op)
            for target in targets[starts[op] : starts[op + 1]]:
                indegree[target] -= 1
                if indegree[target] == 0:
                    heapq.heappush(heap, target)
        if len(order) < self.num_ops:
            stuck = self.names[next(i for i, count in enumerate(indegree) if count > 0)]
            raise AutoplaceError(f"the graph has a cycle through op {stuck!r}; remove a tensor that closes it")
        return np.asarray(order, np.int32)

    @cached_property
    def _successors(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        edges = self.edge_list
        order = np.argsort(edges[:, 0], kind="stable")
        starts = np.zeros(self.num_ops + 1, np.int64)
        np.cumsum(np.bincount(edges[:, 0], minlength=self.num_ops), out=starts[1:])
        return starts, edges[order, 1]

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 (first 16 hex digits) of structure, names and costs."""
        digest = hashlib.sha256()
        for texts in (self.names, self.kinds, self.modules):
            digest.update("\x00".join(texts).encode())
        for array in (
            self.flops, self.bytes_moved, self.weight_bytes, self.activation_bytes, self.frees, self.colocate,
            self.tensor_producer, self.tensor_bytes, self.consumer_offsets, self.consumers,
        ):  # fmt: skip
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]


def _consumers(rows: list[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return offsets int32[T + 1] and the consumers of T tensors, ascending and each once within a tensor."""
    tensor = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    consumer = np.fromiter(itertools.chain.from_iterable(rows), np.int64, len(tensor))
    order = np.lexsort((consumer, tensor))
    tensor, consumer = tensor[order], consumer[order]
    fresh = np.ones(len(tensor), np.bool_)
    fresh[1:] = (tensor[1:] != tensor[:-1]) | (consumer[1:] != consumer[:-1])
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(np.bincount(tensor[fresh], minlength=len(rows)), out=offsets[1:])
    return offsets, consumer[fresh].astype(np.int32)


def _array(values: Sequence[float] | NDArray | None, count: int, dtype: type) -> NDArray:
    array: NDArray = np.zeros(count, dtype) if values is None else np.asarray(values, dtype)
    if array.shape != (count,):
        raise AutoplaceError(f"expected {count} values, one per op, and got {array.shape}")
    return array
