"""Tracking: every tune and train is a record on disk first, and an MLflow run second.

`track_run` yields a `RunTracker`. What it is given is on disk (→ `autoplace.records`) before MLflow hears of it, in
batches. A store that fails costs one warning; the user's work goes on, and `autoplace sync` delivers the rest later.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoplace.errors import TrackingError
from autoplace.outcome import Outcome
from autoplace.records import RecordLog, plain_json, read_records, start_run_log

from ._client import (
    default_tracking_uri,
    ensure_experiment,
    ensure_store,
    is_server,
    open_client,
    public_uri,
    quiet_mlflow,
    resolve_tracking_uri,
)
from ._delivery import Delivery, kept_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "RunTracker",
    "default_tracking_uri",
    "ensure_store",
    "experiments",
    "is_server",
    "public_uri",
    "resolve_tracking_uri",
    "sync_command",
    "track_run",
    "ui_command",
]

RECORDS_PER_FLUSH = 100
SECONDS_PER_FLUSH = 5.0
"""Records are delivered when either is reached, so that the UI follows a long run without a request per record."""
logger = logging.getLogger("autoplace")


class RunTracker:
    """One run's record and its MLflow run. Safe to call from several threads; never raises for a store that fails."""

    def __init__(self, log: RecordLog, uri: str) -> None:
        """Open the MLflow run of a record that has just been started.

        Args:
            log: The run's record, with its header written.
            uri: Resolved tracking URI.
        """
        self.record_path = log.path
        """The run's JSON-lines file."""
        self.tracking_uri = uri
        self._log = log
        self._lock = threading.RLock()
        header = read_records(log.path)[0][0]
        self._pending: list[dict[str, Any]] = [header]
        self._flushed = time.monotonic()
        self._warned: set[str] = set()
        self._online = True
        self._delivery = Delivery(log.path, uri)
        self._attempt(lambda: self._delivery.open(header))
        self.flush()

    @property
    def online(self) -> bool:
        """Whether MLflow has taken everything it was given so far."""
        return self._online

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None when the store could not be reached at the start."""
        return self._delivery.state.run_id or None

    @property
    def url(self) -> str:
        """Address of the run in a tracking server's UI; else the store's own, which `autoplace ui` serves."""
        state, store = self._delivery.state, public_uri(self.tracking_uri)
        if not state.run_id or not is_server(self.tracking_uri):
            return store
        return f"{store}/#/experiments/{state.experiment_id}/runs/{state.run_id}"

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log what the run was asked to do; MLflow keeps the first value of each name."""
        self._append({"type": "params", "params": dict(params)})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers by name; the unit belongs into the name."""
        self._append({"type": "metrics", "metrics": dict(metrics), "step": step})

    def log_outcome(self, plan_label: str, outcome: Outcome, step: int | None = None) -> None:
        """Log what a plan cost: all of it in the record, the figures as metrics `measured/latency_ms` and so on."""
        self._append({"type": "outcome", "plan": plan_label, "outcome": outcome.to_json(), "step": step})

    def log_experience(self, problem: Mapping[str, Any], plans: Sequence[Mapping[str, Any]]) -> None:
        """Log a problem and what its plans cost in real runs, to the record alone, for policies to learn from.

        Args:
            problem: As `problem_to_json` writes it.
            plans: Each with `label`, `plan` and the measured `outcome`, as their `to_json` write them.
        """
        self._append({"type": "experience", "problem": dict(problem), "plans": [dict(p) for p in plans]})

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Log a file or a directory, under `folder` in the run's artifacts."""
        self._append({"type": "artifact", "path": str(Path(path).absolute()), "folder": folder}, flush=True)
        if not self.online:
            self._keep(Path(path), folder)

    def log_figure(self, figure: Figure, name: str) -> None:
        """Log a matplotlib figure as `plots/<name>`, a PNG unless the name says otherwise."""
        name = Path(name).name
        target = kept_files(self.record_path) / "plots" / (name if Path(name).suffix else f"{name}.png")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(target, dpi=120, bbox_inches="tight")
        except OSError as error:
            self._warn("disk", f"{target} cannot be written: {error}; free some space on the disk")
            return
        self.log_artifact(target, "plots")

    def flush(self) -> None:
        """Deliver what waits to MLflow."""
        with self._lock:
            self._attempt(lambda: self._delivery.deliver(self._pending))
            self._pending = []
            self._flushed = time.monotonic()

    def end(self, status: str = "FINISHED", reason: str = "") -> None:
        """End the run: `FINISHED`, `FAILED` or `KILLED`. Called by `track_run`."""
        self._append({"type": "end", "status": status, "reason": reason}, flush=True)
        self._log.close()
        if self.online:
            shutil.rmtree(kept_files(self.record_path), ignore_errors=True)

    def _append(self, record: dict[str, Any], *, flush: bool = False) -> None:
        record = plain_json({**record, "time": time.time()})
        with self._lock:
            try:
                self._log.append(record)
            except OSError as error:
                self._warn("disk", f"{self.record_path} cannot be written: {error}; free some space on the disk")
            self._pending.append(record)
            due = len(self._pending) >= RECORDS_PER_FLUSH or time.monotonic() - self._flushed >= SECONDS_PER_FLUSH
            if flush or due:
                self.flush()

    def _attempt(self, action: Callable[[], None]) -> None:
        """Do something with the store; when it fails, say so once and leave the rest to `autoplace sync`."""
        if not self._online:
            return
        try:
            action()
        except Exception as error:  # MLflow, its HTTP client, its database and its artifact stores each raise their own
            self._online = False
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            self._warn(
                "store",
                f"tracking to {public_uri(self.tracking_uri)} failed ({reason}); the run goes on, its record is "
                f"{self.record_path}, and `{sync_command(self.tracking_uri)}` delivers it later",
            )

    def _keep(self, path: Path, folder: str) -> None:
        """Copy an artifact beside the record, for a delivery after the original may have changed."""
        target = kept_files(self.record_path) / folder / path.name
        if path.absolute() == target or not path.exists():
            return
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True)
            else:
                shutil.copy2(path, target)
        except OSError as error:
            self._warn("disk", f"{target} cannot be written: {error}; free some space on the disk")

    def _warn(self, about: str, sentence: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            logger.warning("autoplace: %s", sentence)


@contextmanager
def track_run(
    kind: str,
    name: str,
    *,
    tracking_uri: str | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    records_dir: str | Path | None = None,
) -> Iterator[RunTracker]:
    """Record and track one run; an exception inside marks it failed and goes on to the caller.

    Args:
        kind: `tune`, `train`, …; the experiment is `autoplace-<kind>`.
        name: The run's name, for example the model's.
        tracking_uri: As given by the user; None = → `resolve_tracking_uri`.
        params: What the run was asked to do.
        tags: Short labels; MLflow's own (`mlflow.parentRunId`) work too.
        records_dir: Where the record goes; None = the user's data directory.

    Yields:
        The tracker.

    Raises:
        TrackingError: If the record itself cannot be written, or the URI is of no use.
    """
    uri = resolve_tracking_uri(tracking_uri)
    log = start_run_log(kind, name, params=params, tags=tags, directory=records_dir)
    try:
        tracker = RunTracker(log, uri)
    except BaseException:
        log.close()
        raise
    try:
        yield tracker
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        tracker.end("KILLED" if interrupted else "FAILED", f"{type(error).__name__}: {error}")
        raise
    tracker.end()


def sync_command(uri: str | None = None) -> str:
    """Return the command that delivers to the store what it missed; `uri` as given by the user, or resolved."""
    return _command("autoplace sync", uri)


def ui_command(uri: str | None = None) -> str:
    """Return the command that opens the UI on the store; `uri` as given by the user, or resolved."""
    return _command("autoplace ui", uri)


def experiments(uri: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return (name, id) of experiments, created at need, those with the latest run first.

    Raises:
        TrackingError: If the store cannot be created or opened; a server that fails raises MLflow's own errors.
    """
    client = open_client(uri)
    found = []
    with quiet_mlflow():
        for name in names:
            number = ensure_experiment(client, uri, name)
            runs = client.search_runs([number], order_by=["attributes.start_time DESC"], max_results=1)
            found.append((runs[0].info.start_time if runs else 0, name, number))
    return [(name, number) for _, name, number in sorted(found, key=lambda entry: -entry[0])]


def _command(verb: str, uri: str | None) -> str:
    """Return the verb, with the URI only where it is not what the command would find itself."""
    try:
        resolved, usual = resolve_tracking_uri(uri), resolve_tracking_uri()
    except TrackingError:
        resolved, usual = str(uri), ""
    return verb if resolved == usual else f"{verb} --tracking-uri {shlex.quote(public_uri(resolved))}"
