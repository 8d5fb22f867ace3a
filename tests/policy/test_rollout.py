import numpy as np
import pytest
import torch

from autoplace.policy import scorer
from autoplace.policy.features import PartialPlacement
from autoplace.policy.network import PolicyConfig, PolicyNetwork
from autoplace.policy.policy import Policy
from autoplace.policy.rollout import follow, roll
from autoplace.policy.scorer import pack_weights
from autoplace.policy.tables import build_tables


def noisy(hidden=32, seed=0, message_passing=True):
    """Return a network whose scores differ by device."""
    network = PolicyNetwork(PolicyConfig(hidden=hidden, message_passing=message_passing), seed=seed)
    with torch.no_grad():
        network.score2.weight.mul_(20)
    return network


@pytest.mark.parametrize("hidden", [8, 32, 48])
@pytest.mark.parametrize("message_passing", [True, False])
def test_numba_probabilities_equal_torch(problem_maker, hidden, message_passing):
    network = noisy(hidden, message_passing=message_passing)
    problem = problem_maker(memory=0.5, colocate=True, goal="throughput")
    tables = build_tables(problem)
    weights, placement = pack_weights(network.tensors()), PartialPlacement(problem, tables)
    plan = roll(tables, weights, count=1, temperature=1.0, seed=3)[0]
    found = follow(tables, weights, placement.actions(plan))
    for action, row in zip(placement.actions(plan), found, strict=True):
        with torch.no_grad():
            scores = network(torch.from_numpy(placement.features)[None])[0][0]
        expected = scores.masked_fill(~torch.from_numpy(placement.mask), -np.inf).softmax(0).numpy()
        np.testing.assert_allclose(row, expected, atol=1e-4)
        placement.place(int(action))
    assert found.max() < 1.0 or found.min() > 0.0


def test_what_is_kept_of_the_first_layer_changes_nothing(problem_maker, monkeypatch):
    """Large problems keep nothing; their placements are those that the cache gives."""
    problem, network = problem_maker(ops=40), noisy()
    tables, weights = build_tables(problem), pack_weights(network.tensors())
    kept = roll(tables, weights, count=5, temperature=1.0, seed=1)
    monkeypatch.setattr(scorer, "CACHE_NUMBERS", 0)
    np.testing.assert_array_equal(roll(tables, weights, count=5, temperature=1.0, seed=1), kept)


def test_without_masks_placements_may_not_fit(problem_maker):
    problem = problem_maker(memory=0.36)
    network, held = noisy(), problem.graph.weight_bytes + problem.graph.activation_bytes
    loose = Policy(PolicyConfig(masks=False), network.tensors()).sample(problem, 20, seed=1)
    tight = Policy(PolicyConfig(), network.tensors()).sample(problem, 20, seed=1)
    limit = problem.cluster.devices[0].memory_bytes

    def highest(draws):
        return max(np.bincount(d, weights=held, minlength=3).max() for d in draws)

    assert len(loose) == 20 and highest(loose) > limit >= highest(tight)


def test_a_device_that_cannot_run_an_op_is_never_chosen_without_masks_either(problem_maker):
    problem = problem_maker()
    latency = problem.latency_ms.copy()
    latency[3, 1] = latency[5, 0] = np.inf
    policy = Policy(PolicyConfig(masks=False), noisy().tensors())
    draws = policy.sample(problem.with_(latency_ms=latency), 50)
    assert (draws[:, 3] != 1).all() and (draws[:, 5] != 0).all()


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
