"""What environments share: prepared problems, who draws them, and what a finished placement is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import InfeasibleError, InputError
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.outcome import Evaluator
from autoplace.plan import Plan
from autoplace.policy.features import PartialPlacement
from autoplace.policy.partial import State, new_state
from autoplace.policy.tables import Tables, build_tables
from autoplace.problem import Problem
from autoplace.simulate.evaluator import SimulatedEvaluator

from .reference import best_baseline

__all__ = ["INFEASIBLE_REWARD", "ProblemCache", "Sampler", "example", "sampler_of"]

INFEASIBLE_REWARD = -5.0
"""Sum of the rewards of an episode that ends without a feasible plan: as if it were e^5 = 148 times the reference."""
MAX_PREPARED = 4096
"""Problems whose tables, evaluator and reference are kept."""

Sampler = Callable[[np.random.Generator], Problem]


class ProblemCache:
    """What episodes on problems need, made once per problem object; environments in one thread may share it.

    Args:
        evaluator_factory: Problem to Evaluator; None = `SimulatedEvaluator`.
        reference: Problem to J_reference; None = the best simulated baseline.
    """

    def __init__(
        self,
        evaluator_factory: Callable[[Problem], Evaluator] | None = None,
        reference: Callable[[Problem], float] | None = None,
    ) -> None:
        self._factory = evaluator_factory or SimulatedEvaluator
        self._reference = reference or _simulated_reference
        self._entries: dict[int, Entry] = {}

    def entry(self, problem: Problem) -> Entry:
        """Return the tables and the evaluator of a problem."""
        found = self._entries.get(id(problem))
        if found is None:
            if len(self._entries) >= MAX_PREPARED:
                self._entries.pop(next(iter(self._entries)))
            found = Entry(problem, _plain(build_tables(problem)), self._factory(problem))
            self._entries[id(problem)] = found
        return found

    def log_reference(self, problem: Problem) -> float:
        """Return log J_reference of a problem."""
        entry = self.entry(problem)
        if entry.log_reference is None:
            entry.log_reference = math.log(max(self._reference(problem), 1e-12))
        return entry.log_reference

    def judge(self, problem: Problem, assignments: NDArray[np.int32]) -> list[tuple[float, dict[str, Any]]]:
        """Evaluate finished placements of a problem in one call.

        Args:
            problem: What was placed.
            assignments: int32[P, N].

        Returns:
            For each, log(J_reference / J), or `INFEASIBLE_REWARD`, and `objective`, `feasible`, `reason` and, where
            the evaluator returned one, `outcome`.
        """
        evaluator = self.entry(problem).evaluator
        found: list[tuple[float, bool, dict[str, Any]]] = []
        if isinstance(evaluator, SimulatedEvaluator):
            for objective in evaluator.score(assignments).tolist():
                feasible = math.isfinite(objective)
                found.append((objective, feasible, {"reason": "" if feasible else "the simulator finds it infeasible"}))
        else:
            plans = [Plan.from_assignment(problem, assignment, strategy="learned") for assignment in assignments]
            for outcome in evaluator.evaluate(plans):
                feasible = outcome.feasible and math.isfinite(outcome.objective)
                found.append((outcome.objective, feasible, {"reason": outcome.reason, "outcome": outcome}))
        return [self._worth(problem, *each) for each in found]

    def _worth(
        self, problem: Problem, objective: float, feasible: bool, info: dict[str, Any]
    ) -> tuple[float, dict[str, Any]]:
        info |= {"objective": objective if feasible else math.inf, "feasible": feasible}
        if not feasible:
            return INFEASIBLE_REWARD, info
        return self.log_reference(problem) - math.log(max(objective, 1e-12)), info


@dataclass(eq=False)
class Entry:
    """A problem, held so that its id stays its own, and what was made of it."""

    problem: Problem
    tables: Tables
    evaluator: Evaluator
    log_reference: float | None = None
    states: dict[bool, list[State]] = field(default_factory=lambda: {True: [], False: []})
    """Of finished placements, to be used again, by whether their masks are hard."""

    def take_state(self, *, masks: bool) -> State:
        """Return a state with hard masks or without; what is in it is left from before."""
        return self.states[masks].pop() if self.states[masks] else new_state(self.tables, masks=masks)


def _plain(tables: Tables) -> Tables:
    """Return tables whose arrays all are contiguous and writable: compiled loops want one type for all problems."""
    return Tables._make(np.require(array, requirements=("C", "W", "A")) for array in tables)


def _simulated_reference(problem: Problem) -> float:
    """Return J of the best baseline; where none is feasible, the optimistic guess at J of the empty placement."""
    try:
        return best_baseline(problem).objective
    except InfeasibleError:
        # The guess counts energy in mJ, J in joules.
        millijoules = problem.objective.energy_weight * math.log(1000.0)
        return math.exp(PartialPlacement(problem).log_estimate - millijoules)


def sampler_of(problems: Problem | Sequence[Problem] | Sampler) -> Sampler:
    """Return a function that draws a problem: one of those given, each as likely.

    Raises:
        InputError: If there is none.
    """
    if isinstance(problems, Problem):
        return lambda generator: problems
    if callable(problems):
        return problems
    fixed = tuple(problems)
    if not fixed:
        raise InputError("the environment needs at least one problem")
    return lambda generator: fixed[int(generator.integers(len(fixed)))]


def example() -> Problem:
    """Return three ops in a row on two devices, of which each is the fast one for some op."""
    graph = OpGraph.build(
        names=("embed", "attention", "head"),
        edges=[(0, [1], 4096.0), (1, [2], 4096.0)],
        weight_bytes=[1000, 2000, 4000],
        activation_bytes=[64, 64, 64],
    )
    devices = (
        Device(name="host0/cuda:0", kind="cuda", memory_bytes=6000, idle_watts=60, busy_watts=300),
        Device(name="host0/cpu:0", kind="cpu", memory_bytes=8000, idle_watts=20, busy_watts=90),
    )
    cluster = Cluster(devices=devices, default_link=Link(latency_ms=0.02, bytes_per_ms=1e6))
    latency = np.asarray([[0.4, 0.1], [0.5, 2.0], [1.0, 1.5]])
    return Problem(graph=graph, cluster=cluster, latency_ms=latency, name="three-ops")
