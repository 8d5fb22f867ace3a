import numpy as np
import pytest

from autoplace.agents.conditions import draw_device_count, draw_memory, needed_bytes
from autoplace.graph.opgraph import OpGraph


def chain(weights, activations, *, frees, colocate=None):
    count = len(weights)
    return OpGraph.build(
        names=[f"op{i}" for i in range(count)],
        edges=[(i, [i + 1], 1.0) for i in range(count - 1)],
        weight_bytes=weights,
        activation_bytes=activations,
        frees=[frees] * count,
        colocate=colocate,
    )


def test_what_is_needed_counts_freed_outputs_while_they_are_read():
    held, largest = needed_bytes(chain([10, 10, 10], [1, 2, 3], frees=False))
    assert (held, largest) == (36.0, 13.0)
    assert needed_bytes(chain([10, 10, 10], [1, 2, 3], frees=True)) == (35.0, 13.0)
    assert needed_bytes(chain([10, 10, 10], [1, 2, 3], frees=False, colocate=[0, -1, 0]))[1] == 24.0


@pytest.mark.parametrize("count", [2, 3, 8])
def test_binding_memory_holds_all_together_and_never_alone(count):
    graph = chain([10] * 40, [1] * 40, frees=False)
    total = needed_bytes(graph)[0]
    for seed in range(30):
        memory = draw_memory(np.random.default_rng(seed), graph, count, how="binding")
        assert 1.14 * total < memory.sum() < 1.7 * total and memory.max() <= 0.9 * total + 1e-6
    assert np.isinf(draw_memory(np.random.default_rng(0), graph, count, how="unlimited")).all()
    ample = draw_memory(np.random.default_rng(0), graph, count, how="ample")
    assert ample.sum() >= 2.0 * total


def test_memory_follows_the_shares_asked_for():
    graph = chain([10] * 40, [0] * 40, frees=False)
    memory = draw_memory(np.random.default_rng(0), graph, 3, how="ample", shares=np.array([1.0, 2.0, 4.0]))
    np.testing.assert_allclose(memory / memory[0], [1.0, 2.0, 4.0])


def test_few_devices_come_more_often_than_many():
    counts = [draw_device_count(np.random.default_rng(seed), 16) for seed in range(2000)]
    assert set(counts) == set(range(2, 17)) and np.mean(np.array(counts) <= 5) > 0.4
    assert {draw_device_count(np.random.default_rng(seed), 2) for seed in range(50)} == {2}
