from dataclasses import replace

import numpy as np
import pytest

from autoplace.agents.ppo import PpoConfig, PpoTrainer
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster
from autoplace.policy.network import PolicyConfig, PolicyNetwork
from autoplace.policy.policy import Policy
from autoplace.problem import Problem

SMALL = PpoConfig(envs=4, steps=64, batch_size=64, epochs=4, learning_rate=3e-3, updates_per_chunk=2, warmup_updates=0)


def test_ppo_learns_the_optimum_of_a_trivial_problem(lanes):
    problem, fast = lanes
    network, seen = PolicyNetwork(seed=0), []
    assert (Policy.of(network).greedy(problem) != fast).any()
    trainer = PpoTrainer(network, [problem], SMALL, max_devices=2, report=seen.append)
    for chunk in range(8):
        trainer.run_chunk(chunk)
    np.testing.assert_array_equal(Policy.of(network).greedy(problem), fast)
    # The optimum is the reference too, so that a perfect episode is rewarded with 0.
    assert seen[0]["ppo/reward"] < -0.2 < seen[-1]["ppo/reward"] <= 1e-9
    assert len(seen) == trainer.updates == 16


@pytest.fixture
def tight(lanes):
    """The lanes, with room on each device for a little over half of the ops."""
    problem = lanes[0]
    graph = OpGraph.build(
        names=problem.graph.names, edges=[(i, [i + 1], 1.0) for i in range(7)], weight_bytes=[100] * 8
    )
    devices = tuple(replace(device, memory_bytes=450.0) for device in problem.cluster.devices)
    cluster = Cluster(devices=devices, default_link=problem.cluster.default_link)
    return Problem(graph=graph, cluster=cluster, latency_ms=problem.latency_ms, name="tight")


@pytest.mark.parametrize("interrupted", [False, True])
def test_chunks_are_deterministic_also_across_trainers(lanes, interrupted):
    def trained(split):
        network = PolicyNetwork(PolicyConfig(hidden=8), seed=2)
        trainer = PpoTrainer(network, [lanes[0]], SMALL, max_devices=2)
        trainer.run_chunk(10)
        if split:
            state, updates, weights = trainer.optimizer_state, trainer.updates, network.tensors()
            network = PolicyNetwork(PolicyConfig(hidden=8), seed=99)
            network.load_tensors(weights)
            trainer = PpoTrainer(network, [lanes[0]], SMALL, max_devices=2)
            trainer.optimizer_state, trainer.updates = state, updates
        trainer.run_chunk(11)
        return network.tensors()

    one, other = trained(False), trained(interrupted)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_warm_up_moves_the_critic_alone(lanes):
    network = PolicyNetwork(PolicyConfig(hidden=8), seed=3)
    before = network.tensors()
    config = PpoConfig(envs=2, steps=32, batch_size=32, updates_per_chunk=1, warmup_updates=5)
    PpoTrainer(network, [lanes[0]], config, max_devices=2).run_chunk(0)
    after = network.tensors()
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved and all(name.startswith("value") for name in moved)


def test_without_hard_masks_forbidden_choices_are_punished(tight):
    seen = {}
    for hard in (True, False):
        infos = []
        config = PpoConfig(envs=4, steps=32, batch_size=64, epochs=1, updates_per_chunk=2, warmup_updates=0)
        trainer = PpoTrainer(
            PolicyNetwork(seed=0), [tight], config, max_devices=3, hard_masks=hard, on_episode=infos.append
        )
        trainer.run_chunk(0)
        seen[hard] = [info["feasible"] for info in infos]
    assert all(seen[True]) and not all(seen[False])
