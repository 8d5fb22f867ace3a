"""The report: one HTML file that needs nothing beside it, and the plots as PNG files for slides.

Everything that comes from outside (names, reasons, notes) is escaped; pictures are embedded as images, so that nothing
in them can run; no script, no font and no style is fetched from anywhere.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from autoplace.errors import InputError
from autoplace.files import write_bytes_atomically, write_text_atomically
from autoplace.report._style import STYLE
from autoplace.report.table import (
    COLUMNS,
    MOST_ROWS,
    candidate_rows,
    describe_plan,
    figure,
    is_reference,
    left_out,
    time_ms,
)
from autoplace.result import Candidate, TuneResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_report"]

CAPTIONS = {
    "latency": "Medians of interleaved real runs on the devices.",
    "predicted_vs_measured": "How well the simulator foretold the real runs: each plan as predicted before it ran.",
    "energy": "Figures of different sources are never compared.",
    "timeline": "What the simulator expects every device to do during one pass.",
    "timeline_measured": "What the devices did during one measured pass.",
}
RUNGS = {
    "export": "the whole graph, by torch.export",
    "dispatch": "the ops that a run of the model dispatched, under their modules",
    "module": "the model's modules, each as one op",
}


def write_report(result: TuneResult, directory: str | Path) -> Path:
    """Write `report.html` and its plots as PNG files.

    Args:
        result: What a tuning found.
        directory: Folder, created at need.

    Returns:
        Path of `report.html`.

    Raises:
        InputError: If the folder cannot be written.
    """
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = []
        for name, drawing in _drawings(result):
            write_bytes_atomically(folder / f"{name}.png", _render(drawing, "png"))
            pictures.append((name, _render(drawing, "svg")))
        path = folder / "report.html"
        write_text_atomically(path, _page(result, pictures))
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error}; choose another folder for the report") from None
    return path


def _drawings(result: TuneResult) -> list[tuple[str, Figure]]:
    from autoplace.report import plots

    measured = result.chosen.measured
    found = [
        ("latency", plots.latency_bars(result)),
        ("predicted_vs_measured", plots.predicted_against_measured(result)),
        ("energy", plots.energy_bars(result)),
        ("timeline", plots.timeline_of_result(result)),
        (
            "timeline_measured",
            plots.timeline(measured, title=f"Measured timeline of {result.chosen.label}") if measured else None,
        ),
    ]
    return [(name, drawing) for name, drawing in found if drawing is not None]


def _render(drawing: Figure, kind: str) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "autoplace"}):  # the same result gives the same file
        drawing.savefig(buffer, format=kind, dpi=144, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _page(result: TuneResult, pictures: Sequence[tuple[str, bytes]]) -> str:
    title = f"{result.model_name}, {result.mode}"
    notes = "".join(f"<li>{escape(note)}</li>" for note in result.notes)
    parts = [
        f"<header><p class='brand'>autoplace report</p><h1>{escape(title)}</h1>",
        f"<p class='lead'>{escape(_headline(result))}</p></header>",
        _cards(result),
        _section("Candidates", _candidates(result)),
        _section("Plots", "".join(_picture(name, svg) for name, svg in pictures)),
        _section("Notes", f"<ul>{notes}</ul>") if notes else "",
        _section("How this was found", _facts(result)),
        _section("Devices", _devices(result)),
        _section("The chosen plan", _plan(result.chosen)),
        _section("Environment", _definitions(result.environment.items())) if result.environment else "",
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:; "
        "style-src 'unsafe-inline'\">"
        f"<title>autoplace: {escape(title)}</title><style>{STYLE}</style></head><body><main>"
        + "\n".join(part for part in parts if part)
        + "</main></body></html>\n"
    )


def _headline(result: TuneResult) -> str:
    chosen = result.chosen
    if is_reference(chosen):
        return (
            "Plain PyTorch was kept: no candidate was better by more than the measured noise "
            f"of ±{result.noise:.1%} and passed every check."
        )
    text = f"Kept {chosen.label}"
    if chosen.speedup is not None:
        text += f": {chosen.speedup:.2f} times as fast as plain PyTorch"
        if chosen.speedup_interval is not None:
            text += " (middle half of the pairs: {:.2f} to {:.2f})".format(*chosen.speedup_interval)
    return text + "."


def _cards(result: TuneResult) -> str:
    goal, plain, chosen = result.objective.goal, result.baseline, result.chosen
    unit = "time per pass" if goal == "latency" else "steady-state time per pass"
    cards = [(unit, _change(time_ms(plain.measured, goal), time_ms(chosen.measured, goal)), "ms, plain → chosen")]
    rates = [o.throughput_sps if (o := c.measured) is not None and o.feasible else None for c in (plain, chosen)]
    cards.append(("throughput", _change(*rates), "samples/s, plain → chosen"))
    cards.append(_energy_card(plain, chosen))
    cards.append(("noise", f"±{result.noise:.1%}", "plain against plain, in the same run"))
    cells = "".join(
        f"<div class='card'><p>{escape(label)}</p><strong>{escape(value)}</strong><small>{escape(unit)}</small></div>"
        for label, value, unit in cards
    )
    return f"<div class='cards'>{cells}</div>"


def _energy_card(plain: Candidate, chosen: Candidate) -> tuple[str, str, str]:
    before, after = plain.measured, chosen.measured
    if after is None or after.energy_j is None:
        return ("energy of a pass", "no figure", "no device states a source")
    if before is not None and before.energy_j is not None and before.energy_source == after.energy_source:
        return (
            "energy of a pass",
            _change(before.energy_j, after.energy_j),
            f"J ({after.energy_source}), plain → chosen",
        )
    return ("energy of a pass", figure(after.energy_j), f"J ({after.energy_source}), chosen plan")


def _change(before: float | None, after: float | None) -> str:
    return f"{figure(before)} → {figure(after)}" if before != after else figure(after)


def _candidates(result: TuneResult) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    body = []
    for row in candidate_rows(result, MOST_ROWS):
        mark = " class='kept'" if row.kept else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row.cells)
        body.append(f"<tr{mark}>{cells}</tr>")
    checked = [(c.label, c.check) for c in result.candidates if c.check]
    checks = (
        f"<details><summary>Checks against plain PyTorch</summary>{_definitions(checked)}</details>" if checked else ""
    )
    caption = (
        "<p class='caption'>Speed-up over plain PyTorch: median of the pairwise ratios of an interleaved run, with "
        f"their quartiles. Energy names its source.{left_out(result)}</p>"
    )
    return (
        f"<div class='scroll'><table class='candidates'><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>{caption}{checks}"
    )


def _picture(name: str, svg: bytes) -> str:
    data = base64.b64encode(svg).decode("ascii")
    words = name.replace("_", " ")
    return (
        f"<figure><img alt='{escape(words)}' src='data:image/svg+xml;base64,{data}'>"
        f"<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>"
    )


def _facts(result: TuneResult) -> str:
    captured = (
        f"{RUNGS.get(result.capture_rung, result.capture_rung)}: {result.num_ops} ops in {result.num_groups} groups"
    )
    labels = ", ".join(f"{count:,} {label}" for label, count in result.cost_labels.items())
    weight = result.objective.energy_weight
    goal = f"{result.objective.goal}, " + (f"energy weight {weight:g}" if weight else "energy not counted")
    facts = [("captured", captured)]
    if result.capture_reason:
        facts.append(("why not higher", result.capture_reason))
    facts += [("batch size", str(result.batch_size)), ("goal", goal)]
    if labels:
        facts.append(("latencies of groups on devices", labels))
    facts += [(f"seconds for {phase}", f"{seconds:.1f}") for phase, seconds in result.seconds.items()]
    return _definitions(facts)


def _devices(result: TuneResult) -> str:
    head = "".join(
        f"<th>{word}</th>"
        for word in ("device", "kind", "model", "cores", "memory", "idle / busy W", "source of watts")
    )
    rows = []
    for device in result.cluster.devices:
        memory = f"{device.memory_bytes / 2**30:.1f} GiB" if math.isfinite(device.memory_bytes) else "unlimited"
        cells = (
            device.name,
            device.kind,
            device.model or "–",
            ", ".join(str(core) for core in device.cores) or "–",
            memory,
            f"{figure(device.idle_watts)} / {figure(device.busy_watts)}",
            device.watts_source or "–",
        )
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _plan(candidate: Candidate) -> str:
    plan = candidate.plan
    parts = [f"<p>{escape(candidate.label)}: {escape(describe_plan(plan))}.</p>"]
    for index, replica in enumerate(plan.replicas):
        rows = "".join(
            f"<tr><td>{escape(op or '(root)')}</td><td>{escape(device)}</td></tr>"
            for op, device in replica.assignment.items()
        )
        label = (
            f"Replica {index + 1}, {replica.share:.0%} of the batch"
            if len(plan.replicas) > 1
            else "Where each group runs"
        )
        parts.append(
            f"<details><summary>{escape(label)} ({len(replica.assignment)} groups)</summary><div class='scroll'><table>"
            f"<thead><tr><th>group</th><th>device</th></tr></thead><tbody>{rows}</tbody></table></div></details>"
        )
    return "".join(parts)


def _definitions(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in pairs)
    return f"<dl>{rows}</dl>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""
