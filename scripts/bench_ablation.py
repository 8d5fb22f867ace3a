"""What each part of the policy and of its training is worth: policies trained with one part left out, against the full.

    python scripts/bench_ablation.py full=default without-imitation=runs/a without-message-passing=runs/b

The first policy named is the full one. All should have been trained with equal budgets; each one's configuration is
in the result. On the benchmark's held-out problems each places with one greedy rollout, with the best of 32 evaluated
rollouts, and with 200 evaluations of the search that it guides. Ratios are J_variant / J_full: above 1 the part helps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import placement_parts as parts
import placement_runs as runs
import results as kept
from placement_runs import Case, Method, Run
from placement_tables import Results, problem_rows, show
from rich.console import Console

from autoplace.policy.policy import Policy

KINDS = {"greedy": "", "best-of": "32e", "guided": "200e"}
"""Ways to place with a policy, and the budget of each."""


def make_methods(policies: Mapping[str, Policy]) -> dict[str, Method]:
    """Return `kind@policy` for every kind and policy."""
    from autoplace.strategies.guided import GuidedStrategy
    from autoplace.strategies.learned import LearnedStrategy

    methods = {}
    for name, policy in policies.items():
        methods[f"greedy@{name}"] = runs.greedy(policy)
        methods[f"best-of@{name}"] = runs.by_strategy(partial(LearnedStrategy, policy), policy)
        methods[f"guided@{name}"] = runs.by_strategy(partial(GuidedStrategy, policy), policy)
    return methods


def planned(cases: Sequence[Case], policies: Sequence[str], seeds: int) -> list[list[Run]]:
    """Return the runs of each (problem, seed): kind by kind, the policies in turn."""
    return [
        [
            Run(problem=case.problem.name, method=f"{kind}@{name}", budget=budget, seed=seed)
            for kind, budget in KINDS.items()
            if seed == 0 or kind != "greedy"
            for name in policies
        ]
        for seed, case in product(range(seeds), cases)
    ]


def tables_of(results: Results, policies: Sequence[str]) -> dict[str, Any]:
    """Return the ratios of every other policy against the first, and who found nothing feasible how often."""
    full, *variants = policies
    ratios = {
        kind: [
            row
            for name in variants
            for row in results.compare(results.arm(f"{kind}@{name}", budget), results.arm(f"{kind}@{full}", budget))
        ]
        for kind, budget in KINDS.items()
    }
    infeasible = {
        f"{kind}@{name}": sum(
            row["objective"] is None for row in results.rows if row["method"] == f"{kind}@{name}" and "error" not in row
        )
        for kind, name in product(KINDS, policies)
    }
    return {"ratios": ratios, "infeasible_runs": infeasible}


def report(tables: dict[str, Any], results: Results, console: Console) -> bool:
    """Print the tables; return whether every run ended."""
    for kind, rows in tables["ratios"].items():
        show(console, f"{kind} {KINDS[kind]}: J of the variant / J of the full policy; above 1 the part helps", rows)
    for name, count in tables["infeasible_runs"].items():
        console.print(f"{name}: {count} runs without a feasible plan")
    for row in results.errors:
        console.print(f"broken: {row['problem']} {row['method']} {row['budget']}: {row['error']}", style="red")
    return not results.errors


def named(text: str) -> tuple[str, str]:
    """Split `name=policy`; argparse reports what has no name."""
    name, sign, where = text.partition("=")
    if not (name and sign and where) or "@" in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not name=policy, such as full=default")
    return name, where


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="+", type=named, help="name=policy, the full one first")
    parts.add_run_options(parser, runs="ablation.jsonl")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(argv)
    if len(dict(options.policies)) < max(2, len(options.policies)):
        parser.error("name two policies or more, each with a name of its own")
    return options


def summarise(
    options: argparse.Namespace, cases: Sequence[Case], policies: Mapping[str, Policy], methods: dict[str, Method]
) -> bool:
    """Print and keep the tables of what there is; return whether nothing is wrong."""
    results = Results(runs.read_rows(options.runs), cases, methods)
    tables = tables_of(results, list(policies))
    fine = report(tables, results, Console(width=None if sys.stdout.isatty() else 140))
    about = [
        {"name": n, "digest": runs.policy_digest(p), "config": asdict(p.config), "parameters": _parameters(p)}
        for n, p in policies.items()
    ]
    data = {
        "policies": about,
        "commits": sorted({row["commit"] for row in results.rows}),
        "tables": tables,
        "problems": problem_rows(results),
    }
    print(kept.save("ablation", seed=options.problem_seed, data=data))
    return fine


def _parameters(policy: Policy) -> int:
    return sum(int(tensor.size) for tensor in policy.tensors.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print the tables and keep them."""
    from autoplace.agents.benchmark import benchmark_problems
    from autoplace.zoo import load_policy

    options = parse(argv)
    cases = parts.chosen_cases(benchmark_problems(seed=options.problem_seed), options.only)
    policies = {name: load_policy(where) for name, where in options.policies}
    methods = make_methods(policies)
    groups = planned(cases, list(policies), options.seeds)
    if options.part:
        parts.make_part(groups, methods, cases, options)
        return 0
    if not options.summary:
        left = runs.missing([run for group in groups for run in group], methods, cases, options.runs)
        print(f"{len(left)} of {sum(map(len, groups))} runs to make", flush=True)
        if status := parts.in_parts([str(Path(__file__)), *(sys.argv[1:] if argv is None else argv)], options.workers):
            return status
    return 0 if summarise(options, cases, policies, methods) else 1


if __name__ == "__main__":
    sys.exit(main())
