import numpy as np
import pytest

from autoplace.policy.propagate import consumers_of, discounted_sums, hop_means, producers_of
from autoplace.policy.tables import build_tables


@pytest.fixture
def graph(problem_maker):
    """A problem, its tables and its row-normalised adjacency on and back, float64[N, N]."""
    problem = problem_maker(ops=30, seed=5)
    on = np.zeros((30, 30))
    for producer, consumer, _ in problem.graph.edge_list:
        on[producer, consumer] += 1.0
    back = on.T.copy()
    for matrix in (on, back):
        matrix /= np.maximum(matrix.sum(axis=1, keepdims=True), 1.0)
    return problem, build_tables(problem), on, back


def test_hop_means_are_powers_of_the_adjacency(graph):
    _, tables, on, back = graph
    signals = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    for edges, matrix in ((consumers_of(tables), on), (producers_of(tables), back)):
        found = hop_means(edges, signals, 4)
        assert len(found) == 3
        for power, mean in zip((1, 2, 4), found, strict=True):
            np.testing.assert_allclose(mean, np.linalg.matrix_power(matrix, power) @ signals, atol=1e-5)


def test_weights_of_tensors_weigh_the_mean(graph):
    problem, tables, _, _ = graph
    signals = np.random.default_rng(1).normal(size=(30, 2)).astype(np.float32)
    weights = problem.graph.tensor_bytes
    found = hop_means(producers_of(tables), signals, 1, weights)[0]
    edges = problem.graph.edge_list
    for op in range(30):
        own = edges[edges[:, 1] == op]
        if len(own):
            expected = np.average(signals[own[:, 0]], axis=0, weights=weights[own[:, 2]])
            np.testing.assert_allclose(found[op], expected, atol=1e-5)
        else:
            assert (found[op] == 0).all()


def test_discounted_sums_are_the_geometric_series(graph):
    problem, tables, on, _ = graph
    signals = np.random.default_rng(2).normal(size=(30, 2)).astype(np.float32)
    order = problem.graph.topological_order.astype(np.int64)[::-1].copy()
    found = discounted_sums(consumers_of(tables), order, signals, 0.9)
    expected = sum(0.9**k * np.linalg.matrix_power(on, k) @ signals for k in range(1, 31))
    np.testing.assert_allclose(found, expected, atol=1e-4)
