"""`launch`: torchrun on every host of a cluster, started from here; what all of them print comes back line by line.

Each host gets one command, an `agent`, behind the words that the file gives for it: none (a process of this machine),
`ssh user@node1`, or whatever else runs a command elsewhere. Settings travel as words of `env`, since ssh passes no
environment on. When one host ends with an error, the others are told to end, and killed after some seconds.

Ranks meet at the first host's address, at a port that was free there a moment ago. Where they may be started again,
hosts meet anew for every attempt (→ `rendezvous`), and where fewer of them are enough, one that is lost is not waited
for; the first has to stay, since it is where they meet.

Knows nothing of models and plans. Rendezvous and restarts are torchrun's.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from autoplace.errors import ClusterFileError, InputError
from autoplace.hardware._fields import read
from autoplace.hardware.cluster import Cluster, Host
from autoplace.hardware.hosts_file import HostProcesses, processes_of

from .agent import CLUSTER_TEXT_VARIABLE, DIRECTORY_VARIABLE, PEER_VARIABLE, PER_DEVICE, pack
from .member import CLUSTER_VARIABLE, HOST_VARIABLE, MIN_HOSTS_VARIABLE
from .rendezvous import BACKEND
from .reports import REPORTS_VARIABLE, parse
from .session import TIMEOUT_VARIABLE

__all__ = ["launch", "run_script"]

Heard = Callable[[dict[str, Any]], None]
"""Takes a report of a rank → `reports`; calls come one at a time."""

_PACKAGE = "autoplace.runtime.distributed"
_PROBE_S = 10.0
_END_S = 5.0
_RANKS_END_S = 3
"""Shorter than `_END_S`: torchrun kills its ranks before it is killed itself."""
_RENDEZVOUS_S = 180
_LAST_CALL_S = 15
"""Once enough hosts are there, the others have as long to come, too."""
_ALIVE = "keep_alive_interval=3,keep_alive_max_attempt=4"
"""A host is gone 12 s after its last sign of life; their clocks may differ by less than that."""
_FREE_PORT = "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])"
_LOOPBACK = "127.0.0.1"
_MAX_PACKED = 100_000  # Linux takes 128 KiB a word
_PASSED_ON = ("AUTOPLACE_", "GLOO_", "NCCL_", "TORCH_")
"""Of this environment's variables, those with such a name are set on other hosts too."""
_NOT_FOUND = (126, 127)
_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"
"""c10d warns of hosts without reverse DNS, and of the first host's agent when that ends before another's."""


def run_script(
    path: str | Path,
    command: Sequence[str],
    *,
    max_restarts: int = 0,
    min_hosts: int | None = None,
    timeout_s: float | None = None,
) -> int:
    """Run a script on all devices of a cluster file, one process each, and return the exit code → `launch`.

    Args:
        path: The cluster file.
        command: `script.py` or `-m module`, then what it gets.
        max_restarts: How often torchrun may start the ranks again after a failure.
        min_hosts: How many hosts, the first among them, are enough to go on; None = all.
        timeout_s: Seconds after which a rank that says nothing counts as lost; None = a minute.

    Raises:
        ClusterFileError: If the file describes no cluster or not how to start processes, or a host cannot be reached.
        InputError: If there are fewer hosts than are to be enough.
    """
    cluster = Cluster.load(path)
    try:
        hosts = processes_of(cluster)
    except ClusterFileError as cause:
        raise ClusterFileError(f"{path}: {cause}") from None
    if min_hosts is not None and not 1 <= min_hosts <= len(hosts):
        raise InputError(f"--min-hosts is {min_hosts} and {path} names {len(hosts)} hosts; use 1 to {len(hosts)}")
    return launch(
        hosts,
        command,
        cluster=Path(path).resolve(),
        max_restarts=max_restarts,
        min_hosts=min_hosts,
        timeout_s=timeout_s,
    )


