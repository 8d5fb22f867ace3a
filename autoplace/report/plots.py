"""The report's pictures, each a matplotlib Figure of its own: no pyplot, no global state, no display needed.

Colours are Okabe and Ito's, which colour-blind people can tell apart; what a colour means is also said in words.
Every function returns None when there is nothing to draw. Figures of energy from different sources never share an axis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from autoplace.outcome import Outcome, Span
from autoplace.report.table import figure as number
from autoplace.report.table import is_reference, time_ms
from autoplace.report.trace import is_transfer, lanes
from autoplace.result import Candidate, TuneResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["energy_bars", "latency_bars", "predicted_against_measured", "timeline", "timeline_of_result"]

BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#E69F00", "#009E73", "#8A9099", "#22272E"
MAX_BARS = 24
"""Most bars of one plot; the slowest of the others are left out and counted in the title."""


def predicted_against_measured(result: TuneResult) -> Figure | None:
    """Draw predicted against measured time, one point per candidate that has both, with the line of equality."""
    goal = result.objective.goal
    points = []
    for candidate in result.candidates:
        predicted, measured = time_ms(candidate.forecast, goal), time_ms(candidate.measured, goal)
        if predicted is not None and measured is not None:
            points.append((candidate, predicted, measured))
    if not points:
        return None
    drawing, axes = _axes(6.0, 5.8)
    values = [v for _, p, m in points for v in (p, m)]
    low, high = 0.0, max(values) * 1.15
    axes.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle="--", zorder=1)
    axes.set_aspect("equal")
    axes.annotate(
        "predicted = measured", (high * 0.04, high * 0.04), ha="left", va="top", rotation=45,
        rotation_mode="anchor", color=GREY, fontsize=8, xytext=(3, -3), textcoords="offset points",
    )  # fmt: skip
    for candidate, predicted, measured in points:
        colour, marker, size = (GREEN, "D", 60) if candidate.kept else (BLUE, "o", 40)
        axes.scatter([predicted], [measured], color=colour, marker=marker, s=size, zorder=3, edgecolor="white")
    _label_points(axes, points, high)
    axes.set(xlim=(low, high), ylim=(low, high), xlabel="predicted by the simulator, ms", ylabel="measured, ms")
    error = float(np.median([abs(p - m) / m for _, p, m in points]))
    _title(axes, "Predicted against measured time per pass", f"median error {error:.0%} of the measured time")
    return drawing


def latency_bars(result: TuneResult) -> Figure | None:
    """Draw the measured time of every candidate, with the quartiles of its repeats."""
    goal = result.objective.goal
    rows = [(c, value) for c in result.candidates if (value := time_ms(c.measured, goal)) is not None]
    if not rows:
        return None
    rows.sort(key=lambda row: row[1])
    rows, left_out = _limit(rows)
    drawing, axes = _axes(8.0, 1.5 + 0.36 * len(rows))
    colours = [_colour(candidate) for candidate, _ in rows]
    values = [value for _, value in rows]
    axes.barh(range(len(rows)), values, color=colours, height=0.66, zorder=2)
    ends = []
    for row, (candidate, value) in enumerate(rows):
        low, high = _quartiles(candidate.measured, value)
        axes.plot([low, high], [row, row], color=INK, linewidth=1.4, marker="|", markersize=7, zorder=3)
        ends.append(max(high, value))
        axes.annotate(
            number(value), (ends[-1], row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5
        )
    plain = next((value for c, value in rows if is_reference(c)), None)
    if plain is not None:
        axes.axvline(plain, color=GREY, linewidth=1, linestyle="--", zorder=1)
    _bar_axis(axes, [_text(c.label) for c, _ in rows], max(ends), "measured time per pass, ms (less is better)")
    _title(axes, "Measured time per pass", _legend_words(rows) + "line: middle half of the repeats" + left_out)
    return drawing


def energy_bars(result: TuneResult) -> Figure | None:
    """Draw the energy of a pass, measured where there is a figure, else predicted; one panel per source."""
    panels = _energy_panels(result)
    if not panels:
        return None
    rows = max(len(entries) for _, entries in panels)
    drawing = _figure(8.0, (1.5 + 0.36 * rows) * len(panels))
    for axes, (source, entries) in zip(np.atleast_1d(drawing.subplots(len(panels), 1)), panels, strict=True):
        entries.sort(key=lambda entry: entry[1])
        entries, left_out = _limit(entries)
        values = [value for _, value in entries]
        axes.barh(range(len(entries)), values, color=[_colour(c) for c, _ in entries], height=0.66, zorder=2)
        for row, value in enumerate(values):
            axes.annotate(
                number(value), (value, row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5
            )
        _bar_axis(axes, [_text(c.label) for c, _ in entries], max(values), "energy of a pass, J (less is better)")
        _title(axes, f"Energy of a pass, source: {source}", _legend_words(entries).rstrip("; ") + left_out)
    return drawing


def timeline_of_result(result: TuneResult) -> Figure | None:
    """Draw the predicted timeline of the chosen plan; of the best predicted plan where the chosen one has none."""
    goal = result.objective.goal
    drawn = [c for c in result.candidates if c.predicted is not None and c.predicted.timeline]
    if not drawn:
        return None
    best = min(drawn, key=lambda c: (not c.kept, time_ms(c.predicted, goal) or float("inf")))
    which = "the chosen plan" if best.kept else "the best predicted plan (plain PyTorch was kept)"
    assert best.predicted is not None
    return timeline(best.predicted, title=f"Predicted timeline of {which}, {best.label}")


def timeline(outcome: Outcome, *, title: str = "Timeline of one pass") -> Figure | None:
    """Draw what every device and link does when, from an outcome's spans.

    Args:
        outcome: With a timeline.
        title: Above the picture.

    Returns:
        The figure, None when the outcome has no timeline.
    """
    if not outcome.timeline:
        return None
    rows = [(r, lane) for r, own in lanes(outcome.timeline).items() for lane in own]
    drawing, axes = _axes(10.0, 1.7 + 0.5 * len(rows))
    first_start: dict[str, float] = {}
    for span in sorted(outcome.timeline, key=lambda s: s.start_ms):
        if not is_transfer(span.resource):
            first_start.setdefault(span.label, span.start_ms)
    order = {label: index for index, label in enumerate(first_start)}
    end = max(span.end_ms for span in outcome.timeline)
    for row, (resource, lane) in enumerate(rows):
        _draw_lane(axes, row, resource, lane, order, end)
    busy = {r: sum(s.end_ms - s.start_ms for lane in own for s in lane) for r, own in lanes(outcome.timeline).items()}
    names = [f"{_text(r)}\n{min(busy[r] / end, 1.0):.0%} busy" if end else _text(r) for r, _ in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(0, end * 1.01 or 1), xlabel="ms since the start of the pass")
    axes.grid(axis="y", visible=False)
    _title(
        axes, title, f"{outcome.source}; colour: from the model's first ops (dark) to its last (light); grey: transfers"
    )
    return drawing


def _draw_lane(axes: Axes, row: int, resource: str, lane: list[Span], order: dict[str, int], end: float) -> None:
    from matplotlib import colormaps

    spans = [(s.start_ms, s.end_ms - s.start_ms) for s in lane]
    if is_transfer(resource):
        axes.broken_barh(spans, (row - 0.2, 0.4), color=GREY, linewidth=0, zorder=2)
        return
    palette = colormaps["viridis"]
    shades = [palette(0.08 + 0.84 * order[s.label] / max(len(order) - 1, 1)) for s in lane]
    edge = 0.6 if len(lane) <= 80 else 0.0
    axes.broken_barh(spans, (row - 0.36, 0.72), facecolors=shades, edgecolor="white", linewidth=edge, zorder=2)
    for span, shade in zip(lane, shades, strict=True):
        width = (span.end_ms - span.start_ms) / end if end else 0.0
        text = span.label.rsplit(".", 1)[-1] if len(span.label) * 0.0105 > width else span.label
        if len(text) * 0.0105 <= width:  # a character takes about a hundredth of the axis
            brightness = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2]
            axes.text(
                (span.start_ms + span.end_ms) / 2, row, _text(text), ha="center", va="center", fontsize=7,
                color="white" if brightness < 0.55 else INK, clip_on=True,
            )  # fmt: skip


def _energy_panels(result: TuneResult) -> list[tuple[str, list[tuple[Candidate, float]]]]:
    """Return (source, [(candidate, J)]): measured figures by source, or the predicted ones where none was measured."""
    for attribute, kind in (("measured", "measured"), ("predicted", "predicted")):
        panels: dict[str, list[tuple[Candidate, float]]] = {}
        for candidate in result.candidates:
            outcome: Outcome | None = getattr(candidate, attribute)
            if outcome is not None and outcome.feasible and outcome.energy_j is not None:
                words = f"{outcome.energy_source or 'unknown'} ({kind} run)"
                panels.setdefault(words, []).append((candidate, outcome.energy_j))
        if panels:
            return list(panels.items())
    return []


def _quartiles(outcome: Outcome | None, median: float) -> tuple[float, float]:
    """Return the quartiles of the repeats, ms; the median twice where there are no repeats of that very figure."""
    if outcome is None or len(outcome.samples_ms) < 2:
        return median, median
    low, high = np.percentile(outcome.samples_ms, [25, 75])
    return (float(low), float(high)) if low <= median <= high else (median, median)


def _label_points(axes: Axes, points: list[tuple[Candidate, float, float]], span: float) -> None:
    """Name each point; points that lie close together share their labels' space by stepping down."""
    from matplotlib.patheffects import withStroke

    placed: list[tuple[float, float]] = []
    for candidate, predicted, measured in sorted(points, key=lambda point: -point[2]):
        height = measured
        while any(abs(height - y) < span * 0.042 and abs(predicted - x) < span * 0.45 for x, y in placed):
            height -= span * 0.042
        placed.append((predicted, height))
        right = predicted > span * 0.62
        axes.annotate(
            _text(candidate.label), (predicted, measured),
            xytext=(predicted + span * (-0.025 if right else 0.025), height),
            ha="right" if right else "left", va="center", fontsize=8, color=INK, zorder=4,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip


def _legend_words(rows: list[tuple[Candidate, float]]) -> str:
    kept = any(c.kept and not is_reference(c) for c, _ in rows)
    plain = any(is_reference(c) for c, _ in rows)
    return ("green: kept; " if kept else "") + ("orange: plain PyTorch; " if plain else "")


def _colour(candidate: Candidate) -> str:
    if is_reference(candidate):
        return ORANGE
    return GREEN if candidate.kept else BLUE


def _limit(rows: list[tuple[Candidate, float]]) -> tuple[list[tuple[Candidate, float]], str]:
    """Keep the best rows, and plain PyTorch and the kept plan wherever they stand."""
    if len(rows) <= MAX_BARS:
        return rows, ""
    kept = [row for i, row in enumerate(rows) if i < MAX_BARS - 2 or row[0].kept or is_reference(row[0])]
    return kept, f"; {len(rows) - len(kept)} slower ones not shown"


def _bar_axis(axes: Axes, names: list[str], largest: float, label: str) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, largest * 1.12 or 1), xlabel=label)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _figure(width_inches: float, height_inches: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width_inches, height_inches), layout="constrained", facecolor="white")
    FigureCanvasAgg(drawing)
    return drawing


def _axes(width_inches: float, height_inches: float) -> tuple[Figure, Any]:
    drawing = _figure(width_inches, height_inches)
    return drawing, drawing.subplots()


def _title(axes: Axes, title: str, below: str) -> None:
    axes.set_title(_text(title, 100), loc="left", fontsize=11, fontweight="bold", color=INK, pad=17)
    axes.text(
        0, 1.0, _text(below, 200), transform=axes.transAxes, fontsize=8.5, color="#57606A", va="bottom", ha="left"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#E6E8EB", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, colors=INK)


def _text(words: str, limit: int = 44) -> str:
    """Return a name as matplotlib shall draw it: a dollar sign is a dollar sign, a long name is cut in the middle."""
    short = words if len(words) <= limit else f"{words[: limit // 2]}…{words[-(limit // 2 - 1) :]}"
    return short.replace("$", r"\$")
