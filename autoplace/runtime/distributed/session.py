"""`Session`: one process of a group that torchrun started, which device of the cluster it is, and how all agree.

Every process ("rank") runs one device of the cluster. Which one it is follows from the cluster file that `autoplace
run` hands over (`AUTOPLACE_CLUSTER`, and `AUTOPLACE_HOST` for the name of this host): the ranks of a host take its
devices in order. Without a file, every rank describes the device that it has, and hosts are named by torchrun's node
rank. → `member`

What one rank finds wrong, all ranks raise, with the same sentence: nobody is left waiting in a collective. → `settle`

Where the user allows it (`AUTOPLACE_MIN_HOSTS`), whole hosts of the file may be missing: the group is then of the
devices that are there. → `Session.absent`

Knows nothing of models and plans. Transport, rendezvous and restarts are torch.distributed's and torchrun's.
"""

from __future__ import annotations

import datetime
import os
import platform
import secrets
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from autoplace.errors import AutoplaceError, ClusterFileError, ExecutionError, InputError, in_one_line
from autoplace.hardware.cluster import Cluster, Device, Link

from .member import (
    CLUSTER_VARIABLE,
    HOST_VARIABLE,
    MIN_HOSTS_VARIABLE,
    assigned,
    gpu_index,
    host_name,
    own_device,
)

__all__ = ["CLUSTER_VARIABLE", "HOST_VARIABLE", "MIN_HOSTS_VARIABLE", "TIMEOUT_VARIABLE", "Session"]

T = TypeVar("T")

TIMEOUT_VARIABLE = "AUTOPLACE_TIMEOUT_S"
"""Environment variable with the seconds after which a silent rank counts as lost."""
_TIMEOUT_S = 60.0
_JOIN_S = 60.0
"""Seconds beyond the time-out for which a rank waits for the others: they may have to find out first who is lost."""
_POLL_S = 0.05
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_GIGABIT = Link(latency_ms=0.1, bytes_per_ms=125_000.0)
"""What a link between hosts is taken for until somebody measures it."""


