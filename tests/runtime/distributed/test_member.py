import os
import subprocess
import sys

import pytest

from autoplace.hardware.cluster import Cluster, Device
from autoplace.runtime.distributed import member
from autoplace.runtime.distributed.member import assigned, gpu_index, host_name, own_device


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.delenv(member.HOST_VARIABLE, raising=False)
    names = ("a/cuda:1", "b/cpu:0", "a/cpu:0")
    return Cluster(devices=tuple(Device(name=n, kind=n.split("/")[1].split(":")[0]) for n in names))


@pytest.fixture
def host_without_gpus(monkeypatch):
    monkeypatch.setattr(member, "cuda_devices", lambda host, nvml: [])
    monkeypatch.setattr(member, "available_cores", lambda *, quota_cores: (0, 1, 2, 5, 6))
    monkeypatch.setattr(member, "memory_limit_bytes", lambda: 1001.0)


def test_a_host_is_named_by_the_environment_the_file_or_the_machine(cluster, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "machine")
    monkeypatch.setenv("GROUP_RANK", "3")
    assert host_name(cluster) == "machine"
    assert host_name(Cluster(devices=cluster.devices[1:2])) == "b"
    assert host_name() == "host3"
    monkeypatch.setenv(member.HOST_VARIABLE, "a")
    assert host_name(cluster) == host_name() == "a"


def test_devices_are_given_out_in_order(cluster, monkeypatch):
    monkeypatch.setenv(member.HOST_VARIABLE, "a")
    assert [assigned(cluster, i) for i in range(3)] == [cluster.devices[0], cluster.devices[2], None]
    assert gpu_index(cluster.devices[0]) == 1 and gpu_index(Device(name="a/gpu", kind="cuda")) == -1


@pytest.mark.usefixtures("host_without_gpus")
def test_processes_share_cores_and_memory():
    (alone,) = [own_device("a", 0, 1)]
    assert (alone.name, alone.cores, alone.memory_bytes) == ("a/cpu:0", (0, 1, 2, 5, 6), 1001.0)
    first, second = (own_device("a", i, 2) for i in range(2))
    assert (first.cores, second.cores) == ((0, 1), (2, 5, 6))
    assert first.memory_bytes == second.memory_bytes == 500.0
    assert first.busy_watts < second.busy_watts < alone.busy_watts
    many = [own_device("a", i, 7).cores for i in range(7)]
    assert all(many), "more processes than cores share them"


@pytest.mark.usefixtures("host_without_gpus")
def test_gpus_come_first(monkeypatch):
    gpu = Device(name="a/cuda:0", kind="cuda")
    monkeypatch.setattr(member, "cuda_devices", lambda host, nvml: [gpu])
    assert own_device("a", 0, 2) == gpu
    rest = own_device("a", 1, 2)
    assert (rest.name, len(rest.cores)) == ("a/cpu:0", 5)


def test_a_process_stays_on_its_cores():
    core = min(os.sched_getaffinity(0))
    code = (
        "import os, sys, torch\n"
        "from autoplace.hardware.cluster import Device\n"
        "from autoplace.runtime.distributed.member import take_cores\n"
        f"take_cores(Device(name='a/cpu:0', kind='cpu', cores=({core}, 100000)))\n"
        "assert os.sched_getaffinity(0) != {100000}\n"
        f"take_cores(Device(name='a/cpu:0', kind='cpu', cores=({core},)))\n"
        "tasks = os.listdir('/proc/self/task')\n"
        f"assert all(os.sched_getaffinity(int(task)) == {{{core}}} for task in tasks), tasks\n"
        "assert torch.get_num_threads() == 1 and os.environ['OMP_NUM_THREADS'] == '1'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
