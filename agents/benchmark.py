"""The fixed held-out problems of the placement benchmark. Nothing of them enters training, → `distribution`.

A problem with binding memory is one whose best unlimited placement, of those that the heuristics find, does not fit,
and for which some heuristic does find a placement that fits: problems are drawn again until both hold.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator

from autoplace.errors import AutoplaceError
from autoplace.problem import Problem, Semantics
from autoplace.simulate.evaluator import SimulatedEvaluator
from autoplace.strategies._base import Budget
from autoplace.strategies._search import Found, Scorer
from autoplace.strategies.chunks import ChunksStrategy
from autoplace.strategies.heft import HeftStrategy
from autoplace.strategies.heuristics import construct
from autoplace.strategies.metf import MetfStrategy
from autoplace.strategies.single import SingleStrategy

from .captured import available
from .captured_problems import draw_captured_problem
from .conditions import Conditions
from .distribution import HELD_OUT_FAMILIES, HELD_OUT_MODELS
from .synthetic import draw_problem

__all__ = ["BenchmarkProblem", "benchmark_problems", "is_binding"]

OPERATOR, COARSE, SMALL = 16, 32, 8
"""Problems of 500 ops and more, of up to 300, and of up to 12 ops, the latter for comparison with exact optima."""
_DEVICES = (2, 4, 8, 3, 16, 6, 12)
_CLUSTERS = ("unequal", "hosts", "equal", "accelerated", "hosts")
_SPECIAL = (
    {"semantics": Semantics(transfers="blocking")},
    {"semantics": Semantics(route="host")},
    {"semantics": Semantics(queue="priority")},
    {"semantics": Semantics(microbatches=4)},
    {"energy_weight": 0.5},
    {"semantics": Semantics(contention="none")},
)
_LARGE_MODELS = (
    ("qwen2", False), ("clip", True), ("deberta", True), ("mistral", False),
    ("swin", True), ("whisper", False), ("mistral", True), ("qwen2", True),
)  # fmt: skip
"""Held-out models, forward or training, of 500 ops and more."""
_TRIES = 60
_BUILDERS = (SingleStrategy, ChunksStrategy, HeftStrategy, MetfStrategy)
"""Few and plain, so that the benchmark stays the same where strategies are added."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BenchmarkProblem:
    """One problem of the benchmark."""

    problem: Problem
    tags: frozenset[str]
    """`latency` or `throughput`; `memory` where memory binds; `operator` from 500 ops on, `small` up to 12 ops,
    `coarse` between; `captured` or `synthetic`; `special` where transfers, route, contention, queue, microbatches or
    energy are not the usual."""


def benchmark_problems(*, seed: int = 0, captured: bool | None = None) -> list[BenchmarkProblem]:
    """Return 48 problems, 16 of them operator-level graphs, and 8 small ones tagged `small`.

    Args:
        seed: The same seed gives the same problems.
        captured: Whether half of the 48 are captured from models; None = where `transformers` is installed.

    Raises:
        AutoplaceError: If a problem of the kind asked for cannot be drawn.
    """
    captured = available() if captured is None else captured
    slots = [slot if captured else replace(slot, model=None) for slot in _slots()]
    return [_find(seed, slot) for slot in slots]


@dataclass(frozen=True, kw_only=True)
class _Slot:
    """What one problem of the benchmark has to be."""

    index: int
    size: str
    """`operator`, `coarse` or `small`."""
    cluster: str
    conditions: Conditions
    special: bool
    model: str | None = None
    """Whose captured graph it is; None = a synthetic family."""
    training: bool = False
    """Whether that is a training step."""


