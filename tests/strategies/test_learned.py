import numpy as np
import pytest

from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.policy.network import PolicyNetwork
from autoplace.policy.policy import Policy
from autoplace.problem import Problem
from autoplace.simulate.evaluator import SimulatedEvaluator
from autoplace.strategies._base import Budget
from autoplace.strategies.learned import LearnedStrategy


@pytest.fixture(scope="module")
def scarce():
    """Twelve ops of which a device holds seven, four of them kept away from device 0."""
    random = np.random.default_rng(0)
    latency = random.lognormal(0, 0.5, (12, 2))
    latency[[1, 4, 7, 10], 0] = np.inf
    graph = OpGraph.build(
        names=[f"op{i}" for i in range(12)],
        edges=[(i, [i + 1], 100.0) for i in range(11)],
        weight_bytes=[100] * 12,
    )
    devices = tuple(Device(name=f"host0/cuda:{i}", kind="cuda", memory_bytes=700) for i in range(2))
    cluster = Cluster(devices=devices, default_link=Link(latency_ms=0.1, bytes_per_ms=1e4))
    return Problem(graph=graph, cluster=cluster, latency_ms=latency)


@pytest.fixture(scope="module")
def learned():
    return LearnedStrategy(Policy.of(PolicyNetwork(seed=0)))


def test_plans_respect_masks_and_come_best_first(scarce, learned):
    plans = learned.propose(scarce, budget=Budget(evaluations=60), seed=0)
    assert plans and all(p.strategy == "learned" for p in plans)
    evaluator, values = SimulatedEvaluator(scarce), []
    for plan in plans:
        assignment = plan.assignment_array(scarce)
        assert scarce.can_run[np.arange(12), assignment].all()
        assert np.bincount(assignment, minlength=2).max() <= 7
        values.append(float(evaluator.score(assignment)[0]))
    assert values == sorted(values) and np.isfinite(values).all()
    assert learned.evaluations <= 60


def test_same_seed_same_plans(scarce, learned):
    budget = Budget(evaluations=40)
    one, other = (learned.propose(scarce, budget=budget, seed=3) for _ in range(2))
    assert [p.to_json() for p in one] == [p.to_json() for p in other]


def test_more_budget_is_never_worse(scarce, learned):
    evaluator = SimulatedEvaluator(scarce)

    def best(budget):
        return evaluator.score(learned.propose(scarce, budget=budget, seed=1)[0].assignment_array(scarce))[0]

    values = [best(Budget(evaluations=n)) for n in (1, 10, 100)] + [best(Budget())]
    assert values[0] >= values[1] >= values[2] and np.isfinite(values[3])


def test_seconds_end_it(scarce, learned):
    assert learned.propose(scarce, budget=Budget(seconds=0.2), seed=0)
