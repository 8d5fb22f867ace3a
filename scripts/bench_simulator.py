"""Plans a second that the simulator evaluates, in every mode, against a bare list-scheduling loop in the same run.

Operator-level transformers of 200, 2,000 and 20,000 ops on four devices, one thread. The bare loop knows one order of
the ops, no queues, no contention: an op starts when its device is free and its inputs are there. It is the floor, not a
rival: its figures are others. It runs twice a round, so that the noise of the run stands beside its ratios; all cells
of a size are interleaved, and every figure is the median over rounds.

A trial is a move of one op, at random, with the present J as its limit: what a search asks most of the time. They start
from contiguous stages after a descent, go to another device, and are counted with and without keeping those that are no
worse.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray
from results import save
from rich.console import Console
from rich.table import Table

from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Objective, Problem, Semantics
from autoplace.simulate import SimulatedEvaluator
from autoplace.simulate.local import Local, begin, keep, new_local, trial

DEVICES = 4
SIZES = (200, 2_000, 20_000)
SECONDS = 0.05
"""Least time of a cell in a round: shorter ones measure who else was scheduled."""

SEARCHED = ("no contention, fifo", "no contention, priority", "link, fifo", "link, priority", "blocking", "throughput")
"""Modes whose trials are timed."""


def _modes() -> dict[str, tuple[Semantics, Objective]]:
    latency, throughput = Objective(), Objective(goal="throughput")
    return {
        "no contention, fifo": (Semantics(contention="none"), latency),
        "no contention, priority": (Semantics(contention="none", queue="priority"), latency),
        "link, fifo": (Semantics(), latency),
        "link, priority": (Semantics(queue="priority"), latency),
        "host route, no contention": (Semantics(route="host", contention="none"), latency),
        "host route, link": (Semantics(route="host"), latency),
        "blocking": (Semantics(transfers="blocking"), latency),
        "blocking, host route": (Semantics(transfers="blocking", route="host"), latency),
        "throughput": (Semantics(), throughput),
    }


def transformer(ops: int, random: np.random.Generator) -> Problem:
    """Return a decoder at operator level, cut after `ops` ops, on four devices of two speeds with slow links."""
    work: list[float] = []
    consumers: list[list[int]] = []

    def add(inputs: list[int], cost: float) -> int:
        index = len(work)
        work.append(cost)
        consumers.append([])
        for producer in inputs:
            consumers[producer].append(index)
        return index

    last = add([], 0.05)
    while len(work) < ops:
        norm = add([last], 0.01)
        query, key, value = (add([norm], 0.1) for _ in range(3))
        attention = add([add([add([query, key], 0.05)], 0.02), value], 0.05)
        middle = add([last, add([attention], 0.1)], 0.01)
        hidden = add([add([add([middle], 0.01)], 0.4)], 0.02)
        last = add([middle, add([hidden], 0.4)], 0.01)
    edges = [(i, [c for c in targets if c < ops], 1e5) for i, targets in enumerate(consumers[:ops])]
    graph = OpGraph.build(names=[f"op{i}" for i in range(ops)], edges=[e for e in edges if e[1]])
    devices = tuple(Device(name=f"host0/cuda:{d}", kind="cuda") for d in range(DEVICES))
    latency = np.asarray(work[:ops])[:, None] * [1.0, 1.0, 1.5, 1.5] * np.exp(random.normal(0, 0.2, (ops, DEVICES)))
    cluster = Cluster(devices=devices, default_link=Link(latency_ms=0.02, bytes_per_ms=1e6))
    return Problem(graph=graph, cluster=cluster, latency_ms=latency)


class Bare(NamedTuple):
    """What the bare loop reads."""

    order: NDArray[np.int32]
    latency_ms: NDArray[np.float64]
    offsets: NDArray[np.int64]
    producers: NDArray[np.int32]
    sizes: NDArray[np.float64]
    link_ms: NDArray[np.float64]
    ms_per_byte: NDArray[np.float64]
    finish_ms: NDArray[np.float64]
    free_ms: NDArray[np.float64]


def bare_of(problem: Problem) -> Bare:
    """Lay out a problem for the bare loop, ops in topological order."""
    edges = problem.graph.edge_list[np.argsort(problem.graph.edge_list[:, 1], kind="stable")]
    counts = np.bincount(edges[:, 1], minlength=problem.num_ops)
    return Bare(
        order=np.ascontiguousarray(problem.graph.topological_order, np.int32),
        latency_ms=np.ascontiguousarray(problem.latency_ms),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        producers=np.ascontiguousarray(edges[:, 0], np.int32),
        sizes=np.ascontiguousarray(problem.graph.tensor_bytes[edges[:, 2]], np.float64),
        link_ms=np.ascontiguousarray(problem.cluster.link_latency_ms),
        ms_per_byte=np.ascontiguousarray(1.0 / problem.cluster.link_bytes_per_ms),
        finish_ms=np.zeros(problem.num_ops),
        free_ms=np.zeros(problem.num_devices),
    )


@njit
def bare_loop(bare: Bare, plans: NDArray[np.int32], makespans: NDArray[np.float64]) -> None:
    """Schedule plans by the bare loop; fills their makespans, ms."""
    for p in range(len(plans)):
        plan = plans[p]
        bare.free_ms[:] = 0.0
        for op in bare.order:
            d = plan[op]
            start = bare.free_ms[d]
            for k in range(bare.offsets[op], bare.offsets[op + 1]):
                producer = bare.producers[k]
                s = plan[producer]
                there = bare.finish_ms[producer]
                if s != d:
                    there += bare.link_ms[s, d] + bare.sizes[k] * bare.ms_per_byte[s, d]
                start = max(start, there)
            bare.finish_ms[op] = bare.free_ms[d] = start + bare.latency_ms[op, d]
        makespans[p] = bare.free_ms.max()


@njit
def walk(
    local: Local, ops: NDArray[np.int32], ways: NDArray[np.int32], objective: float, keeps: bool
) -> tuple[float, int]:
    """Try moves of one op each, so many devices on (1 to D - 1); return the last J and how many were no worse."""
    usable, device = 0, np.zeros(1, np.int32)
    for k in range(len(ops)):
        device[0] = (local.plan[0, ops[k]] + ways[k]) % DEVICES
        found = trial(local, ops[k : k + 1], device, 1, objective)
        if found < np.inf:
            usable += 1
            if keeps:
                keep(local)
                objective = found
    return objective, usable


class Cell(NamedTuple):
    """Something to time: `run` does `number` of it."""

    label: str
    what: str
    number: int
    run: Callable[[], object]


def _plans(ops: int, count: int, random: np.random.Generator) -> dict[str, NDArray[np.int32]]:
    """Return contiguous stages with random borders, and devices at random, int32[count, ops] each."""
    borders = np.sort(random.integers(0, ops, (count, DEVICES - 1)), axis=1)
    stages = (np.arange(ops)[None, :, None] >= borders[:, None, :]).sum(axis=2)
    return {
        "contiguous": np.ascontiguousarray(stages, np.int32),
        "random": random.integers(0, DEVICES, (count, ops)).astype(np.int32),
    }


def _trials(problem: Problem, label: str, stages: NDArray[np.int32], seed: int) -> tuple[list[Cell], dict[str, float]]:
    """Return the cells of one mode's trials, and the share of them that were usable."""
    random, ops = np.random.default_rng(seed), problem.num_ops

    def moves(count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return random.integers(0, ops, count).astype(np.int32), random.integers(1, DEVICES, count).astype(np.int32)

    local = new_local(SimulatedEvaluator(problem))
    local.plan[0] = stages
    objective, _ = walk(local, *moves(20_000 if ops < 10_000 else 4_000), begin(local), True)
    started = time.perf_counter()
    _, usable = walk(local, *moves(500), objective, False)
    count = max(50, int(500 * 0.03 / (time.perf_counter() - started)))
    tried, kept = moves(count), moves(count)
    state = [objective]

    def search() -> None:
        state[0], _ = walk(local, *kept, state[0], True)

    cells = [
        Cell(label, "trials", count, lambda: walk(local, *tried, state[0], False)),
        Cell(label, "trials and keeps", count, search),
    ]
    return cells, {"usable": usable / 500}


def cells_of(ops: int, seed: int) -> tuple[list[Cell], dict[str, dict[str, float]]]:
    """Return all that is timed at one size, and the share of usable trials by mode."""
    random = np.random.default_rng(seed)
    base = transformer(ops, random)
    plans, bare = _plans(ops, max(4, 100_000 // ops), random), bare_of(base)
    makespans = np.zeros(len(plans["random"]))
    cells, shares = [], {}
    for what, some in plans.items():
        for label in ("bare loop", "bare loop again"):
            cells.append(Cell(label, what, len(some), partial(bare_loop, bare, some, makespans)))
    for label, (semantics, objective) in _modes().items():
        problem = base.with_(semantics=semantics, objective=objective)
        evaluator = SimulatedEvaluator(problem)
        for what, some in plans.items():
            cells.append(Cell(label, what, len(some), partial(evaluator.score, some)))
        if label in SEARCHED:
            more, shares[label] = _trials(problem, label, plans["contiguous"][0], seed)
            cells += more
    return cells, shares


def measure(cells: list[Cell], rounds: int) -> dict[tuple[str, str], list[float]]:
    """Return seconds a plan or trial of every cell, a figure a round; the rounds are interleaved.

    A cell runs as often a round as fills `SECONDS`, found in a first round that does not count.
    """
    times: list[int] = []
    for cell in cells:
        cell.run()
        started = time.perf_counter()
        cell.run()
        times.append(max(1, round(SECONDS / (time.perf_counter() - started))))
    seconds: dict[tuple[str, str], list[float]] = {(c.label, c.what): [] for c in cells}
    for _ in range(rounds):
        for cell, repeats in zip(cells, times, strict=True):
            started = time.perf_counter()
            for _ in range(repeats):
                cell.run()
            seconds[cell.label, cell.what].append((time.perf_counter() - started) / (repeats * cell.number))
    return seconds


def _row(seconds: dict[tuple[str, str], list[float]], label: str, what: str, ops: int) -> dict[str, Any]:
    times = seconds[label, what]
    quartiles = statistics.quantiles(times, n=4)
    row: dict[str, Any] = {
        "ops": ops,
        "mode": label,
        "what": what,
        "per_second": 1.0 / statistics.median(times),
        "interquartile_share": (quartiles[2] - quartiles[0]) / statistics.median(times),
    }
    if what in ("contiguous", "random"):
        floor = seconds["bare loop", what]
        row["ns_per_op"] = 1e9 * statistics.median(times) / ops
        row["times_the_bare_loop"] = statistics.median(t / f for t, f in zip(times, floor, strict=True))
    else:
        evaluations = seconds[label, "contiguous"]
        row["times_faster_than_an_evaluation"] = statistics.median(
            e / t for t, e in zip(times, evaluations, strict=True)
        )
    return row


def _tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Return the table of evaluations and that of trials."""
    found = {(r["ops"], r["mode"], r["what"]): r for r in rows}
    sizes = sorted({r["ops"] for r in rows})
    whole = Table("mode", title="evaluations a second (ns an op, times the bare loop), contiguous | random")
    moves = Table("mode", title="trials a second (times faster than an evaluation), without | with keeps")
    for ops in sizes:
        whole.add_column(f"{ops:,} ops", justify="right")
        moves.add_column(f"{ops:,} ops", justify="right")
    for mode in dict.fromkeys(r["mode"] for r in rows):
        line, tried = [mode], [mode]
        for ops in sizes:
            pair = [found[ops, mode, what] for what in ("contiguous", "random")]
            line.append(" | ".join(
                f"{r['per_second']:,.0f} ({r['ns_per_op']:.0f}, {r['times_the_bare_loop']:.1f})" for r in pair
            ))  # fmt: skip
            if mode in SEARCHED:
                pair = [found[ops, mode, what] for what in ("trials", "trials and keeps")]
                tried.append(" | ".join(
                    f"{r['per_second']:,.0f} ({r['times_faster_than_an_evaluation']:.1f})" for r in pair
                ))  # fmt: skip
        whole.add_row(*line)
        if mode in SEARCHED:
            moves.add_row(*tried)
    return [whole, moves]


def main() -> None:
    """Measure every size, print the tables and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    rows, usable, noise = [], {}, {}
    for ops in options.sizes:
        cells, usable[ops] = cells_of(ops, options.seed)
        seconds = measure(cells, options.rounds)
        rows += [_row(seconds, cell.label, cell.what, ops) for cell in cells]
        pairs = [
            b / a
            for what in ("contiguous", "random")
            for a, b in zip(seconds["bare loop", what], seconds["bare loop again", what], strict=True)
        ]
        noise[ops] = statistics.median(abs(p - 1.0) for p in pairs)
    console = Console(width=160)
    for table in _tables(rows):
        console.print(table)
    for ops in options.sizes:
        console.print(f"{ops:,} ops: the bare loop against itself differs by {noise[ops]:.1%} (median of the rounds)")
    if not options.no_save:
        save(
            "simulator",
            seed=options.seed,
            data={
                "devices": DEVICES,
                "rounds": options.rounds,
                "noise": noise,
                "usable_trials": usable,
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
