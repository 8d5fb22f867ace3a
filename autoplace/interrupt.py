"""Raise an exception in another thread: at its next Python instruction, not inside a long call of C++ code.

An exception that strikes in a destructor or a weak reference's callback is swallowed there by the interpreter, which
prints a trace of it; whoever sends one has to look whether it arrived, and send it again. The print is left out.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from typing import Any

__all__ = ["raise_in"]

_sent: set[tuple[int, type[BaseException]]] = set()
_hook: Any = None
"""Ours, once it is installed."""


def raise_in(ident: int, kind: type[BaseException]) -> None:
    """Raise `kind()` in a thread soon.

    Args:
        ident: The thread's `threading.get_ident()`; nothing happens when it has ended.
        kind: Exception class, made without arguments.
    """
    _sent.add((ident, kind))
    _install_hook()
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(kind))


def _install_hook() -> None:
    global _hook
    before = sys.unraisablehook
    if before is _hook:
        return

    def unraisable(event: Any, /) -> None:
        if (threading.get_ident(), event.exc_type) not in _sent:
            before(event)

    _hook = sys.unraisablehook = unraisable
