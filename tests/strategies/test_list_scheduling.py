"""HEFT against the paper's example, and HEFT and m-ETF against plain references."""

from __future__ import annotations

import numpy as np
import pytest

from autoplace.problem import Semantics
from autoplace.simulate import SimulatedEvaluator
from autoplace.strategies import Budget
from autoplace.strategies._kernels import heft, metf
from autoplace.strategies._support import View
from autoplace.strategies.heft import HeftStrategy
from autoplace.strategies.metf import MetfStrategy


def _ready(view, op, device, placed, finish):
    """When the inputs of an op are on a device."""
    offsets, producers, sizes = view.predecessors
    times = [0.0]
    for edge in range(offsets[op], offsets[op + 1]):
        p = producers[edge]
        s = placed[p]
        way = (
            0.0
            if s == device
            else view.transfer.latency_ms[s, device] + sizes[edge] * view.transfer.ms_per_byte[s, device]
        )
        times.append(finish[p] + way)
    return max(times)


def _plain_heft(view):
    latency = view.problem.latency_ms
    placed, finish, busy = {}, {}, [[] for _ in view.capacity]
    for op in view.rank_order.tolist():
        options = []
        for device in range(len(view.capacity)):
            ready = _ready(view, op, device, placed, finish)
            edges = [ready, *(end for _, end in busy[device] if end > ready)]
            start = min(
                s for s in edges if all(s + latency[op, device] <= b or s >= e for b, e in busy[device] if e > ready)
            )
            options.append((start + latency[op, device], device, start))
        finish[op], placed[op], start = min(options)
        busy[placed[op]].append((start, finish[op]))
    return placed, finish


def _plain_metf(view):
    latency, place = view.problem.latency_ms, {op: i for i, op in enumerate(view.rank_order.tolist())}
    offsets, producers, _ = view.predecessors
    placed, finish, free = {}, {}, np.zeros(len(view.capacity))
    while len(placed) < len(place):
        options = []
        for op in place:
            if op in placed or any(p not in placed for p in producers[offsets[op] : offsets[op + 1]].tolist()):
                continue
            for device in range(len(free)):
                start = max(free[device], _ready(view, op, device, placed, finish))
                options.append((start, place[op], start + latency[op, device], device, op))
        _, _, end, device, op = min(options)
        placed[op], finish[op], free[device] = device, end, end
    return placed, finish


@pytest.mark.parametrize(("kernel", "plain"), [(heft, _plain_heft), (metf, _plain_metf)])
def test_schedules_equal_a_plain_reference(kernel, plain, random_problem):
    for seed in range(15):
        view = View.of(random_problem(seed, ops=5 + 3 * seed, devices=1 + seed % 4))
        assignment, finish = kernel(view.flat(view.allowed))
        placed, ends = plain(view)
        assert assignment.tolist() == [placed[op] for op in range(len(placed))]
        assert finish.tolist() == pytest.approx([ends[op] for op in range(len(ends))])


def test_heft_finds_the_papers_schedule(topcuoglu):
    view = View.of(topcuoglu)
    assignment, finish = heft(view.flat(view.allowed))
    assert finish.max() == 80.0  # Topcuoglu et al. 2002, figure 3(a)
    (plan,) = HeftStrategy().propose(topcuoglu, budget=Budget(evaluations=1))
    assert plan.assignment_array(topcuoglu).tolist() == assignment.tolist()


def test_gaps_are_filled(random_problem):
    view = View.of(random_problem(0, ops=40))
    assignment, finish = heft(view.flat(view.allowed))
    start = finish - view.problem.latency_ms[np.arange(40), assignment]
    order = view.rank_order
    late = [
        (a, b)
        for i, a in enumerate(order)
        for b in order[i + 1 :]
        if assignment[a] == assignment[b] and start[b] < start[a]
    ]
    assert late  # some op runs before one that was placed earlier on its device


def test_metf_never_lets_a_device_that_could_start_earlier_wait(random_problem):
    problem = random_problem(1, semantics=Semantics(contention="none"))
    (plan,) = MetfStrategy().propose(problem, budget=Budget())
    assert SimulatedEvaluator(problem).evaluate([plan])[0].feasible
    assert len(plan.devices) == problem.num_devices


@pytest.mark.parametrize("strategy", [HeftStrategy(), MetfStrategy()])
def test_a_class_with_one_choice_has_its_memory_kept(strategy, random_problem):
    problem = random_problem(2, ops=8, devices=2, memory=0.6)
    latency = problem.latency_ms.copy()
    latency[:, 0] = 0.01  # every op prefers device 0 …
    latency[-1, 1] = np.inf  # … and the last one has no other
    problem = problem.with_(latency_ms=latency)
    (plan,) = strategy.propose(problem, budget=Budget())
    assert plan.assignment_array(problem)[-1] == 0
