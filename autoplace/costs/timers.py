"""Time marks on a device: `perf_counter` on a CPU, events on a CUDA stream. Knows nothing of models."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["Timer", "differences_ms"]


class Timer:
    """Takes marks in the order of execution and turns them into milliseconds.

    Args:
        device: Where the work runs; on CUDA, marks are events on the current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device

    def mark(self) -> Any:
        """Take a mark."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def finish(self) -> None:
        """Wait until everything before has run."""
        if self.cuda:
            torch.cuda.synchronize(self.device)


def differences_ms(marks: Sequence[Any]) -> list[float]:
    """Return the milliseconds between each mark and the next; CUDA events must have happened."""
    pairs = itertools.pairwise(marks)
    if marks and isinstance(marks[0], float):
        return [(end - start) * 1e3 for start, end in pairs]
    return [float(start.elapsed_time(end)) for start, end in pairs]
