import math

import psutil

from autoplace.hardware.cgroups import cpu_quota_cores, memory_limit_bytes

MEMINFO = "MemTotal:       1000 kB\nMemFree:         900 kB"


def test_without_cgroups_the_host_counts(tree):
    root = tree({"meminfo": MEMINFO})
    assert memory_limit_bytes(sys_root=root, proc_root=root) == 1000 * 1024
    assert cpu_quota_cores(sys_root=root, proc_root=root) == math.inf


def test_nothing_known_is_unlimited(tmp_path):
    assert memory_limit_bytes(sys_root=tmp_path, proc_root=tmp_path) == math.inf


def test_v2_the_tightest_level_counts(tree):
    group = "fs/cgroup/user/job"
    root = tree(
        {
            "meminfo": MEMINFO,
            "self/cgroup": "0::/user/job",
            f"{group}/memory.max": "max",
            f"{group}/cpu.max": "max 100000",
            "fs/cgroup/user/memory.max": 500_000,
            "fs/cgroup/user/cpu.max": "150000 100000",
        }
    )
    assert memory_limit_bytes(sys_root=root, proc_root=root) == 500_000
    assert cpu_quota_cores(sys_root=root, proc_root=root) == 1.5


def test_v1_and_a_path_that_the_container_does_not_see(tree):
    root = tree(
        {
            "meminfo": MEMINFO,
            "self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n3:freezer:/x\n0::/",
            "fs/cgroup/memory/memory.limit_in_bytes": 700_000,
            "fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": 200_000,
            "fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": 100_000,
        }
    )
    assert memory_limit_bytes(sys_root=root, proc_root=root) == 700_000
    assert cpu_quota_cores(sys_root=root, proc_root=root) == 2.0


def test_v1_unlimited_is_the_host(tree):
    root = tree(
        {
            "meminfo": MEMINFO,
            "self/cgroup": "4:memory:/\n5:cpu:/",
            "fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
            "fs/cgroup/cpu/cpu.cfs_quota_us": -1,
            "fs/cgroup/cpu/cpu.cfs_period_us": 100_000,
        }
    )
    assert memory_limit_bytes(sys_root=root, proc_root=root) == 1000 * 1024
    assert cpu_quota_cores(sys_root=root, proc_root=root) == math.inf


def test_this_machine_has_a_limit_within_its_memory():
    assert 0 < memory_limit_bytes() <= psutil.virtual_memory().total
