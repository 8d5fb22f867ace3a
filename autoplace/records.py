"""The local record of every run: append-only JSON lines, synced to disk before anything else hears of them.

A run is one file `<run>.jsonl`. Its first line is the header (kind, name, parameters, time, versions); after it come
lines of type `params`, `metrics`, `outcome`, `artifact` and `end`. A process that dies may leave a torn last line; the
reader skips it and says so. Knows nothing of MLflow; `autoplace.zoo.tracking` delivers these lines to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import platform
import secrets
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from autoplace.errors import TrackingError

__all__ = ["RecordLog", "data_directory", "plain_json", "read_records", "records_directory", "start_run_log"]

RECORD_FORMAT = "autoplace.record/1"


def data_directory() -> Path:
    """Return where autoplace keeps its data: `AUTOPLACE_DATA_DIR`, else the user's XDG data directory; absolute."""
    if own := os.environ.get("AUTOPLACE_DATA_DIR"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_DATA_HOME")
    base = Path(shared) if shared and Path(shared).is_absolute() else Path("~/.local/share").expanduser()
    return base.absolute() / "autoplace"


def records_directory() -> Path:
    """Return the directory of the run records, absolute."""
    return data_directory() / "records"


class RecordLog:
    """An append-only file of JSON lines; a line is on the disk when `append` returns.

    The log holds a lock on its file for as long as it is open, so that `autoplace sync` can tell a run that goes on
    from one that ended or died.
    """

    def __init__(self, path: str | Path) -> None:
        """Open for appending, creating file and folders.

        Raises:
            TrackingError: If the file cannot be opened, or another process has it open.
        """
        self.path = Path(path).absolute()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise TrackingError(
                f"{self.path} cannot be written: {error}; set AUTOPLACE_DATA_DIR to a folder that can"
            ) from None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._handle)
            raise TrackingError(f"{self.path} is in use by a run that goes on; wait for its end") from None
        except OSError:
            pass  # a file system without locks: appending still works
        self._end_torn_line()
        _sync_directory(self.path.parent)

    def append(self, *records: Mapping[str, Any]) -> None:
        """Append records, one line each, and sync them to the disk once.

        Raises:
            OSError: If the disk refuses, for example because it is full.
        """
        if not records:
            return
        text = "".join(json.dumps(plain_json(r), allow_nan=False, separators=(",", ":")) + "\n" for r in records)
        data = memoryview(text.encode("utf-8"))
        while data:
            data = data[os.write(self._handle, data) :]
        os.fsync(self._handle)

    def close(self) -> None:
        """Close the file and release its lock; closing twice is fine."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> RecordLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end_torn_line(self) -> None:
        """Start on a fresh line where a process died within one."""
        size = os.fstat(self._handle).st_size
        if size and os.pread(self._handle, 1, size - 1) != b"\n":
            os.write(self._handle, b"\n")


def start_run_log(
    kind: str,
    name: str,
    *,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    directory: str | Path | None = None,
) -> RecordLog:
    """Open a new run's log and write its header.

    Args:
        kind: `tune`, `train` or another word for what runs.
        name: What people call the run, for example the model's name.
        params: What the run was asked to do.
        tags: Short labels.
        directory: Where the file goes; None = → `records_directory`.

    Raises:
        TrackingError: If the file cannot be written.
    """
    started = time.time()
    run = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(started))}-{kind}-{secrets.token_hex(4)}"
    log = RecordLog(Path(directory if directory is not None else records_directory()) / f"{run}.jsonl")
    header = {
        "type": "run",
        "format": RECORD_FORMAT,
        "run": run,
        "kind": kind,
        "name": name,
        "time": started,
        "params": dict(params or {}),
        "tags": dict(tags or {}),
        "versions": _versions(),
    }
    try:
        log.append(header)
    except OSError as error:
        log.close()
        raise TrackingError(f"{log.path} cannot be written: {error}; free some space on the disk") from None
    return log


def read_records(path: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the records of a log, and one note per line that could not be read.

    Raises:
        TrackingError: If the file is missing or unreadable.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise TrackingError(f"{path} cannot be read: {error}; check the path") from None
    records: list[dict[str, Any]] = []
    notes: list[str] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        record = None
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
        if isinstance(record, dict):
            records.append(record)
        else:
            notes.append(f"{path} line {number} is torn or no record, and was skipped")
    return records, notes


def plain_json(value: Any) -> Any:
    """Return `value` as data that JSON knows: NaN and infinities become null, numpy scalars numbers, the rest text."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain_json(v) for k, v in value.items()}
    if hasattr(value, "tolist"):  # numpy scalars and arrays, torch tensors
        return plain_json(value.tolist())
    if isinstance(value, Iterable) and not isinstance(value, bytes | os.PathLike):
        return [plain_json(v) for v in value]
    return str(value)


def _versions() -> dict[str, str]:
    from importlib import metadata

    versions = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in ("autoplace", "torch", "numpy"):
        module = sys.modules.get(package)
        try:
            versions[package] = str(getattr(module, "__version__", None) or metadata.version(package))
        except metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def _sync_directory(directory: Path) -> None:
    """Make a new file's name as durable as its content, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
