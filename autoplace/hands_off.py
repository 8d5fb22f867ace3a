"""Work beside the user's program: threads marked here leave what belongs to the whole process alone.

A tuning in the foreground may set and put back what is process-wide, since nobody else runs meanwhile; in the
background it may not. A thread marks itself by `hands_off`; tasks that it gives to worker threads are marked too
→ `runtime.worker`. In marked threads:

1. Random generators are never set: not by our own contexts, and not where PyTorch sets them for itself
   (`torch.compile`, `fork_rng`, gradient checkpointing). Their draws still come from the process's generators, so they
   advance the user's random numbers, but never rewind them. A model that draws random numbers other than dropout then
   fails its check.
2. Warnings, and PyTorch's logs, are silenced for the thread alone → `silent`.
3. When the interpreter exits, they are stopped by an exception first: a thread that comes back from PyTorch's C++ code
   into a finalizing interpreter aborts the process ("terminate called without an active exception").

What it does not know: what PyTorch itself does to `warnings.filters` while it compiles (`warnings.catch_warnings` is
process-wide before Python 3.14), and threads that PyTorch starts.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from autoplace.interrupt import raise_in

__all__ = ["hands_off", "is_hands_off", "silent", "stop_at_exit"]

_EXIT_LIMIT_S = 5.0
"""Marked threads get this long to end at exit; one that is still in a long call then never comes back to Python."""
_EXIT_REPEAT_S = 1.0
"""An exception that somebody swallowed is sent again after this time; sooner, it would cut clean-ups short."""


class _Here(threading.local):
    depth = 0
    silent = False


_here = _Here()
_lock = threading.Lock()
_marked: Counter[int] = Counter()
"""Thread id to how many contexts it is in."""
_left_behind: set[int] = set()
"""Ids of threads that are only stopped at exit; they may have ended since."""
_originals: list[tuple[Any, str, Any, Any]] = []
"""(owner, name, PyTorch's function, ours) while any thread is marked."""


def is_hands_off() -> bool:
    """Return whether the present thread is to leave process-wide state alone."""
    return _here.depth > 0


@contextmanager
def hands_off() -> Iterator[None]:
    """Mark the present thread, and the tasks that it hands to worker threads meanwhile."""
    ident = threading.get_ident()
    with _lock:
        if not _marked:
            _guard_generators()
            atexit.unregister(_stop_marked)  # what is registered last runs first: before what the threads use is shut
            atexit.register(_stop_marked)
        _marked[ident] += 1
    _here.depth += 1
    try:
        yield
    finally:
        _here.depth -= 1
        with _lock:
            _marked[ident] -= 1
            if _marked[ident] <= 0:
                del _marked[ident]
            if not _marked:
                _release_generators()


def stop_at_exit(ident: int) -> None:
    """Stop a thread that was left behind, in PyTorch perhaps, when the interpreter exits (see 3).

    Args:
        ident: The thread's `threading.get_ident()`.
    """
    with _lock:
        _left_behind.add(ident)
        atexit.unregister(_stop_marked)
        atexit.register(_stop_marked)


def _guard_generators() -> None:
    """Let PyTorch's setters of generators' states do nothing in marked threads, and what they did elsewhere."""
    owners = [(torch, "set_rng_state"), (torch.random, "set_rng_state")]
    owners += [(owner, "set_rng_state") for owner in (torch.cuda, torch.cuda.random)]
    for owner, name in owners:
        original = getattr(owner, name)
        ours = _unless_hands_off(original)
        setattr(owner, name, ours)
        _originals.append((owner, name, original, ours))


def _unless_hands_off(setter: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(setter)
    def set_rng_state(*args: Any, **kwargs: Any) -> None:
        if not is_hands_off():
            setter(*args, **kwargs)

    return set_rng_state


def _release_generators() -> None:
    for owner, name, original, ours in _originals:
        if getattr(owner, name) is ours:  # else somebody else has put his own there since
            setattr(owner, name, original)
    _originals.clear()


@contextmanager
def silent() -> Iterator[None]:
    """Drop warnings, and the logs of PyTorch, that the present thread gives; those of other threads are shown."""
    _install_filters()
    before, _here.silent = _here.silent, True
    try:
        yield
    finally:
        _here.silent = before


class _SilentThread(logging.Filter):
    """Matches in silent threads only: as a module pattern of `warnings.filters`, and as a filter of log records."""

    def match(self, _module: str) -> bool:
        """Return whether a warning of the present thread is to be dropped."""
        return _here.silent

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is to be shown."""
        return not (_here.silent and record.name.partition(".")[0] == "torch")


_silent_thread = _SilentThread()


def _install_filters() -> None:
    # A filter's module pattern is any object with `match`; the entry stays, and matches nothing in other threads.
    entry: Any = ("ignore", None, Warning, _silent_thread, 0)
    if entry not in warnings.filters:
        warnings.filters.insert(0, entry)  # type: ignore[attr-defined]
        warnings._filters_mutated()  # type: ignore[attr-defined]
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith("torch")]
    handlers = [handler for logger in (logging.root, *loggers) for handler in logger.handlers]
    for handler in (*handlers, logging.lastResort):
        if handler is not None:
            handler.addFilter(_silent_thread)


def _stop_marked() -> None:
    """Raise `SystemExit` in the marked threads, and those left behind, until they have left PyTorch; a few seconds."""
    own = threading.get_ident()
    now = time.monotonic()
    deadline, sent = now + _EXIT_LIMIT_S, dict[int, float]()
    while (now := time.monotonic()) < deadline:
        with _lock:
            alive = {thread.ident for thread in threading.enumerate()}
            idents = [ident for ident in {*_marked, *(_left_behind & alive)} if ident != own]
        if not idents:
            return
        for ident in idents:
            if now - sent.get(ident, -_EXIT_REPEAT_S) >= _EXIT_REPEAT_S:
                sent[ident] = now
                raise_in(ident, SystemExit)
        time.sleep(0.005)


def _forget_threads() -> None:
    """A forked child has none of its parent's threads."""
    global _lock
    _lock = threading.Lock()
    with _lock:
        _marked.clear()
        _left_behind.clear()
        _release_generators()


os.register_at_fork(after_in_child=_forget_threads)
