import numpy as np
import pytest

from autoplace.envs.reference import best_baseline, constructive_baselines
from autoplace.errors import InfeasibleError
from autoplace.simulate.evaluator import SimulatedEvaluator


def test_the_best_baseline_is_the_least_and_no_worse_than_a_single_device(problem_maker):
    problem = problem_maker()
    found, evaluator = constructive_baselines(problem), SimulatedEvaluator(problem)
    for baseline in found:
        assert evaluator.score(baseline.assignment)[0] == baseline.objective
    singles = evaluator.score(np.repeat(np.arange(3, dtype=np.int32)[:, None], problem.num_ops, axis=1))
    assert {"single", "heft", "metf", "chunks"} <= {b.strategy for b in found}
    assert best_baseline(problem).objective == min(b.objective for b in found) <= singles.min()


def test_no_memory_no_baseline(problem_maker):
    with pytest.raises(InfeasibleError, match="small-0"):
        best_baseline(problem_maker(memory=0.0001))
