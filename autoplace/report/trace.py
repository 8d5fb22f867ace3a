"""An Outcome's timeline as a Chrome trace, which ui.perfetto.dev and chrome://tracing open.

Format: "Trace Event Format", complete events (`ph: X`) with times in microseconds. Devices are threads of one process,
links of another; spans that overlap on one resource, which that format cannot nest, get lanes of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from autoplace.errors import InputError
from autoplace.files import write_text_atomically
from autoplace.outcome import Outcome, Span

__all__ = ["is_transfer", "lanes", "write_trace"]

DEVICES, LINKS = 1, 2
"""Process ids in the trace."""


def write_trace(outcome: Outcome, path: str | Path) -> Path:
    """Write the outcome's timeline as a Chrome/Perfetto trace.

    Args:
        outcome: With a timeline.
        path: File to write; nothing half-written is ever left.

    Returns:
        The path.

    Raises:
        InputError: If the outcome has no timeline, or the file cannot be written.
    """
    if not outcome.timeline:
        raise InputError("this outcome has no timeline; evaluate the plan with timelines on, then write the trace")
    data = {
        "traceEvents": [*_names(outcome.timeline), *_events(outcome.timeline)],
        "displayTimeUnit": "ms",
        "otherData": {"source": outcome.source, "latency_ms": outcome.to_json()["latency_ms"]},
    }
    try:
        write_text_atomically(path, json.dumps(data, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}; choose another place") from None
    return Path(path)


def is_transfer(resource: str) -> bool:
    """Return whether a span's resource is a link and not a device."""
    return " -> " in resource


def lanes(spans: Iterable[Span]) -> dict[str, list[list[Span]]]:
    """Return resource to lanes of spans that do not overlap, each in order of time; devices first, then links.

    A span starts a new lane only where all lanes of its resource are busy. Resources keep the order of their first
    span within devices and within links.
    """
    found: dict[str, list[list[Span]]] = {}
    for span in sorted(spans, key=lambda s: (s.start_ms, s.end_ms)):
        own = found.setdefault(span.resource, [])
        # A millionth of a millisecond absorbs rounding where one span ends as the next begins.
        free = next((lane for lane in own if lane[-1].end_ms <= span.start_ms + 1e-6), None)
        if free is None:
            own.append([span])
        else:
            free.append(span)
    return dict(sorted(found.items(), key=lambda item: is_transfer(item[0])))


def _names(spans: Sequence[Span]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
        for pid, name in ((DEVICES, "devices"), (LINKS, "transfers"))
    ]
    for resource, pid, tid, lane in _threads(spans):
        name = resource if lane == 0 else f"{resource} (lane {lane + 1})"
        events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}})
        events.append({"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}})
    return events


def _events(spans: Sequence[Span]) -> list[dict[str, Any]]:
    by_lane = lanes(spans)
    return [
        {
            "ph": "X",
            "name": span.label,
            "cat": "transfer" if pid == LINKS else "compute",
            "pid": pid,
            "tid": tid,
            "ts": span.start_ms * 1e3,
            "dur": (span.end_ms - span.start_ms) * 1e3,
        }
        for resource, pid, tid, lane in _threads(spans)
        for span in by_lane[resource][lane]
    ]


def _threads(spans: Sequence[Span]) -> list[tuple[str, int, int, int]]:
    """Return (resource, process id, thread id, lane) for every lane."""
    pairs = [(resource, lane) for resource, own in lanes(spans).items() for lane in range(len(own))]
    return [
        (resource, LINKS if is_transfer(resource) else DEVICES, tid, lane)
        for tid, (resource, lane) in enumerate(pairs, start=1)
    ]
