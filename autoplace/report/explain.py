"""What runs where, and why, as plain text: what the wrapper's `explain` prints.

It says what the plan, the tuning and the kept facts hold, and leaves out what they don't; it measures nothing.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from autoplace.graph.coarsen import group_modules
from autoplace.hardware.cluster import Cluster
from autoplace.plan import Plan
from autoplace.report.places import module_ranges, paths_on
from autoplace.report.table import candidate_rows, describe_plan, figure
from autoplace.result import Candidate, TuneResult

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["explain_plan"]

_MOST_ALTERNATIVES = 5
_MOST_PATHS = 12
"""Module paths in one cell; a plan that jumps between devices has hundreds."""
_ENGINES = {
    "threads": "threads of this process",
    "processes": "processes that share the parameters' memory",
    "graph": "stages cut from the exported graph",
}


def explain_plan(
    model: torch.nn.Module,
    plan: Plan,
    *,
    cluster: Cluster,
    result: TuneResult | None = None,
    facts: Mapping[str, Any] | None = None,
    mode: str,
    width: int = 100,
) -> str:
    """Return a readable text: what is run, on which device, and why.

    Args:
        model: The wrapped model; its parameters are counted.
        plan: What runs now.
        cluster: The devices that the plan names.
        result: The tuning that found it, if it was tuned in this process.
        facts: What else is known, as → `autoplace.plan_cache.facts_of` gives it; also `origin`, where the plan came
            from, in words. Figures of `result` come first.
        mode: `training` or `inference`.
        width: Columns of the text.
    """
    facts = facts or {}
    row = _candidate(plan, result)
    lines: list[RenderableType] = [_headline(model, plan, row, result, facts, mode), ""]
    if not plan.is_plain:
        lines += [_how(plan), ""]
    lines += [_device_table(model, plan, cluster, row), ""]
    if result is not None and (table := _alternatives(result, row)) is not None:
        lines += [table, ""]
    lines += list(_reasons(row, result, facts))
    return as_text(lines, width)


def _candidate(plan: Plan, result: TuneResult | None) -> Candidate | None:
    """Return the tuning's row for the plan that runs, which need not be the one that it kept."""
    if result is None:
        return None
    rows = [c for c in result.candidates if c.plan == plan]
    return next((c for c in rows if c.kept), rows[0] if rows else None)


def _headline(
    model: torch.nn.Module,
    plan: Plan,
    row: Candidate | None,
    result: TuneResult | None,
    facts: Mapping[str, Any],
    mode: str,
) -> str:
    name = result.model_name if result is not None else facts.get("model", type(model).__name__)
    batch = result.batch_size if result is not None else facts.get("batch_size")
    subject = f"{name}, {mode}" + (f", batch {batch}" if batch is not None else "")
    noise = result.noise if result is not None else facts.get("noise")
    sound = "" if noise is None else f"A/A noise {noise:.1%}"
    if plan == Plan.plain().with_(strategy=plan.strategy):
        return f"{subject}: plain PyTorch{_why_plain(row, sound, facts, result)}."
    what = "plain torch.compile" if plan == Plan.plain().with_(strategy=plan.strategy, compiled=True) else None
    parts = [what or describe_plan(plan)]
    speedup = row.speedup if row is not None else facts.get("speedup") if result is None else None
    interval = row.speedup_interval if row is not None else facts.get("interval") if result is None else None
    if speedup is not None:
        parts.append(f"{speedup:.2f}x plain PyTorch" + ("" if not interval else " ({:.2f}-{:.2f})".format(*interval)))
        parts += [sound] if sound else []
    return f"{subject}: {', '.join(parts)}."


def _why_plain(row: Candidate | None, sound: str, facts: Mapping[str, Any], result: TuneResult | None) -> str:
    if (row is not None and row.kept) or (result is None and facts.get("kept") == "plain"):
        return ": nothing beat it beyond the noise" + (f" ({sound})" if sound else "")
    return f"; the tuning had kept {result.chosen.label}" if result is not None else ""


def _compiled(plan: Plan) -> str:
    return ("compiled" + ", kernels called from C++" * plan.cpp_wrapper) if plan.compiled else "not compiled"


def _how(plan: Plan) -> str:
    """Return the knobs that all devices share."""
    knobs = [f"run by {_ENGINES[plan.engine]}", _compiled(plan), plan.precision]
    if plan.channels_last:
        knobs.append("images channels last")
    if plan.microbatches > 1:
        knobs.append(f"{plan.microbatches} microbatches")
    return f"How: {', '.join(knobs)}; proposed by {plan.strategy}."


def _device_table(model: torch.nn.Module, plan: Plan, cluster: Cluster, row: Candidate | None) -> RenderableType:
    """One row per device and replica; columns about which nothing is known are left out."""
    columns = ("device", "modules", "share of batch", "threads", "parameters MB", "busy ms, predicted", "measured")
    rows = list(_plain_rows(model) if plan.is_plain else _placed_rows(model, plan, cluster, row))
    known = [i for i in range(len(columns)) if i < 2 or any(cells[i] for cells in rows)]
    return _table([columns[i] for i in known], [[cells[i] for i in known] for cells in rows], wide=1)


