"""Tables of the placement benchmarks, from the rows that `placement_runs` keeps. Runs nothing.

Every comparison is J_a / J_b as a geometric mean over problems (→ `autoplace.agents.statistics`): below 1 the first is
better. Each is made for all problems together and for each kind of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from placement_runs import HEURISTICS, Case, Method
from rich.console import Console
from rich.table import Table

from autoplace.agents.statistics import log_ratio, summarise

TAGS = ("operator", "memory", "throughput", "latency")
AGAIN = 100
"""Added to a seed for the second of two equal runs, which show the noise."""
EQUAL = 1e-9
"""Relative difference below which two objectives are one."""
OVER = 1.05
"""Part of its budget from which on a run counts as over it: what it found had time that others had not."""
PROOF = 2e-6
"""Twice the relative distance from its bound at which the exact solver calls a placement proven."""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison."""

    label: str
    find: Callable[[str], dict[int, float]]
    """Name of a problem to {seed: J}; empty where nothing ran, inf where nothing feasible was found."""


class Results:
    """The rows of the problems and policies at hand, by problem, method, budget and seed."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], cases: Sequence[Case], methods: Mapping[str, Method]) -> None:
        """Keep the rows that belong to these problems and to the policies of these methods."""
        prints = {case.problem.name: case.problem.fingerprint for case in cases}
        self.cases = list(cases)
        self.rows = [
            row
            for row in rows
            if prints.get(row["problem"]) == row["fingerprint"]
            and row["method"] in methods
            and methods[row["method"]].policy == row["policy"]
        ]
        self.errors = [row for row in self.rows if row.get("error")]
        self._found: dict[tuple[str, str, str], dict[int, float]] = {}
        for row in self.rows:
            if not row.get("error"):
                value = math.inf if row["objective"] is None else float(row["objective"])
                self._found.setdefault((row["problem"], row["method"], row["budget"]), {})[row["seed"]] = value
        self.log_ratios: dict[str, dict[str, float]] = {case.problem.name: {} for case in cases}
        """Problem to {comparison: mean over seeds of ln(J_a / J_b)}, of all comparisons made so far."""

    def objectives(self, problem: str, method: str, budget: str = "") -> dict[int, float]:
        """Return {seed: J} of a method's first runs on a problem."""
        found = self._found.get((problem, method, budget), {})
        return {seed: value for seed, value in found.items() if seed < AGAIN}

    def arm(self, method: str, budget: str = "") -> Arm:
        """Return a method at a budget as a side of a comparison."""
        return Arm(f"{method} {budget}".strip(), lambda problem: self.objectives(problem, method, budget))

    def again(self, method: str, budget: str) -> Arm:
        """Return the second of two equal runs of a method."""

        def find(problem: str) -> dict[int, float]:
            found = self._found.get((problem, method, budget), {})
            return {seed - AGAIN: value for seed, value in found.items() if seed >= AGAIN}

        return Arm(f"{method} {budget} again", find)

    def best_of(self, label: str, methods: Sequence[str]) -> Arm:
        """Return the best of several methods without chance, where all of them ran."""

        def find(problem: str) -> dict[int, float]:
            found = [self.objectives(problem, method) for method in methods]
            return {0: min(min(f.values()) for f in found)} if all(found) else {}

        return Arm(label, find)

    def compare(self, ours: Arm, others: Arm, *, tags: Sequence[str] = TAGS) -> list[dict[str, Any]]:
        """Return a JSON-ready row for all problems, and one for each tag, with those on which both ran."""
        name = f"{ours.label} / {others.label}"
        logs: list[tuple[Case, float]] = []
        for case in self.cases:
            one, other = ours.find(case.problem.name), others.find(case.problem.name)
            if one and other:
                logs.append((case, log_ratio(one, other)))
                self.log_ratios[case.problem.name][name] = logs[-1][1]
        rows = []
        for tag in ("all", *tags):
            values = [value for case, value in logs if tag == "all" or tag in case.tags]
            if values:
                rows.append({"ours": ours.label, "others": others.label, "kind": tag, **summarise(values).to_json()})
        return rows

    def where(self, chosen: Callable[[frozenset[str]], bool]) -> Results:
        """Return the results on the problems whose tags are chosen; comparisons are kept in one place."""
        found = Results([], [case for case in self.cases if chosen(case.tags)], {})
        found.rows, found._found, found.log_ratios = self.rows, self._found, self.log_ratios
        return found

    def spent(self, method: str, budget: str) -> dict[str, Any]:
        """Return what runs with a budget really took of it, at most and in the middle."""
        rows = [r for r in self.rows if (r["method"], r["budget"]) == (method, budget) and not r.get("error")]
        amount, key = float(budget[:-1]), "evaluations" if budget.endswith("e") else "seconds"
        used = [float(row[key]) / amount for row in rows]
        seconds = [float(row["seconds"]) for row in rows]
        return {
            "method": method,
            "budget": budget,
            "runs": len(rows),
            "over": sum(part > OVER for part in used),
            "most_of_budget": max(used, default=0.0),
            "median_of_budget": float(np.median(used)) if used else 0.0,
            "median_seconds": float(np.median(seconds)) if seconds else 0.0,
        }


