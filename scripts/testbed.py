"""The test bed: a cluster of unequal hosts on one Linux machine, for tests and benchmarks of what runs across hosts.

    with TestBed.from_yaml("examples/testbed.yaml") as bed:
        bed.run("fast", ["python", "script.py"])

    python scripts/testbed.py up examples/testbed.yaml -- command...   # the bed's id is in AUTOPLACE_TESTBED
    python scripts/testbed.py enter ID HOST -- command...              # inside a host of a bed that is up
    python scripts/testbed.py sweep                                    # remove beds whose owner is gone

Needs root, a Linux with network namespaces, veth and tbf, a cgroup v1 or v2 whose cpu controller (and memory, for hosts
with a limit) may be written, and `ip` and `tc`: `apt-get install iproute2`. `TestBed.missing()` tries all of it.

    a host     is a network namespace with one interface, `eth0`, whose other end stands in a namespace of the switch,
               a host name of its own, and an /etc/hosts with all hosts of the bed. Nothing leads out of the bed.
    rate       is a token bucket (tbf) in each direction, in the kernel, so that a sender is held back as by a card.
               From a to b the lesser rate of both counts, and b's rate is shared by all who send to it.
    latency    from a to b is the mean of both hosts' figures: each adds half, as a cable to the switch would.
    processor  is a CPU quota of a cgroup, and on wish an affinity; memory is a limit of a cgroup.

1. Where no host adds latency, the switch is a bridge.
2. Latency is netem's, behind the token buckets. Many kernels lack netem; there, and where there is no bridge, the
   switch is a process of ours (`relay`) that hands frames from interface to interface when they are due, ahead of
   everything else that wants the processor. It adds about 0.2 ms, and while hosts send at full rate it takes a quarter
   (100 Mbit/s) to a half (1 Gbit/s) of a core [measured: two virtual cores, 2026-11]; at rest it takes nothing.
3. A bucket holds a millisecond's worth of bytes, or late timers would lower the rate. So much passes an idle link at
   once: a transfer of n bytes takes latency + n / rate - 1 ms, and never less than the latency.
4. `ip netns exec` is not used to enter a host: it mounts a new /sys without the cgroups, and a process could not read
   its own limits.

A bed vanishes with its owner, however that ends: a watchdog waits for it, and `sweep` finds what even that left behind.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import functools
import gc
import heapq
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from autoplace.hardware.cluster import Cluster

FORMAT = "autoplace.testbed/1"
VARIABLE = "AUTOPLACE_TESTBED"
"""Environment variable with the id of the bed, set by `up` and inside hosts."""
INTERFACE = "eth0"
"""The network interface of every host."""
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
MAX_HOSTS = 16
SCRIPT = Path(__file__).resolve()
RUNTIME = Path("/run/autoplace-testbeds")
"""What is up, one file a bed; only root may write there, since `sweep` believes it."""
NAMESPACES = Path("/run/netns")
_PREFIX = "autoplace-"
_END_S = 10.0  # for killing what is left in a bed
_LEAST_BURST_BYTES = 3036  # two packets
_BURST_MS = 1.0  # what a late timer may be late by before the rate falls [measured: two busy virtual cores, 2026-11]
_QUEUE_MS = 100.0


class BedError(Exception):
    """Raised when a bed cannot be described, built, used or removed."""


# -- what a bed is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BedLink:
    """What stands between a host and the switch, in each direction."""

    bytes_per_ms: float
    """Rate, bytes per ms; 125 are 1 Mbit/s."""
    latency_ms: float = 0.0
    """One-way latency between two hosts with such a link, ms."""

    def __post_init__(self) -> None:
        _check_number(self.bytes_per_ms, "bytes_per_ms of a link", 10, 5e6)
        _check_number(self.latency_ms, "latency_ms of a link", 0, 10_000)


@dataclass(frozen=True, kw_only=True)
class BedHost:
    """One host."""

    name: str
    """One to eight of a-z, 0-9 and hyphen."""
    cpu: float | None = None
    """Processor time, in cores; None = no quota."""
    cores: tuple[int, ...] = ()
    """CPU ids that its processes run on; empty = those of whoever starts them."""
    memory_bytes: int | None = None
    """Most bytes that its processes hold together; None = no limit."""
    link: BedLink | None = None
    """None = the bed's."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z0-9-]{1,8}", self.name):
            raise BedError(f"a host is named {_short(self.name)}; use one to eight of a-z, 0-9 and hyphen")
        if self.cpu is not None:
            _check_number(self.cpu, f"cpu of host {self.name!r}", 0.01, 1024)
        if self.memory_bytes is not None:
            _check_number(self.memory_bytes, f"memory_bytes of host {self.name!r}", 1 << 24, 1 << 50)
        for core in self.cores:
            if isinstance(core, bool) or not isinstance(core, int) or not 0 <= core < 8192:
                raise BedError(f"host {self.name!r} has core {_short(core)}; use CPU ids, 0 or more")
        if len(set(self.cores)) < len(self.cores):
            raise BedError(f"host {self.name!r} names a core twice; keep one")
        if self.cores and self.cpu is not None and self.cpu > len(self.cores):
            raise BedError(
                f"host {self.name!r} gets {self.cpu:g} of {len(self.cores)} cores; give it more, or less cpu"
            )


