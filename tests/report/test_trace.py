"""The trace is what Perfetto reads: valid JSON, microseconds, no overlap within a thread."""

import itertools
import json
from collections import defaultdict

import pytest

from autoplace.errors import InputError
from autoplace.outcome import Outcome, Span
from autoplace.report.trace import lanes, write_trace


def test_every_span_is_an_event_in_microseconds(result, tmp_path):
    outcome = result.chosen.predicted
    data = json.loads(write_trace(outcome, tmp_path / "trace.json").read_text())
    events = [e for e in data["traceEvents"] if e["ph"] == "X"]
    assert len(events) == len(outcome.timeline)
    assert max(e["ts"] + e["dur"] for e in events) == pytest.approx(outcome.latency_ms * 1000)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in data["traceEvents"] if e["name"] == "thread_name"}
    assert set(names.values()) == {"host0/cpu:0", "host0/cpu:1", "host0/cpu:0 -> host0/cpu:1"}
    first = min(events, key=lambda e: e["ts"])
    assert (names[first["pid"], first["tid"]], first["name"], first["cat"]) == ("host0/cpu:0", "embeddings", "compute")


def test_overlapping_spans_are_on_threads_of_their_own(tmp_path):
    spans = tuple(Span(resource="d", label=str(i), start_ms=i * 0.5, end_ms=i * 0.5 + 1) for i in range(6))
    data = json.loads(write_trace(Outcome(source="measured", timeline=spans), tmp_path / "t.json").read_text())
    by_thread = defaultdict(list)
    for event in data["traceEvents"]:
        if event["ph"] == "X":
            by_thread[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(by_thread) == 2
    for own in by_thread.values():
        own.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(own))


def test_lanes_list_devices_before_links():
    spans = [Span(resource=r, label="x", start_ms=0, end_ms=1) for r in ("a -> b", "b", "a")]
    assert list(lanes(spans)) == ["b", "a", "a -> b"]


def test_without_a_timeline_there_is_no_trace(tmp_path):
    with pytest.raises(InputError, match="no timeline"):
        write_trace(Outcome(source="measured"), tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == []
