"""The learned planner against heuristics, annealing, the dynamic programme and the optimum, on problems held out.

None of the problems was drawn in training. All ratios are J_a / J_b, geometric means over problems with 95% intervals;
seeds are averaged within a problem first. The small problems are in the table `exact` alone: elsewhere they would only
add ties. Tables, by the names that `--tables` takes:

    zero-shot    one greedy rollout of the policy, no search, against each heuristic and the best of them
    evaluations  search with the policy against annealing from the best heuristic, at equal evaluations
    seconds      the same at equal seconds, from the problem object on; the policy is loaded before
    noise        annealing against itself on other seeds
    dp           search with the policy against the dynamic programme, on operator-level graphs with a throughput goal
    exact        search with the policy, and annealing, against the optimum, on small problems where it is proven
    ablation     the same search without the policy

In every table's runs, a plan worse than a heuristic's, or infeasible, is an error: the script says so and exits with 1.
Every run is kept in `--runs` as it ends and is not made again; `--summary` makes the tables of what there is.

    python scripts/bench_placement.py --workers 2                 # everything: hours; says how many before it starts
    python scripts/bench_placement.py --tables zero-shot exact --only small
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import placement_parts as parts
import placement_runs as runs
import results as kept
from placement_runs import HEURISTICS, Case, Method, Run
from placement_tables import AGAIN, Arm, Results, against_exact, never_worse, noise, problem_rows, show
from rich.console import Console

from autoplace.policy.policy import Policy

TABLES = ("zero-shot", "evaluations", "seconds", "noise", "dp", "exact", "ablation")
SMALL = "small"
"""Tag of the problems that the exact solver is tried on."""
MS_AN_EVALUATION = 0.002
"""Guess of what an evaluation takes for each op, search included, ms; for the estimate of the whole alone."""


def make_methods(policy: Policy) -> dict[str, Method]:
    """Return everything that is compared, by name."""
    from autoplace.strategies.annealing import AnnealingStrategy
    from autoplace.strategies.chunks import ChunksStrategy
    from autoplace.strategies.dp import PipelineDpStrategy
    from autoplace.strategies.guided import GuidedStrategy
    from autoplace.strategies.heft import HeftStrategy
    from autoplace.strategies.metf import MetfStrategy
    from autoplace.strategies.single import SingleStrategy

    kinds = (SingleStrategy, ChunksStrategy, HeftStrategy, MetfStrategy, PipelineDpStrategy)
    return {
        **{name: runs.by_strategy(kind) for name, kind in zip(HEURISTICS, kinds, strict=True)},
        "greedy": runs.greedy(policy),
        "annealing": runs.by_strategy(AnnealingStrategy),
        "guided": runs.by_strategy(partial(GuidedStrategy, policy), policy),
        "unguided": runs.by_strategy(partial(GuidedStrategy, None)),
        "exact": runs.exact(),
    }


def planned(cases: Sequence[Case], options: argparse.Namespace) -> list[list[Run]]:
    """Return the runs of each (problem, seed), in the order in which they are made; budget by budget, A B A B.

    The runs without chance belong to the first seed of their problem.
    """
    groups = []
    seeds = range(max([options.seeds, *options.seeds_seconds]))
    for seed, case in product(seeds, cases):
        name = case.problem.name
        group = [Run(problem=name, method=m) for m in (*HEURISTICS, "greedy")] if seed == 0 else []
        if seed == 0 and "exact" in options.tables and SMALL in case.tags:
            group.append(Run(problem=name, method="exact", budget=f"{options.exact_seconds:g}s"))
        for budget, count in [(b, options.seeds) for b in _evaluations(options)] + list(_seconds(options).items()):
            if seed < count:
                methods = _methods_at(budget, case, options)
                group += [Run(problem=name, method=m, budget=budget, seed=seed) for m in methods]
                if budget == options.noise_at and "noise" in options.tables and SMALL not in case.tags:
                    group.append(Run(problem=name, method="annealing", budget=budget, seed=seed + AGAIN))
        if group:
            groups.append(group)
    return groups


def _methods_at(budget: str, case: Case, options: argparse.Namespace) -> list[str]:
    """Return what runs on a problem at a budget, by the tables that want it."""
    tables, counted = {*options.tables}, budget.endswith("e")
    if SMALL in case.tags:
        near = "exact" in tables and budget in (_evaluations(options)[-1], _short(options))
        return ["annealing", "guided"] if near else []
    compared = ("evaluations" if counted else "seconds") in tables
    ablated = "ablation" in tables and (counted or budget == _short(options))
    noisy = "noise" in tables and budget == options.noise_at
    last = budget == list(_seconds(options))[-1]
    for_dp = "dp" in tables and last and {"operator", "throughput"} <= case.tags
    wanted = {"annealing": compared or noisy, "guided": compared or ablated or for_dp, "unguided": ablated}
    return [method for method, want in wanted.items() if want]


def _evaluations(options: argparse.Namespace) -> list[str]:
    return [f"{count}e" for count in sorted(options.evaluations)]


def _seconds(options: argparse.Namespace) -> dict[str, int]:
    """Return the budgets of seconds with their numbers of seeds, shortest first."""
    pairs = zip(options.seconds, options.seeds_seconds, strict=True)
    return {f"{seconds:g}s": seeds for seconds, seeds in sorted(pairs)}


def _short(options: argparse.Namespace) -> str:
    """Return the budget of seconds that the exact and the ablation table are made at: 10, or the middle one."""
    budgets = list(_seconds(options))
    return "10s" if "10s" in budgets else budgets[len(budgets) // 2]


def estimate_s(wanted: Sequence[Run], cases: Sequence[Case]) -> float:
    """Return about how many seconds of one process the runs take."""
    ops = {case.problem.name: case.problem.num_ops for case in cases}
    total = 0.0
    for run in wanted:
        if run.budget.endswith("s"):
            total += float(run.budget[:-1])
        else:
            total += int(run.budget[:-1] or 20) * ops[run.problem] * MS_AN_EVALUATION / 1e3
    return total


def tables_of(results: Results, options: argparse.Namespace) -> dict[str, Any]:
    """Return all tables that the results allow, JSON-ready."""
    arm, seconds, counts = results.arm, list(_seconds(options)), _evaluations(options)
    main = results.where(lambda tags: SMALL not in tags)
    operators = main.where(lambda tags: {"operator", "throughput"} <= tags)
    best = results.best_of("best heuristic", HEURISTICS)
    rivals = [*(arm(name) for name in HEURISTICS), results.best_of("better of heft, metf", ("heft", "metf")), best]

    def versus(budgets: Sequence[str], other: Callable[[str], Arm]) -> list[dict[str, Any]]:
        return [row for budget in budgets for row in main.compare(arm("guided", budget), other(budget))]

    near = [arm(method, budget) for method in ("guided", "annealing") for budget in (counts[-1], _short(options))]
    return {
        "zero_shot": [row for rival in rivals for row in main.compare(arm("greedy"), rival)],
        "evaluations": versus(counts, lambda budget: arm("annealing", budget)),
        "seconds": versus(seconds, lambda budget: arm("annealing", budget)),
        "noise": noise(main, "annealing", options.noise_at),
        "dp": [row for budget in seconds for row in operators.compare(arm("guided", budget), arm("dp"), tags=())],
        "exact": against_exact(results, near),
        "ablation": versus([*counts, _short(options)], lambda budget: arm("unguided", budget)),
        "best_heuristic": versus(counts + seconds, lambda budget: best),
        "never_worse": never_worse(results, "guided"),
        "spent": [results.spent(m, b) for b in counts + seconds for m in ("annealing", "guided", "unguided")],
    }


def report(tables: dict[str, Any], results: Results, console: Console) -> bool:
    """Print the tables; return whether there is nothing that must not be."""
    show(console, "Zero-shot: one greedy rollout of the policy", tables["zero_shot"])
    show(console, "Search with the policy against annealing, at equal evaluations", tables["evaluations"])
    show(console, "Search with the policy against annealing, at equal seconds", tables["seconds"])
    show(console, "Noise: annealing against itself on other seeds", tables["noise"]["rows"])
    show(console, "Search with the policy against the dynamic programme, operator-level throughput", tables["dp"])
    exact = tables["exact"]
    show(console, f"Against the optimum, proven on {exact['proven']} of {exact['tried']}", exact["rows"])
    for row in exact["rows"]:
        if "within_1_percent" in row:
            shares = f"{row['within_1_percent']:.0%} within 1%, {row['within_0.01_percent']:.0%} within 0.01%"
            console.print(f"{row['ours']}: {shares}, worst {row['worst'] or float('inf'):.4f}")
    show(console, "Ablation: the same search with the policy against without", tables["ablation"])
    show(console, "Search with the policy against the best heuristic", tables["best_heuristic"])
    for row in tables["spent"]:
        if row["runs"]:
            console.print(
                f"{row['method']} {row['budget']}: {row['runs']} runs, median {row['median_seconds']:.2f} s, "
                f"{row['median_of_budget']:.3f} of the budget in the middle, {row['most_of_budget']:.3f} at most, "
                f"{row['over']} runs more than 5% over",
                style="red" if row["over"] else "",
            )
    checks, fine = tables["never_worse"], True
    console.print(f"never worse: {checks['checked']} plans of the search checked against every heuristic")
    for title, found in (
        ("worse than a heuristic", checks["worse"]),
        ("infeasible where a heuristic is not", checks["infeasible"]),
        ("below a proven optimum", exact["below_the_optimum"]),
        ("broken", [f"{r['problem']} {r['method']} {r['budget']}: {r['error']}" for r in results.errors]),
    ):
        console.print(f"{title}: {len(found)}", style="red" if found else "")
        for line in found[:20]:
            console.print(f"  {line}")
        fine = fine and not found
    return fine


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts.add_run_options(parser, runs="placement.jsonl")
    parser.add_argument("--policy", default="default", help="shipped name or directory")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--evaluations", nargs="+", type=int, default=[50, 200, 2000])
    parser.add_argument("--seeds", type=int, default=5, help="at each budget of evaluations")
    parser.add_argument("--seconds", nargs="+", type=float, default=[1.0, 10.0, 60.0])
    parser.add_argument("--seeds-seconds", nargs="+", type=int, default=[5, 3, 1], help="at each budget of seconds")
    parser.add_argument("--exact-seconds", type=float, default=60.0)
    parser.add_argument("--noise-at", default="200e", help="budget of the A/A runs: 200e or 1s")
    parser.add_argument("--name", default="placement", help="of the file under docs/results/")
    options = parser.parse_args(argv)
    if len(options.seconds) != len(options.seeds_seconds):
        parser.error("--seeds-seconds needs one number for each of --seconds")
    return options


def summarise(options: argparse.Namespace, cases: Sequence[Case], methods: dict[str, Method]) -> bool:
    """Print and keep the tables of what there is; return whether nothing is wrong."""
    results = Results(runs.read_rows(options.runs), cases, methods)
    tables = tables_of(results, options)
    fine = report(tables, results, Console(width=None if sys.stdout.isatty() else 140))
    data = {
        "policy": {"name": options.policy, "digest": methods["guided"].policy},
        "commits": sorted({row["commit"] for row in results.rows}),
        "tables": tables,
        "problems": problem_rows(results),
    }
    print(kept.save(options.name, seed=options.problem_seed, data=data))
    return fine


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print the tables and keep them."""
    from autoplace.agents.benchmark import benchmark_problems
    from autoplace.zoo import load_policy

    options = parse(argv)
    cases = parts.chosen_cases(benchmark_problems(seed=options.problem_seed), options.only)
    methods = make_methods(load_policy(options.policy))
    groups = planned(cases, options)
    if options.part:
        parts.make_part(groups, methods, cases, options)
        return 0
    if not options.summary:
        whole = [run for group in groups for run in group]
        left = runs.missing(whole, methods, cases, options.runs)
        hours = estimate_s(left, cases) / 3600 / options.workers
        print(f"{len(left)} of {len(whole)} runs to make, about {hours:.2f} hours", flush=True)
        if status := parts.in_parts([str(Path(__file__)), *(sys.argv[1:] if argv is None else argv)], options.workers):
            return status
    return 0 if summarise(options, cases, methods) else 1


if __name__ == "__main__":
    sys.exit(main())