def read_bed(path: str | Path) -> dict[str, Any]:
    """Return the arguments of `TestBed` that a YAML file gives.

    Raises:
        BedError: If the file is missing, unreadable, no YAML, or describes no usable bed.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BedError(f"{path} does not exist; check the path") from None
    except (OSError, UnicodeDecodeError) as cause:
        raise BedError(f"{path} cannot be read: {cause}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as cause:
        raise BedError(f"{path} is not YAML: {' '.join(str(cause).split())[:200]}") from None
    try:
        top = _mapping(data, "the file", ("format", "name", "hosts", "link"), required=("format", "hosts", "link"))
        if top["format"] != FORMAT:
            raise BedError(f"format is {_short(top['format'])}; this version reads {FORMAT!r}")
        hosts = [_host(entry, f"hosts[{i}]") for i, entry in enumerate(_list(top["hosts"], "hosts"))]
        return {"hosts": hosts, "link": _link(top["link"], "link"), "name": top.get("name", "bed")}
    except BedError as cause:
        raise BedError(f"{path}: {cause}") from None


def _host(entry: Any, place: str) -> BedHost:
    fields = _mapping(entry, place, ("name", "cpu", "cores", "memory_bytes", "link"), required=("name",))
    memory_bytes = _numeric(fields.get("memory_bytes"))
    return BedHost(
        name=fields["name"],
        cpu=_numeric(fields.get("cpu")),
        cores=tuple(_list(fields.get("cores") or [], f"{place}.cores")),
        memory_bytes=int(memory_bytes) if isinstance(memory_bytes, float) and memory_bytes < 1e18 else memory_bytes,
        link=None if fields.get("link") is None else _link(fields["link"], f"{place}.link"),
    )


def _link(entry: Any, place: str) -> BedLink:
    fields = _mapping(entry, place, ("bytes_per_ms", "mbit_per_s", "latency_ms"))
    if ("bytes_per_ms" in fields) == ("mbit_per_s" in fields):
        raise BedError(f"{place} needs a rate; give either bytes_per_ms or mbit_per_s")
    rate = _numeric(fields.get("bytes_per_ms", fields.get("mbit_per_s")))
    if "mbit_per_s" in fields:
        _check_number(rate, f"{place}.mbit_per_s", 0.08, 40_000)
        rate *= 125
    return BedLink(bytes_per_ms=rate, latency_ms=_numeric(fields.get("latency_ms", 0)))


def _mapping(value: Any, place: str, known: Sequence[str], required: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BedError(f"{place} is {_short(value)}; expected keys and values: {', '.join(known)}")
    for key in value:
        if key not in known:
            raise BedError(f"{place} has an unknown key {_short(key)}; known are {', '.join(known)}")
    for key in required:
        if key not in value:
            raise BedError(f"{place} lacks {key!r}; add it")
    return value


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise BedError(f"{place} is {_short(value)}; expected a list")
    return value


def _numeric(value: Any) -> Any:
    """Return the number that a text such as 1e6 means, which YAML 1.1 takes for text; anything else as it is."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _check_number(value: Any, what: str, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise BedError(f"{what} is {_short(value)}; use a number from {least:g} to {most:g}")


