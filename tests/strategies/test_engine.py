"""Moves keep to what is allowed and to memory; windows are placed exactly; a walk's J is the simulator's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autoplace.simulate import SimulatedEvaluator
from autoplace.simulate.local import local_version, new_local
from autoplace.strategies import _engine
from autoplace.strategies._moves import BEST, EVALUATIONS, GRAFTS, GUIDED, VALUE, Prior, Space, new_walk, uniform_prior
from autoplace.strategies._support import View


def _walk(problem, seed=0, start=None):
    view, evaluator = View.of(problem), SimulatedEvaluator(problem)
    space, local = Space.of(view), new_local(evaluator)
    walk = new_walk(space, seed=seed)
    walk.now[:] = view.pack(view.allowed) if start is None else start
    _engine.set_out(space, walk, local)
    return view, evaluator, space, local, walk


@pytest.mark.parametrize("goal", ["latency", "throughput"])
@pytest.mark.parametrize("heat", [0.0, 1.0, 100.0])
def test_a_walk_knows_its_cost_and_stays_within_limits(heat, goal, random_problem):
    for seed in range(4):
        problem = random_problem(seed, ops=24, devices=3, goal=goal, memory=0.6, colocate=True)
        view, evaluator, space, local, walk = _walk(problem, seed)
        prior = uniform_prior(space)._replace(donors=np.stack([walk.now, walk.now[::-1]]))
        walk.numbers[GUIDED], walk.numbers[GRAFTS] = 0.3, 0.3
        scale = walk.numbers[VALUE] / view.num_classes
        assert _engine.anneal(space, prior, walk, local, 500, heat * scale) == 500
        assert walk.numbers[EVALUATIONS] == 500
        for classes, value in ((walk.now, walk.numbers[VALUE]), (walk.best, walk.numbers[BEST])):
            assert evaluator.score(view.spread(classes))[0] == pytest.approx(value, rel=1e-9)
            assert view.allowed[np.arange(view.num_classes), classes].all()
        assert walk.numbers[BEST] <= walk.numbers[VALUE]


def test_without_heat_nothing_worse_is_accepted(random_problem):
    _, _, space, local, walk = _walk(random_problem(1, ops=30))
    values = [walk.numbers[VALUE]]
    for _ in range(50):
        _engine.anneal(space, uniform_prior(space), walk, local, 5, 0.0)
        values.append(walk.numbers[VALUE])
    assert values == sorted(values, reverse=True) and values[-1] < values[0]


def test_the_prior_chooses_class_and_device(random_problem):
    problem = random_problem(2, ops=12, devices=3)
    view, _, space, local, walk = _walk(problem, start=np.zeros(12, np.int32))
    pick, wish = np.zeros(len(space.free)), np.zeros((view.num_classes, 3))
    pick[4:], wish[:, 2] = 1.0, 1.0  # only class 4, only to device 2
    walk.numbers[GUIDED] = 1.0
    moved = set()
    for _ in range(200):
        walk.now[:] = 0
        _engine.set_out(space, walk, local)
        _engine.anneal(space, Prior(pick, wish, np.zeros((0, 12), np.int32)), walk, local, 1, 1e9)
        if (walk.now != 0).sum() == 1 and walk.now[4] == 2:
            moved.add(4)
    assert moved == {4}


def test_a_window_over_everything_is_the_optimum(random_problem):
    for seed in range(4):
        problem = random_problem(seed, ops=5, devices=3, goal=("latency", "throughput")[seed % 2])
        view, evaluator, space, local, walk = _walk(problem, seed)
        everything = np.asarray(list(itertools.product(range(3), repeat=view.num_classes)), np.int32)
        best = evaluator.score(everything[:, view.op_class]).min()
        spent = _engine.solve_windows(space, uniform_prior(space), walk, local, 5000, view.num_classes)
        assert 3**view.num_classes - 1 <= spent <= 5000
        assert walk.numbers[BEST] == pytest.approx(best, rel=1e-9)


def test_a_window_ends_within_its_budget(random_problem):
    _, _, space, local, walk = _walk(random_problem(3, ops=30, devices=4))
    assert _engine.solve_windows(space, uniform_prior(space), walk, local, 37, 3) == 37


@pytest.mark.parametrize("entry", [_engine.set_out, _engine.anneal, _engine.solve_windows])
def test_every_entry_closes_over_the_simulators_version(entry):
    """Else numba's cache would go on with the simulator that the entry was compiled with."""
    cells = dict(zip(entry.py_func.__code__.co_freevars, entry.py_func.__closure__, strict=True))
    assert cells["version"].cell_contents == _engine.engine_version() != local_version()
