"""Ranks that do not fit each other or the cluster: all of them raise the same sentence, and nobody waits.

Two real processes live through all cases one after the other, since starting them takes most of the time.
"""

import json
import os
import subprocess
import sys

import pytest

from autoplace.errors import ExecutionError
from autoplace.runtime.distributed import Session

CASES = """\
import contextlib, json, os, sys, warnings
import torch
import torch.distributed as dist
import autoplace
from autoplace.errors import AutoplaceError, ClusterFileError, PlanFileError
from autoplace.hardware.cluster import Cluster, Device
from autoplace.plan import Plan, Replica
from autoplace.runtime.distributed import Session

dist.init_process_group("gloo")
rank, core = dist.get_rank(), min(os.sched_getaffinity(0))
found = {}


def cluster(*names, **facts):
    return Cluster(devices=tuple(Device(name=name, kind=name.split("/")[1].split(":")[0], **facts) for name in names))


@contextlib.contextmanager
def refused(case):
    os.environ.pop("AUTOPLACE_HOST", None)
    os.environ.pop("AUTOPLACE_CLUSTER", None)
    try:
        yield
        found[case] = None
    except AutoplaceError as error:
        found[case] = (type(error).__name__, str(error))


TWO = cluster("a/cpu:0", "a/cpu:1")
with refused("too many ranks"):
    Session.join(cluster("a/cpu:0"))
with refused("too few ranks"):
    Session.join(cluster("a/cpu:0", "a/cpu:1", "a/cpu:2"))
os.environ["AUTOPLACE_MIN_HOSTS"] = "2"
with refused("too few hosts"):
    os.environ["AUTOPLACE_HOST"] = "a"
    Session.join(cluster("a/cpu:0", "a/cpu:1", "b/cpu:0"))
os.environ["AUTOPLACE_MIN_HOSTS"] = "1"
with refused("half a host"):
    os.environ["AUTOPLACE_HOST"] = "a"
    Session.join(cluster("a/cpu:0", "a/cpu:1", "a/cpu:2", "b/cpu:0"))
with refused("a host is gone"), warnings.catch_warnings(record=True) as told:
    os.environ["AUTOPLACE_HOST"] = "a"
    whole = cluster("b/cpu:0", "a/cpu:0", "a/cpu:1")
    session = Session.join(whole)
    assert session.absent == ("b",) and session.whole == whole and session.members == ("a/cpu:0", "a/cpu:1")
    assert session.cluster == TWO and session.device.name == f"a/cpu:{rank}"
    wanted = ["host 'b' of the cluster file did not come; the others go on with 2 of 3 devices"]
    assert [str(w.message) for w in told] == ([] if rank else wanted)
os.environ["AUTOPLACE_MIN_HOSTS"] = "some"
with refused("a number that is none"):
    os.environ["AUTOPLACE_HOST"] = "a"
    Session.join(cluster("a/cpu:0", "a/cpu:1", "b/cpu:0"))
del os.environ["AUTOPLACE_MIN_HOSTS"]
with refused("a host that is not named"):
    os.environ["AUTOPLACE_HOST"] = "b" if rank else "a"
    Session.join(TWO)
with refused("two ranks on one device"):
    os.environ["AUTOPLACE_HOST"] = "a"
    os.environ["LOCAL_RANK"] = "0"
    Session.join(TWO)
os.environ["LOCAL_RANK"] = str(rank)
with refused("different versions"):
    autoplace.__version__, before = ("0.0.9" if rank else autoplace.__version__), autoplace.__version__
    try:
        Session.join(TWO)
    finally:
        autoplace.__version__ = before
with refused("different files"):
    Session.join(cluster("a/cpu:0", "a/cpu:1", model="x" if rank else "y"))
with refused("a GPU that is not there"):
    Session.join(cluster("a/cuda:0", "a/cuda:1000"))
with refused("a core that is not there"):
    Session.join(Cluster(devices=(Device(name="a/cpu:0", kind="cpu", cores=(core,)),
                                  Device(name="a/cpu:1", kind="cpu", cores=(100000,)))))
with refused("a file that one rank cannot read"):
    path = sys.argv[1] + f"/cluster-{rank}.yaml"
    os.environ["AUTOPLACE_CLUSTER"] = path
    if rank == 0:
        TWO.save(path)
    Session.join()
with refused("a plan for another cluster"):
    session = Session.join(TWO)
    session.together(lambda: session.rank_of("other/cpu:0") if rank else None)
with refused("no file"):
    session = Session.join()
    assert [d.split("/")[0] for d in session.members] == ["host0", "host0"]
    assert session.members[rank] == session.device.name
with refused("a bug on one rank"):
    Session.join(TWO).together(lambda: 1 // rank)
with refused("agreement"):
    session = Session.join(TWO)
    assert session.world_size == 2 and session.gather(rank) == [0, 1] and session.broadcast(rank, 1) == 1
    assert session.device.name == f"a/cpu:{rank}" and session.torch_device == torch.device("cpu")
    assert session.rank_of("a/cpu:1") == 1 and session.together(lambda: rank) == rank
    assert session.group([1]) is None or rank == 1
    session.close()
    assert dist.is_initialized(), "who did not start the group does not end it"
everybody = [None, None]
dist.all_gather_object(everybody, found)
if rank == 0:
    print(json.dumps(everybody))
dist.destroy_process_group()
"""

