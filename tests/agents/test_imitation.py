import numpy as np
import pytest
import torch

from autoplace.agents.distribution import training_problems
from autoplace.agents.imitation import clone_epoch, demonstrate
from autoplace.agents.teachers import best_known
from autoplace.errors import InputError
from autoplace.policy.features import NUM_FEATURES
from autoplace.policy.network import PolicyNetwork
from autoplace.policy.policy import Policy


def test_the_teacher_finds_the_optimum_and_the_clone_matches_it(lanes):
    problem, fast = lanes
    teacher = best_known(problem, evaluations=300, seed=0)
    np.testing.assert_array_equal(teacher, fast)
    data = demonstrate([problem], [teacher])
    assert len(data) == 8 and [group.features.shape[:2] for group in data.groups] == [(8, 2)]
    network = PolicyNetwork(seed=0)
    assert (Policy.of(network).greedy(problem) != teacher).any()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for epoch in range(80):
        metrics = clone_epoch(network, optimizer, data, seed=epoch)
    assert metrics["imitate/accuracy"] == 1.0
    np.testing.assert_array_equal(Policy.of(network).greedy(problem), teacher)


def test_cloning_is_deterministic(lanes):
    problem, fast = lanes
    data, weights = demonstrate([problem], [fast.astype(np.int32)]), []
    for _ in range(2):
        network = PolicyNetwork(seed=1)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for epoch in range(3):
            clone_epoch(network, optimizer, data, seed=epoch, batch_size=3)
        weights.append(network.tensors())
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_nothing_to_learn_from_is_an_error(lanes):
    with pytest.raises(InputError, match="no teacher"):
        demonstrate([lanes[0]], [None])


def test_decisions_of_few_and_many_devices_are_learned_together():
    problems = training_problems(30, seed=1, max_ops=20, max_devices=12)
    teachers = [best_known(p, evaluations=30, seed=0) for p in problems]
    data = demonstrate(problems, teachers)
    widths = [group.features.shape[1] for group in data.groups]
    assert widths == sorted(set(widths)) and len(widths) > 3 and max(widths) <= 13
    assert sum(group.features.size for group in data.groups) < 0.7 * len(data) * 12 * NUM_FEATURES
    network = PolicyNetwork(seed=0)
    one_pass = clone_epoch(network, torch.optim.SGD(network.parameters(), lr=0.0), data, seed=0, batch_size=7)
    losses = []
    for group in data.groups:
        scores = network(torch.from_numpy(group.features))[0].masked_fill(~torch.from_numpy(group.masks), -1e8)
        losses += torch.nn.functional.cross_entropy(scores, torch.from_numpy(group.actions), reduction="none").tolist()
    assert one_pass["imitate/loss"] == pytest.approx(np.mean(losses), rel=1e-4)
