import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from autoplace.agents.experience import Experience, load_experience
from autoplace.agents.imitation import clone_epoch, demonstrate
from autoplace.agents.train import train
from autoplace.errors import InputError
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.outcome import Outcome
from autoplace.plan import Plan, Replica
from autoplace.policy.network import PolicyConfig, PolicyNetwork
from autoplace.policy.policy import Policy
from autoplace.problem_file import problem_to_json
from autoplace.tracked import tracked_tune
from autoplace.tuner import TuneConfig
from autoplace.workload import Workload


def line(problem, *plans):
    """Return a record line of plans with their measured J."""
    rows = [
        {"label": f"p{i}", "plan": plan.to_json(), "outcome": Outcome(source="measured", objective=j).to_json()}
        for i, (plan, j) in enumerate(plans)
    ]
    return json.dumps({"type": "experience", "problem": problem_to_json(problem), "plans": rows})


@pytest.fixture
def placed(lanes):
    problem, _ = lanes
    return lambda assignment, **knobs: Plan.from_assignment(problem, assignment, strategy="x", **knobs)


def test_the_best_single_replica_plan_counts(lanes, placed, tmp_path):
    problem, fast = lanes
    halves = tuple(replace(placed(np.full(8, d)).replicas[0], share=0.5) for d in (0, 1))
    plans = [
        (placed(fast), 5.0),
        (placed(1 - fast, microbatches=2), 3.0),
        (placed(np.zeros(8, int), threads={"host0/cuda:0": 2}), 1.0),
        (placed(fast).with_(replicas=halves), 1.5),
        (Plan.plain(), 1.0),
        (placed(np.ones(8, int)), float("inf")),
    ]
    (tmp_path / "a.jsonl").write_text(line(problem, *plans) + "\n")
    (found,) = load_experience(tmp_path)
    assert found.objective == 3.0 and found.problem.semantics.microbatches == 2
    np.testing.assert_array_equal(found.assignment, 1 - fast)
    np.testing.assert_allclose(found.problem.latency_ms, problem.latency_ms)


def test_one_problem_tuned_twice_comes_once(lanes, placed, tmp_path):
    problem, fast = lanes
    (tmp_path / "a.jsonl").write_text(line(problem, (placed(fast), 2.0)) + "\n")
    (tmp_path / "b.jsonl").write_text(line(problem, (placed(1 - fast, microbatches=4), 3.0)) + "\n")
    other = problem.with_(latency_ms=problem.latency_ms * 2)
    (tmp_path / "c.jsonl").write_text(line(other, (placed(fast), 7.0)) + "\n")
    assert [e.objective for e in load_experience(tmp_path)] == [2.0, 7.0]


def test_torn_old_and_foreign_lines_are_passed_over(lanes, placed, tmp_path):
    problem, fast = lanes
    good = line(problem, (placed(fast), 2.0))
    wrong = json.loads(good)
    wrong["problem"]["ops"] = []
    alien = line(problem, (Plan(replicas=(Replica(assignment={"other": "host0/cuda:0"}),), strategy="x"), 1.0))
    odd = ['{"type": "run", "kind": "tune"}', json.dumps(wrong), alien, '{"type": "experience"}', "[1]", good[:50]]
    (tmp_path / "a.jsonl").write_text("\n".join([*odd[:-1], good, odd[-1]]))
    assert [e.objective for e in load_experience(tmp_path)] == [2.0]
    with pytest.raises(InputError, match="no folder"):
        load_experience(tmp_path / "missing")


@pytest.fixture
def surprising(lanes):
    """Real runs that contradicted the profile: no simulated teacher would ask for this placement."""
    problem, fast = lanes
    assignment = (np.arange(8) >= 4).astype(np.int32)
    assert not np.array_equal(assignment, fast)
    return Experience(problem=problem, assignment=assignment, objective=1.0)


def test_imitation_reproduces_the_best_measured_plan(surprising):
    data = demonstrate([surprising.problem], [surprising.assignment])
    network = PolicyNetwork(PolicyConfig(hidden=32), seed=0)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for epoch in range(150):
        clone_epoch(network, optimizer, data, seed=epoch)
    (greedy,) = Policy.of(network).sample(surprising.problem, 1, temperature=0.0)
    np.testing.assert_array_equal(greedy, surprising.assignment)


def test_training_takes_the_measured_plan_as_the_teacher(surprising, tiny, monkeypatch):
    taught = []

    def watched(problems, teachers, **rest):
        taught.extend(zip(problems, teachers, strict=True))
        return demonstrate(problems, teachers, **rest)

    monkeypatch.setattr("autoplace.agents.train.demonstrate", watched)
    train(tiny(stages=("imitate",), problems=2), experience=[surprising])
    (teacher,) = [t for p, t in taught if p is surprising.problem]
    np.testing.assert_array_equal(teacher, surprising.assignment)
    assert len(taught) == 3


def test_a_tuning_leaves_an_experience(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOPLACE_DATA_DIR", str(tmp_path))
    devices = tuple(Device(name=f"host0/cpu:{i}", kind="cpu", cores=(i,)) for i in range(2))
    cluster = Cluster(devices=devices, default_link=Link(latency_ms=0.01, bytes_per_ms=1e7))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)).eval()
    workload = Workload(model=model, args=(torch.randn(8, 16),), name="two")
    config = TuneConfig(budget_s=0.5, policy=None, microbatches=(1, 2), evaluations=20, rounds=3, measured_plans=6)
    result = tracked_tune(workload, config, cluster=cluster, tracking_uri=f"sqlite:///{tmp_path}/ml.db")
    (found,) = load_experience()
    assert result.problem is not None and found.problem.graph.names == result.problem.graph.names
    able = [
        c.measured.objective
        for c in result.candidates
        if c.measured is not None and c.measured.feasible and len(c.plan.replicas) == 1 and not c.plan.threads
    ]
    assert found.objective == pytest.approx(min(able))
    assert found.problem.num_devices == 2 and len(found.assignment) == found.problem.num_ops
