"""What `launch` starts on every host: torchrun, in this process, with manners of ours around it.

    python -m autoplace.runtime.distributed.agent (torchrun's options) autoplace.runtime.distributed.main script.py ...

1. It takes what the launcher sent by environment variables: the working directory, the cluster file's text (which it
   writes to a temporary file for the ranks), the address of another host (gloo and NCCL use the interface to there).
2. `--nproc-per-node devices` is one process per GPU, or one where there is none.
3. It ends when the launcher does: that holds this process's standard input open, and writes a line to it at the start.
   Where a prefix passes no input on (`ssh -n`), no line comes and nothing is watched. The ranks have an empty input.
4. Ranks that are stopped for a restart and do not end are killed after `TORCH_ELASTIC_SHUTDOWN_TIMEOUT` seconds, as at
   the end; torchrun alone gives them half a minute there. [torch 2.13]
5. It exits with the code of the rank that failed first (128 + number for a signal), and prints no banner: what a rank
   had to say, it has said. → `reports`
"""

from __future__ import annotations

import base64
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError, RendezvousTimeoutError
from torch.distributed.run import parse_args
from torch.distributed.run import run as torchrun

import autoplace
from autoplace.errors import AutoplaceError, ClusterFileError, ExecutionError

from .member import CLUSTER_VARIABLE, host_name
from .rendezvous import register
from .reports import report

__all__ = [
    "CLUSTER_TEXT_VARIABLE",
    "DIRECTORY_VARIABLE",
    "PEER_VARIABLE",
    "PER_DEVICE",
    "interface_to",
    "main",
    "pack",
    "unpack",
    "wait_for_meeting_point",
]

CLUSTER_TEXT_VARIABLE = "AUTOPLACE_CLUSTER_TEXT"
"""Environment variable with the cluster file itself → `pack`."""
DIRECTORY_VARIABLE = "AUTOPLACE_DIRECTORY"
"""Environment variable with the working directory of the ranks."""
PEER_VARIABLE = "AUTOPLACE_PEER"
"""Environment variable with the address of another host."""
PER_DEVICE = "devices"
"""As many processes as the host has GPUs, at least one."""
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_STOPPED = 128
_NO_OTHERS = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this host's ranks and return the exit code: 0, that of the first failure, or 2 on an error of ours.

    Args:
        arguments: torchrun's; None = the process's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    report("started", version=autoplace.__version__)
    threading.Thread(target=_watch_launcher, args=(_take_input(),), daemon=True).start()
    try:
        _enter_directory()
        wait_for_meeting_point(*_meeting_point(words), first=words[words.index("--node-rank") + 1] == "0")
        _choose_interface()
        # torchrun would warn that it sets this; the ranks set their own.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with _cluster_file():
            return _torchrun([_count() if word == PER_DEVICE else word for word in words])
    except AutoplaceError as error:
        report("error", sentence=str(error), rank=-1)
        return 2
    except KeyboardInterrupt:
        return _STOPPED + signal.SIGINT


def pack(text: str) -> str:
    """Return a text as what an environment variable can hold."""
    return base64.b64encode(zlib.compress(text.encode("utf-8"), 9)).decode("ascii")


def unpack(packed: str) -> str:
    """Return the text again.

    Raises:
        ClusterFileError: If this is no packed text.
    """
    try:
        return zlib.decompress(base64.b64decode(packed, validate=True)).decode("utf-8")
    except (ValueError, zlib.error):
        raise ClusterFileError(
            f"{CLUSTER_TEXT_VARIABLE} does not hold a cluster file; start by `autoplace run`"
        ) from None


def interface_to(address: str) -> str:
    """Return the network interface by which this host reaches an address; empty where that cannot be told.

    By the route, and not by this host's own name: many machines resolve that to a loopback address.
    """
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # of a datagram socket: nothing is sent
            own = str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return ""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in entries):
            return str(name)
    return ""


