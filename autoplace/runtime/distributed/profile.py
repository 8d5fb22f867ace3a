"""Describes the devices of all hosts and measures the links between them, from inside: one process a device.

    python -m autoplace.runtime.distributed.main -m autoplace.runtime.distributed.profile [--budget 2] [--no-links]

Every rank tells what it has → `member.own_device`, and takes its cores as it will under a plan. Then each ordered pair
is measured by the group's own send and receive, one pair after the other, while all other ranks wait.

    latency                 = half the median round trip of 8 bytes                                → `time_link`
    one-way time of n bytes = (time until the receiver's answer of 8 bytes is here) - latency
    bandwidth               = the slope fitted to the medians over sizes                            → `links.fit_link`

1. Where not all devices are GPUs the engine is gloo, which sends host memory: a GPU's copy from or to it is part of the
   time.
2. Sizes that a slow link could not send within the budget are left out, the two smallest excepted.
3. Round trips are measured before and after the sizes, and the lesser median counts: hosts are busy at times. The way
   there cannot take less than half of the way there and back, whatever the latency was.
4. Rank 0 reports the cluster file's text, since only the launcher knows where it belongs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
import torch.distributed as dist

from autoplace.errors import ClusterFileError
from autoplace.hardware.cluster import Cluster, Link
from autoplace.hardware.cluster_file import cluster_to_text
from autoplace.hardware.links import fit_link

from .member import host_name, own_device, take_cores
from .reports import heard, report, report_text
from .session import Session

__all__ = ["Wire", "answer_link", "main", "measure_links", "time_link"]

SIZES_BYTES = (1 << 10, 1 << 16, 1 << 20, 1 << 23)
ANSWER_BYTES = 8
_ALWAYS = 2
"""So many sizes are measured on any link; a line needs two points."""
_MIN_ROUND_TRIPS, _MAX_ROUND_TRIPS = 5, 50
_MAX_REPEATS = 30
_LATENCY_SHARE = 0.15
"""Of the budget, for round trips."""
_ALL_PAIRS_S = 240.0
"""With many devices, pairs get less time each, so that all of them take about this."""
_LEAST_BUDGET_S = 0.05

Progress = Callable[[int, int, str], None]


class Wire(Protocol):
    """One end of a link between two ranks."""

    def send(self, num_bytes: int) -> None:
        """Send a message of a size."""

    def receive(self, num_bytes: int) -> None:
        """Wait for a message of a size."""

    def tell(self, *numbers: int) -> None:
        """Send two numbers."""

    def hear(self) -> tuple[int, int]:
        """Wait for two numbers."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile the ranks' devices; rank 0 reports the cluster.

    Args:
        arguments: Of the command line; None = the process's own.
    """
    parser = argparse.ArgumentParser(prog="autoplace.runtime.distributed.profile")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds per pair")
    parser.add_argument("--no-links", action="store_true", help="describe the devices only")
    options = parser.parse_args(arguments)
    own = own_device(host_name(), int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    take_cores(own, local_ranks=int(os.environ["LOCAL_WORLD_SIZE"]))
    session = Session.join(own=own)
    try:
        cluster = session.cluster
        _check_cores(cluster)
        if not options.no_links and session.world_size > 1:
            links = measure_links(session, budget_s=options.budget, progress=_progress)
            cluster = replace(cluster, links=links, default_link=None)
        if session.rank == 0:
            _deliver(cluster)
    finally:
        session.close()


def measure_links(
    session: Session, *, budget_s: float = 2.0, progress: Progress | None = None
) -> dict[tuple[str, str], Link]:
    """Measure the link of every ordered pair of ranks; every rank has to call it.

    Args:
        session: The group.
        budget_s: Seconds per pair, less where there are many.
        progress: Called on rank 0 with (pairs done, pairs in all, `source -> target`).

    Returns:
        (source name, target name) to link, the same on all ranks.
    """
    ranks = range(session.world_size)
    pairs = [(source, target) for source in ranks for target in ranks if source != target]
    budget_s = max(_LEAST_BUDGET_S, min(budget_s, _ALL_PAIRS_S / max(1, len(pairs))))
    only_gpus = all(d.kind == "cuda" for d in session.cluster.devices)
    own: dict[tuple[str, str], Link] = {}
    for done, (source, target) in enumerate(pairs):
        names = (session.members[source], session.members[target])
        session.gather(None)  # nobody else is on the network
        if progress and session.rank == 0:
            progress(done, len(pairs), f"{names[0]} -> {names[1]}")
        if session.rank == source:
            own[names] = time_link(_GroupWire(target, session.torch_device, only_gpus), budget_s=budget_s)
        elif session.rank == target:
            answer_link(_GroupWire(source, session.torch_device, only_gpus))
    found = {names: link for links in session.gather(own) for names, link in links.items()}
    return {names: found[names] for names in ((session.members[s], session.members[t]) for s, t in pairs)}


def time_link(wire: Wire, *, budget_s: float, clock: Callable[[], float] = time.perf_counter) -> Link:
    """Measure the link to a rank that is in `answer_link`.

    Args:
        wire: To it.
        budget_s: Seconds to spend, about.
        clock: Returns seconds.
    """

    def rounds_s(num_bytes: int, count: int) -> list[float]:
        wire.tell(num_bytes, count)
        times = []
        for _ in range(count):
            start = clock()
            wire.send(num_bytes)
            wire.receive(ANSWER_BYTES)
            times.append(clock() - start)
        return times

    began = clock()
    rounds_s(ANSWER_BYTES, 1)  # connects, and makes what the first message makes
    trip_s = rounds_s(ANSWER_BYTES, 1)[0]
    count = int(_LATENCY_SHARE / 2 * budget_s / max(trip_s, 1e-9))
    count = min(_MAX_ROUND_TRIPS, max(_MIN_ROUND_TRIPS, count))
    trip_s = statistics.median(rounds_s(ANSWER_BYTES, count))
    sizes, rounds = [], []
    last_bytes, last_s = SIZES_BYTES[0], trip_s
    for i, num_bytes in enumerate(SIZES_BYTES):
        left_s = budget_s - (clock() - began)
        if i >= _ALWAYS and last_s * num_bytes / last_bytes > left_s:
            break
        share_s = left_s / (len(SIZES_BYTES) - i)
        samples = rounds_s(num_bytes, 1)
        # The first of a size touches fresh memory; it counts only where there is no time for a second.
        if samples[0] < share_s:
            samples = rounds_s(num_bytes, min(_MAX_REPEATS, max(1, int(share_s / max(samples[0], 1e-9)))))
        last_bytes, last_s = num_bytes, statistics.median(samples)
        sizes.append(num_bytes)
        rounds.append(last_s)
    trip_s = min(trip_s, statistics.median(rounds_s(ANSWER_BYTES, count)))
    wire.tell(0, 0)
    times_ms = [1e3 * max(round_s - trip_s / 2, round_s / 2) for round_s in rounds]
    return Link(latency_ms=_figure(trip_s / 2 * 1e3), bytes_per_ms=_figure(fit_link(sizes, times_ms).bytes_per_ms))


def answer_link(wire: Wire) -> None:
    """Answer a rank that is in `time_link` until it is done."""
    while True:
        num_bytes, count = wire.hear()
        if not num_bytes:
            return
        for _ in range(count):
            wire.receive(num_bytes)
            wire.send(ANSWER_BYTES)


class _GroupWire:
    """torch.distributed's send and receive, with the device's memory at this end.

    Args:
        peer: The other rank.
        device: Of this rank.
        direct: Whether the engine sends from the device; else a GPU's bytes are copied to host memory first.
    """

    def __init__(self, peer: int, device: torch.device, direct: bool) -> None:
        self._peer, self._device = peer, device
        self._staged = device.type == "cuda" and not direct
        self._buffers: dict[int, torch.Tensor] = {}

    def send(self, num_bytes: int) -> None:
        buffer = self._buffer(num_bytes)
        dist.send(buffer.cpu() if self._staged else buffer, self._peer)

    def receive(self, num_bytes: int) -> None:
        buffer = self._buffer(num_bytes)
        arrived = torch.empty(num_bytes, dtype=torch.uint8) if self._staged else buffer
        dist.recv(arrived, self._peer)
        if self._staged:
            buffer.copy_(arrived)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def tell(self, *numbers: int) -> None:
        dist.send(torch.tensor(numbers, dtype=torch.int64), self._peer)

    def hear(self) -> tuple[int, int]:
        numbers = torch.zeros(2, dtype=torch.int64)
        dist.recv(numbers, self._peer)
        return int(numbers[0]), int(numbers[1])

    def _buffer(self, num_bytes: int) -> torch.Tensor:
        if num_bytes not in self._buffers:
            self._buffers[num_bytes] = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        return self._buffers[num_bytes]


def _figure(value: float) -> float:
    """Return six digits of a figure: more are noise, and the file travels with every launch."""
    return float(f"{value:.6g}")


def _check_cores(cluster: Cluster) -> None:
    """Raise, on all ranks alike, if processes of a host share cores."""
    owners: dict[tuple[str, int], str] = {}
    for device in cluster.devices:
        for core in device.cores:
            if owners.setdefault((device.host, core), device.name) != device.name:
                raise ClusterFileError(
                    f"host {device.host!r} has fewer cores than processes; lower its `processes` in the hosts file"
                )


def _progress(done: int, total: int, label: str) -> None:
    if heard():
        report("progress", done=done, total=total, label=label)


def _deliver(cluster: Cluster) -> None:
    text = cluster_to_text(cluster)
    if heard():
        report_text("cluster", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
