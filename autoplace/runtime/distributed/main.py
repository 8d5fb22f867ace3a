"""What torchrun runs on every rank under `autoplace run`: takes the device's cores, then runs the user's script.

    python -m autoplace.runtime.distributed.main script.py arguments...
    python -m autoplace.runtime.distributed.main -m module arguments...

An error of ours that leaves the script is one sentence and exit code 2; any other exception keeps its traceback.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from autoplace.errors import AutoplaceError, ClusterFileError, InputError
from autoplace.hardware.cluster import Cluster

from .member import CLUSTER_VARIABLE, assigned, host_name, take_cores
from .reports import heard, report

__all__ = ["die_with_parent", "main"]

_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a script or module as `__main__`; exits with 2 on an error of ours and with 130 on Ctrl-C.

    Args:
        arguments: `script.py` or `-m module`, then what it gets; None = the process's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if heard():
        die_with_parent()
    _settle_down()
    try:
        _run(words)
    except AutoplaceError as error:
        if os.environ.get("AUTOPLACE_DEBUG"):
            raise
        _say(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, however that comes."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _settle_down() -> None:
    """Take the cores of this rank's device; a file that does not say which is for those who join to complain of."""
    if not (path := os.environ.get(CLUSTER_VARIABLE)):
        return
    with contextlib.suppress(ClusterFileError, ValueError):
        cluster = Cluster.load(path)
        device = assigned(cluster, int(os.environ.get("LOCAL_RANK", "0")))
        take_cores(device, local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _run(words: list[str]) -> None:
    if words[:1] == ["-m"] and len(words) > 1:
        sys.argv = words[1:]
        sys.path[0] = str(Path.cwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    if not words:
        raise InputError("no script is named; give one")
    script = Path(words[0])
    if not script.is_file():
        raise InputError(
            f"{script} is not on host {host_name()!r} (in {Path.cwd()}); copy it there, or set the host's `directory`"
        )
    sys.argv = words
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


def _say(error: AutoplaceError) -> None:
    """Tell the launcher, or print the sentence where there is none."""
    sentence, rank = " ".join(str(error).split()), os.environ.get("RANK", "0")
    sys.stdout.flush()
    if heard():
        report("error", sentence=sentence, rank=int(rank))
    elif rank == "0":
        print(f"autoplace: {sentence}", file=sys.stderr, flush=True)
    else:
        print(f"autoplace, rank {rank}: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
