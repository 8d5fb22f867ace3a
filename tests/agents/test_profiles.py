import numpy as np
import pytest

from autoplace.agents.profiles import PROFILES, draw_hardware, roofline
from autoplace.graph.opgraph import OpGraph


def graph():
    return OpGraph.build(
        names=["product", "copy", "~loss"],
        edges=[(0, [1], 1.0), (1, [2], 0.0)],
        kinds=["linear", "clone", "barrier"],
        flops=[1e12, 0.0, 0.0],
        bytes_moved=[1e6, 8e8, 0.0],
    )


def test_latencies_are_rooflines_of_the_published_peaks():
    types = [PROFILES[name] for name in ("A100-SXM", "T4", "A100-SXM", "Xeon-6226R")]
    for half in (False, True):
        latency, overhead = roofline(np.random.default_rng(0), graph(), types, half=half)
        assert latency.shape == overhead.shape == (3, 4) and (overhead <= latency).all()
        for column, profile in enumerate(types):
            peak = (profile.half_tflops if half else profile.tflops) * 1e9
            work = latency[:, column] - overhead[:, column]
            assert 1e12 / peak / 0.95 <= work[0] <= 1e12 / peak / 0.05
            assert work[1] == pytest.approx(8e8 / (profile.gbytes * 0.8e6))
        np.testing.assert_array_equal(latency[:, 0], latency[:, 2])
        assert (latency[2] == 0.0).all()


@pytest.mark.parametrize("family", ["equal", "unequal", "accelerated", "hosts"])
def test_clusters_are_of_their_family(family):
    fastest = 0.0
    for seed in range(20):
        cluster, types = draw_hardware(np.random.default_rng(seed), family, 2 + seed % 15)
        assert cluster.num_devices == len(types) == 2 + seed % 15
        assert [d.model for d in cluster.devices] == [p.name for p in types]
        names, hosts = {p.name for p in types}, {d.host for d in cluster.devices}
        assert (
            len(names) == 1 if family == "equal" else len(names) >= (2 if family in ("unequal", "accelerated") else 1)
        )
        assert len(hosts) == 1 if family != "hosts" else 2 <= len(hosts) <= 4
        assert [p.kind for p in types].count("cpu") == (1 if family == "accelerated" else 0)
        apart = ~np.eye(len(types), dtype=bool)
        speed = cluster.link_bytes_per_ms[apart]
        assert (speed > 0.0).all() and np.isfinite(cluster.link_latency_ms).all()
        fastest = max(fastest, float(speed.max()))
    assert fastest > 50e6 if family in ("equal", "hosts") else fastest >= 12e6
