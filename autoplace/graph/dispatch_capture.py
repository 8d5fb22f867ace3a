"""Second rung of capture: run the model once and write down every ATen op as it is dispatched.

Works for whatever runs: data-dependent control flow, outputs of any type. It sees this run alone: another input may
take another path. Memory is told apart by storage, not by tensor object, since autograd and views make new objects;
weak references keep a storage's identity from being used again without keeping its data.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from autoplace.graph.op_costs import bytes_moved, concrete, op_flops, op_kind, tensor_bytes, tensors_of
from autoplace.graph.opgraph import OpGraph
from autoplace.graph.recorder import Recorder, Value
from autoplace.workload import Workload

__all__ = ["capture_by_dispatch"]


def capture_by_dispatch(workload: Workload, kwargs: Mapping[str, Any]) -> tuple[OpGraph, set[str]]:
    """Run the model's forward once under a recording dispatch mode.

    Args:
        workload: The model and its positional inputs; the model is already in the workload's mode.
        kwargs: Keyword inputs, caches off.

    Returns:
        The graph and the paths of the modules that were called.

    Raises:
        CaptureError: If the model runs no operation.
        Exception: Whatever the run raises.
    """
    recorder = Recorder(workload.model, frees=not workload.training)
    stack: list[str] = [""]
    with torch.set_grad_enabled(workload.training), _module_stack(recorder, stack), _Mode(recorder, stack):
        workload.model(*workload.args, **kwargs)
    return recorder.build(), recorder.called


@contextmanager
def _module_stack(recorder: Recorder, stack: list[str]) -> Iterator[None]:
    """Keep the path of the innermost module that runs in this thread on top of `stack`."""
    own = threading.get_ident()

    def enter(module: torch.nn.Module, args: Any) -> None:
        if threading.get_ident() != own:
            return
        stack.append(recorder.paths.get(id(module), stack[-1]))
        recorder.called.add(stack[-1])

    def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == own and len(stack) > 1:
            stack.pop()

    before = torch.nn.modules.module.register_module_forward_pre_hook(enter)
    after = torch.nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


class _Mode(TorchDispatchMode):
    """Writes every op to a Recorder."""

    def __init__(self, recorder: Recorder, stack: list[str]) -> None:
        super().__init__()
        self.recorder, self.stack = recorder, stack
        self.flop_cache: dict[str, float] = {}
        self.bases: dict[int, tuple[StorageWeakRef, Value]] = {}
        self.views: dict[tuple[Any, ...], Value] = {}
        weights: dict[int, list[torch.Tensor]] = {}
        for tensor in [*recorder.model.parameters(), *recorder.model.buffers()]:
            if (key := _storage_key(tensor)) is not None:
                weights.setdefault(key, []).append(tensor)
        for key, tensors in weights.items():
            self.bases[key] = (StorageWeakRef(tensors[0].untyped_storage()), recorder.weight(tensors))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_of((args, kwargs))
        reads = [self._value(t) for t in inputs]
        out = func(*args, **kwargs)
        outputs = tensors_of(out)
        if outputs and not re.match(r"(prim|_assert|sym_)", op_kind(func)):
            self._record(func, args, kwargs, inputs, reads, out, outputs)
        return out

    def _record(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        inputs: list[torch.Tensor],
        reads: list[Value],
        out: Any,
        outputs: list[torch.Tensor],
    ) -> None:
        module, known = self.stack[-1], {_storage_key(t) for t in inputs}
        written = _written(func, args, kwargs)
        fresh = [t for t in outputs if _storage_key(t) not in known or _storage_key(t) is None]
        if not fresh and not written:
            for tensor in outputs:
                source = self._value(inputs[[_storage_key(t) for t in inputs].index(_storage_key(tensor))])
                self.views[_view_key(tensor)] = self.recorder.view(source, tensor_bytes(tensor), module)
            return
        meta_args, meta_kwargs, meta_out = concrete(args), concrete(kwargs), concrete(out)
        kind = op_kind(func)
        values = self.recorder.op(
            kind,
            module,
            reads=reads,
            writes=[self._value(t) for t in written],
            outputs=[tensor_bytes(t) for t in fresh],
            flops=op_flops(func, meta_args, meta_kwargs, meta_out, self.flop_cache),
            bytes_moved=bytes_moved(kind, tensors_of((meta_args, meta_kwargs)), tensors_of(meta_out)),
        )
        for tensor, value in zip(fresh, values, strict=True):
            self._remember(tensor, value)

    def _remember(self, tensor: torch.Tensor, value: Value) -> None:
        if (key := _storage_key(tensor)) is not None:
            self.bases[key] = (StorageWeakRef(tensor.untyped_storage()), value)

    def _value(self, tensor: torch.Tensor) -> Value:
        key = _storage_key(tensor)
        if key is None or key not in self.bases:
            value = self.recorder.source(tensor_bytes(tensor))
            self._remember(tensor, value)
            return value
        base = self.bases[key][1]
        seen = self.views.get(_view_key(tensor))
        return seen if seen is not None and seen.base is base.base else base


def _storage_key(tensor: torch.Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors and wrappers have no storage
        return None


def _view_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (_storage_key(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    actual = [
        args[i] if i < len(args) else kwargs.get(formal.name)
        for i, formal in enumerate(schema.arguments)
        if formal.alias_info is not None and formal.alias_info.is_write
    ]
    return tensors_of(actual)