EXPECTED = {
    "too many ranks": ("ClusterFileError", "host 'a' has 1 devices in the cluster file and at least 2 processes"),
    "too few ranks": ("ClusterFileError", "names 3 devices and 2 processes were started, none for 'a/cpu:2'"),
    "too few hosts": ("ClusterFileError", "names 3 devices and 2 processes were started, none for 'b/cpu:0'"),
    "half a host": ("ClusterFileError", "names 4 devices and 2 processes were started, none for 'a/cpu:2'"),
    "a number that is none": ("InputError", "AUTOPLACE_MIN_HOSTS is 'some'; use a whole number of hosts"),
    "a host that is not named": ("ClusterFileError", "rank 1 runs on host 'b', which the cluster file does not name"),
    "two ranks on one device": ("ClusterFileError", "two processes run 'a/cpu:0'"),
    "different versions": ("ExecutionError", "the ranks run different versions: autoplace is"),
    "different files": ("ClusterFileError", "the ranks have different cluster files"),
    "a GPU that is not there": ("ClusterFileError", "names 'a/cuda:"),
    "a core that is not there": ("ClusterFileError", "gives 'a/cpu:1' core 100000, which that host does not have"),
    "a file that one rank cannot read": ("ClusterFileError", "cluster-1.yaml does not exist"),
    "a plan for another cluster": ("ClusterFileError", "the plan uses 'other/cpu:0', which no process runs"),
    "a bug on one rank": ("ExecutionError", "rank 0 (a/cpu:0): ZeroDivisionError"),
}


@pytest.fixture(scope="module")
def everybody(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    (folder / "cases.py").write_text(CASES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(folder / "cases.py"), str(folder)],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", EXPECTED)
def test_all_ranks_raise_the_same_sentence(case, everybody):
    kind, sentence = EXPECTED[case]
    assert everybody[0][case] is not None, "nobody refused"
    assert everybody[0][case] == everybody[1][case]
    assert everybody[0][case][0] == kind and sentence in everybody[0][case][1]
    assert "\n" not in everybody[0][case][1]


@pytest.mark.parametrize("case", ["no file", "agreement", "a host is gone"])
def test_ranks_that_fit_are_let_in(case, everybody):
    assert [found[case] for found in everybody] == [None, None]


def test_a_process_alone_belongs_to_no_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert not Session.launched()
    with pytest.raises(ExecutionError, match="start the script with torchrun or `autoplace run`"):
        Session.join()
