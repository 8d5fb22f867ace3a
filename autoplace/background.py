"""A tuning that runs beside the user's program, on a copy of the model, while plain PyTorch serves.

The copy is made in the calling thread, at once: the user's training goes on and changes the model. A plan names modules
by path, so what was found for the copy holds for the model. Until the tuning ends, parameters and buffers are in memory
twice. Process-wide state is left alone → `autoplace.hands_off`.

What it does not know: what else the program computes meanwhile. Times and energy are those beside the program's own
work, which disturbs plain PyTorch and the plans alike, round by round, and shows in the noise; peak memory holds the
program's allocations too. Hooks of the model are copied with it, and fire in the tuning's threads.
"""

from __future__ import annotations

import copy
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from autoplace.errors import InputError, TuningCancelled
from autoplace.hands_off import hands_off
from autoplace.runtime.worker import TaskThread
from autoplace.workload import Workload

if TYPE_CHECKING:
    from autoplace.result import TuneResult
    from autoplace.tuner import Progress

__all__ = ["BackgroundTuning", "cancellable"]


class _Current(threading.local):
    cancelled: threading.Event | None = None


_current = _Current()


class BackgroundTuning:
    """Tune a copy of a workload in a thread of its own.

    It starts at once, in the caller's grad and autocast modes. The thread is a daemon: a program that ends meanwhile
    stops it and exits as it would have.

    Args:
        workload: Model and inputs; copied before this returns, and not touched after.
        tune: Runs in the thread, on the copy. Give `cancellable(...)` to the tuner as its progress.

    Raises:
        InputError: If the model or its inputs cannot be copied; tune in the foreground then.
    """

    def __init__(self, workload: Workload, tune: Callable[[Workload], TuneResult]) -> None:
        copied = copy_workload(workload)
        self._cancelled = threading.Event()
        self._start_s = time.perf_counter()
        self._end_s: float | None = None
        thread = TaskThread("autoplace tuning")
        self._future = thread.submit(partial(self._run, [copied], tune))
        thread.close()

    def _run(self, box: list[Workload], tune: Callable[[Workload], TuneResult]) -> TuneResult:
        _current.cancelled = self._cancelled
        workload = box.pop()  # so that nothing else holds the copy
        try:
            with hands_off():
                return tune(workload)
        except BaseException as error:
            del workload
            _let_go(error)
            raise
        finally:
            self._end_s = time.perf_counter()

    @property
    def done(self) -> bool:
        """Whether the tuning has ended, well or not."""
        return self._future.done()

    @property
    def seconds(self) -> float:
        """Wall seconds since the start; of an ended tuning, until its end."""
        return (self._end_s or time.perf_counter()) - self._start_s

    def result(self) -> TuneResult:
        """Wait for the end and return what was found, raising what the tuning raised.

        Raises:
            TuningCancelled: If it was cancelled first.
            Exception: Whatever `tune` raised.
        """
        found = self._future.result()
        # Our worker threads set the count that the process's later threads start with; the present one is the user's.
        torch.set_num_threads(torch.get_num_threads())
        return found

    def cancel(self) -> None:
        """Ask the tuning to end at its next report of progress; `result` then raises TuningCancelled."""
        self._cancelled.set()


def cancellable(progress: Progress | None = None) -> Progress:
    """Return a progress callback that ends the background tuning of the present thread once it is cancelled.

    Args:
        progress: Told first; None = nobody. Outside a background tuning this is all that happens.
    """
    cancelled = _current.cancelled

    def report(phase: str, done: int, total: int) -> None:
        if cancelled is not None and cancelled.is_set():
            raise TuningCancelled("the background tuning was cancelled; plain PyTorch, or the plan before, runs on")
        if progress is not None:
            progress(phase, done, total)

    return report


def copy_workload(workload: Workload) -> Workload:
    """Return a workload whose model, inputs and loss share nothing with the given one's.

    Gradients are not copied. Ties, modes and the values of everything else are as in the original.

    Raises:
        InputError: With the reason, if something cannot be copied.
    """
    memo: dict[int, Any] = {}

    def copy_leaf(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, torch.nn.Parameter):
            return leaf.detach().clone().requires_grad_(leaf.requires_grad)
        return copy.deepcopy(leaf, memo)

    try:
        with torch.inference_mode(False), torch.no_grad():
            model = copy.deepcopy(workload.model, memo)
            args, kwargs = pytree.tree_map(copy_leaf, (workload.args, dict(workload.kwargs)))
            loss = copy.deepcopy(workload.loss, memo)
    except Exception as error:
        raise InputError(
            f"{type(workload.model).__name__} cannot be tuned in the background, which needs a copy of it and its "
            f"inputs: {type(error).__name__}: {error}; tune in the foreground"
        ) from error
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.grad = None
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # the copies are made on the caller's streams and used on others
    return replace(workload, model=model, args=args, kwargs=kwargs, loss=loss)


def _let_go(error: BaseException | None) -> None:
    """Free what the frames of an exception hold, above all the copy of the model; its lines stay readable."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
