"""Executors with a GPU; skipped where there is none."""

import os

import pytest
import torch
from torch import nn

from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.runtime import InlineDevice, SingleDevice, build_executor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

C, G = "host0/cpu:0", "host0/cuda:0"


@pytest.fixture
def cluster():
    cores = tuple(sorted(os.sched_getaffinity(0)))
    devices = (Device(name=C, kind="cpu", cores=cores), Device(name=G, kind="cuda"))
    return Cluster(devices=devices, default_link=Link(latency_ms=0.0, bytes_per_ms=1e9))


@pytest.mark.parametrize("home", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("replicas", "knobs"),
    [
        ([G], {}),
        ([C, G], {"shares": [0.25, 0.75]}),
        ([{"0": C, "1": G, "2": C}], {}),
        ([{"0": G, "1": C, "2": G}], {"microbatches": 2}),
        ([{"0": C, "1": G, "2": C}], {"engine": "graph"}),
        ([{"0": G, "1": C, "2": G}], {"engine": "graph", "microbatches": 2}),
    ],
)
def test_mixed_devices_equal_plain_pytorch(make_plan, compare, home, replicas, knobs):
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).to(home)
    x = torch.randn(8, 8, device=home)
    for _ in range(3):
        output = compare(net, make_plan(*replicas, **knobs), [x])
        assert output.device.type == home
    assert all(p.device.type == home for p in net.parameters())


def test_busy_time_is_the_gpus(cluster, make_plan):
    net = nn.Linear(2048, 2048).cuda()
    with build_executor(net, make_plan(G), cluster) as executor, torch.no_grad():
        executor(torch.randn(512, 2048, device="cuda"))
        executor.busy_ms()
        executor(torch.randn(512, 2048, device="cuda"))
        assert 0 < executor.busy_ms()[G] < 1000


def test_a_model_on_the_gpu_runs_in_line(cluster, make_plan, compare):
    net, x = nn.Sequential(nn.Linear(512, 512), nn.Dropout(0.5)).cuda(), torch.randn(256, 512, device="cuda")
    with build_executor(net, make_plan(G), cluster) as executor:
        assert type(executor) is InlineDevice
        torch.manual_seed(3)
        y = executor(x)
        torch.manual_seed(3)
        assert torch.equal(y, net(x)), "dropout is bit-equal under one seed"
        assert 0 < executor.busy_ms()[G] < 1000
        y.sum().backward()
        assert 0 < executor.busy_ms()[G] < 1000
        moved = executor(x.cpu())
        assert moved.device.type == "cpu", "inputs from elsewhere are moved, and outputs back"
    compare(net.eval(), make_plan(G), [x])
    with build_executor(net.cpu(), make_plan(G), cluster) as executor:
        assert type(executor) is SingleDevice


def test_two_plans_take_turns_on_a_gpu_that_holds_one_of_them(make_plan, cluster):
    total = torch.cuda.get_device_properties(0).total_memory
    net = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096) for _ in range(8))).eval()  # 512 MiB
    plans = [make_plan({str(i): G if i < n else C for i in range(8)}) for n in (6, 7)]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (800 << 20)) / total, 0)
    try:
        with (
            torch.no_grad(),
            build_executor(net, plans[0], cluster) as a,
            build_executor(net, plans[1], cluster) as b,
        ):
            x = torch.randn(4, 4096)
            for _ in range(2):
                for executor in (a, b):
                    torch.testing.assert_close(executor(x), net(x), rtol=1e-3, atol=1e-3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
