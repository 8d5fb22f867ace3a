import os

from autoplace.hardware.cluster import Cluster
from autoplace.hardware.discover import ASSUMED_LINK, cpu_devices, discover
from autoplace.hardware.nvml import NullNvml


def test_core_groups_of_a_recorded_host(tree):
    root = tree(
        {
            "devices/system/node/node0/cpulist": "0-3",
            "devices/system/node/node1/cpulist": "4-7",
            "cpuinfo": "model name : Recorded CPU",
            "meminfo": "MemTotal: 1001 kB",
            "self/cgroup": "0::/",
            "fs/cgroup/memory.max": 999_999,
        }
    )
    first, second = cpu_devices("h", available=range(8), sys_root=root, proc_root=root)
    assert (first.name, first.cores, second.name, second.cores) == ("h/cpu:0", (0, 1, 2, 3), "h/cpu:1", (4, 5, 6, 7))
    assert first.memory_bytes == second.memory_bytes == 999_999 // 2, "both groups full still fit the limit"
    assert first.model == "Recorded CPU"
    assert first.busy_watts == 14.0


def test_this_machine_without_measuring():
    cluster = Cluster.discover(measure_links=False, host="here")
    groups = [d for d in cluster.devices if d.kind == "cpu"]
    cores = sorted(c for d in groups for c in d.cores)
    assert set(cores) <= os.sched_getaffinity(os.getpid()) and len(set(cores)) == len(cores)
    assert len(groups) >= min(2, len(cores))
    assert {d.host for d in cluster.devices} == {"here"}
    assert cluster.default_link == ASSUMED_LINK and not cluster.links


def test_this_machine_with_links_has_one_for_every_pair_and_a_steady_fingerprint():
    cluster, again = discover(nvml=NullNvml()), discover(measure_links=False, nvml=NullNvml())
    assert len(cluster.links) == cluster.num_devices * (cluster.num_devices - 1)
    assert cluster.fingerprint == again.fingerprint
