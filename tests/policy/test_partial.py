import itertools

import numpy as np
import pytest

from autoplace.policy.features import PartialPlacement
from autoplace.simulate.evaluator import SimulatedEvaluator


def run(placement, random):
    placement.reset()
    while not placement.done and not placement.stuck:
        placement.place(int(random.choice(np.flatnonzero(placement.mask))))
    return placement.assignment


@pytest.mark.parametrize("memory", [0.36, 0.45, 0.8])
@pytest.mark.parametrize("seed", range(5))
def test_masks_lead_to_feasible_placements_only(problem_maker, memory, seed):
    problem = problem_maker(ops=30, seed=seed, memory=memory, colocate=seed % 2 == 1)
    placement, random = PartialPlacement(problem), np.random.default_rng(seed)
    assert (placement.state.certificate >= 0).all()
    for _ in range(10):
        assignment = run(placement, random)
        assert placement.done
        assert np.isfinite(SimulatedEvaluator(problem).score(assignment)).all()


def test_the_whole_of_a_device_that_holds_everything_stays_allowed(problem_maker):
    placement = PartialPlacement(problem_maker(memory=1.0))
    while not placement.done:
        assert placement.mask[0]
        placement.place(0)
    assert (placement.assignment == 0).all()


def test_missing_links_never_lead_into_a_dead_end_one_step_ahead(problem_maker):
    problem = problem_maker(missing=((0, 1), (1, 0)))
    placement, evaluator = PartialPlacement(problem), SimulatedEvaluator(problem)
    whole = 0
    for seed in range(20):
        assignment = run(placement, np.random.default_rng(seed))
        if placement.done:
            whole += 1
            assert np.isfinite(evaluator.score(assignment)).all()
    assert whole >= 15


def test_no_memory_at_all_ends_with_an_empty_mask(problem_maker):
    placement = PartialPlacement(problem_maker(memory=0.001))
    assert placement.stuck and not placement.mask.any()


def test_estimate_ends_at_the_makespan_without_contention_of_choices(problem_maker):
    """On one device the partial schedule is exact, so the last guess is log J."""
    problem = problem_maker(devices=1)
    placement = PartialPlacement(problem)
    while not placement.done:
        placement.place(0)
    objective = SimulatedEvaluator(problem).score(placement.assignment)[0]
    assert placement.log_estimate == pytest.approx(np.log(objective), abs=1e-9)


def test_estimate_without_contention_is_optimistic_and_never_falls_below_the_start(problem_maker):
    problem = problem_maker(ops=12, devices=2)
    for choice in itertools.product([0, 1], repeat=4):
        placement = PartialPlacement(problem)
        start = placement.log_estimate
        for device in choice:
            placement.place(device)
            assert placement.log_estimate >= start - 1e-9
