"""`Recorder`: builds an OpGraph op by op in execution order. Both rungs of capture that see ops write through it.

It follows storages, not tensor objects: a view shares its base, a write in place makes its op the base's producer, and
reading a base gives an edge from its latest producer. Hence edges always point forward and index order is topological.
Views are folded away; what remains of them is the number of bytes that have to travel, → `_travelling_bytes`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from autoplace.errors import CaptureError
from autoplace.graph.opgraph import OpGraph

__all__ = ["Recorder", "Value", "module_paths"]


@dataclass(eq=False)
class _Base:
    """A piece of memory and who wrote it last."""

    num_bytes: int
    producer: int = -1
    weights: tuple[int, ...] = ()
    serial: int = field(default_factory=itertools.count().__next__)


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor: a piece of memory seen through views."""

    base: _Base
    views: tuple[tuple[str, int], ...] = ()
    """(module in which the view was taken, bytes of the view), outermost last."""


@dataclass
class Recorder:
    """Collects ops, their costs and the tensors between them."""

    model: torch.nn.Module
    frees: bool
    """Whether outputs are freed after their last consumer, that is, inference."""
    names: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    bytes_moved: list[float] = field(default_factory=list)
    activation_bytes: list[int] = field(default_factory=list)

    called: set[str] = field(default_factory=set)
    """Paths of the modules that were called."""

    def __post_init__(self) -> None:
        self.paths = module_paths(self.model)
        self._weights: list[tuple[torch.Tensor, str]] = []
        self._weight_index: dict[int, int] = {}
        for path, module in self.model.named_modules():
            own = [*module._parameters.values(), *module._buffers.values()]
            for tensor in own:
                if tensor is not None and id(tensor) not in self._weight_index:
                    self._weight_index[id(tensor)] = len(self._weights)
                    self._weights.append((tensor, path))
        self._readers: list[list[int]] = [[] for _ in self._weights]
        self._edges: dict[tuple[int, int, int], list[int]] = {}
        self.called.add("")
        self._taken: set[str] = set()

    def weight(self, tensors: Sequence[torch.Tensor]) -> Value:
        """Return a value for memory that holds these parameters or buffers of the model."""
        indices = tuple(self._weight_index[id(t)] for t in tensors if id(t) in self._weight_index)
        return Value(_Base(sum(t.numel() * t.element_size() for t in tensors), weights=indices))

    def source(self, num_bytes: int) -> Value:
        """Return a value that no op produced: an input or a constant."""
        return Value(_Base(num_bytes))

    def view(self, value: Value, num_bytes: int, module: str) -> Value:
        """Return a view of a value, taken in `module`."""
        return Value(value.base, (*value.views, (module, num_bytes)))

    def op(
        self,
        kind: str,
        module: str,
        *,
        reads: Iterable[Value],
        writes: Iterable[Value] = (),
        outputs: Sequence[int] = (),
        flops: float = 0.0,
        bytes_moved: float = 0.0,
        name: str = "",
    ) -> list[Value]:
        """Append one op.

        Args:
            kind: Simplified ATen name.
            module: Path of the innermost module.
            reads: Values that it reads.
            writes: Values that it changes in place (they count as read, too).
            outputs: Bytes of each new output.
            flops: Floating-point operations.
            bytes_moved: Bytes read and written.
            name: Preferred name; made unique.

        Returns:
            One value per output.
        """
        index, writes = len(self.names), list(writes)
        self.names.append(self._unique(name or kind))
        self.kinds.append(kind)
        self.modules.append(module)
        self.flops.append(flops)
        self.bytes_moved.append(bytes_moved)
        self.activation_bytes.append(int(sum(outputs)))
        for value in [*reads, *writes]:
            self._read(index, value)
        for value in writes:
            value.base.producer = index
        return [Value(_Base(num_bytes, producer=index)) for num_bytes in outputs]

    def _unique(self, name: str) -> str:
        unique, count = name, 0
        while unique in self._taken:
            count += 1
            unique = f"{name}_{count}"
        self._taken.add(unique)
        return unique

    def _read(self, index: int, value: Value) -> None:
        base = value.base
        for weight in base.weights:
            self._readers[weight].append(index)
        if base.producer < 0:
            return
        key = (base.producer, base.serial, self._travelling_bytes(value))
        self._edges.setdefault(key, []).append(index)

    def _travelling_bytes(self, value: Value) -> int:
        """Bytes sent to a reader: views taken on the producer's side shrink them, views on the reader's side do not."""
        size, producer_module = value.base.num_bytes, self.modules[value.base.producer]
        for module, num_bytes in value.views:
            if module and module != producer_module and not producer_module.startswith(module + "."):
                break
            size = min(size, num_bytes)
        return size

    def build(self) -> OpGraph:
        """Return the graph.

        Raises:
            CaptureError: If nothing was recorded.
        """
        if not self.names:
            raise CaptureError("the model runs no operation")
        weight_bytes = [0] * len(self.names)
        for (tensor, owner), readers in zip(self._weights, self._readers, strict=True):
            op = readers[0] if readers else self._home(owner)
            weight_bytes[op] += tensor.numel() * tensor.element_size()
        return OpGraph.build(
            names=self.names,
            edges=[(producer, consumers, size) for (producer, _, size), consumers in self._edges.items()],
            kinds=self.kinds,
            modules=self.modules,
            flops=self.flops,
            bytes_moved=self.bytes_moved,
            weight_bytes=weight_bytes,
            activation_bytes=self.activation_bytes,
            frees=[self.frees] * len(self.names),
            colocate=self._colocate(),
        )

    def _home(self, owner: str) -> int:
        """The first op inside a module, else inside the nearest parent that has one: where unused weights count."""
        while owner:
            for index, module in enumerate(self.modules):
                if module == owner or module.startswith(owner + "."):
                    return index
            owner = owner.rpartition(".")[0]
        return 0

    def _colocate(self) -> list[int]:
        """Ops that read the same parameter share a device: it lives in one place and has one gradient."""
        parent = list(range(len(self.names)))

        def find(op: int) -> int:
            while parent[op] != op:
                parent[op] = parent[parent[op]]
                op = parent[op]
            return op

        for (tensor, _), readers in zip(self._weights, self._readers, strict=True):
            if isinstance(tensor, torch.nn.Parameter):
                for other in readers[1:]:
                    parent[max(find(readers[0]), find(other))] = min(find(readers[0]), find(other))
        roots = [find(op) for op in range(len(parent))]
        sizes, numbers = Counter(roots), itertools.count()
        keys = {root: next(numbers) if sizes[root] > 1 else -1 for root in dict.fromkeys(roots)}
        return [keys[root] for root in roots]


def module_paths(model: torch.nn.Module) -> dict[int, str]:
    """Return module id to its first path in the model; "" is the root."""
    return {id(module): path for path, module in model.named_modules()}
