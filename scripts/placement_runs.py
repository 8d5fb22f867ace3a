"""Runs of placement strategies, one at a time, each kept on disk as it ends; what the placement benchmarks share.

A run is (problem, method, budget, seed). Its plan is scored afresh by a `SimulatedEvaluator` of this file's own, never
by what the strategy says of it. Every run gets a copy of the problem on which nothing was computed before, so that its
seconds hold everything from the problem on: tables, heuristics, search. Policies are loaded before. No statistics here.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import InfeasibleError
from autoplace.policy.policy import Policy
from autoplace.problem import Problem
from autoplace.simulate import SimulatedEvaluator
from autoplace.strategies import Budget, Strategy

HEURISTICS = ("single", "chunks", "heft", "metf", "dp")


class Case(Protocol):
    """A problem of the benchmark and what it is an example of."""

    @property
    def problem(self) -> Problem:
        """What to place."""

    @property
    def tags(self) -> frozenset[str]:
        """Such as `operator`, `memory`, `throughput`, `latency`, `small`."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run to make. `budget` is "" (none), "200e" (evaluations) or "10s" (seconds)."""

    problem: str
    method: str
    budget: str = ""
    seed: int = 0


@dataclass(kw_only=True)
class Answer:
    """What a method found."""

    assignment: NDArray[np.int32] | None = None
    """int32[N]; None = nothing feasible."""
    evaluations: int = 0
    """Evaluations that it says it spent."""
    more: dict[str, Any] = field(default_factory=dict)
    """JSON-ready: what else is to be kept."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to place a problem."""

    place: Callable[[Problem, str, int], Answer]
    """From problem, budget and seed."""
    policy: str = ""
    """Digest of the policy that it uses; "" = none."""
    warm: bool = True
    """Whether it is called before anything is timed; not where its time is compared with nobody's."""


def parse_budget(budget: str) -> Budget:
    """Return the budget that "", "200e" or "10s" means."""
    if not budget:
        return Budget()
    amount, unit = budget[:-1], budget[-1]
    return Budget(evaluations=int(amount)) if unit == "e" else Budget(seconds=float(amount))


def by_strategy(make: Callable[[], Strategy], policy: Policy | None = None) -> Method:
    """Return the method that takes a strategy's first plan."""

    def place(problem: Problem, budget: str, seed: int) -> Answer:
        strategy = make()
        plans = strategy.propose(problem, budget=parse_budget(budget), seed=seed)
        found = plans[0].assignment_array(problem) if plans else None
        return Answer(assignment=found, evaluations=strategy.evaluations)

    return Method(place=place, policy=policy_digest(policy))


def greedy(policy: Policy) -> Method:
    """Return the method that takes the policy's greedy placement; the simulator is never asked."""
    return Method(
        place=lambda problem, budget, seed: Answer(assignment=policy.greedy(problem)), policy=policy_digest(policy)
    )


def exact() -> Method:
    """Return the method that solves a problem to optimality within its seconds, or keeps the bound it reached."""
    from autoplace.strategies.exact import solve

    def place(problem: Problem, budget: str, seed: int) -> Answer:
        limit = parse_budget(budget).seconds
        assert limit is not None, "the exact solver takes seconds"
        result = solve(problem, seconds=limit)
        bound = result.lower_bound
        known = bound is not None and math.isfinite(bound)
        more = {"lower_bound": bound if known else None, "proven": result.proven, "solver": result.method}
        return Answer(assignment=result.assignment, more=more)

    return Method(place=place, warm=False)


def policy_digest(policy: Policy | None) -> str:
    """Return 12 hex digits that stand for a policy's configuration and weights; "" for none."""
    if policy is None:
        return ""
    digest = hashlib.sha256(repr(policy.config).encode())
    for name, tensor in sorted(policy.tensors.items()):
        digest.update(name.encode() + np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()[:12]


def fresh(problem: Problem) -> Problem:
    """Return a copy on which nothing was computed before: the original keeps what it once derived."""
    return problem.with_(graph=replace(problem.graph), cluster=replace(problem.cluster))


def make_run(run: Run, method: Method, problem: Problem) -> dict[str, Any]:
    """Make one run and return its row, JSON-ready: a null `objective` means that nothing feasible was found.

    A strategy that breaks gets a row with its `error`, which counts as not run.
    """
    row: dict[str, Any] = {**asdict(run), "policy": method.policy, "fingerprint": problem.fingerprint}
    copy, answer = fresh(problem), Answer()
    gc.collect()
    start = time.perf_counter()
    try:
        answer = method.place(copy, run.budget, run.seed)
    except InfeasibleError as error:
        row["reason"] = str(error)
    except Exception as error:  # a night of runs must outlive one that breaks; the summary names it
        row["error"] = f"{type(error).__name__}: {error}"
    row["seconds"] = round(time.perf_counter() - start, 4)
    objective = math.inf
    if answer.assignment is not None:
        objective = float(SimulatedEvaluator(problem).score(answer.assignment)[0])
    row["objective"] = objective if math.isfinite(objective) else None
    return {**row, "evaluations": answer.evaluations, **answer.more}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what makes a row the one that is looked for."""
    return row["fingerprint"], row["problem"], row["method"], row["budget"], row["seed"], row["policy"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, the last of each run; a line torn by a crash is skipped."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows[key(row)] = row
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return list(rows.values())


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row and sync it; one write, so that two processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        os.write(handle, b"\n" * torn + json.dumps(row).encode() + b"\n")
        os.fsync(handle)
    finally:
        os.close(handle)


def missing(runs: Iterable[Run], methods: dict[str, Method], cases: Sequence[Case], path: Path) -> list[Run]:
    """Return the runs that the file does not hold yet; broken ones are made again."""
    done = {key(row) for row in read_rows(path) if not row.get("error")}
    prints = {case.problem.name: case.problem.fingerprint for case in cases}

    def known(run: Run) -> bool:
        row = {**asdict(run), "fingerprint": prints[run.problem], "policy": methods[run.method].policy}
        return key(row) in done

    return [run for run in runs if not known(run)]


def make_runs(
    runs: Sequence[Run],
    methods: dict[str, Method],
    cases: Sequence[Case],
    path: Path,
) -> None:
    """Make the runs that the file does not hold yet, in order, and append each as it ends."""
    problems = {case.problem.name: case.problem for case in cases}
    commit = source_commit()
    wanted = missing(runs, methods, cases, path)
    for count, run in enumerate(wanted, 1):
        row = make_run(run, methods[run.method], problems[run.problem])
        append_row(path, {**row, "commit": commit})
        print(
            f"{count}/{len(wanted)} {run.problem} {run.method} {run.budget} seed {run.seed}: "
            f"J {row['objective']} in {row['seconds']:.2f} s{' ' + row['error'] if 'error' in row else ''}",
            flush=True,
        )


def source_commit() -> str:
    """Return the commit of the sources that ran, marked where they were changed since."""
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=here
    )
    return done.stdout.strip() or "unknown"
