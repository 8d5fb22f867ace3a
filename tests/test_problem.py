"""`Problem`, `Objective` and `Semantics`: validation, what can run where, fingerprints."""

from __future__ import annotations

import numpy as np
import pytest

from autoplace.errors import InputError
from autoplace.graph import OpGraph
from autoplace.hardware import Cluster, Device, Link
from autoplace.problem import Objective, Problem, Semantics


@pytest.fixture
def problem():
    return Problem(
        graph=OpGraph.build(names=["a", "b", "c"], edges=[(0, [1], 8.0)], colocate=[-1, 0, 0]),
        cluster=Cluster(
            devices=(Device(name="h/cpu:0", kind="cpu"), Device(name="h/cpu:1", kind="cpu")),
            default_link=Link(latency_ms=1.0, bytes_per_ms=1.0),
        ),
        latency_ms=np.asarray([[1.0, np.inf], [1.0, 2.0], [np.inf, 1.0]]),
    )


def test_objective_weighs_time_and_energy():
    assert Objective().value(3.0, None) == 3.0
    assert Objective(energy_weight=1.0).value(3.0, 5.0) == 5.0
    assert Objective(energy_weight=0.5).value(4.0, 9.0) == pytest.approx(6.0)
    with pytest.raises(InputError, match="idle_watts and busy_watts"):
        Objective(energy_weight=0.5).value(4.0, None)


@pytest.mark.parametrize("bad", [{"goal": "speed"}, {"energy_weight": -0.1}, {"energy_weight": 1.1}])
def test_an_objective_without_meaning_is_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Objective(**bad)


@pytest.mark.parametrize(
    "bad", [{"transfers": "x"}, {"route": "x"}, {"contention": "x"}, {"queue": "x"}, {"microbatches": 0}]
)
def test_semantics_without_meaning_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Semantics(**bad)


def test_co_located_ops_can_run_where_all_of_them_can(problem):
    assert problem.num_ops == 3 and problem.num_devices == 2
    assert problem.can_run.tolist() == [[True, False], [False, True], [False, True]]


@pytest.mark.parametrize("bad", [np.ones((3, 1)), np.full((3, 2), np.nan), np.full((3, 2), -1.0)])
def test_latencies_that_do_not_fit_are_refused(problem, bad):
    with pytest.raises(InputError, match="latency_ms"):
        problem.with_(latency_ms=bad)
    with pytest.raises(InputError, match="overhead_ms"):
        problem.with_(overhead_ms=bad)


def test_the_fingerprint_follows_what_changes_the_answer(problem):
    same = problem.with_(name="another")
    assert same.fingerprint == problem.fingerprint and len(problem.fingerprint) == 16
    slower = Cluster(devices=problem.cluster.devices, default_link=Link(latency_ms=2.0, bytes_per_ms=1.0))
    watts = Cluster(
        devices=(Device(name="h/cpu:0", kind="cpu", idle_watts=3), problem.cluster.devices[1]),
        default_link=problem.cluster.default_link,
    )
    others = [
        problem.with_(latency_ms=problem.latency_ms * 2),
        problem.with_(overhead_ms=np.zeros((3, 2))),
        problem.with_(objective=Objective(goal="throughput")),
        problem.with_(semantics=Semantics(microbatches=2)),
        problem.with_(batch_size=2),
        problem.with_(cluster=slower),
        problem.with_(cluster=watts),
    ]
    assert len({p.fingerprint for p in [problem, *others]}) == len(others) + 1