def _slots() -> Iterator[_Slot]:
    """Go through all conditions with cycles of lengths that share no factor, so that none follows another."""
    for first, count, size in ((0, OPERATOR, "operator"), (OPERATOR, COARSE, "coarse")):
        special = itertools.cycle(_SPECIAL if size == "coarse" else reversed(_SPECIAL))
        for place in range(count):
            conditions = Conditions(
                devices=_DEVICES[place % len(_DEVICES)],
                goal=("latency", "throughput")[place % 2],
                memory=("unlimited", "binding", "ample")[place // 2 % 3],
                energy_weight=0.0,
                semantics=Semantics(),
            )
            unusual = place % 5 == 4
            if unusual:
                conditions = replace(conditions, **next(special))  # type: ignore[arg-type]
            cluster = _CLUSTERS[place % len(_CLUSTERS)]
            slot = _Slot(index=first + place, size=size, cluster=cluster, conditions=conditions, special=unusual)
            yield replace(slot, **_model(place, size)) if place // 2 % 2 else slot  # type: ignore[arg-type]
    for place in range(SMALL):
        conditions = Conditions(
            devices=2 + place // 2 % 2,
            goal=("latency", "throughput")[place % 2],
            memory=("unlimited", "binding")[place // 4],
            energy_weight=0.0,
            semantics=Semantics(),
        )
        index, cluster = OPERATOR + COARSE + place, ("unequal", "equal", "hosts")[place % 3]
        yield _Slot(index=index, size="small", cluster=cluster, conditions=conditions, special=False)


def _model(place: int, size: str) -> dict[str, object]:
    number = place // 4 * 2 + place % 2
    if size == "operator":
        model, training = _LARGE_MODELS[number % len(_LARGE_MODELS)]
    else:
        model, training = HELD_OUT_MODELS[number % len(HELD_OUT_MODELS)], bool((number + number // 7) % 2)
    return {"model": model, "training": training}


def _find(seed: int, slot: _Slot) -> BenchmarkProblem:
    """Draw until the slot's conditions hold."""
    for attempt in range(_TRIES):
        random = np.random.default_rng([seed, 20_311, slot.index, attempt])
        problem = _synthetic(random, slot) if slot.model is None else _captured(random, slot, slot.model)
        if _holds(problem, slot):
            tags = {slot.size, problem.objective.goal, "captured" if slot.model else "synthetic"}
            tags |= {"memory"} if slot.conditions.memory == "binding" else set()
            tags |= {"special"} if slot.special else set()
            return BenchmarkProblem(problem=problem, tags=frozenset(tags))
    raise AutoplaceError(f"no problem like {slot} was drawn in {_TRIES} attempts; use another seed")


def _synthetic(random: Generator, slot: _Slot) -> Problem:
    family = HELD_OUT_FAMILIES[(slot.index + slot.index // 6) % len(HELD_OUT_FAMILIES)]
    low, high = _DRAWN[slot.size]
    size = round(math.exp(random.uniform(math.log(low), math.log(high))))
    name = f"benchmark-{slot.index}"
    return draw_problem(random, family, slot.cluster, name=name, size=size, conditions=slot.conditions)


def _captured(random: Generator, slot: _Slot, model: str) -> Problem:
    return draw_captured_problem(
        random,
        model,
        slot.cluster,
        name=f"benchmark-{slot.index}",
        training=slot.training,
        max_ops=None if slot.size == "operator" else 300,
        conditions=slot.conditions,
    )


def _holds(problem: Problem, slot: _Slot) -> bool:
    least, most = _SIZES[slot.size]
    if not least <= problem.num_ops <= most:
        return False
    return is_binding(problem) if slot.conditions.memory == "binding" else bool(_built(problem))


_DRAWN = {"operator": (500, 1500), "coarse": (24, 300), "small": (4, 11)}
_SIZES = {"operator": (500, 2500), "coarse": (20, 320), "small": (5, 12)}


def is_binding(problem: Problem) -> bool:
    """Whether the best placement of the heuristics without limits does not fit, and another one of theirs does."""
    devices = tuple(replace(d, memory_bytes=float("inf")) for d in problem.cluster.devices)
    unlimited = problem.with_(cluster=replace(problem.cluster, devices=devices))
    found = _built(unlimited)
    if not found or np.isfinite(SimulatedEvaluator(problem).score(found[0][1])[0]):
        return False
    return bool(_built(problem))


def _built(problem: Problem) -> Found:
    """Return the feasible placements of the plain constructive strategies, best first."""
    found = construct(Scorer(problem, Budget().start()), [kind() for kind in _BUILDERS])
    return sorted((pair for pairs in found.values() for pair in pairs), key=lambda pair: pair[0])