def _short(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**18 else "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."


# -- what the kernel can do ------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """What `probe` found."""

    missing: str
    """Why no bed can be made here, a sentence; empty when one can."""
    bridge: bool = False
    netem: bool = False


class Controller(NamedTuple):
    """Where groups with a cgroup controller are made."""

    base: Path
    version: int


@functools.cache
def probe() -> Kernel:
    """Try everything that a bed needs, in a namespace that is gone afterwards."""
    if not sys.platform.startswith("linux"):
        return Kernel("a test bed needs Linux; run it there")
    if os.geteuid() != 0:
        return Kernel("a test bed needs root; run it with sudo")
    if absent := [name for name in ("ip", "tc") if not shutil.which(name)]:
        return Kernel(f"a test bed needs {' and '.join(absent)}; install iproute2 (apt-get install iproute2)")
    try:
        group = _make_group("cpu", f"{_PREFIX}probe-{os.getpid()}")
        group.rmdir()
    except BedError as cause:
        return Kernel(str(cause))
    space = f"{_PREFIX}probe-{os.getpid()}"
    network, traffic = ("ip", "-n", space, "link", "add", "name"), ("tc", "-n", space, "qdisc", "add", "dev", "one")
    needs = {
        "network namespaces": ("ip", "netns", "add", space),
        "veth links": (*network, "one", "type", "veth", "peer", "name", "two"),
        "the tbf queue": (*traffic, "root", "handle", "1:", "tbf", "rate", "1mbit", "burst", "10000", "limit", "10000"),
    }
    try:
        for what, command in needs.items():
            if failure := _failure(command):
                return Kernel(
                    f"a test bed needs {what}, which this kernel does not give ({failure}); use another machine"
                )
        bridge = not _failure((*network, "three", "type", "bridge"))
        netem = not _failure((*traffic, "parent", "1:1", "netem", "delay", "1ms"))
    finally:
        _failure(("ip", "netns", "del", space))
    if not (bridge and netem):
        try:
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
        except OSError as cause:
            return Kernel(f"a test bed needs netem or packet sockets, and this kernel gives neither ({cause.strerror})")
    return Kernel("", bridge, netem)


def _failure(command: Sequence[str]) -> str:
    """Run a command and return the first line of its complaint; empty when it succeeds."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[0] if lines else f"exit status {done.returncode}")


def _do(*command: str) -> None:
    if failure := _failure(command):
        raise BedError(f"`{' '.join(command)}` failed: {failure}; run `python scripts/testbed.py sweep` and try again")


def find_controller(name: str, *, proc_root: str | Path = "/proc") -> Controller | None:
    """Return where groups with a controller are made: v1 below this process's own group, v2 at the top.

    A v2 group that holds processes cannot have limited groups below it, so there it is the top of what is mounted.

    Args:
        name: `cpu` or `memory`.
        proc_root: Where procfs is.

    Returns:
        None when no cgroup file system with the controller is mounted.
    """
    own = {}
    for line in _text(Path(proc_root) / "self" / "cgroup").splitlines():
        _, names, path = line.split(":", 2)
        own.update(dict.fromkeys(names.split(","), path))
    for line in _text(Path(proc_root) / "self" / "mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        (root, mount), (kind, *_, options) = left.split()[3:5], right.split()
        if kind == "cgroup" and name in options.split(","):
            path = own.get(name, "/")
            inner = path[len(root) :] if path.startswith(root) else ""  # else the host's path, seen from a container
            group = Path(mount) / inner.strip("/")
            return Controller(group if group.is_dir() else Path(mount), 1)
        if kind == "cgroup2" and name in _text(Path(mount) / "cgroup.controllers").split():
            return Controller(Path(mount), 2)
    return None


def _make_group(controller: str, name: str) -> Path:
    """Make a group and return its directory; on v2 it has all controllers that were switched on."""
    found = find_controller(controller)
    if found is None:
        raise BedError(f"no cgroup with the {controller} controller is mounted; mount one, or use another machine")
    group = found.base / name
    try:
        switches = found.base / "cgroup.subtree_control"
        if found.version == 2 and controller not in switches.read_text().split():
            switches.write_text(f"+{controller}")
        group.mkdir(exist_ok=True)
    except OSError as cause:
        raise BedError(
            f"no group can be made in {found.base} for the {controller} controller ({cause.strerror}); use a machine "
            "or container that may write its cgroups"
        ) from None
    return group


def _limit(group: Path, files: Mapping[str, str | int]) -> None:
    for name, value in files.items():
        try:
            (group / name).write_text(str(value))
        except OSError as cause:
            raise BedError(f"{group / name} does not take {value} ({cause.strerror}); choose another value") from None


def _make_groups(host: BedHost, name: str) -> list[str]:
    """Make the groups of a host and set their limits."""
    group = _make_group("cpu", name)
    groups = [str(group)]
    if host.cpu is not None:
        # A short period, so that a host stands still for milliseconds, not for the kernel's usual tenth of a second.
        period_us = 10_000 if host.cpu >= 0.1 else 100_000
        quota_us = round(host.cpu * period_us)
        if (group / "cpu.max").exists():
            _limit(group, {"cpu.max": f"{quota_us} {period_us}"})
        else:
            _limit(group, {"cpu.cfs_period_us": period_us, "cpu.cfs_quota_us": quota_us})
    if host.memory_bytes is not None:
        group = _make_group("memory", name)
        groups.append(str(group))
        limits = {"memory.max": host.memory_bytes, "memory.swap.max": 0}
        if not (group / "memory.max").exists():
            limits = dict.fromkeys(("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"), host.memory_bytes)
        _limit(group, {file: value for file, value in limits.items() if (group / file).exists()})
    return list(dict.fromkeys(groups))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


# -- the end of a bed ------------------------------------------------------------------------------------------------


def _tear_down(state: Mapping[str, Any]) -> str:
    """Kill all that runs in a bed, remove it, and return what would not go; does no harm when done twice."""
    end = time.monotonic() + _END_S
    while left := _remove(state):
        if time.monotonic() > end:
            return ", ".join(left)
        time.sleep(0.01)
    for name in ("hosts", "json"):
        (RUNTIME / f"{state['id']}.{name}").unlink(missing_ok=True)
    return ""


def _remove(state: Mapping[str, Any]) -> list[str]:
    """Kill and remove what there is now, and return what is left: a group is busy until its processes are dead."""
    pids = _members(state)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if pids:
        return [f"process {pid}" for pid in sorted(pids)]
    left = []
    for space in _spaces(state):
        if (NAMESPACES / space).exists() and (failure := _failure(("ip", "netns", "del", space))):
            left.append(f"namespace {space} ({failure})")
    for group in (Path(group) for host in state["hosts"] for group in host["groups"]):
        try:
            group.rmdir()
        except FileNotFoundError:
            continue
        except OSError as cause:
            left.append(f"{group} ({cause.strerror})")
    return left


def _members(state: Mapping[str, Any]) -> set[int]:
    """Return the processes in a bed's groups and namespaces, but for this one."""
    found: set[int] = set()
    for host in state["hosts"]:
        for group in host["groups"]:
            with suppress(OSError):
                found.update(map(int, Path(group, "cgroup.procs").read_text().split()))
    spaces = {key for space in _spaces(state) if (key := _inode(NAMESPACES / space))}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _inode(entry / "ns" / "net") in spaces:
            found.add(int(entry.name))
    return {pid for pid in found if pid > 1 and pid != os.getpid()}


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _spaces(state: Mapping[str, Any]) -> list[str]:
    return [state["switch"], *(host["namespace"] for host in state["hosts"])]


def _started(pid: int) -> str:
    """Return when a process started, in the kernel's ticks; empty when it is gone."""
    fields = _text(Path("/proc") / str(pid) / "stat").rpartition(")")[2].split()
    return "" if not fields or fields[0] in "ZX" else fields[19]


# -- the bed ---------------------------------------------------------------------------------------------------------


class TestBed:
    """Hosts, up for as long as the `with` block lasts.

    Args:
        hosts: At most 16.
        link: What every host without a link of its own has.
        name: For people.

    Raises:
        BedError: If two hosts have one name, or there are too many, or none.
    """

    __test__ = False  # no test, whatever pytest makes of the name

    def __init__(self, *, hosts: Sequence[BedHost], link: BedLink, name: str = "bed") -> None:
        names = [host.name for host in hosts]
        if not 1 <= len(names) <= MAX_HOSTS:
            raise BedError(f"a bed of {len(names)} hosts cannot be made; name 1 to {MAX_HOSTS}")
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise BedError(f"host {twice!r} is listed twice; give each host its own name")
        if not isinstance(name, str) or not name.strip():
            raise BedError(f"the bed is named {_short(name)}; use a text that is not empty")
        self.hosts, self.link, self.name = tuple(hosts), link, name
        self.id = ""
        self._state: dict[str, Any] = {}
        self._processes: list[subprocess.Popen[Any]] = []
        self._relay: subprocess.Popen[str] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._pipe = -1

    @staticmethod
    def from_yaml(path: str | Path) -> TestBed:
        """Return the bed that a YAML file describes, not up yet.

        Raises:
            BedError: If the file is missing, unreadable, or describes no usable bed.
        """
        arguments = read_bed(path)
        try:
            return TestBed(**arguments)
        except BedError as cause:
            raise BedError(f"{path}: {cause}") from None

    @staticmethod
    def missing() -> str:
        """Return why no bed can be made on this machine, one sentence; empty when one can."""
        return probe().missing

    @staticmethod
    def sweep() -> list[str]:
        """Remove all beds whose owner is gone and return their ids.

        Raises:
            BedError: If something of a bed cannot be removed.
        """
        swept, left = [], []
        for path in sorted(RUNTIME.glob("*.json")):
            with suppress(OSError, ValueError):  # it may be going right now
                state = json.loads(path.read_text(encoding="utf-8"))
                if _started(state["owner"]["pid"]) != state["owner"]["started"]:
                    left.append(_tear_down(state))
                    swept.append(state["id"])
        for path in NAMESPACES.glob(f"{_PREFIX}probe-*"):
            if not _started(int(path.name.rpartition("-")[2])):
                _failure(("ip", "netns", "del", path.name))
        if any(left):
            raise BedError(f"still there after {_END_S:g} s: {', '.join(filter(None, left))}; run sweep again")
        return swept

    def __enter__(self) -> TestBed:
        if reason := TestBed.missing():
            raise BedError(reason)
        self._check_cores()
        TestBed.sweep()
        self.id = secrets.token_hex(3)
        self._state = self._describe()
        try:
            self._save()
            self._start_watchdog()
            self._build()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = self._close()
        if failure and error is None:
            raise BedError(failure)

    # -- use -------------------------------------------------------------------------------------------------------

    def address(self, host: str) -> str:
        """Return a host's IPv4 address, which only the bed's hosts reach."""
        return str(self._entry(host)["address"])

    def prefix(self, host: str) -> list[str]:
        """Return what to put before a command, from any process of root, so that it runs inside a host."""
        self._entry(host)
        return [sys.executable, "-I", "-S", str(SCRIPT), "enter", str(self._path), host, "--"]

    def popen(self, host: str, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command inside a host; what still runs when the bed ends is killed.

        Args:
            host: Name of the host.
            command: Program and arguments.
            **options: Of `subprocess.Popen`.
        """
        process = subprocess.Popen([*self.prefix(host), *command], **options)
        self._processes.append(process)
        return process

    def run(self, host: str, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a command inside a host and wait for it; `options` are those of `subprocess.run`."""
        return subprocess.run([*self.prefix(host), *command], **options)

    def cut(self, host: str) -> None:
        """Pull a host's cable: what is sent to it or by it is lost, and nobody is told."""
        _do("ip", "-n", self._state["switch"], "link", "set", "dev", self._entry(host)["port"], "down")

    def heal(self, host: str) -> None:
        """Plug a host's cable in again; does no harm where it was not cut."""
        _do("ip", "-n", self._state["switch"], "link", "set", "dev", self._entry(host)["port"], "up")

    def cluster(self) -> Cluster:
        """Return the bed as it was ordered, for those who do not want to profile it: a device `name/cpu:0` a host.

        A host with less processor time than its cores could give says so in its model, lest it be taken for a full one.
        """
        from autoplace.hardware.cluster import Cluster, Device, Link
        from autoplace.hardware.cores import available_cores, cpu_model

        devices = []
        for host in self.hosts:
            cores = host.cores or available_cores(quota_cores=float("inf") if host.cpu is None else host.cpu)
            short = host.cpu is not None and host.cpu < len(cores)
            devices.append(
                Device(
                    name=f"{host.name}/cpu:0",
                    kind="cpu",
                    memory_bytes=float("inf") if host.memory_bytes is None else float(host.memory_bytes),
                    cores=tuple(cores),
                    model=f"{cpu_model()}, {host.cpu:g} of {len(cores)} cores" if short else cpu_model(),
                )
            )
        links = {
            (f"{a.name}/cpu:0", f"{b.name}/cpu:0"): Link(
                latency_ms=(self._link(a).latency_ms + self._link(b).latency_ms) / 2,
                bytes_per_ms=min(self._link(a).bytes_per_ms, self._link(b).bytes_per_ms),
            )
            for a in self.hosts
            for b in self.hosts
            if a is not b and (a.link or b.link)
        }
        default = Link(latency_ms=self.link.latency_ms, bytes_per_ms=self.link.bytes_per_ms)
        return Cluster(devices=tuple(devices), links=links, default_link=default)

    # -- building --------------------------------------------------------------------------------------------------

    @property
    def _path(self) -> Path:
        return RUNTIME / f"{self.id}.json"

    def _link(self, host: BedHost) -> BedLink:
        return host.link or self.link

    def _entry(self, host: str) -> dict[str, Any]:
        if not self._state:
            raise BedError(f"bed {self.name!r} is not up; use it inside its `with` block")
        for entry in self._state["hosts"]:
            if entry["name"] == host:
                return entry  # type: ignore[no-any-return]
        raise BedError(f"bed {self.name!r} has no host {host!r}; it has {', '.join(h.name for h in self.hosts)}")

    def _check_cores(self) -> None:
        here = os.sched_getaffinity(0)
        for host in self.hosts:
            if strange := set(host.cores) - here:
                raise BedError(f"host {host.name!r} wants core {min(strange)}, which is not here; use {sorted(here)}")
            if host.cpu is not None and host.cpu > len(here):
                raise BedError(f"host {host.name!r} wants {host.cpu:g} cores of {len(here)}; use less cpu")

    def _describe(self) -> dict[str, Any]:
        """Return the bed as its file keeps it: all that is needed to enter, to relay and to tear down."""
        bases = [found.base for name in ("cpu", "memory") if (found := find_controller(name))]
        hosts = []
        for i, host in enumerate(self.hosts):
            name = f"{_PREFIX}{self.id}-{host.name}"
            hosts.append(
                {
                    "name": host.name,
                    "namespace": name,
                    "groups": list(dict.fromkeys(str(base / name) for base in bases)),
                    "cores": list(host.cores),
                    "address": f"10.77.0.{i + 1}",
                    "mac": f"02:61:70:00:00:{i + 1:02x}",
                    "port": f"to-{host.name}",
                    "latency_ms": self._link(host).latency_ms,
                }
            )
        owner = {"pid": os.getpid(), "started": _started(os.getpid())}
        return {"id": self.id, "name": self.name, "owner": owner, "switch": f"{_PREFIX}{self.id}", "hosts": hosts}

    def _save(self) -> None:
        RUNTIME.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = "".join(f"{entry['address']} {entry['name']}\n" for entry in self._state["hosts"])
        (RUNTIME / f"{self.id}.hosts").write_text(f"127.0.0.1 localhost\n{names}", encoding="utf-8")
        half = RUNTIME / f"{self.id}.tmp"
        half.write_text(json.dumps(self._state), encoding="utf-8")
        half.replace(self._path)

    def _start_watchdog(self) -> None:
        waiting, self._pipe = os.pipe()
        try:
            self._watchdog = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SCRIPT), "watch", str(self._path), str(waiting), str(os.getpid())],
                pass_fds=(waiting,),
                start_new_session=True,  # Ctrl-C is for the owner
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        finally:
            os.close(waiting)

    def _build(self) -> None:
        kernel = probe()
        slow = any(self._link(host).latency_ms > 0 for host in self.hosts)
        relay = not kernel.bridge or (slow and not kernel.netem)
        switch = self._state["switch"]
        _make_namespace(switch)
        if not relay:
            _do("ip", "-n", switch, "link", "add", "name", "bridge", "type", "bridge")
            _do("ip", "-n", switch, "link", "set", "dev", "bridge", "up")
        for host, entry in zip(self.hosts, self._state["hosts"], strict=True):
            entry["groups"] = _make_groups(host, entry["namespace"])
            self._connect(host, entry, netem=not relay)
        self._save()
        if relay:
            self._start_relay()

    def _connect(self, host: BedHost, entry: Mapping[str, Any], *, netem: bool) -> None:
        """Make a host's namespace and the cable to the switch."""
        link, space, switch, port = self._link(host), entry["namespace"], self._state["switch"], entry["port"]
        _make_namespace(space)
        _do(
            *("ip", "link", "add", "name", INTERFACE, "address", entry["mac"], "netns", space),
            *("type", "veth", "peer", "name", port, "netns", switch),
        )
        _do("ip", "-n", space, "address", "add", f"{entry['address']}/24", "dev", INTERFACE)
        for where, device in ((space, INTERFACE), (switch, port)):
            queue = ("tc", "-n", where, "qdisc", "add", "dev", device)
            burst = max(_LEAST_BURST_BYTES, int(link.bytes_per_ms * _BURST_MS))
            _do(
                *(*queue, "root", "handle", "1:", "tbf", "rate", f"{round(link.bytes_per_ms * 8000)}bit"),
                *("burst", str(burst), "limit", str(16 * burst + int(link.bytes_per_ms * _QUEUE_MS))),
            )
            if netem and link.latency_ms > 0:
                _do(*queue, "parent", "1:1", "netem", "delay", f"{link.latency_ms / 2:f}ms", "limit", "20000")
            if netem and where == switch:
                _do("ip", "-n", switch, "link", "set", "dev", port, "master", "bridge")
            most = min(burst * 9 // 10, 65_536)
            _do("ip", "-n", where, "link", "set", "dev", device, "gso_max_size", str(most), "up")

    def _start_relay(self) -> None:
        self._relay = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SCRIPT), "relay", str(self._path)],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._relay.stdout is not None
        if self._relay.stdout.readline() != "ready\n":
            raise BedError(self._relay_failure())

    def _relay_failure(self) -> str:
        assert self._relay is not None
        lines = self._relay.communicate()[1].strip().splitlines() or [f"exit status {self._relay.returncode}"]
        return f"the relay of bed {self.name!r} has ended ({lines[-1]}); what was measured since then is worth nothing"

    def _close(self) -> str:
        """Remove everything and return what went wrong, a sentence; empty when nothing did."""
        dead = self._relay is not None and self._relay.poll() is not None
        failure = self._relay_failure() if dead else ""
        for process in self._processes:  # one that was started just now is not inside yet
            process.kill()
        if left := _tear_down(self._state):
            failure = f"still there after {_END_S:g} s: {left}; run `python scripts/testbed.py sweep`"
        if self._pipe >= 0:
            os.close(self._pipe)
        if self._relay is not None:
            self._relay.communicate()
        for process in filter(None, (self._watchdog, *self._processes)):
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_END_S)
        self._processes, self._relay, self._watchdog, self._pipe, self._state = [], None, None, -1, {}
        return failure


