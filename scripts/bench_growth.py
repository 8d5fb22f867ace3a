"""Time `autoplace place` on operator-level transformers of 1,000, 10,000 and 100,000 ops, and the parts of the way.

The whole is the wall time of a fresh process with default settings: interpreter, imports, reading, placing, writing.
`place` is the part of it between reading and writing, as the command itself states it. The other parts run in one
process of their own, in which every kernel was called once before, so that none holds the loading of compiled code.
Medians; target: 10,000 ops in 10 s.

    python scripts/bench_growth.py [--ops 1000 10000 100000] [--goals latency throughput] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import save

from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Objective, Problem

TARGET_OPS, TARGET_S = 10_000, 10.0
HEADS = 8
PARTS = ("place", "read", "tables", "heuristics", "coarsen", "evaluate", "write")
"""What the command spends on placing; and apart from it: reading the file; evaluator and view; building and scoring the
heuristics' placements; coarsening to all levels; one simulation; writing the answer."""


def transformer(ops: int, *, goal: str = "latency", seed: int = 0) -> Problem:
    """Return a decoder at operator level on four devices, every attention head on its own.

    Two fast and two slow devices with room for 0.4 of the weights and activations each, links of 20 us and 12 GB/s.

    Args:
        ops: Number of ops; the last block is cut short.
        goal: `latency` or `throughput`.
        seed: Of the latencies.
    """
    random = np.random.default_rng(seed)
    kinds: list[str] = []
    work: list[float] = []
    size: list[float] = []
    consumers: list[list[int]] = []
    weights: list[int] = []

    def add(kind: str, inputs: list[int], cost: float, out: float, weight: float = 0.0) -> int:
        index = len(kinds)
        kinds.append(kind)
        work.append(cost)
        size.append(out)
        consumers.append([])
        weights.append(int(weight * 2**20))
        for producer in inputs:
            consumers[producer].append(index)
        return index

    last = add("embedding", [], 0.02, 1.0, 64.0)
    while len(kinds) < ops:
        norm = add("layer_norm", [last], 0.004, 1.0)
        heads = []
        for _ in range(HEADS):
            query, key, value = (add("linear", [norm], 0.012, 1 / HEADS, 0.4) for _ in range(3))
            scores = add("softmax", [add("matmul", [query, key], 0.01, 0.5)], 0.006, 0.5)
            heads.append(add("matmul", [scores, value], 0.01, 1 / HEADS))
        joined = add("linear", [add("cat", heads, 0.004, 1.0)], 0.04, 1.0, 3.0)
        middle = add("add", [last, joined], 0.003, 1.0)
        up = add("linear", [add("layer_norm", [middle], 0.004, 1.0)], 0.15, 4.0, 12.0)
        down = add("linear", [add("gelu", [up], 0.01, 4.0)], 0.15, 1.0, 12.0)
        last = add("add", [middle, down], 0.003, 1.0)
    keep = [
        (i, [c for c in targets if c < ops], s * 2**20)
        for i, (targets, s) in enumerate(zip(consumers, size, strict=True))
    ]
    graph = OpGraph.build(
        names=[f"{kind}{i}" for i, kind in enumerate(kinds[:ops])],
        kinds=kinds[:ops],
        edges=[edge for edge in keep[:ops] if edge[1]],
        weight_bytes=weights[:ops],
        activation_bytes=[int(s * 2**20) for s in size[:ops]],
        frees=[True] * ops,
    )
    room = 0.4 * float((graph.weight_bytes + graph.activation_bytes).sum())
    devices = [Device(name=f"host0/cuda:{d}", kind="cuda", memory_bytes=room) for d in range(4)]
    slowness = np.asarray([1.0, 1.0, 1.6, 1.6])
    latency = np.asarray(work[:ops])[:, None] * slowness * np.exp(random.normal(0.0, 0.1, (ops, 4)))
    return Problem(
        graph=graph,
        cluster=Cluster(devices=tuple(devices), default_link=Link(latency_ms=0.02, bytes_per_ms=12e6)),
        latency_ms=latency,
        objective=Objective(goal=goal),
        name=f"transformer-{ops}",
    )


