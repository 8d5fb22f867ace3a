"""`autoplace place`: from a problem file to a placement file. No model, no real run: the simulator decides."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from autoplace.errors import InfeasibleError, InputError, PolicyError
from autoplace.files import write_text_atomically
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.problem import Problem

if TYPE_CHECKING:
    from autoplace.policy.policy import Policy
    from autoplace.strategies import Comparison, Strategy

__all__ = ["place"]

AUTO = "auto"
DEFAULT_POLICY = "default"
DEFAULT_EVALUATIONS = 2000
"""Evaluations of a run that names no limit."""


def place(
    problem: Annotated[Path, typer.Argument(help="Problem file (autoplace.problem/1).")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Placement file to write; default: standard output.")
    ] = None,
    strategy: Annotated[str, typer.Option("--strategy", help="A strategy's name, or auto for all of them.")] = AUTO,
    budget: Annotated[
        int | None, typer.Option("--budget", help="Placements to simulate, all strategies together. [default: 2000]")
    ] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", help="Seconds to search, best so far wins.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of all searches.")] = 0,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Learned policy: name, folder, models:/ URI, or none.")
    ] = None,
) -> None:
    """Place a problem file's ops on its devices; no model needed."""
    from autoplace.problem_file import load_problem, placement_to_json
    from autoplace.strategies import Budget, compare, explain_infeasible, prove_infeasible

    console = Console(stderr=output is None)
    if output is not None and output.is_dir():
        raise InputError(f"{output} is a folder; name a file for --output")
    limit = Budget(evaluations=DEFAULT_EVALUATIONS if budget is None and seconds is None else budget, seconds=seconds)
    task = load_problem(problem)
    strategies, notes = _strategies(strategy, policy)
    begin = time.perf_counter()
    with console.status(f"Placing {task.num_ops} ops on {task.num_devices} devices"):
        comparison = compare(task, strategies, limit, seed)
    spent = time.perf_counter() - begin
    best = comparison.best
    if best is None or best.assignment is None:
        if strategy != AUTO and prove_infeasible(task) is None:
            raise InfeasibleError(f"strategy {strategy!r} found no feasible placement; use --strategy auto to ask all")
        raise InfeasibleError(explain_infeasible(task))
    plan = Plan.from_assignment(task, best.assignment, strategy=best.strategy)
    outcome = _show(console, task, comparison)
    for note in notes:
        console.print(f"Note: {note}", highlight=False, markup=False, soft_wrap=True)
    _summarise(console, task, plan, comparison, spent)
    answer = placement_to_json(task, plan, outcome, evaluations=comparison.evaluations, seconds=spent, seed=seed)
    _write(console, json.dumps(answer, indent=1) + "\n", output)


def _strategies(name: str, policy: str | None) -> tuple[list[Strategy], list[str]]:
    """Make what was asked for; with notes on what it had to go without."""
    from autoplace.strategies import make_strategy, placement_strategy_names, portfolio_strategies

    names = (AUTO, *placement_strategy_names())
    if name not in names:
        raise InputError(f"strategy {name!r} is unknown; use one of {', '.join(names)}")
    if name == AUTO:
        learned, notes = _policy(policy)
        return portfolio_strategies(learned), notes
    if name == "guided":
        learned, notes = _policy(policy)
        return [make_strategy(name, learned)], notes
    if name == "learned":
        return [make_strategy(name, _load(policy or DEFAULT_POLICY))], []
    return [make_strategy(name)], []


def _policy(spec: str | None) -> tuple[Policy | None, list[str]]:
    """Load the policy; the default one may be missing, one that was named may not."""
    if spec == "none":
        return None, []
    if spec is not None:
        return _load(spec), []
    try:
        return _load(DEFAULT_POLICY), []
    except PolicyError as error:
        return None, [f"searched without a learned policy: {error}"]


def _load(spec: str) -> Policy:
    from autoplace.zoo import load_policy

    return load_policy(spec)


def _show(console: Console, problem: Problem, comparison: Comparison) -> Outcome:
    """Print a row per strategy, best first, and return the best one's outcome."""
    from autoplace.simulate.evaluator import SimulatedEvaluator

    evaluator, best = SimulatedEvaluator(problem), comparison.best
    table = Table(title=f"{problem.name}: {problem.objective.goal}, by simulation", title_justify="left")
    table.add_column("strategy")
    for column in ("objective J", "latency ms", "period ms", "energy J"):
        table.add_column(column, justify="right")
    table.add_column("feasible")
    chosen = Outcome(source="simulated", feasible=False)
    for proposal in sorted(comparison.proposals, key=lambda p: (p is not best, p.objective)):
        if proposal.assignment is None:
            table.add_row(proposal.strategy, "-", "-", "-", "-", "none found")
            continue
        outcome = evaluator.outcome(proposal.assignment)
        figures = (outcome.objective, outcome.latency_ms, outcome.period_ms, outcome.energy_j)
        cells = ["-" if value is None else f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}" for value in figures]
        style = "bold" if proposal is best else ""
        table.add_row(proposal.strategy, *cells, "yes", style=style)
        chosen = outcome if proposal is best else chosen
    console.print(table)
    return chosen


def _summarise(console: Console, problem: Problem, plan: Plan, comparison: Comparison, spent: float) -> None:
    counts = Counter(plan.replicas[0].assignment.values())
    shares = ", ".join(f"{device.name} {counts[device.name]}" for device in problem.cluster.devices)
    console.print(
        f"Chosen: {plan.strategy}. Ops per device: {shares}. {comparison.evaluations:,} placements simulated in "
        f"{spent:.2f} s.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _write(console: Console, text: str, output: Path | None) -> None:
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        write_text_atomically(output, text)
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror or error}; name another file") from None
    console.print(f"Wrote {output}", highlight=False, markup=False, soft_wrap=True)
