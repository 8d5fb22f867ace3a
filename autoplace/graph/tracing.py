"""Trace a model in one thread while other threads go on running it.

`torch.export` replaces `torch.nn.Module.__call__` and `__getattr__` for the whole process while it traces, and puts
fake tensors into the modules' places for parameters. What is done about it, for a user whose threads serve meanwhile:

1. A copy of the modules is traced, which shares parameters and buffers → `modules_to_trace`.
2. One thread traces at a time, and none compiles meanwhile: patches laid over each other would not be taken off in
   order → `traces_alone`.
3. The replaced functions treat the modules of other threads as if they were the original ones.
4. `torch.compiler.is_compiling()` is true for every thread meanwhile; our own code asks `tracer.compiling_here`.

What it does not know: models that ask `is_compiling()` get that answer in every thread, and a model that cannot be
copied is traced itself: another thread that runs it then may fail.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.convert_frame import compile_lock
from torch.fx.experimental import proxy_tensor

from autoplace.graph.preserve import preserve_model
from autoplace.tracer import tracing_here

__all__ = ["modules_to_trace", "traces_alone"]

_lock = threading.RLock()


@contextmanager
def modules_to_trace(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Give the modules that may be traced in a model's place: a copy that shares its parameters and buffers.

    Where the model cannot be copied that is the model itself, which is then put back as it was.
    """
    tensors = [*model.parameters(), *model.buffers()]
    try:
        copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception:  # whatever a model keeps that cannot be copied
        with preserve_model(model):
            yield model
    else:
        yield copied


@contextmanager
def traces_alone() -> Iterator[None]:
    """Wait for the traces and compilations of other threads, and let none begin until the end."""
    _let_other_threads_pass()
    with _lock, compile_lock, tracing_here():
        yield


@functools.cache
def _let_other_threads_pass() -> None:
    """Make export's tracer see only what its own thread does. Stays: taking it off could hit a trace of the user's."""
    tracer: Any = proxy_tensor._ModuleStackTracer
    trace, call_module, getattribute = tracer.trace, tracer.call_module, tracer.getattr

    @functools.wraps(trace)
    def trace_here(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._autoplace_thread = threading.get_ident()
        return trace(self, *args, **kwargs)

    @functools.wraps(call_module)
    def call_module_here(self: Any, m: Any, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._autoplace_thread != threading.get_ident():
            return forward(*args, **kwargs)
        return call_module(self, m, forward, args, kwargs)

    @functools.wraps(getattribute)
    def getattr_here(self: Any, attr: str, value: Any, parameter_proxy_cache: Any) -> Any:
        if self._autoplace_thread != threading.get_ident():
            return value
        return getattribute(self, attr, value, parameter_proxy_cache)

    tracer.trace, tracer.call_module, tracer.getattr = trace_here, call_module_here, getattr_here
