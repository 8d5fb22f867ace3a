import numpy as np
import pytest
import torch

from autoplace.policy.features import PartialPlacement
from autoplace.policy.network import PolicyConfig, PolicyNetwork
from autoplace.policy.policy import Policy
from autoplace.policy.rollout import pack_weights, roll, score_devices
from autoplace.policy.tables import build_tables


def noisy(hidden=32, seed=0):
    """Return a network whose scores differ by device."""
    network = PolicyNetwork(PolicyConfig(hidden=hidden), seed=seed)
    with torch.no_grad():
        network.score2.weight.mul_(20)
    return network


@pytest.mark.parametrize("hidden", [8, 32])
def test_numba_scores_equal_torch(problem_maker, hidden):
    network = noisy(hidden)
    weights = pack_weights(network.tensors())
    placement = PartialPlacement(problem_maker(memory=0.5, colocate=True))
    scores = np.empty(3, np.float32)
    while not placement.done:
        score_devices(weights, placement.features, scores)
        with torch.no_grad():
            expected = network(torch.from_numpy(placement.features)[None])[0][0].numpy()
        np.testing.assert_allclose(scores, expected, atol=1e-4)
        placement.place(int(np.flatnonzero(placement.mask)[0]))


def test_greedy_is_the_best_allowed_device_at_every_step(problem_maker):
    problem, network = problem_maker(memory=0.5), noisy()
    policy, placement = Policy.of(network), PartialPlacement(problem)
    while not placement.done:
        with torch.no_grad():
            scores = network(torch.from_numpy(placement.features)[None])[0][0].numpy()
        placement.place(int(np.argmax(np.where(placement.mask, scores, -np.inf))))
    np.testing.assert_array_equal(policy.greedy(problem), placement.assignment)


def test_samples_are_deterministic_by_seed_and_follow_the_temperature(problem_maker):
    problem, policy = problem_maker(), Policy.of(noisy())
    one, other = policy.sample(problem, 20, seed=1), policy.sample(problem, 20, seed=1)
    np.testing.assert_array_equal(one, other)
    assert (one != policy.sample(problem, 20, seed=2)).any()
    assert len(np.unique(one, axis=0)) > 1
    cold = policy.sample(problem, 20, seed=1, temperature=1e-6)
    np.testing.assert_array_equal(cold, np.repeat(policy.greedy(problem)[None], 20, axis=0))


def test_first_choices_are_drawn_by_their_probabilities(problem_maker):
    problem, network = problem_maker(ops=3), noisy(seed=2)
    tables = build_tables(problem)
    draws = roll(tables, pack_weights(network.tensors()), count=4000, temperature=1.0, seed=0)
    placement = PartialPlacement(problem, tables)
    with torch.no_grad():
        expected = network(torch.from_numpy(placement.features)[None])[0][0].softmax(0).numpy()
    found = np.bincount(draws[:, tables.class_members[0]], minlength=3) / 4000
    np.testing.assert_allclose(found, expected, atol=0.04)
