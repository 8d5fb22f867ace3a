import math

import psutil

from autoplace.hardware.cgroups import cpu_quota_cores, memory_held_bytes, memory_limit_bytes

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


def test_what_the_tightest_group_holds_is_counted_without_files(tree):
    stat = "anon 1\ninactive_file 30000\nactive_file 10000"
    root = tree(
        {
            "meminfo": MEMINFO,
            "self/cgroup": "0::/user/job",
            "fs/cgroup/user/job/memory.max": "max",
            "fs/cgroup/user/job/memory.current": 90_000,
            "fs/cgroup/user/memory.max": 500_000,
            "fs/cgroup/user/memory.current": 100_000,
            "fs/cgroup/user/memory.stat": stat,
        }
    )
    assert memory_held_bytes(sys_root=root, proc_root=root) == 60_000


def test_what_a_v1_group_holds_has_that_of_the_groups_below_it(tree):
    root = tree(
        {
            "meminfo": MEMINFO,
            "self/cgroup": "4:memory:/job",
            "fs/cgroup/memory/job/memory.limit_in_bytes": 700_000,
            "fs/cgroup/memory/job/memory.usage_in_bytes": 100_000,
            "fs/cgroup/memory/job/memory.stat": "active_file 1\ntotal_inactive_file 20000\ntotal_active_file 5000",
        }
    )
    assert memory_held_bytes(sys_root=root, proc_root=root) == 75_000


def test_without_a_limited_group_nothing_is_told(tree):
    root = tree({"meminfo": MEMINFO, "self/cgroup": "0::/", "fs/cgroup/memory.current": 5})
    assert memory_held_bytes(sys_root=root, proc_root=root) == 0.0


def test_this_machine_has_a_limit_within_its_memory():
    assert 0 < memory_limit_bytes() <= psutil.virtual_memory().total
