"""`autoplace profile`: find the devices of this machine or of several, measure the links, write `cluster.yaml`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from autoplace.hardware.cluster import Cluster

__all__ = ["devices_table", "links_table", "profile"]


Show = Callable[[int, int, str], None]


def profile(
    cluster: Annotated[
        Path | None, typer.Option("--cluster", help="Hosts file, or cluster file with hosts; default: this machine.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the cluster file.")] = Path(
        "cluster.yaml"
    ),
    links: Annotated[
        bool, typer.Option("--links/--no-links", help="Measure the links by real copies, or assume them.")
    ] = True,
) -> None:
    """Find the devices, measure the links between them and write a cluster file."""
    from autoplace.hardware.discover import discover

    console = Console()
    with _bar(console) as show:
        found = discover(measure_links=links, progress=show) if cluster is None else _from_hosts(cluster, links, show)
    found.save(output)
    console.print(devices_table(found))
    for source in sorted({d.watts_source for d in found.devices if d.watts_source}):
        console.print(f"Watts: {source}", highlight=False)
    if found.num_devices > 1:
        console.print(links_table(found))
        if not links:
            console.print("Links are assumed, not measured; run without --no-links to measure them.")
    console.print(f"Wrote {output}", soft_wrap=True, highlight=False)


@contextmanager
def _bar(console: Console) -> Iterator[Show]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("looking for devices", total=None)

        def show(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=label)

        yield show


def _from_hosts(path: Path, links: bool, show: Show) -> Cluster:
    """Start a process for every device of the hosts and return the cluster that they describe and measure."""
    from autoplace.hardware.cluster_file import cluster_from_text
    from autoplace.hardware.hosts_file import load_hosts
    from autoplace.runtime.distributed.launch import launch
    from autoplace.runtime.distributed.reports import Texts

    hosts = load_hosts(path)
    parts, found = Texts(), [""]

    def heard(told: dict[str, Any]) -> None:
        if told["kind"] == "progress":
            show(told["done"], told["total"], told["label"])
        elif told["kind"] == "cluster" and (text := parts.add("cluster", told)) is not None:
            found[0] = text

    options = [] if links else ["--no-links"]
    code = launch(hosts, ["-m", "autoplace.runtime.distributed.profile", *options], heard=heard)
    if code:
        raise typer.Exit(code)
    cluster = cluster_from_text(found[0], where="what the ranks measured")
    return replace(cluster, hosts=tuple(one.host for one in hosts))


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
            cells.append(f"{_rate(bytes_per_ms)}, {latency_ms * 1e3:.1f} µs" if known else "-")
        table.add_row(source.name, *cells)
    return table


def _rate(bytes_per_ms: float) -> str:
    return f"{bytes_per_ms / 1e6:.2f} GB/s" if bytes_per_ms >= 1e5 else f"{bytes_per_ms / 1e3:.1f} MB/s"


def _ranges(cores: tuple[int, ...]) -> str:
    """Return CPU ids as the kernel writes them, `0-3,8`."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
