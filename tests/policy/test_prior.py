import numpy as np
import pytest
import torch

from autoplace.errors import InputError
from autoplace.policy.features import PartialPlacement
from autoplace.policy.network import PolicyNetwork
from autoplace.policy.policy import Policy
from autoplace.policy.tables import build_tables


@pytest.fixture(scope="module")
def policy():
    network = PolicyNetwork(seed=3)
    with torch.no_grad():
        network.score2.weight.mul_(20)
    return Policy.of(network)


@pytest.mark.parametrize("memory", [None, 0.5])
def test_along_the_greedy_placement_its_devices_are_the_likeliest(problem_maker, policy, memory):
    problem = problem_maker(colocate=True, memory=memory)
    greedy = policy.greedy(problem)
    prior = policy.prior(problem, greedy)
    assert prior.shape == (problem.num_ops, 3) and prior.dtype == np.float32
    np.testing.assert_allclose(prior.sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(prior.argmax(axis=1), greedy)
    assert len(np.unique(prior[problem.graph.colocate == 1], axis=0)) == 1


def test_rows_are_the_networks_softmax_after_the_same_decisions(problem_maker, policy):
    problem = problem_maker(memory=0.45)
    plan = policy.sample(problem, 1, seed=8)[0]
    tables, network = build_tables(problem), policy.network()
    prior, placement = policy.prior(problem, plan, tables=tables), PartialPlacement(problem, tables)
    for action in placement.actions(plan):
        with torch.no_grad():
            scores = network(torch.from_numpy(placement.features)[None])[0][0]
        expected = scores.masked_fill(~torch.from_numpy(placement.mask), -np.inf).softmax(0).numpy()
        np.testing.assert_allclose(prior[placement.current_ops[0]], expected, atol=1e-4)
        placement.place(int(action))


def test_a_placement_against_the_masks_still_has_a_prior(problem_maker, policy):
    problem = problem_maker(memory=0.4)
    prior = policy.prior(problem, np.zeros(problem.num_ops, np.int32))
    assert np.isfinite(prior).all() and (prior >= 0).all()
    np.testing.assert_allclose(prior.sum(axis=1), 1.0, atol=1e-5)


def test_after_a_device_that_cannot_run_an_op_rows_are_uniform(problem_maker, policy):
    problem = problem_maker()
    latency = problem.latency_ms.copy()
    latency[:, 1] = np.inf
    latency[5, 1] = 1.0
    problem = problem.with_(latency_ms=latency)
    prior = policy.prior(problem, np.ones(problem.num_ops, np.int32))
    first = build_tables(problem).class_members[0]
    assert prior[first, 0] != pytest.approx(0.5, abs=1e-3)
    rest = np.arange(problem.num_ops)[(np.arange(problem.num_ops) != first) & (np.arange(problem.num_ops) != 5)]
    np.testing.assert_allclose(prior[rest], [[0.5, 0.0, 0.5]] * len(rest))


def test_resample_with_everything_free_is_sample(problem_maker, policy):
    problem = problem_maker(colocate=True, memory=0.5)
    draws = policy.resample(problem, np.zeros(24, np.int32), np.ones(24, bool), 10, seed=4, temperature=0.7)
    np.testing.assert_array_equal(draws, policy.sample(problem, 10, seed=4, temperature=0.7))


def test_resample_keeps_what_is_not_free(problem_maker, policy):
    problem = problem_maker(colocate=True)
    plan = np.arange(24, dtype=np.int32) % 3
    plan[problem.graph.colocate == 0] = 2
    plan[problem.graph.colocate == 1] = 1
    free = np.zeros(24, bool)
    free[[0, 5, 6, 7]] = True
    draws = policy.resample(problem, plan, free, 30, seed=1)
    # Op 23 moves with op 0, with which it is co-located.
    kept = ~free & (problem.graph.colocate != 0)
    np.testing.assert_array_equal(draws[:, kept], np.repeat(plan[kept][None], 30, axis=0))
    assert len(np.unique(draws[:, [5, 6, 7]], axis=0)) > 3
    np.testing.assert_array_equal(draws[:, 0], draws[:, 23])


def test_resample_decides_what_the_mask_forbids(problem_maker, policy):
    problem = problem_maker(memory=0.4)
    draws = policy.resample(problem, np.zeros(24, np.int32), np.zeros(24, bool), 3, seed=1)
    held = problem.graph.weight_bytes + problem.graph.activation_bytes
    assert len(draws) == 3
    for draw in draws:
        assert (np.bincount(draw, weights=held, minlength=3) <= problem.cluster.devices[0].memory_bytes).all()
        assert (draw == 0).any() and (draw != 0).any()


def test_wrong_lengths_and_devices_are_refused(problem_maker, policy):
    problem = problem_maker()
    with pytest.raises(InputError, match="24 ops"):
        policy.prior(problem, np.zeros(3, np.int32))
    with pytest.raises(InputError, match="outside 0 to 2"):
        policy.prior(problem, np.full(24, 3, np.int32))
    with pytest.raises(InputError, match="one flag"):
        policy.resample(problem, np.zeros(24, np.int32), np.ones(2, bool), 1, seed=0)


def test_permuting_the_devices_permutes_the_prior(problem_maker, policy):
    problem, order = problem_maker(ops=40, goal="throughput"), np.array([2, 0, 1])
    cluster = type(problem.cluster)(
        devices=tuple(problem.cluster.devices[i] for i in order), default_link=problem.cluster.default_link
    )
    moved = problem.with_(cluster=cluster, latency_ms=problem.latency_ms[:, order])
    plan = policy.sample(problem, 1, seed=2)[0]
    there = policy.prior(moved, np.argsort(order)[plan].astype(np.int32))
    np.testing.assert_allclose(policy.prior(problem, plan)[:, order], there, atol=1e-4)
