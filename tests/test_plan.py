"""`Plan`: shapes, assignments and the file."""

from __future__ import annotations

import json

import numpy as np
import pytest

from autoplace.errors import PlanFileError
from autoplace.graph import OpGraph
from autoplace.hardware import Cluster, Device
from autoplace.plan import Plan, Replica
from autoplace.problem import Problem, Semantics


@pytest.fixture
def problem():
    return Problem(
        graph=OpGraph.build(names=["a", "b"], edges=[]),
        cluster=Cluster(devices=(Device(name="h/cpu:0", kind="cpu"), Device(name="h/cpu:1", kind="cpu"))),
        latency_ms=np.ones((2, 2)),
        semantics=Semantics(microbatches=4),
    )


def replica(first, second, share=1.0):
    return Replica(assignment={"a": f"h/cpu:{first}", "b": f"h/cpu:{second}"}, share=share)


@pytest.mark.parametrize(
    ("replicas", "shape", "devices"),
    [
        ((), "plain", ()),
        ((replica(1, 1),), "single", ("h/cpu:1",)),
        ((replica(1, 0),), "stages", ("h/cpu:1", "h/cpu:0")),
        ((replica(0, 0, 0.25), replica(1, 1, 0.75)), "replicas", ("h/cpu:0", "h/cpu:1")),
        ((replica(0, 1, 0.5), replica(1, 1, 0.5)), "hybrid", ("h/cpu:0", "h/cpu:1")),
    ],
)
def test_the_shape_says_which_executor_runs_it(replicas, shape, devices):
    plan = Plan(replicas=replicas, strategy="test")
    assert plan.shape == shape and plan.devices == devices and plan.is_plain == (shape == "plain")


def test_from_assignment_and_back(problem):
    plan = Plan.from_assignment(problem, [1, 0], strategy="test", compiled=True)
    assert plan.assignment_array(problem).tolist() == [1, 0] and plan.assignment_array(problem).dtype == np.int32
    assert plan.microbatches == 4 and plan.compiled and plan.graph_fingerprint == problem.graph.fingerprint
    assert plan.with_(microbatches=2).microbatches == 2
    with pytest.raises(PlanFileError, match="tune again"):
        Plan(replicas=(Replica(assignment={"a": "h/cpu:0"}),), strategy="test").assignment_array(problem)
    with pytest.raises(ValueError, match="zip"):
        Plan.from_assignment(problem, [1], strategy="test")


@pytest.mark.parametrize("shares", [(0.5, 0.6), (1.5, -0.5), (0.0, 1.0)])
def test_shares_must_make_a_whole(shares):
    with pytest.raises(PlanFileError, match="shares"):
        Plan(replicas=tuple(replica(0, 0, s) for s in shares), strategy="test")


def test_microbatches_must_be_one_or_more():
    with pytest.raises(PlanFileError, match="microbatches"):
        Plan(replicas=(), strategy="test", microbatches=0)


def test_only_compiled_plans_have_a_cpp_wrapper():
    with pytest.raises(PlanFileError, match="cpp_wrapper is set and compiled is not"):
        Plan.plain().with_(cpp_wrapper=True)


def test_the_file_round_trips(tmp_path):
    plan = Plan(
        replicas=(replica(0, 1, 0.5), replica(1, 1, 0.5)),
        strategy="test", microbatches=3, threads={"h/cpu:0": 2}, compiled=True, cpp_wrapper=True,
        precision="bfloat16",
        graph_fingerprint="g", cluster_fingerprint="c",
    )  # fmt: skip
    for one in (plan, Plan.plain()):
        one.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == one
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "autoplace.plan/9"}, "is not a plan file"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"replicas": [{"share": 1.0}]}, "malformed near 'assignment'"),
        ({"replicas": [{"share": "much", "assignment": {}}]}, "malformed"),
        ({"replicas": 3}, "malformed"),
        ({"microbatches": "x"}, "malformed"),
        ({"threads": [1]}, "malformed"),
    ],
)
def test_a_bad_file_gets_one_sentence(tmp_path, change, words):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(Plan.plain().to_json() | change), encoding="utf-8")
    with pytest.raises(PlanFileError, match=words) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_gets_one_sentence(tmp_path):
    with pytest.raises(PlanFileError, match="does not exist"):
        Plan.load(tmp_path / "none.json")
