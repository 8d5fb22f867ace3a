"""Which thread is being traced or compiled.

`torch.compiler.is_compiling()` is true for every thread while `torch.export` traces in one. A thread of the user's that
calls the model while autoplace exports it elsewhere is none of the tracer's: it has to wait, or to run its plan.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["compiling_here", "tracing_here"]

_tracer: int | None = None
"""The thread that autoplace traces in; one at a time."""


def compiling_here() -> bool:
    """Return whether the present thread is traced or compiled; TorchDynamo can trace this, too."""
    return torch.compiler.is_compiling() and (_tracer is None or _tracer == threading.get_ident())


@contextmanager
def tracing_here() -> Iterator[None]:
    """Say that autoplace traces in the present thread; whoever does holds a lock that keeps others from it."""
    global _tracer
    before, _tracer = _tracer, threading.get_ident()
    try:
        yield
    finally:
        _tracer = before