def _make_namespace(name: str) -> None:
    _do("ip", "netns", "add", name)
    _do("ip", "-n", name, "link", "set", "dev", "lo", "up")
    # IPv6 would chatter, and gloo might choose an address that only this link knows.
    switch = "/proc/sys/net/ipv6/conf/default/disable_ipv6"
    _do("ip", "netns", "exec", name, "sh", "-c", f"test ! -e {switch} || echo 1 > {switch}")


# -- the script's own processes --------------------------------------------------------------------------------------

_SIOCGSTAMPNS = 0x8907  # when the last frame that was read came in, <linux/sockios.h>
_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWNET = 0x20000, 0x4000000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _load(bed: str) -> dict[str, Any]:
    """Return the state of the bed with an id, or in a file."""
    path = Path(bed) if "/" in bed else RUNTIME / f"{bed}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError):
        up = ", ".join(sorted(path.stem for path in RUNTIME.glob("*.json"))) or "none"
        raise BedError(f"bed {path.stem} is not up; up are: {up}") from None


def _join_network(namespace: str) -> None:
    handle = os.open(NAMESPACES / namespace, os.O_RDONLY | os.O_CLOEXEC)
    _call("setns", handle, _CLONE_NEWNET)
    os.close(handle)


def enter(bed: str, host: str, command: Sequence[str]) -> None:
    """Become a command inside a host; never returns.

    Raises:
        BedError: If the bed is not up, has no such host, or the command cannot be started.
    """
    state = _load(bed)
    entry = next((entry for entry in state["hosts"] if entry["name"] == host), None)
    if entry is None:
        names = ", ".join(entry["name"] for entry in state["hosts"])
        raise BedError(f"bed {state['id']} has no host {host!r}; it has {names}")
    if not command:
        raise BedError("there is nothing to run; give a command after --")
    try:
        for group in entry["groups"]:
            Path(group, "cgroup.procs").write_text(str(os.getpid()))
        _join_network(entry["namespace"])
        _call("unshare", _CLONE_NEWNS | _CLONE_NEWUTS)
        socket.sethostname(host)
        _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        if Path("/etc/hosts").exists():
            _call("mount", str(RUNTIME / f"{state['id']}.hosts").encode(), b"/etc/hosts", None, _MS_BIND, None)
        if entry["cores"]:
            os.sched_setaffinity(0, entry["cores"])
    except OSError as cause:
        raise BedError(f"host {host!r} of bed {state['id']} cannot be entered: {cause}; is the bed still up?") from None
    environment = {**os.environ, **dict.fromkeys(_INTERFACE_VARIABLES, INTERFACE), VARIABLE: state["id"]}
    try:
        os.execvpe(command[0], list(command), environment)
    except OSError as cause:
        raise BedError(f"{command[0]} cannot be started: {cause.strerror}; check the command") from None


