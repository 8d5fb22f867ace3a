"""Replay to MLflow what a tracking server missed. Running it twice delivers nothing twice."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoplace.errors import TrackingError
from autoplace.records import RecordLog, read_records, records_directory

from ._client import open_client, public_uri, quiet_mlflow, resolve_tracking_uri
from ._delivery import Delivery, kept_files, read_delivered

__all__ = ["SyncCounts", "replay"]


@dataclass(kw_only=True)
class SyncCounts:
    """What a replay did."""

    delivered: int = 0
    """Runs delivered now."""
    already: int = 0
    """Runs that some store had in full before."""
    running: int = 0
    """Runs that go on in another process, left alone."""
    failed: int = 0
    """Runs that the store refused."""
    notes: list[str] = field(default_factory=list)
    """One sentence for everything that people should know."""


def replay(records_dir: str | Path | None = None, tracking_uri: str | None = None) -> SyncCounts:
    """Deliver every record that no store has in full.

    Args:
        records_dir: Folder of the records; None = the user's data directory.
        tracking_uri: As given by the user; None = → `resolve_tracking_uri`.

    Returns:
        What was delivered, skipped and refused.

    Raises:
        TrackingError: If the store cannot be reached at all.
    """
    uri = resolve_tracking_uri(tracking_uri)
    directory = Path(records_dir if records_dir is not None else records_directory())
    counts = SyncCounts()
    waiting = []
    for record in sorted(directory.glob("*.jsonl")):
        if read_delivered(record).complete:
            counts.already += 1
        else:
            waiting.append(record)
    if waiting:
        _check_store(uri)
    for record in waiting:
        _replay_one(record, uri, counts)
    return counts


def _check_store(uri: str) -> None:
    client = open_client(uri)
    try:
        with quiet_mlflow():
            client.search_experiments(max_results=1)
    except Exception as error:  # MLflow and its HTTP client each raise their own
        reason = str(error).splitlines()[0][:200]
        raise TrackingError(
            f"{public_uri(uri)} cannot be reached ({reason}); start the server, or name another with --tracking-uri"
        ) from None


def _replay_one(record: Path, uri: str, counts: SyncCounts) -> None:
    try:
        log = RecordLog(record)  # holds the record's lock: nobody else writes or delivers it meanwhile
    except TrackingError:
        counts.running += 1
        return
    with log:
        records, notes = read_records(record)
        counts.notes.extend(notes)
        if not records or records[0].get("type") != "run":
            counts.failed += 1
            counts.notes.append(f"{record} has no header, so it is no run's record; move it away")
            return
        delivery = Delivery(record, uri)
        try:
            _deliver(delivery, records)
        except Exception as error:  # one bad run must not keep the others from their store
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            counts.failed += 1
            counts.notes.append(f"{record} was not delivered ({reason}); run the command again later")
            return
        counts.delivered += 1
        counts.notes.extend(f"{path} is gone, so {record.stem} lacks it" for path in delivery.missing)
        if not delivery.missing:
            shutil.rmtree(kept_files(record), ignore_errors=True)


def _deliver(delivery: Delivery, records: list[dict[str, Any]]) -> None:
    delivery.open(records[0])
    rest = records[delivery.state.records :]
    if any(r.get("type") == "end" for r in records):
        delivery.deliver(rest)
    else:
        delivery.abandon(rest)