def launch(
    hosts: Sequence[HostProcesses],
    command: Sequence[str],
    *,
    cluster: Path | None = None,
    max_restarts: int = 0,
    min_hosts: int | None = None,
    timeout_s: float | None = None,
    heard: Heard | None = None,
) -> int:
    """Run a script on hosts and wait for it.

    Args:
        hosts: Where, and how many processes each; the first is where ranks meet.
        command: `script.py` or `-m module`, then what it gets.
        cluster: Absolute path of the cluster file that the ranks shall have.
        max_restarts: How often torchrun may start the ranks again after a failure.
        min_hosts: How many hosts, the first among them, are enough to go on; None = all.
        timeout_s: Seconds after which a rank that says nothing counts as lost; None = a minute.
        heard: Called with what ranks report beside their output.

    Returns:
        0 when all succeeded; 2 when a rank ended with an error of ours, whose sentence has then been printed; 130 on
        Ctrl-C; else the code of what failed first, 128 + number for a signal.

    Raises:
        ClusterFileError: If a host cannot be reached, or the cluster file cannot be handed over.
    """
    settings = _settings(hosts, cluster, timeout_s, min_hosts)
    least = min_hosts or len(hosts)
    port = _reach([one.host for one in hosts])
    address = addresses([one.host for one in hosts])[0]
    children: list[_Child] = []
    listener = _Listener(heard)
    try:
        for rank, one in enumerate(hosts):
            words = _torchrun_words(one, rank, (least, len(hosts)), address, port, max_restarts)
            children.append(_Child(one.host, listener))
            children[-1].start([*words, *command], settings[rank])
        failed = _first_failure(children, listener, least)
    except KeyboardInterrupt:
        _end(children, signal.SIGINT)
        return 128 + signal.SIGINT
    finally:
        _end(children, signal.SIGTERM)
    return _conclude(failed, listener)


def addresses(hosts: Sequence[Host]) -> list[str]:
    """Return the address of every host: what the file says, else its name, else loopback where all are local."""
    default = _LOOPBACK if all(host.is_local for host in hosts) else ""
    return [host.address or default or host.name for host in hosts]


# -- what is started ---------------------------------------------------------------------------------------------------