def watch(path: str, pipe: int, owner: int) -> None:
    """Wait until the owner closes its end of the pipe or ends, and remove the bed if it is still there."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ends = [pipe]
    with suppress(ProcessLookupError):
        # A child that the owner forked keeps the pipe open; the owner's own end is seen here.
        ends.append(os.pidfd_open(owner))
        select.select(ends, [], [])
    with suppress(BedError):
        _tear_down(_load(path))


def relay(path: str) -> None:
    """Be the switch: hand frames from port to port, each when it is due; never returns.

    The kernel notes when a frame arrives, so none needs to be fetched before the least latency is over. This and a
    pause between rounds, a quarter of a millisecond or of the least latency, bound how often the relay wakes.
    """
    state = _load(path)
    _join_network(state["switch"])
    _hurry()
    entries = state["hosts"]
    ports = [_open_port(entry["port"]) for entry in entries]
    index = {port: i for i, port in enumerate(ports)}
    by_mac = {bytes.fromhex(entry["mac"].replace(":", "")): i for i, entry in enumerate(entries)}
    delay_ns = [[int((a["latency_ms"] + b["latency_ms"]) * 5e5) for b in entries] for a in entries]
    least_ns = min((row[j] for i, row in enumerate(delay_ns) for j in range(len(row)) if i != j), default=0)
    pause_ns = min(least_ns, 1_000_000) // 4
    due: list[tuple[int, int, int, bytes]] = []  # (when, ns; number; port; frame)
    number, now = 0, time.monotonic_ns()
    print("ready", flush=True)
    while True:
        if due:
            wake_ns = max(min(due[0][0], now + least_ns), now + pause_ns) - time.monotonic_ns()
            # Where some pair has next to no latency, what arrives has to wake the relay.
            select.select(ports if least_ns < 100_000 else (), (), (), max(wake_ns, 0) / 1e9)
        for port in select.select(ports, (), (), 0 if due else None)[0]:
            source = index[port]
            for arrived, frame in _frames(port):
                target = by_mac.get(frame[10:16])
                for i in range(len(ports)) if target is None else (target,):
                    if i != source:
                        number += 1
                        heapq.heappush(due, (arrived + delay_ns[source][i], number, i, frame))
        now = time.monotonic_ns()
        while due and due[0][0] <= now:
            _, _, target, frame = heapq.heappop(due)
            with suppress(OSError):  # the queue is full or the cable is cut: lost, as in a switch
                ports[target].send(frame)


def _hurry() -> None:
    """Run ahead of everything else, as hardware would, on any core."""
    gc.disable()
    with suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    except OSError:  # a v1 cpu group below the top has no real-time budget
        os.setpriority(os.PRIO_PROCESS, 0, -20)


def _open_port(interface: str) -> socket.socket:
    """Return a socket that gets and sends whole frames, each behind its virtio-net header of 10 bytes.

    The header keeps what a virtual link leaves undone, a checksum or a cut into packets, undone on the other side.
    """
    level, ignore_outgoing, network_header = 263, 23, 15  # SOL_PACKET and two of its options, <linux/if_packet.h>
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    port.setsockopt(level, network_header, 1)
    port.setsockopt(level, ignore_outgoing, 1)
    with suppress(OSError):  # asked once, the kernel notes it from now on
        fcntl.ioctl(port, _SIOCGSTAMPNS, bytes(16))
    for force in (32, 33):  # SO_SNDBUFFORCE, SO_RCVBUFFORCE
        port.setsockopt(socket.SOL_SOCKET, force, 64 << 20)
    port.bind((interface, 3))  # ETH_P_ALL
    port.setblocking(False)
    return port


def _frames(port: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Yield what has arrived and when, ns on the monotonic clock; an error is a cable that was cut, no news."""
    now = time.monotonic_ns()
    ahead = time.time_ns() - now
    with suppress(OSError):
        for _ in range(1000):
            frame = port.recv(66_000)
            seconds, rest = struct.unpack("qq", fcntl.ioctl(port, _SIOCGSTAMPNS, bytes(16)))
            arrived = seconds * 1_000_000_000 + rest - ahead
            yield (arrived if now - 100_000_000 < arrived else now), frame  # the wall clock may have been set