class Session:
    """This process as a member of the group.

    Args:
        cluster: The devices; one process each, or more devices than processes have been given out.
        members: Device name per rank.
        rank: Of this process.
        timeout_s: Seconds after which a rank that says nothing counts as lost.
        owned: Whether this session started the process group, and ends it.
    """

    def __init__(
        self, cluster: Cluster, members: Sequence[str], rank: int, *, timeout_s: float = _TIMEOUT_S, owned: bool = False
    ) -> None:
        self.cluster, self.members, self.rank = cluster, tuple(members), rank
        self.whole = cluster
        """What the cluster file describes; more than `cluster` where hosts are missing."""
        self.attempt = ""
        """A word that only the ranks of this attempt of torchrun's know, for keys in its store."""
        self.timeout_s = timeout_s
        self._owned = owned
        self._groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        self._rank_of = {name: i for i, name in enumerate(self.members)}

    @staticmethod
    def launched() -> bool:
        """Return whether torchrun started this process as one of several, or as what is left of them."""
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1 or bool(os.environ.get(MIN_HOSTS_VARIABLE))
        return several and all(name in os.environ for name in _TORCHRUN)

    @staticmethod
    def join(cluster: Cluster | None = None, *, own: Device | None = None, timeout_s: float | None = None) -> Session:
        """Enter the group that torchrun made; every rank has to.

        Args:
            cluster: The devices; None reads the file of `AUTOPLACE_CLUSTER`, else every rank tells its own device.
            own: What this rank tells, where there is no file; None = look what it has.
            timeout_s: See the class; None = `AUTOPLACE_TIMEOUT_S`, or a minute.

        Raises:
            ExecutionError: If torchrun did not start this process, the ranks do not meet, or they run different
                versions.
            ClusterFileError: If the cluster file and the processes do not fit each other.
        """
        if not all(name in os.environ for name in _TORCHRUN):
            raise ExecutionError("this process belongs to no group; start the script with torchrun or `autoplace run`")
        if timeout_s is None:
            timeout_s = float(os.environ.get(TIMEOUT_VARIABLE, _TIMEOUT_S))
        local_rank = int(os.environ["LOCAL_RANK"])
        problem: AutoplaceError | None = None
        try:
            if cluster is None and (path := os.environ.get(CLUSTER_VARIABLE)):
                cluster = Cluster.load(path)
        except ClusterFileError as error:
            problem = error
        owned = not dist.is_initialized()
        if owned:
            _enter(_backend(cluster, local_rank), timeout_s)
        rank = dist.get_rank()
        session = Session(_NOBODY, ["?/cpu:0"] * dist.get_world_size(), rank, timeout_s=timeout_s, owned=owned)
        try:
            session.attempt = session.broadcast(secrets.token_hex(8))
            session.settle(problem)
            session.agree(_versions(), what="the ranks run different versions")
            session.whole, members = session._matched(cluster, local_rank, own)
            session.cluster = session.whole.part(members)
            session.members = tuple(members)
            session._rank_of = {name: i for i, name in enumerate(session.members)}
        except BaseException:
            session.close()
            raise
        if session.absent and rank == 0:
            warnings.warn(
                f"{_named(session.absent)} of the cluster file did not come; the others go on with "
                f"{session.cluster.num_devices} of {session.whole.num_devices} devices",
                stacklevel=2,
            )
        return session

    # -- who is who ------------------------------------------------------------------------------------------------

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.members)

    @property
    def absent(self) -> tuple[str, ...]:
        """The hosts of the cluster file that did not come."""
        present = {d.host for d in self.cluster.devices}
        return tuple(dict.fromkeys(d.host for d in self.whole.devices if d.host not in present))

    @property
    def device(self) -> Device:
        """The device that this rank runs."""
        return self.cluster.devices[self.cluster.index[self.members[self.rank]]]

    @property
    def torch_device(self) -> torch.device:
        """The same as PyTorch names it."""
        return _torch_device(self.device)

    def rank_of(self, device: str) -> int:
        """Return the rank that runs a device.

        Raises:
            ClusterFileError: If none does.
        """
        if device not in self._rank_of:
            raise ClusterFileError(
                f"the plan uses {device!r}, which no process runs; start one for each of {', '.join(self.members)}"
            )
        return self._rank_of[device]

    def _matched(self, cluster: Cluster | None, local_rank: int, described: Device | None) -> tuple[Cluster, list[str]]:
        """Return the whole cluster and the device of every rank."""
        if cluster is None:
            return self._described(local_rank, described)
        host = host_name(cluster)
        own: str | None = None
        refusal: AutoplaceError | None = None
        names = [d.name for d in cluster.on(host)]
        if not names:
            known = ", ".join(sorted({d.host for d in cluster.devices}))
            refusal = ClusterFileError(
                f"rank {self.rank} runs on host {host!r}, which the cluster file does not name ({known}); "
                f"set {HOST_VARIABLE} to its name there"
            )
        elif local_rank >= len(names):
            refusal = ClusterFileError(
                f"host {host!r} has {len(names)} devices in the cluster file and at least {local_rank + 1} processes; "
                "start one process a device"
            )
        else:
            own = names[local_rank]
            refusal = _absent(cluster.devices[cluster.index[own]])
        self.settle(refusal)
        fingerprints = self.gather(cluster.fingerprint)
        self.settle(
            None
            if len(set(fingerprints)) == 1
            else ClusterFileError("the ranks have different cluster files; copy one to all hosts")
        )
        members = [str(name) for name in self.gather(own)]
        if len(set(members)) < len(members):
            twice = next(name for name in members if members.count(name) > 1)
            raise ClusterFileError(f"two processes run {twice!r}; give every host its own name in {HOST_VARIABLE}")
        missing = [d for d in cluster.devices if d.name not in members]
        if missing and not self._may_miss(cluster, {d.host for d in missing}):
            raise ClusterFileError(
                f"the cluster file names {len(cluster.devices)} devices and {len(members)} processes were started, "
                f"none for {missing[0].name!r}; start one process a device, or take it out of the file"
            )
        return cluster, members

    def _may_miss(self, cluster: Cluster, hosts: set[str]) -> bool:
        """Return whether the user lets the others go on without some hosts, all of whose devices are missing."""
        every = {d.host for d in cluster.devices}
        least = self.broadcast(self.together(_min_hosts)) or len(every)
        missing = sum(len(cluster.on(host)) for host in hosts)
        return cluster.num_devices - missing == self.world_size and len(every) - len(hosts) >= least

    def _described(self, local_rank: int, own: Device | None) -> tuple[Cluster, list[str]]:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        found = self.together(lambda: own or own_device(host_name(), local_rank, local_ranks))
        devices = tuple(self.gather(found))
        return Cluster(devices=devices, default_link=_GIGABIT), [d.name for d in devices]

    # -- agreeing --------------------------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank; every rank has to call it."""
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: T | None, source: int = 0) -> T:
        """Return the value of one rank; every rank has to call it."""
        box = [value]
        dist.broadcast_object_list(box, src=source)
        return box[0]  # type: ignore[return-value]

    def settle(self, problem: AutoplaceError | None) -> None:
        """Raise on all ranks what the first of them that has a problem says; every rank has to call it.

        Raises:
            AutoplaceError: That problem.
        """
        for found in self.gather(None if problem is None else (type(problem), str(problem))):
            if found is not None:
                kind, sentence = found
                raise kind(sentence)

    def together(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, where it succeeds on all ranks; every rank has to call it.

        `work` itself must not communicate, or a rank that fails leaves the others waiting in it.

        Raises:
            AutoplaceError: The first rank's problem, on all ranks.
        """
        result: T | None = None
        problem: AutoplaceError | None = None
        try:
            result = work()
        except AutoplaceError as error:
            problem = error
        except Exception as error:
            problem = ExecutionError(f"rank {self.rank} ({self.members[self.rank]}): {in_one_line(error)}")
        self.settle(problem)
        return result  # type: ignore[return-value]

    def agree(self, facts: Mapping[str, str], *, what: str) -> None:
        """Raise on all ranks unless they state the same facts; every rank has to call it.

        Raises:
            ExecutionError: Naming the first fact that differs, and two ranks.
        """
        stated = self.gather(dict(facts))
        for name, value in stated[0].items():
            for rank, other in enumerate(stated):
                if other.get(name) != value:
                    raise ExecutionError(
                        f"{what}: {name} is {value!r} on rank 0 and {other.get(name)!r} on rank {rank}; "
                        "make them the same and start again"
                    )

    def group(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """Return the process group of some ranks, None where this one is not in it; every rank has to call it."""
        key = tuple(ranks)
        if key not in self._groups:
            made = dist.new_group(list(key), timeout=datetime.timedelta(seconds=self.timeout_s))
            self._groups[key] = made if self.rank in key else None
        return self._groups[key]

    def close(self) -> None:
        """Leave the group, if this session entered it."""
        if self._owned and dist.is_initialized():
            dist.destroy_process_group()
        self._owned = False


_NOBODY = Cluster(devices=(Device(name="?/cpu:0", kind="cpu"),))


def _backend(cluster: Cluster | None, local_rank: int) -> str:
    """Return gloo, and NCCL beside it for the tensors of GPUs where all devices are GPUs.

    What ranks tell each other goes by gloo in any case: one that lacks its GPU can still say so, and ranks that cannot
    know what the others have (there is no cluster file yet) can still meet.
    """
    if not torch.cuda.is_available():
        return "gloo"
    own = assigned(cluster, local_rank) if cluster is not None else None
    if cluster is None:
        index = local_rank
    else:
        index = gpu_index(own) if own is not None and own.kind == "cuda" else -1
    present = 0 <= index < torch.cuda.device_count()
    if present:
        torch.cuda.set_device(index)
    only_gpus = cluster is None or all(d.kind == "cuda" for d in cluster.devices)
    return "cpu:gloo,cuda:nccl" if present and only_gpus and dist.is_nccl_available() else "gloo"


def _enter(backend: str, timeout_s: float) -> None:
    """Make the process group once all ranks of this attempt of torchrun's are there.

    Raises:
        ExecutionError: If some do not come.
    """
    rank, count, join_s = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout_s + _JOIN_S
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(
            address,
            port,
            is_master=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank == 0,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=join_s),
            multi_tenant=True,
        )
        own = dist.PrefixStore(f"autoplace/{_attempt(store, rank, count, join_s)}", store)
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group(backend, timeout=timeout, store=own, rank=rank, world_size=count)
    except dist.DistError as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExecutionError(
            f"rank {rank} could not meet the others at {address}:{port} ({first[:200]}); check that all of them run "
            "and that nothing blocks their ports"
        ) from error


def _attempt(store: dist.Store, rank: int, count: int, join_s: float) -> str:
    """Return a word of rank 0's, once all ranks have it.

    The agent's store outlives a restart, and with it what the ranks wrote that ended, their addresses among it. Which
    attempt this is cannot be told from the environment: an agent counts the failures of its own ranks only, and not the
    restarts that other hosts ask for. So every rank shows a word of its own, and rank 0 answers to that. [torch 2.13]
    """
    store = dist.PrefixStore("autoplace/meeting", store)
    own, end = secrets.token_hex(8), time.monotonic() + join_s
    if rank:
        store.set(f"here/{rank}", own)
        attempt: str = store.get(f"for {own}").decode()
        store.set(f"{attempt}/{rank}", "")
        if refusal := store.get(f"{attempt}/end").decode():
            raise ExecutionError(refusal)
        return attempt
    missing, answered, refusal = set(range(1, count)), set(), ""
    while missing and not refusal:
        for other in sorted(missing):
            if store.check([f"{own}/{other}"]):
                missing.discard(other)
            elif store.check([f"here/{other}"]) and (theirs := store.get(f"here/{other}").decode()) not in answered:
                store.set(f"for {theirs}", own)
                answered.add(theirs)
        if missing and time.monotonic() > end:
            refusal = (
                f"rank {min(missing)} of {count} did not come within {join_s:.0f} s; see what its host says, and start "
                "again"
            )
        time.sleep(_POLL_S if missing else 0.0)
    store.set(f"{own}/end", refusal)
    if refusal:
        raise ExecutionError(refusal)
    return own


def _min_hosts() -> int:
    """Return how many hosts the user says are enough; 0 = nothing was said."""
    given = os.environ.get(MIN_HOSTS_VARIABLE) or "0"
    if not given.isdecimal():
        raise InputError(f"{MIN_HOSTS_VARIABLE} is {given!r}; use a whole number of hosts")
    return int(given)


def _named(hosts: Sequence[str]) -> str:
    return f"host{'s' if len(hosts) > 1 else ''} {', '.join(map(repr, hosts))}"


def _versions() -> dict[str, str]:
    import autoplace

    python = ".".join(platform.python_version_tuple()[:2])
    return {"autoplace": autoplace.__version__, "torch": torch.__version__.split("+")[0], "python": python}


def _absent(device: Device) -> AutoplaceError | None:
    """Return why a device of the cluster file is not on this host; None when it is."""
    if device.kind == "cuda":
        index = gpu_index(device)
        if not 0 <= index < torch.cuda.device_count():
            return ClusterFileError(
                f"the cluster file names {device.name!r} and that host has {torch.cuda.device_count()} GPUs; "
                "profile the cluster again"
            )
        return None
    missing = sorted(set(device.cores) - os.sched_getaffinity(0))
    if missing:
        return ClusterFileError(
            f"the cluster file gives {device.name!r} core {missing[0]}, which that host does not have or allow; "
            "profile the cluster again"
        )
    return None


def _torch_device(device: Device) -> torch.device:
    return torch.device("cpu") if device.kind == "cpu" else torch.device("cuda", gpu_index(device))