def command_seconds(problem: Path, answer: Path, options: Sequence[str]) -> tuple[float, dict[str, Any]]:
    """Return the wall time of one `autoplace place` in a fresh process, s, and its answer."""
    command = [
        sys.executable,
        "-c",
        "from autoplace.cli import main; main()",
        "place",
        str(problem),
        "-o",
        str(answer),
        *options,
    ]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    spent = time.perf_counter() - start
    return spent, json.loads(answer.read_text(encoding="utf-8"))


def part_seconds(path: Path) -> dict[str, float]:
    """Return the wall time of the parts on one problem file, s."""
    from autoplace.plan import Plan
    from autoplace.problem_file import load_problem, placement_to_json
    from autoplace.strategies import Budget
    from autoplace.strategies._search import Scorer
    from autoplace.strategies.heuristics import construct
    from autoplace.strategies.multilevel import coarsen_levels

    spent: dict[str, float] = {}

    def timed(part: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        spent[part] = time.perf_counter() - start
        return result

    problem = timed("read", lambda: load_problem(path))
    scorer = timed("tables", lambda: Scorer(problem, Budget(evaluations=1000).start()))
    found = timed("heuristics", lambda: construct(scorer))
    timed("coarsen", lambda: coarsen_levels(problem))
    value, best = min((pair for pairs in found.values() for pair in pairs), key=lambda pair: pair[0])
    timed("evaluate", lambda: scorer.evaluator.score(best))
    outcome = scorer.evaluator.outcome(best)

    def write() -> None:
        plan = Plan.from_assignment(problem, best, strategy="growth")
        answer = placement_to_json(problem, plan, outcome, evaluations=1, seconds=0.0, seed=0)
        path.with_suffix(".out").write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")

    timed("write", write)
    return {**spent, "heuristics_objective": value}


def measure(ops: int, goal: str, rounds: int, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """Return medians of the whole command and of its parts on one problem."""
    from autoplace.problem_file import save_problem

    path = folder / f"{goal}-{ops}.json"
    save_problem(transformer(ops, goal=goal), path)
    runs, parts = [], []
    for _ in range(rounds):
        seconds, answer = command_seconds(path, folder / "answer.json", options)
        runs.append((seconds, answer))
        parts.append({**part_seconds(path), "place": answer["seconds"]})
    answer = runs[-1][1]
    return {
        "ops": ops,
        "goal": goal,
        "file_mb": path.stat().st_size / 1e6,
        "whole_s": statistics.median(seconds for seconds, _ in runs),
        "whole_s_of_each_round": [seconds for seconds, _ in runs],
        "parts_s": {part: statistics.median(row[part] for row in parts) for part in PARTS},
        "evaluations": answer["evaluations"],
        "strategy": answer["strategy"],
        "objective": answer["outcome"]["objective"],
        "best_heuristic_objective": parts[0]["heuristics_objective"],
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a row a problem."""
    columns = ("whole", *PARTS)
    print(f"{'ops':>8} {'goal':<11}" + "".join(f"{c + ' s':>13}" for c in columns) + f"{'J / best heuristic':>20}")
    for row in rows:
        cells = [row["whole_s"], *(row["parts_s"][part] for part in PARTS)]
        ratio = row["objective"] / row["best_heuristic_objective"]
        print(f"{row['ops']:>8} {row['goal']:<11}" + "".join(f"{c:>13.3f}" for c in cells) + f"{ratio:>20.3f}")
    for row in rows:
        if row["ops"] == TARGET_OPS:
            verdict = "within" if row["whole_s"] <= TARGET_S else "beyond"
            print(f"{TARGET_OPS:,} ops, {row['goal']}: {row['whole_s']:.1f} s, {verdict} the {TARGET_S:.0f} s wanted")


def main() -> None:
    """Measure, print a table and keep the result; arguments after `--` go to `autoplace place`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--goals", nargs="+", default=["latency", "throughput"], choices=["latency", "throughput"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print only, keep nothing")
    parser.add_argument("place", nargs="*", help="options of `autoplace place`, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure(200, "latency", 1, folder, given.place)  # compiles what is not compiled yet
        rows = [measure(ops, goal, given.rounds, folder, given.place) for ops in given.ops for goal in given.goals]
    show(rows)
    if not given.dry:
        print(f"kept in {save('growth', seed=0, data={'target_s_at_10000_ops': TARGET_S, 'rows': rows})}")


if __name__ == "__main__":
    main()
