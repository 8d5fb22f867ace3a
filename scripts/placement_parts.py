"""What the placement benchmarks share around their runs: options, single-threaded processes, and a warm-up in each."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import cycle, product
from pathlib import Path

import numpy as np
from placement_runs import Case, Method, Run, fresh, make_runs, missing

from autoplace.errors import AutoplaceError
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Objective, Problem, Semantics

ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMBA")}


def in_parts(argv: Sequence[str], workers: int) -> int:
    """Run a script in single-threaded processes, each with its `--part i/n`; return 0 when all succeeded."""
    environment = {**os.environ, **ONE_THREAD}
    children = [
        subprocess.Popen([sys.executable, *argv, "--part", f"{part}/{workers}"], env=environment)
        for part in range(workers)
    ]
    return max(child.wait() for child in children)


def add_run_options(parser: argparse.ArgumentParser, *, runs: str) -> None:
    """Add the options that the placement benchmarks share."""
    parser.add_argument(
        "--runs", type=Path, default=Path("build") / runs, help="JSON lines; what it holds is not rerun"
    )
    parser.add_argument("--problem-seed", type=int, default=0, help="of the benchmark's problems")
    parser.add_argument("--only", nargs="*", default=[], help="tags or parts of names of the problems to run on")
    parser.add_argument("--workers", type=int, default=2, help="single-threaded processes")
    parser.add_argument("--summary", action="store_true", help="make the tables of what there is; run nothing")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)


def chosen_cases(cases: Sequence[Case], only: Sequence[str]) -> list[Case]:
    """Return the cases that have one of the tags or parts of names; all when there are none."""
    return [c for c in cases if not only or any(o in c.tags or o in c.problem.name for o in only)]


def make_part(
    groups: Sequence[Sequence[Run]], methods: dict[str, Method], cases: Sequence[Case], options: argparse.Namespace
) -> None:
    """Make this process's part of the runs, every n-th group, after a warm-up of the methods in it."""
    part, parts = (int(number) for number in options.part.split("/"))
    mine = [run for group in groups[part::parts] for run in group]
    wanted = {run.method for run in missing(mine, methods, cases, options.runs)}
    warm_up({name: method for name, method in methods.items() if name in wanted}, cases)
    make_runs(mine, methods, cases, options.runs)


def tiny_problems() -> list[Problem]:
    """Return one problem of 14 ops on three devices for each combination of goal and semantics."""
    random = np.random.default_rng(0)
    edges = [(int(random.integers(max(0, i - 4), i)), [i], 1e5) for i in range(1, 14)]
    graph = OpGraph.build(names=[f"op{i}" for i in range(14)], edges=edges, activation_bytes=[10] * 14)
    devices = [
        Device(name=f"host0/cuda:{d}", kind="cuda", memory_bytes=120.0, idle_watts=50.0, busy_watts=200.0)
        for d in range(3)
    ]
    cluster = Cluster(devices=tuple(devices), default_link=Link(latency_ms=0.01, bytes_per_ms=1e6))
    rules = [
        Semantics(transfers=transfers, route=route, contention=contention, queue=queue, microbatches=count)
        for transfers, route, contention, queue, count in product(
            ("overlapped", "blocking"), ("direct", "host"), ("none", "link"), ("fifo", "priority"), (1, 2)
        )
    ]
    return [
        Problem(
            graph=graph,
            cluster=cluster,
            latency_ms=random.uniform(0.5, 2.0, (14, 3)),
            objective=Objective(goal=goal, energy_weight=weight),
            semantics=semantics,
            name=f"tiny-{goal}-{index}",
        )
        for goal in ("latency", "throughput")
        for index, (semantics, weight) in enumerate(zip(rules, cycle((0.0, 0.0, 0.5)), strict=False))
    ]


def warm_up(methods: dict[str, Method], cases: Sequence[Case]) -> None:
    """Call every method on a tiny problem of each semantics and on one problem of each tag, before anything is timed.

    Compiled code is loaded at the first call of each specialisation; that belongs to no run.
    """
    firsts = {tag: case.problem for case in reversed(cases) for tag in case.tags}
    for method in (m for m in methods.values() if m.warm):
        for problem in [*tiny_problems(), *{p.name: p for p in firsts.values()}.values()]:
            try:
                method.place(fresh(problem), "50e", 0)
            except AutoplaceError:
                continue  # no feasible placement: what there was to load is loaded
