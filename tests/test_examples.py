"""Everything in `examples/` works: models run, the problem is placed, the cluster file is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autoplace import Cluster
from autoplace.cli.factory import load_workload
from autoplace.problem_file import load_problem
from autoplace.strategies import Budget, best_of, portfolio_strategies
from autoplace.workload import default_loss

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_a_model_runs_forward_and_backward(path):
    workload = load_workload(f"{path}:build", training=True)
    assert workload.batch_size >= 8
    with workload.mode():
        output = workload.forward()
        (workload.loss or default_loss)(output).backward()
    assert any(p.grad is not None and torch.isfinite(p.grad).all() for p in workload.model.parameters())


def test_the_problem_is_placed():
    problem = load_problem(EXAMPLES / "three_layers.json")
    plan, outcome, evaluations = best_of(problem, portfolio_strategies(), Budget(evaluations=100))
    assert outcome.feasible and 0 < evaluations <= 100
    assert plan.devices == ("host0/cuda:0",), "the CPU cannot run the head, and the embedding is faster on the GPU"


def test_the_cluster_file_is_read():
    assert Cluster.load(EXAMPLES / "cluster.yaml").num_devices >= 2
