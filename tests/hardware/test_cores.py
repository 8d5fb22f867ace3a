import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoplace.hardware.cores import available_cores, core_groups, cpu_model, parse_cpu_list

CPU = "devices/system/cpu"


@pytest.mark.parametrize(
    ("text", "cores"),
    [("0-3,8", (0, 1, 2, 3, 8)), ("5", (5,)), ("", ()), ("0-1\n", (0, 1)), ("nonsense", ()), ("2,1-2", (1, 2))],
)
def test_cpu_lists(text, cores):
    assert parse_cpu_list(text) == cores


def l3(groups):
    files = {}
    for cores in groups:
        for core in parse_cpu_list(cores):
            files[f"{CPU}/cpu{core}/cache/index3/level"] = 3
            files[f"{CPU}/cpu{core}/cache/index3/shared_cpu_list"] = cores
            files[f"{CPU}/cpu{core}/cache/index2/level"] = 2
            files[f"{CPU}/cpu{core}/cache/index2/shared_cpu_list"] = core
    return files


def test_numa_nodes_come_first(tree):
    nodes = {"devices/system/node/node0/cpulist": "0-1,4-5", "devices/system/node/node1/cpulist": "2-3,6-7"}
    root = tree(nodes | l3(["0-3", "4-7"]))
    assert core_groups(range(8), sys_root=root) == [(0, 1, 4, 5), (2, 3, 6, 7)]


def test_one_numa_node_falls_to_shared_l3(tree):
    root = tree({"devices/system/node/node0/cpulist": "0-5"} | l3(["0-1", "2-3", "4-5"]))
    assert core_groups(range(6), sys_root=root) == [(0, 1), (2, 3), (4, 5)]


def test_cores_outside_the_affinity_are_left_out(tree):
    root = tree(l3(["0-3", "4-7"]))
    assert core_groups([2, 3, 5], sys_root=root) == [(2, 3), (5,)]
    assert core_groups([4, 5, 6, 7], sys_root=root) == [(4, 5), (6, 7)], "all in one cache: halves"


def test_one_shared_l3_falls_to_halves(tree):
    assert core_groups([0, 1], sys_root=tree(l3(["0-1"]))) == [(0,), (1,)]


def test_a_memory_only_numa_node_is_no_group(tree):
    nodes = {"devices/system/node/node0/cpulist": "0-3", "devices/system/node/node1/cpulist": ""}
    assert core_groups(range(4), sys_root=tree(nodes)) == [(0, 1), (2, 3)]


def test_halves_keep_hyperthreads_together(tree):
    siblings = {f"{CPU}/cpu{c}/topology/thread_siblings_list": f"{c % 2},{c % 2 + 2}" for c in range(4)}
    assert core_groups(range(4), sys_root=tree(siblings)) == [(0, 2), (1, 3)]


def test_the_hyperthreads_of_a_single_core_are_parted(tree):
    siblings = {f"{CPU}/cpu{c}/topology/thread_siblings_list": "0-1" for c in range(2)}
    assert core_groups(range(2), sys_root=tree(siblings)) == [(0,), (1,)]


def test_one_core_is_one_group(tmp_path):
    assert core_groups([7], sys_root=tmp_path) == [(7,)]


@given(st.sets(st.integers(0, 300), min_size=1))
def test_groups_part_the_available_cores(cores):
    groups = core_groups(sorted(cores), sys_root="/nowhere")
    assert sorted(c for g in groups for c in g) == sorted(cores)
    assert len(groups) == min(2, len(cores))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_a_quota_takes_cores_away():
    assert set(available_cores()) == os.sched_getaffinity(os.getpid())
    assert len(available_cores(quota_cores=0.5)) == 1


def test_cpu_model(tree):
    root = tree({"cpuinfo": "processor\t: 0\nmodel\t\t: 85\nmodel name\t: Some CPU @ 3 GHz"})
    assert cpu_model(proc_root=root) == "Some CPU @ 3 GHz"
    assert cpu_model(proc_root=root / "nowhere") != ""
