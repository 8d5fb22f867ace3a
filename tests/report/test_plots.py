"""The pictures show what the result holds; nothing to show is None."""

import dataclasses
import sys

import numpy as np
import pytest

from autoplace.outcome import Outcome, Span
from autoplace.report import plots


def widths(axes):
    return [bar.get_width() for bar in axes.patches]


def test_points_are_predicted_and_measured(result):
    (axes,) = plots.predicted_against_measured(result).axes
    points = np.concatenate([c.get_offsets() for c in axes.collections])
    assert sorted(points[:, 1]) == [15.1, 15.9, 21.1]
    assert axes.get_xlim() == axes.get_ylim()


def test_bars_are_sorted_medians_with_quartiles(result):
    (axes,) = plots.latency_bars(result).axes
    assert widths(axes) == [15.1, 15.9, 21.1, 21.4]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["heft x4", "replicas 0.50/0.50", "single cpu:0", "plain"]
    kept = next(c for c in result.candidates if c.kept)
    low, high = axes.lines[0].get_xdata()
    assert (low, high) == pytest.approx(np.percentile(kept.measured.samples_ms, [25, 75]))


def test_energy_of_different_sources_gets_panels_of_its_own(result):
    first, second, *rest = result.candidates
    nvml = dataclasses.replace(second, measured=dataclasses.replace(second.measured, energy_source="nvml"))
    drawing = plots.energy_bars(dataclasses.replace(result, candidates=(first, nvml, *rest)))
    titles = [axes.get_title(loc="left") for axes in drawing.axes]
    assert len(titles) == 2
    assert any("nvml" in t for t in titles) and any("model" in t for t in titles)
    assert sorted(len(axes.patches) for axes in drawing.axes) == [1, 3]


def test_without_energy_there_is_no_energy_plot(result):
    def bare(outcome):
        return outcome and dataclasses.replace(outcome, energy_j=None, energy_source=None)

    candidates = [
        dataclasses.replace(c, measured=bare(c.measured), predicted=bare(c.predicted)) for c in result.candidates
    ]
    assert plots.energy_bars(dataclasses.replace(result, candidates=tuple(candidates))) is None


def test_the_timeline_has_a_row_per_device_and_link(result):
    (axes,) = plots.timeline_of_result(result).axes
    labels = [t.get_text().split("\n")[0] for t in axes.get_yticklabels()]
    assert labels == ["host0/cpu:0", "host0/cpu:1", "host0/cpu:0 -> host0/cpu:1"]
    assert "heft x4" in axes.get_title(loc="left")
    spans = sum(len(c.get_paths()) for c in axes.collections)
    assert spans == len(result.chosen.predicted.timeline)


def test_overlapping_spans_get_rows_of_their_own():
    spans = tuple(Span(resource="a -> b", label=f"t{i}", start_ms=0.0, end_ms=1.0) for i in range(3))
    (axes,) = plots.timeline(Outcome(source="simulated", timeline=spans)).axes
    assert len(axes.get_yticks()) == 3
    assert plots.timeline(Outcome(source="simulated")) is None


def test_nothing_measured_nothing_drawn(result):
    bare = tuple(dataclasses.replace(c, measured=None, predicted=None) for c in result.candidates)
    empty = dataclasses.replace(result, candidates=bare)
    for draw in (plots.latency_bars, plots.predicted_against_measured, plots.energy_bars, plots.timeline_of_result):
        assert draw(empty) is None


def test_many_candidates_stay_readable_and_keep_the_important_ones(result):
    slow = [
        dataclasses.replace(result.candidates[3], label=f"slow {i}",
                            measured=dataclasses.replace(result.candidates[3].measured, latency_ms=1.0 + i / 100))
        for i in range(60)
    ]  # fmt: skip
    (axes,) = plots.latency_bars(dataclasses.replace(result, candidates=(*result.candidates, *slow))).axes
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert len(names) == plots.MAX_BARS and {"plain", "heft x4"} <= set(names)


def test_dollar_signs_are_no_mathematics(result):
    first, *rest = result.candidates
    odd = dataclasses.replace(result, candidates=(dataclasses.replace(first, label=r"cost $\frac{1}{$"), *rest))
    plots.latency_bars(odd).canvas.draw()
    assert "matplotlib.pyplot" not in sys.modules
