import numpy as np
import pytest

from autoplace.agents.ppo import PpoConfig
from autoplace.agents.train import TrainConfig
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Problem


@pytest.fixture(scope="session")
def lanes():
    """Eight ops in a chain, each with one fast device of two and free transfers: the optimum is known."""
    fast = np.array([0, 1, 1, 0, 1, 0, 0, 1])
    latency = np.where(np.arange(2)[None, :] == fast[:, None], 1.0, 3.0)
    devices = tuple(Device(name=f"host0/cuda:{i}", kind="cuda") for i in range(2))
    problem = Problem(
        graph=OpGraph.build(names=[f"op{i}" for i in range(8)], edges=[(i, [i + 1], 1.0) for i in range(7)]),
        cluster=Cluster(devices=devices, default_link=Link(latency_ms=0.0, bytes_per_ms=1e9)),
        latency_ms=latency,
        name="lanes",
    )
    return problem, fast


@pytest.fixture
def tiny(tmp_path):
    """A configuration that trains in about a second."""

    def make(name="run", **changes):
        settings = {
            "output": tmp_path / name,
            "problems": 4,
            "captured": 0.0,
            "workers": 1,
            "max_ops": 12,
            "max_devices": 3,
            "teacher_evaluations": 40,
            "imitate_epochs": 2,
            "simulate_steps": 120,
            "validation": 3,
            "held_out": 3,
            "hidden": 8,
            "ppo": PpoConfig(envs=2, steps=30, updates_per_chunk=1, batch_size=30, epochs=2, warmup_updates=0),
        }
        return TrainConfig(**(settings | changes))

    return make