def _plain_rows(model: torch.nn.Module) -> Iterator[tuple[str, ...]]:
    devices = dict.fromkeys(str(p.device) for p in model.parameters())
    for device in devices or {"cpu": None}:
        modules = "the whole model" if len(devices) < 2 else "those whose parameters are here"
        threads = str(torch.get_num_threads()) if device == "cpu" else ""
        own = [p for p in model.parameters() if str(p.device) == device]
        yield device, modules, "", threads, _megabytes(own), "", ""


def _placed_rows(
    model: torch.nn.Module, plan: Plan, cluster: Cluster, row: Candidate | None
) -> Iterator[tuple[str, ...]]:
    outcomes = [row.predicted if row else None, row.measured if row else None]
    for replica in plan.replicas:
        share = f"{replica.share:.0%}" if len(plan.replicas) > 1 else ""
        for device in replica.devices:
            paths = paths_on(device, replica.assignment)
            busy = ["" if o is None or not o.feasible else _known(o.busy_ms.get(device)) for o in outcomes]
            yield (
                device,
                "the whole model" if paths == [""] else _capped(module_ranges(paths)),
                share,
                _threads(device, plan, cluster),
                _megabytes(_parameters(model, paths)),
                *busy,
            )


def _threads(device: str, plan: Plan, cluster: Cluster) -> str:
    if device in plan.threads:
        return str(plan.threads[device])
    index = cluster.index.get(device)
    return "" if index is None else str(len(cluster.devices[index].cores) or "")


def _capped(texts: Sequence[str]) -> str:
    more = len(texts) - _MOST_PATHS
    return ", ".join(texts[:_MOST_PATHS]) + (f" and {more} more" if more > 0 else "")


def _parameters(model: torch.nn.Module, paths: Sequence[str]) -> list[torch.nn.Parameter] | None:
    """Return the parameters of modules, each once; None when the model lacks one of them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[int, torch.nn.Parameter] = {}
    for path in paths:
        for part in group_modules(path):
            if part not in modules:
                return None
            found.update((id(p), p) for p in modules[part].parameters())
    return list(found.values())


def _megabytes(parameters: Sequence[torch.nn.Parameter] | None) -> str:
    if parameters is None:
        return ""
    return figure(sum(p.numel() * p.element_size() for p in parameters) / 1e6)


def _known(value: float | None) -> str:
    return "" if value is None else figure(value)


def _alternatives(result: TuneResult, row: Candidate | None) -> RenderableType | None:
    """Return the best of the other candidates with their verdicts, plain PyTorch first; None when there are none."""
    skipped = row.label if row is not None else None
    others = [r for r in candidate_rows(result) if r.label != skipped][:_MOST_ALTERNATIVES]
    if not others:
        return None
    cells = [[r.label, r.placement, r.measured_ms, r.speedup, r.verdict] for r in others]
    return _table(["instead of", "placement", "measured ms", "speed-up", "why not"], cells, wide=4)


def _reasons(row: Candidate | None, result: TuneResult | None, facts: Mapping[str, Any]) -> Iterator[str]:
    if row is not None and row.check and not row.plan.is_plain:
        yield f"Checked against plain PyTorch: {row.check}."
    if result is not None:
        yield f"Captured by {result.capture_rung}: {result.num_ops} ops in {result.num_groups} groups."
        if result.capture_reason:
            yield f"Not captured higher because: {result.capture_reason}"
        yield from _energy(row, result)
    elif rung := facts.get("capture_rung"):
        yield f"Captured by {rung}." + (
            f" Not higher because: {facts['capture_reason']}" if facts.get("capture_reason") else ""
        )
    yield from _origin(result, facts)


def _energy(row: Candidate | None, result: TuneResult) -> Iterator[str]:
    measured = row.measured if row is not None else None
    if measured is None or measured.energy_j is None or not measured.energy_source:
        return
    text = f"Energy: {figure(measured.energy_j)} J per pass"
    plain = result.baseline.measured
    if (
        plain is not None
        and row is not result.baseline
        and plain.energy_j is not None
        and plain.energy_source == measured.energy_source
    ):
        text += f", plain PyTorch {figure(plain.energy_j)} J"
    yield f"{text} (source: {measured.energy_source})."


def _origin(result: TuneResult | None, facts: Mapping[str, Any]) -> Iterator[str]:
    origin = facts.get("origin") or ("a tuning in this process" if result is not None else "")
    tuned = f"tuned on {facts['date']}" if facts.get("date") else ""
    versions = facts.get("versions")
    if isinstance(versions, Mapping) and versions:
        tuned += " with " + ", ".join(f"{name} {version}" for name, version in versions.items())
    if origin or tuned:
        yield f"The plan comes from {origin or 'an earlier tuning'}{', ' + tuned.strip() if tuned else ''}."


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, wide: int) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        figures = column.endswith("ms") or column in ("threads", "parameters MB", "share of batch", "measured")
        right = figures or "predicted" in column
        table.add_column(column, justify="right" if right else "left", overflow="fold", ratio=2 if i == wide else None)
    for cells in rows:
        table.add_row(*(Text(cell) for cell in cells))
    return table


def as_text(parts: Sequence[RenderableType], width: int) -> str:
    """Return tables and sentences as plain text of so many columns."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=width, file=io.StringIO(), force_terminal=False, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        for part in parts:
            console.print(Text(part) if isinstance(part, str) else part, soft_wrap=False)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    squeezed = [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]
    return "\n".join(squeezed).strip("\n") + "\n"
