"""CUDA stream order between threads: one stream per GPU and thread, events at every hand-over.

Everything here does nothing until CUDA is initialised. CPU workers take part too, because they copy from and to GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

__all__ = ["Streams", "mark_events", "record_streams", "wait_events"]


def _indices() -> range:
    return range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)


def mark_events() -> list[torch.cuda.Event]:
    """Return one event per GPU behind all that the calling thread has queued on its current streams."""
    return [torch.cuda.current_stream(i).record_event() for i in _indices()]


def wait_events(events: Iterable[torch.cuda.Event]) -> None:
    """Let the calling thread's current streams wait for the events; the thread itself does not wait."""
    events = list(events)
    for i in _indices() if events else ():
        for event in events:
            torch.cuda.current_stream(i).wait_event(event)


def record_streams(values: Iterable[Any]) -> None:
    """Tell the caching allocator that the calling thread's current streams use these tensors.

    Without it, memory freed by its first owner could be handed out again while another stream still reads it.
    """
    if torch.cuda.is_initialized():
        for value in values:
            if isinstance(value, torch.Tensor) and value.is_cuda:
                value.record_stream(torch.cuda.current_stream(value.device))


class Streams:
    """The streams of one thread, one per GPU, made when first used."""

    def __init__(self) -> None:
        self._streams: dict[int, torch.cuda.Stream] = {}

    @contextmanager
    def current(self, device: torch.device | None = None) -> Iterator[None]:
        """Make them the current streams of the calling thread, and `device` its current GPU."""
        with ExitStack() as stack:
            for i in _indices():
                if i not in self._streams:
                    self._streams[i] = torch.cuda.Stream(torch.device("cuda", i))
                stack.enter_context(torch.cuda.stream(self._streams[i]))
            if device is not None and device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            yield
