"""How a tuning shows on a terminal: one status line that erases itself, or one bar per phase.

Both are told phase, steps done and steps in all → `autoplace.tuner.Progress`; a phase starts with (0, 1) and ends with
(1, 1).
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from autoplace.hands_off import is_hands_off

if TYPE_CHECKING:
    from rich.console import Console

    from autoplace.tuner import Progress

__all__ = ["StatusLine", "progress_bars", "terminal_progress"]

_REDRAW_S = 0.1
"""The line is drawn no more often than this: drawing takes time from what is measured."""


class StatusLine:
    """One line that says what a tuning is doing; empty between phases and at the end.

    Args:
        stream: A terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._start_s = time.perf_counter()
        self._drawn_s = float("-inf")
        self._phase = ""
        self._length = 0

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show a phase, or erase it at its end."""
        if done >= total == 1:
            self.close()
            return
        now = time.perf_counter()
        if phase == self._phase and now - self._drawn_s < _REDRAW_S:
            return
        self._phase, self._drawn_s = phase, now
        steps = f" {done}/{total}" if total > 1 else ""
        self._write(f"autoplace tunes this model: {phase}{steps} ({now - self._start_s:.0f} s)")

    def close(self) -> None:
        """Erase the line."""
        self._phase = ""
        self._write("")

    def __del__(self) -> None:
        """Erase what a tuning that failed has left."""
        if self._length:
            self._write("")

    def _write(self, text: str) -> None:
        text = text[: shutil.get_terminal_size().columns - 1]
        erased = "\r" + " " * self._length + "\r" if self._length else ""
        self._length = len(text)
        try:
            self._stream.write(erased + text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal has gone
            self._length = 0


def terminal_progress(stream: TextIO | None = None) -> Progress | None:
    """Return a status line for a tuning, or None where there is nobody to see it.

    Args:
        stream: Where to draw; None = standard error. It must be a terminal that can return to the start of a line.

    Returns:
        None too in a background tuning, whose line would be drawn between those of the user's program.
    """
    stream = sys.stderr if stream is None else stream
    try:
        seen = stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return None
    return StatusLine(stream) if seen and not is_hands_off() else None


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """Show one bar per phase; yields the callback that `tuner.tune` takes."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, int] = {}

        def update(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            task = bars.tasks[tasks[phase]]
            bars.update(
                task.id,
                completed=max(done, task.total or 0) if done == total == 1 else done,
                total=max(total, int(task.total or 0)),
            )

        yield update