def _settings(
    hosts: Sequence[HostProcesses], cluster: Path | None, timeout_s: float | None, min_hosts: int | None
) -> list[dict[str, str]]:
    """Return the environment variables of every host."""
    known = addresses([one.host for one in hosts])
    packed = ""
    if cluster is not None and not all(one.host.is_local for one in hosts):
        packed = pack(read(cluster))
        if len(packed) > _MAX_PACKED:
            raise ClusterFileError(
                f"{cluster} is too large to be handed to other hosts ({len(packed):,} bytes packed); leave links out "
                "and give a default_link"
            )
    found = []
    for rank, one in enumerate(hosts):
        host = one.host
        peer = known[0] if rank or len(known) == 1 else known[1]
        values = {HOST_VARIABLE: host.name, REPORTS_VARIABLE: "1", PEER_VARIABLE: peer}
        values["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(_RANKS_END_S)
        values |= {} if _LOG_LEVEL in os.environ else {_LOG_LEVEL: "ERROR"}
        values[DIRECTORY_VARIABLE] = host.directory or str(Path.cwd())
        if host.interface:
            values |= {"GLOO_SOCKET_IFNAME": host.interface, "NCCL_SOCKET_IFNAME": host.interface}
        if timeout_s is not None:
            values[TIMEOUT_VARIABLE] = f"{timeout_s:g}"
        # Set to nothing where there is none: this environment may hold another's.
        values[MIN_HOSTS_VARIABLE] = str(min_hosts or "")
        values[CLUSTER_VARIABLE] = str(cluster) if cluster is not None and host.is_local else ""
        if packed and not host.is_local:
            values[CLUSTER_TEXT_VARIABLE] = packed
        found.append(values)
    return found


def _torchrun_words(
    one: HostProcesses, rank: int, num_hosts: tuple[int, int], address: str, port: int, max_restarts: int
) -> list[str]:
    least, most = num_hosts
    options = {
        "--nnodes": most if least == most else f"{least}:{most}",
        "--node-rank": rank,
        "--nproc-per-node": one.processes or PER_DEVICE,
        "--master-addr": address,
        "--master-port": port,
        "--max-restarts": max_restarts,
        "--rdzv-conf": f"timeout={_RENDEZVOUS_S}",
    }
    if most > 1 and (max_restarts or least < most):
        options |= {
            "--rdzv-backend": BACKEND,
            "--rdzv-endpoint": f"{address}:{port}",
            # torch orders hosts by this text, and of the first one alone it is an address, too. [torch 2.13]
            "--local-addr": f"~{rank:05}" if rank else address,
            "--rdzv-conf": f"is_host={int(rank == 0)},join_timeout={_RENDEZVOUS_S},"
            f"last_call_timeout={_LAST_CALL_S},{_ALIVE}",
        }
    words = [word for pair in options.items() for word in map(str, pair)]
    return ["-m", f"{_PACKAGE}.agent", *words, "-m", f"{_PACKAGE}.main"]


def _command(host: Host, words: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """Return what runs Python with some words and variables on a host."""
    python = host.python or sys.executable
    if host.is_local:
        return [python, *words]
    passed = {key: value for key, value in os.environ.items() if key.startswith(_PASSED_ON)}
    inner = ["env", *(f"{key}={value}" for key, value in {**passed, **values}.items()), python, *words]
    # ssh joins its words and has a shell take them apart again; other prefixes pass them on as they are.
    if Path(host.launch[0]).name == "ssh":
        inner = [shlex.join(inner)]
    return [*host.launch, *inner]


# -- before the start --------------------------------------------------------------------------------------------------


def _reach(hosts: Sequence[Host]) -> int:
    """Run a first command on every host, all at once, and return a free port of the first.

    Raises:
        ClusterFileError: Naming the first host that does not answer.
    """
    with ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
        ports = list(pool.map(_probe, hosts))
    for found in ports:
        if isinstance(found, ClusterFileError):
            raise found
    return int(str(ports[0]))


def _probe(host: Host) -> int | ClusterFileError:
    """Return a free port of a host, or why it does not tell."""
    try:
        done = subprocess.run(
            _command(host, ["-c", _FREE_PORT], {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_PROBE_S,
            start_new_session=True,  # nobody is asked for a password
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _unreachable(host, f"no answer within {_PROBE_S:g} s")
    except OSError as cause:
        return _unreachable(host, f"{cause.filename or cause}: {cause.strerror}")
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reason = said[-1][:200] if said else f"it ended with code {done.returncode}"
    if done.returncode in _NOT_FOUND:
        python = host.python or sys.executable
        return ClusterFileError(f"host {host.name!r} cannot run {python} ({reason}); set `python` for it in the file")
    if done.returncode:
        return _unreachable(host, reason)
    # What a login prints comes before.
    numbers = [line.strip() for line in done.stdout.splitlines() if line.strip().isdigit()]
    return int(numbers[-1]) if numbers else _unreachable(host, "it did not run the command")


def _unreachable(host: Host, reason: str) -> ClusterFileError:
    if host.is_local:
        return ClusterFileError(
            f"host {host.name!r} cannot run {host.python or sys.executable} ({reason}); set `python` for it in the file"
        )
    return ClusterFileError(
        f"host {host.name!r} cannot be reached by `{shlex.join(host.launch)}`: {reason}; "
        "check the address or take the host out of the file"
    )


# -- while they run ----------------------------------------------------------------------------------------------------


class _Listener:
    """Shows what hosts print, and keeps what they report."""

    def __init__(self, heard: Heard | None) -> None:
        self._heard, self._lock = heard, threading.Lock()
        self.started: set[str] = set()
        self.failed: set[str] = set()
        """Hosts whose ranks failed once too often; one that is gone does not say so."""
        self.sentence = ""
        """Of the first error of ours."""
        self.failure: dict[str, Any] = {}
        """The first rank that failed, with its code."""

    def take(self, host: Host, line: str, *, error: bool) -> None:
        shown, told = parse(line.rstrip("\n"))
        with self._lock:
            if shown or told is None:
                _print(f"{host.name} | {shown}", sys.stderr if error else sys.stdout)
            if told is not None:
                self._keep(host, told)

    def _keep(self, host: Host, told: dict[str, Any]) -> None:
        kind = told["kind"]
        if kind == "started":
            self.started.add(host.name)
        elif kind == "error":
            self.sentence = self.sentence or str(told["sentence"])
        elif kind == "failed":
            self.failed.add(host.name)
            self.failure = self.failure or {**told, "host": host.name}
        elif self._heard is not None:
            self._heard(told)


class _Child:
    """The command of one host, and two threads that read what it prints."""

    def __init__(self, host: Host, listener: _Listener) -> None:
        self.host, self._listener, self.last = host, listener, ""
        self._readers: list[threading.Thread] = []
        self._process: subprocess.Popen[str] | None = None

    def start(self, words: Sequence[str], values: Mapping[str, str]) -> None:
        """Start the command; Ctrl-C may come before this returns."""
        process = self._process = subprocess.Popen(
            _command(self.host, words, values),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, **values} if self.host.is_local else None,
            start_new_session=True,  # Ctrl-C is passed on by us
        )
        streams = ((process.stdout, False), (process.stderr, True))
        self._readers = [threading.Thread(target=self._read, args=stream, daemon=True) for stream in streams]
        for reader in self._readers:
            reader.start()
        # From this line on the agent ends when this pipe closes; it stays open as long as we live.
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.write("\n")
            process.stdin.flush()

    def _read(self, stream: TextIO, error: bool) -> None:
        for line in stream:
            if error and (shown := parse(line)[0].strip()):
                self.last = shown
            self._listener.take(self.host, line, error=error)

    def signal(self, number: int) -> None:
        """Signal the command; where that is not allowed (sudo), let go of its input."""
        if self._process is None or not self.runs():
            return
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass
        except PermissionError:
            self.let_go()

    def let_go(self) -> None:
        """Close the command's input, which ends the agent wherever it is."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def code(self) -> int | None:
        """Return the exit code, None while there is none."""
        return None if self._process is None else self._process.poll()

    def runs(self) -> bool:
        """Return whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def finish(self) -> None:
        """Wait until it is gone and all that it printed is shown; what still holds the streams is not waited for."""
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1.0)
        for reader in self._readers:
            reader.join(timeout=1.0)


def _first_failure(children: Sequence[_Child], listener: _Listener, least: int) -> _Child | None:
    """Wait for all to succeed, or for the first that does not; hosts may go while the first and enough are left."""
    left, end = list(children), math.inf
    while True:
        for child in [c for c in left if c.code()]:
            child.finish()
            left.remove(child)
            name = child.host.name
            needed = child is children[0] or len(left) < least
            if needed or name in listener.failed or name not in listener.started:
                return child
            _print(f"autoplace: host {child.host.name!r} is gone ({_last(child)}); the others go on", sys.stderr)
        if all(child.code() == 0 for child in left):
            return None
        if least < len(children) and children[0].code() == 0:
            end = min(end, time.monotonic() + _END_S)
        if time.monotonic() > end:  # what still runs is cut off
            return None
        time.sleep(0.05)


def _end(children: Sequence[_Child], number: int) -> None:
    """End what still runs: by a signal, after some seconds by force; a second Ctrl-C does not wait."""
    try:
        for child in children:
            child.signal(number)
        end = time.monotonic() + _END_S
        while time.monotonic() < end and any(child.runs() for child in children):
            time.sleep(0.02)
    except KeyboardInterrupt:
        pass
    for child in children:
        child.let_go()
        child.signal(signal.SIGKILL)
    for child in children:
        child.finish()


def _conclude(failed: _Child | None, listener: _Listener) -> int:
    """Say in one sentence what went wrong and return the exit code."""
    if failed is None:
        if listener.sentence:
            _print(f"autoplace: ranks were started again after: {listener.sentence}", sys.stderr)
        return 0
    if listener.sentence:
        _print(f"autoplace: {listener.sentence}", sys.stderr)
        return 2
    code = failed.code() or 0
    if failed.host.name not in listener.started:
        python = failed.host.python or sys.executable
        _print(
            f"autoplace: host {failed.host.name!r} did not start ({_last(failed)}); "
            f"check that {python} there has autoplace",
            sys.stderr,
        )
        return 2
    if failure := listener.failure:
        _print(f"autoplace: rank {failure['rank']} on host {failure['host']!r} {_how(failure['code'])}", sys.stderr)
    else:
        _print(f"autoplace: host {failed.host.name!r} is gone ({_last(failed)}); start again when it is up", sys.stderr)
    return code if code > 0 else 128 - code


def _last(child: _Child) -> str:
    """Return the last words of a host, or its exit code."""
    return child.last[:200] or f"code {child.code()}"


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _print(line: str, stream: TextIO) -> None:
    with suppress(OSError, ValueError):  # whoever listened has gone
        stream.write(line + "\n")
        stream.flush()
