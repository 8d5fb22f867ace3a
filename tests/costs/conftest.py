"""A slow and a fast module, whose times can be told apart on any machine, and a cache of its own for every test."""

import time

import pytest
import torch
from torch import nn

from autoplace.graph.coarsen import coarsen
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.workload import Workload


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOPLACE_CACHE_DIR", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward_ms, backward_ms):
        ctx.backward_ms = backward_ms
        time.sleep(forward_ms / 1e3)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.backward_ms / 1e3)
        return grad, None, None


class Sleeper(nn.Module):
    """Takes a fixed and a per-sample time, forward and backward."""

    def __init__(self, fixed_ms=0.0, sample_ms=0.0, backward_ms=0.0):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.fixed_ms, self.sample_ms, self.backward_ms = fixed_ms, sample_ms, backward_ms

    def forward(self, x):
        return _Sleep.apply(x * self.scale, self.fixed_ms + self.sample_ms * len(x), self.backward_ms)


class Sleepers(nn.Module):
    """Two sleepers in sequence, with code of the parent (glue) between and after."""

    def __init__(self, a, b, glue_ms=0.0):
        super().__init__()
        self.a, self.b, self.glue_ms = a, b, glue_ms

    def forward(self, x):
        x = self.a(x)
        time.sleep(self.glue_ms / 1e3)
        return self.b(x)


@pytest.fixture
def sleepers():
    """Build a workload of two sleepers and the grouping of its graph."""

    def build(a, b, *, glue_ms=0.0, batch=4, training=False):
        workload = Workload(
            model=Sleepers(Sleeper(**a), Sleeper(**b), glue_ms), args=(torch.ones(batch, 2),), training=training
        )
        graph = OpGraph.build(
            names=["mul", "glue", "mul_1"],
            modules=["a", "", "b"],
            edges=[(0, [1], 32.0), (1, [2], 32.0)],
            flops=[8.0, 0.0, 8.0],
            bytes_moved=[64.0, 0.0, 64.0],
            weight_bytes=[4, 0, 4],
        )
        return workload, coarsen(graph)

    return build


@pytest.fixture
def one_cpu():
    """A cluster of this machine's first usable core, once."""
    return Cluster(devices=(_cpu(0),))


@pytest.fixture
def two_cpus():
    """Two devices on the same core: alike, so that one measurement serves both."""
    return Cluster(devices=(_cpu(0), _cpu(1)), default_link=Link(latency_ms=0.01, bytes_per_ms=1e6))


def _cpu(index):
    import os

    return Device(name=f"host0/cpu:{index}", kind="cpu", cores=(min(os.sched_getaffinity(0)),))
