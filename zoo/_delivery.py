"""Delivery of a run's record to MLflow, in batches, resumable at any line.

The tracker delivers while a run goes on, `autoplace sync` what is left. How far a record got stands beside it in
`<run>.delivered.json`; a crash between MLflow's answer and that file repeats lines whose metrics carry the same time,
step and value, which MLflow's SQL stores keep once. Runs are found again by the tag `autoplace.run`.
"""

from __future__ import annotations

import contextlib
import json
import math
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoplace.files import write_text_atomically

from ._client import ensure_experiment, open_client, public_uri, quiet_mlflow

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

__all__ = ["Delivered", "Delivery", "experiment_name", "kept_files", "read_delivered"]

RUN_TAG = "autoplace.run"
METRICS_PER_BATCH, PARAMS_PER_BATCH = 1000, 100
"""MLflow's limits of one `log_batch`."""
PARAM_CHARACTERS, TAG_CHARACTERS, KEY_CHARACTERS = 6000, 5000, 250
"""MLflow's limits of a parameter's value, a tag's value and any key."""


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """How far a record got, and where to."""

    uri: str = ""
    """The store, without user name and password."""
    run_id: str = ""
    """MLflow's id of the run."""
    experiment_id: str = ""
    records: int = 0
    """Records delivered, from the first."""
    complete: bool = False
    """Whether the record's end was delivered."""


