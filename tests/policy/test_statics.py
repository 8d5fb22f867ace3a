import numpy as np
import pytest

from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.policy.columns import FEATURES
from autoplace.policy.features import PartialPlacement
from autoplace.problem import Problem

NAMES = [name for name, _ in FEATURES]


def place(latency, edges, **graph):
    """Return the first decision's features by name, ops in a row of equal names, two devices or more."""
    latency = np.asarray(latency, float)
    devices = tuple(Device(name=f"h/cuda:{i}", kind="cuda") for i in range(latency.shape[1]))
    problem = Problem(
        graph=OpGraph.build(names=tuple(f"op{i}" for i in range(len(latency))), edges=edges, **graph),
        cluster=Cluster(devices=devices, default_link=Link(latency_ms=0.1, bytes_per_ms=1e4)),
        latency_ms=latency,
    )
    placement = PartialPlacement(problem)
    return placement, lambda name: placement.features[:, NAMES.index(name)]


def test_what_comes_next_is_seen_from_the_first_op():
    """a -> b -> c: b suits device 1, c device 0."""
    e = np.e
    _, column = place([[1, 1], [e, 1], [1, e**2]], [(0, [1], 8.0), (1, [2], 8.0)])
    np.testing.assert_allclose(column("latency_on1"), [1, 0], atol=1e-5)
    np.testing.assert_allclose(column("latency_on2"), [0, 2], atol=1e-5)
    np.testing.assert_allclose(column("latency_on4"), [0, 0], atol=1e-5)
    np.testing.assert_allclose(column("latency_back1"), [0, 0], atol=1e-5)
    # Two ops ahead, each of least work 1, the second counting 0.9 of the first.
    np.testing.assert_allclose(column("stay_near"), np.log([(e + 0.9) / 1.9, (1 + 0.9 * e**2) / 1.9]), atol=1e-5)


def test_what_came_before_is_seen_from_the_last_op():
    placement, column = place([[1, np.e], [1, 1], [1, 1]], [(0, [1], 8.0), (1, [2], 8.0)])
    placement.place(0)
    np.testing.assert_allclose(column("latency_back1"), [0, 1], atol=1e-5)
    placement.place(0)
    np.testing.assert_allclose(column("latency_back1"), [0, 0], atol=1e-5)
    np.testing.assert_allclose(column("latency_back2"), [0, 1], atol=1e-5)


def test_shares_of_the_work_ahead_go_to_the_devices_that_suit_it():
    latency = [[1, 1]] + [[1, 4]] * 4 + [[4, 1]] * 4
    edges = [(0, [1, 2, 3, 4], 8.0), *((i, [i + 4], 8.0) for i in range(1, 5))]
    placement, column = place(latency, edges)
    assert abs(column("rest_suits")[0] - column("rest_suits")[1]) < 0.2
    assert column("suits_near")[0] > 0.02 > column("suits_near")[1]
    for _ in range(5):
        placement.place(0)
    assert column("rest_suits")[1] > 0.9 and column("next8_here")[1] > 0.9


def test_width_counts_the_ops_that_can_run_at_the_same_time():
    _, column = place([[1, 1]] * 8, [(0, [1, 2, 3, 4, 5, 6], 8.0), *((i, [7], 8.0) for i in range(1, 7))])
    assert column("width_early")[0] == pytest.approx(np.log1p(1 / 2))
    placement, column = place([[1, 1]] * 8, [(0, [1, 2, 3, 4, 5, 6], 8.0), *((i, [7], 8.0) for i in range(1, 7))])
    placement.place(0)
    for name in ("width_early", "width_late", "level_width"):
        assert column(name)[0] == pytest.approx(np.log1p(6 / 2)), name
    placement.place(1)
    placement.place(1)
    np.testing.assert_allclose(column("level_here"), [0, 2 / 6], atol=1e-6)
    np.testing.assert_allclose(column("recent_here"), [0.875**2 / 8, 0.125 + 0.875 / 8], atol=1e-6)


def test_fluid_time_pours_the_rest_over_the_devices():
    """Six ops of 1 and 2 ms: all poured over both takes 6 / (1 + 1/2) = 4 ms."""
    placement, column = place([[1, 2]] * 6, [])
    balanced = 6 / 2
    assert column("fluid")[0] == pytest.approx(np.log(4 / balanced))
    assert column("fluid_gain")[0] == pytest.approx(np.log(6 / 4))
    placement.place(0)
    assert column("fluid")[0] == pytest.approx(np.log(4 / balanced))
    np.testing.assert_allclose(column("room"), np.log1p(np.array([4 - 2, 4 - 2]) / 1.5), rtol=1e-6)


def test_ops_without_cost_or_without_edges_stay_finite():
    latency = [[0, 0], [1, 2], [0, 0], [np.inf, 3]]
    placement, _ = place(latency, [(0, [1], 0.0)], weight_bytes=[0, 0, 0, 0])
    while not placement.done:
        assert np.isfinite(placement.features).all() and np.abs(placement.features).max() <= 10
        placement.place(int(np.flatnonzero(placement.mask)[0]))
