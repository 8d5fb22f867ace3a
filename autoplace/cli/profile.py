"""`autoplace profile`: find this machine's devices, measure the links between them, write `cluster.yaml`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from autoplace.hardware.cluster import Cluster

__all__ = ["devices_table", "links_table", "profile"]


def profile(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the cluster file.")] = Path(
        "cluster.yaml"
    ),
    links: Annotated[
        bool, typer.Option("--links/--no-links", help="Measure the links by real copies, or assume them.")
    ] = True,
) -> None:
    """Find this machine's devices, measure the links between them and write a cluster file."""
    from autoplace.hardware.discover import discover

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("looking for devices", total=None)

        def show(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=label)

        cluster = discover(measure_links=links, progress=show)
    cluster.save(output)
    console.print(devices_table(cluster))
    for source in sorted({d.watts_source for d in cluster.devices if d.watts_source}):
        console.print(f"Watts: {source}", highlight=False)
    if cluster.num_devices > 1:
        console.print(links_table(cluster))
        if not links:
            console.print("Links are assumed, not measured; run without --no-links to measure them.")
    console.print(f"Wrote {output}", soft_wrap=True, highlight=False)


def devices_table(cluster: Cluster) -> Table:
    """Return a table of the devices: cores, memory, watts and where those come from."""
    table = Table(title="Devices")
    for heading in ("device", "model", "cores", "memory", "idle W", "busy W", "watts from"):
        table.add_column(heading, justify="right" if heading in ("memory", "idle W", "busy W") else "left")
    for device in cluster.devices:
        unlimited = math.isinf(device.memory_bytes)
        table.add_row(
            device.name,
            device.model,
            _ranges(device.cores),
            "unlimited" if unlimited else f"{device.memory_bytes / 2**30:.1f} GiB",
            "unknown" if device.idle_watts is None else f"{device.idle_watts:.1f}",
            "unknown" if device.busy_watts is None else f"{device.busy_watts:.1f}",
            (device.watts_source or "").split(":", 1)[0],
        )
    return table


def links_table(cluster: Cluster) -> Table:
    """Return the matrix of links, row = source, column = target: bandwidth and latency."""
    table = Table(title="Links (row sends to column)")
    table.add_column("")
    for device in cluster.devices:
        table.add_column(device.name, justify="right")
    for i, source in enumerate(cluster.devices):
        cells = []
        for j in range(cluster.num_devices):
            bytes_per_ms, latency_ms = cluster.link_bytes_per_ms[i, j], cluster.link_latency_ms[i, j]
            known = i != j and bytes_per_ms > 0
            cells.append(f"{bytes_per_ms / 1e6:.2f} GB/s, {latency_ms * 1e3:.1f} µs" if known else "-")
        table.add_row(source.name, *cells)
    return table


def _ranges(cores: tuple[int, ...]) -> str:
    """Return CPU ids as the kernel writes them, `0-3,8`."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