def _up(path: str, command: Sequence[str]) -> int:
    if not command:
        raise BedError("there is nothing to run; give a command after --")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with TestBed.from_yaml(path) as bed:
        try:
            status = subprocess.run(command, env={**os.environ, VARIABLE: bed.id}, check=False).returncode
        except OSError as cause:
            raise BedError(f"{command[0]} cannot be started: {cause.strerror}; check the command") from None
    return status if status >= 0 else 128 - status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status; a refusal is one sentence and status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    middle = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="up | enter | sweep")
    for verb, names in {
        "up": ["file"],
        "enter": ["bed", "host"],
        "sweep": [],
        "watch": ["bed", "pipe", "owner"],
        "relay": ["bed"],
    }.items():
        known = verbs.add_parser(verb)
        for name in names:
            known.add_argument(name)
    options = parser.parse_args(words[:middle])
    command = words[middle + 1 :]
    try:
        if options.verb == "up":
            return _up(options.file, command)
        if options.verb == "enter":
            enter(options.bed, options.host, command)
        elif options.verb == "watch":
            watch(options.bed, int(options.pipe), int(options.owner))
        elif options.verb == "relay":
            relay(options.bed)
        else:
            print("\n".join(TestBed.sweep()) or "nothing to remove")
    except BedError as cause:
        print(cause, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