def noise(results: Results, method: str, budget: str) -> dict[str, Any]:
    """Return the A/A comparison of a method with itself on other seeds, and the spread of one pair of runs."""
    once, again = results.arm(method, budget), results.again(method, budget)
    pairs = []
    for case in results.cases:
        one, other = once.find(case.problem.name), again.find(case.problem.name)
        pairs += [math.log(one[s] / other[s]) for s in {*one} & {*other} if math.isfinite(one[s] + other[s])]
    spread = float(np.std(pairs, ddof=1)) if len(pairs) > 1 else 0.0
    return {"rows": results.compare(once, again), "pairs": len(pairs), "log_ratio_sd_of_one_pair": spread}


def never_worse(results: Results, method: str) -> dict[str, Any]:
    """Return the runs of a method whose plan is worse than a heuristic's, or infeasible where one of theirs is not."""
    best_of_all = results.best_of("best heuristic", HEURISTICS)
    checked, worse, infeasible = 0, [], []
    for row in results.rows:
        best = best_of_all.find(row["problem"]).get(0, math.inf)
        if row["method"] != method or row.get("error") or math.isinf(best):
            continue
        checked += 1
        label = f"{row['problem']} {row['budget']} seed {row['seed']}"
        if row["objective"] is None:
            infeasible.append(label)
        elif row["objective"] > best * (1 + EQUAL):
            worse.append(f"{label}: {row['objective'] / best:.6f} of the best heuristic")
    return {"checked": checked, "worse": worse, "infeasible": infeasible}


def against_exact(results: Results, arms: Sequence[Arm]) -> dict[str, Any]:
    """Return how near to the proven optimum each arm comes; a plan below a proven bound is an error of the solver."""
    solved = [row for row in results.rows if row["method"] == "exact" and not row.get("error")]
    proven = {row["problem"]: row for row in solved if row["proven"] and row["objective"] is not None}
    optimum = Arm("optimum", lambda p: {0: float(proven[p]["objective"])} if p in proven else {})
    table, below = [], []
    for arm in arms:
        rows = results.compare(arm, optimum, tags=("throughput", "latency"))
        name = f"{arm.label} / {optimum.label}"
        gaps = np.asarray([results.log_ratios[p][name] for p in proven if name in results.log_ratios[p]])
        below += [f"{p}: {arm.label}" for p in proven if results.log_ratios[p].get(name, 0.0) < math.log(1 - PROOF)]
        for row in rows[:1]:
            table.append(
                {
                    **row,
                    "within_1_percent": float((gaps <= math.log(1.01)).mean()),
                    "within_0.01_percent": float((gaps <= math.log(1.0001)).mean()),
                    "worst": math.exp(gaps.max()) if np.isfinite(gaps).all() else None,
                }
            )
        table += rows[1:]
    return {"tried": len(solved), "proven": len(proven), "rows": table, "below_the_optimum": below}


def problem_rows(results: Results) -> list[dict[str, Any]]:
    """Return what a reader needs to compute every table again: each problem with all its objectives."""
    found = []
    for case in results.cases:
        problem, name = case.problem, case.problem.name
        runs: dict[str, dict[str, float | None]] = {}
        for (where, method, budget), values in sorted(results._found.items()):
            if where == name:
                finite = {str(s): v if math.isfinite(v) else None for s, v in sorted(values.items())}
                runs[f"{method} {budget}".strip()] = finite
        ratios = results.log_ratios[name].items()
        found.append(
            {
                "name": name,
                "fingerprint": problem.fingerprint,
                "tags": sorted(case.tags),
                "ops": problem.num_ops,
                "devices": problem.num_devices,
                "objectives": runs,
                "log_ratios": {key: value if math.isfinite(value) else None for key, value in ratios},
            }
        )
    return found


def show(console: Console, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of comparisons as a table."""
    table = Table(title=title, title_justify="left")
    for heading in ("a / b", "problems", "kind", "J_a / J_b", "95% interval", "wins-ties-losses", "left out", ""):
        table.add_column(heading, justify="right" if heading in ("problems", "J_a / J_b") else "left")
    for row in rows:
        low, high = row["interval"]
        mean = row["geometric_mean"]
        table.add_row(
            f"{row['ours']} / {row['others']}",
            str(row["problems"]),
            row["kind"],
            "-" if mean is None else f"{mean:.4f}",
            "-" if high is None else f"{low:.4f} to {high:.4f}",
            f"{row['wins']}-{row['ties']}-{row['losses']}",
            str(row["left_out"]),
            row["verdict"],
            end_section=row is rows[-1] or rows[rows.index(row) + 1]["ours"] != row["ours"],
        )
    console.print(table)