def read_delivered(record: Path) -> Delivered:
    """Return how far a record got; nowhere when nothing (readable) says otherwise."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Delivered(**json.loads(_sidecar(record).read_text(encoding="utf-8")))
    return Delivered()


def kept_files(record: Path) -> Path:
    """Return the folder beside a record for artifacts that wait for delivery."""
    return record.with_suffix(".files")


def experiment_name(kind: str) -> str:
    """Return the experiment of a kind of run: `autoplace-tune` for `tune`."""
    return f"autoplace-{_key(kind)}"


class Delivery:
    """One record on its way to one store. Every method may raise whatever MLflow raises when the store fails."""

    def __init__(self, record: Path, uri: str) -> None:
        self.record, self.uri = record, uri
        self.missing: list[str] = []
        """Artifacts that were neither kept nor are where they were."""
        self.state = read_delivered(record)
        if self.state.uri != public_uri(uri):
            self.state = Delivered(uri=public_uri(uri))
        self._client: MlflowClient | None = None

    def open(self, header: Mapping[str, Any]) -> None:
        """Open the store and the MLflow run of a record's header, created unless it is there already."""
        self._client = open_client(self.uri)
        if self.state.run_id:
            return
        with quiet_mlflow():
            experiment = ensure_experiment(self._client, self.uri, experiment_name(str(header["kind"])))
            found = self._client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{header['run']}'", max_results=1)
            run = found[0] if found else self._create_run(experiment, header)
        self._save(run_id=run.info.run_id, experiment_id=experiment)

    def deliver(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Deliver the records that follow those delivered so far, and note it."""
        if not records:
            return
        client, run_id = self._opened()
        with quiet_mlflow():
            self._log_params(_params(records))
            for metrics in _chunks(_metrics(records), METRICS_PER_BATCH):
                client.log_batch(run_id, metrics=metrics)
            for entry in records:
                if entry.get("type") == "artifact":
                    self._log_artifact(entry)
            end = next((r for r in records if r.get("type") == "end"), None)
            if end is not None:
                client.log_artifact(run_id, str(self.record), "record")
                client.set_terminated(run_id, str(end.get("status", "FINISHED")), _milliseconds(end))
        self._save(records=self.state.records + len(records), complete=self.state.complete or end is not None)

    def abandon(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Deliver the rest of a run whose process died without an end, and mark the run as failed."""
        self.deliver(records)
        client, run_id = self._opened()
        with quiet_mlflow():
            client.log_artifact(run_id, str(self.record), "record")
            client.set_terminated(run_id, "FAILED")
        self._save(complete=True)

    def _opened(self) -> tuple[MlflowClient, str]:
        if self._client is None:
            raise RuntimeError("open the delivery before delivering")
        return self._client, self.state.run_id

    def _create_run(self, experiment: str, header: Mapping[str, Any]) -> Any:
        tags = {RUN_TAG: str(header["run"]), "mlflow.runName": str(header["name"]), "autoplace.kind": header["kind"]}
        tags |= {f"version.{k}": v for k, v in header.get("versions", {}).items()} | header.get("tags", {})
        tags = {str(k)[:KEY_CHARACTERS]: str(v)[:TAG_CHARACTERS] for k, v in tags.items()}
        assert self._client is not None
        return self._client.create_run(experiment, start_time=_milliseconds(header), tags=tags)

    def _log_params(self, params: Sequence[Param]) -> None:
        """Log parameters; one that MLflow refuses (it keeps the first value of each) stands in the record only."""
        from mlflow.exceptions import MlflowException

        client, run_id = self._opened()
        for chunk in _chunks(params, PARAMS_PER_BATCH):
            try:
                client.log_batch(run_id, params=chunk)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                for param in chunk:
                    with contextlib.suppress(MlflowException):
                        client.log_batch(run_id, params=[param])

    def _log_artifact(self, entry: Mapping[str, Any]) -> None:
        client, run_id = self._opened()
        folder = str(entry.get("folder") or "")
        original = Path(entry["path"])
        kept = kept_files(self.record) / folder / original.name
        source = kept if kept.exists() else original
        if source.is_dir():
            client.log_artifacts(run_id, str(source), posixpath.join(folder, source.name))
        elif source.exists():
            client.log_artifact(run_id, str(source), folder or None)
        else:
            self.missing.append(str(original))

    def _save(self, **changes: Any) -> None:
        self.state = Delivered(**{**asdict(self.state), **changes})
        write_text_atomically(_sidecar(self.record), json.dumps(asdict(self.state)) + "\n")


def _sidecar(record: Path) -> Path:
    return record.with_suffix(".delivered.json")


def _params(records: Sequence[Mapping[str, Any]]) -> list[Param]:
    from mlflow.entities import Param

    merged: dict[str, str] = {}
    for entry in records:
        if entry.get("type") in ("run", "params"):
            for key, value in entry.get("params", {}).items():
                merged.setdefault(_key(key), str(value)[:PARAM_CHARACTERS])
    return [Param(k, v) for k, v in merged.items()]


def _metrics(records: Sequence[Mapping[str, Any]]) -> list[Metric]:
    from mlflow.entities import Metric

    return [
        Metric(_key(key), float(value), _milliseconds(entry), int(entry.get("step") or 0))
        for entry in records
        for key, value in _values(entry).items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]


def _values(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the metrics of a record; an outcome's are named by its source, its energy by the energy's as well."""
    if entry.get("type") == "metrics":
        return entry.get("metrics", {})
    if entry.get("type") != "outcome":
        return {}
    outcome = entry.get("outcome", {})
    source = outcome.get("source", "unknown")
    names = ("latency_ms", "period_ms", "throughput_sps", "objective")
    values = {f"{source}/{name}": outcome.get(name) for name in names} if outcome.get("feasible") else {}
    values[f"{source}/feasible"] = float(bool(outcome.get("feasible")))
    if outcome.get("energy_source"):
        values[f"{source}/energy_{outcome['energy_source']}_j"] = outcome.get("energy_j")
    return values


def _key(text: object) -> str:
    """Return `text` as a key that MLflow accepts: plain characters, and no path that leads elsewhere."""
    cleaned = re.sub(r"[^A-Za-z0-9_\-. /:]|\.{2,}", "_", str(text))[:KEY_CHARACTERS]
    return posixpath.normpath(cleaned.lstrip("./ ").rstrip("/ ") or "_")


def _milliseconds(entry: Mapping[str, Any]) -> int:
    return int(float(entry.get("time") or 0.0) * 1000)


def _chunks(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