def _torchrun(words: list[str]) -> int:
    for name in ("run", "elastic", "launcher"):
        logging.getLogger(f"torch.distributed.{name}").setLevel(logging.CRITICAL)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed."):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    register()
    LocalElasticAgent._stop_workers = _stop_ranks  # type: ignore[method-assign]
    try:
        torchrun(parse_args(words))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        # Times of failures are whole seconds; ranks that were told to stop are no cause.
        failures = error.failures.items()
        rank, failure = min(failures, key=lambda f: (f[1].exitcode == -signal.SIGTERM, f[1].timestamp, f[0]))
        report("failed", rank=rank, code=failure.exitcode)
        return failure.exitcode if failure.exitcode >= 0 else _STOPPED - failure.exitcode
    except SignalException as stop:
        return _STOPPED + int(stop.sigval)
    except RendezvousClosedError:
        return _NO_OTHERS  # another host has said why
    except RendezvousTimeoutError:
        raise ExecutionError(
            f"too few hosts came together again at host {host_name()!r}; start again when they are up, or allow fewer "
            "by --min-hosts"
        ) from None
    except (dist.DistError, RendezvousError) as error:
        address, port = _meeting_point(words)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExecutionError(
            f"host {host_name()!r} could not meet the others at {address}:{port} ({first}); check that all hosts are "
            "up and that nothing blocks their ports"
        ) from None
    return 0


def _stop_ranks(agent: LocalElasticAgent, group: WorkerGroup) -> None:
    """End this host's ranks, in place of torch's method of an agent."""
    agent._shutdown(timeout=agent._shutdown_timeout)


def _take_input() -> int:
    """Return a descriptor of the standard input and leave an empty one in its place, for the ranks."""
    taken = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return taken


def _meeting_point(words: Sequence[str]) -> tuple[str, int]:
    """Return the address and port in torchrun's options."""
    return words[words.index("--master-addr") + 1], int(words[words.index("--master-port") + 1])


def _watch_launcher(descriptor: int) -> None:
    """End this process, and the ranks with it, when the launcher goes; its first line arms this."""
    if not os.read(descriptor, 1):
        return
    while os.read(descriptor, 1 << 12):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _enter_directory() -> None:
    if wanted := os.environ.get(DIRECTORY_VARIABLE):
        try:
            os.chdir(wanted)
        except OSError as cause:
            raise ClusterFileError(
                f"host {host_name()!r} cannot enter {wanted} ({cause.strerror}); set `directory` for it in the file"
            ) from None


def wait_for_meeting_point(address: str, port: int, *, first: bool, silence_s: float = 20.0, s: float = 120.0) -> None:
    """Wait until the first host listens; torchrun would go on trying for minutes, and then print its stack.

    Args:
        address: Of the first host.
        port: There.
        first: Whether this is it: nobody listens yet, and it only has to reach itself.
        silence_s: Seconds for which no answer is waited for. A refusal is one: the host is there and will listen soon.
        s: Seconds for which the host may refuse.

    Raises:
        ClusterFileError: If the address means nothing, or does not answer.
    """
    start = time.monotonic()
    while True:
        try:
            socket.create_connection((address, port), timeout=silence_s).close()
            return
        except OSError as cause:
            refused = isinstance(cause, ConnectionRefusedError)
            if refused and first:
                return
            patience_s = 0.0 if isinstance(cause, socket.gaierror) else s if refused else silence_s
            if time.monotonic() - start >= patience_s:
                raise ClusterFileError(
                    f"host {host_name()!r} cannot reach {address}:{port}, where the ranks meet "
                    f"({cause.strerror or cause}); check the first host's `address` and that nothing blocks its ports"
                ) from None
        time.sleep(0.2)


def _choose_interface() -> None:
    if (address := os.environ.get(PEER_VARIABLE)) and (interface := interface_to(address)):
        for name in _INTERFACE_VARIABLES:
            os.environ.setdefault(name, interface)


@contextmanager
def _cluster_file() -> Iterator[None]:
    """Write the cluster file's text, where it was sent, for as long as the ranks run."""
    packed = os.environ.pop(CLUSTER_TEXT_VARIABLE, None)
    if packed is None:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="autoplace-") as folder:
        path = Path(folder) / "cluster.yaml"
        path.write_text(unpack(packed), encoding="utf-8")
        os.environ[CLUSTER_VARIABLE] = str(path)
        yield


def _count() -> str:
    return str(max(1, torch.cuda.device_count() if torch.cuda.is_available() else 0))


if __name__ == "__main__":
    sys.exit(main())
