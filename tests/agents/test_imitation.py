import numpy as np
import pytest
import torch

from autoplace.agents.imitation import clone_epoch, demonstrate
from autoplace.agents.teachers import best_known
from autoplace.errors import InputError
from autoplace.policy.network import PolicyNetwork
from autoplace.policy.policy import Policy


def test_the_teacher_finds_the_optimum_and_the_clone_matches_it(lanes):
    problem, fast = lanes
    teacher = best_known(problem, evaluations=300, seed=0)
    np.testing.assert_array_equal(teacher, fast)
    data = demonstrate([problem], [teacher], max_devices=4)
    assert len(data) == 8 and data.features.shape[1] == 4 and not data.masks[:, 2:].any()
    network = PolicyNetwork(seed=0)
    assert (Policy.of(network).greedy(problem) != teacher).any()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for epoch in range(80):
        metrics = clone_epoch(network, optimizer, data, seed=epoch)
    assert metrics["imitate/accuracy"] == 1.0
    np.testing.assert_array_equal(Policy.of(network).greedy(problem), teacher)


def test_cloning_is_deterministic(lanes):
    problem, fast = lanes
    data, weights = demonstrate([problem], [fast.astype(np.int32)], max_devices=2), []
    for _ in range(2):
        network = PolicyNetwork(seed=1)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for epoch in range(3):
            clone_epoch(network, optimizer, data, seed=epoch, batch_size=3)
        weights.append(network.tensors())
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_nothing_to_learn_from_is_an_error(lanes):
    with pytest.raises(InputError, match="no teacher"):
        demonstrate([lanes[0]], [None], max_devices=2)
