"""The border to MLflow: where its store is, how it is opened, and how patient we are with a server.

Everything that imports MLflow does so here or inside a `quiet_mlflow` block, because the import alone takes seconds.
Global state of MLflow (`mlflow.set_tracking_uri`, the active run) is the user's own and never touched.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from autoplace.errors import TrackingError
from autoplace.records import data_directory

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = [
    "default_tracking_uri",
    "ensure_experiment",
    "ensure_store",
    "is_server",
    "open_client",
    "public_uri",
    "quiet_mlflow",
    "resolve_tracking_uri",
    "sqlite_path",
]

SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""What holds while we call MLflow, unless the user set it. Its own patience, 7 retries of 120 s, blocks for minutes."""
LOCK_TIMEOUT_S = 120.0
"""Longest wait for another process that creates or migrates the same database, s."""
_ready: set[tuple[int, str]] = set()
"""(process id, URI) of the stores that this process has checked."""


@contextlib.contextmanager
def quiet_mlflow() -> Iterator[None]:
    """Hold our patience and quiet for MLflow calls; the user's own environment and log levels come back after."""
    added = [key for key in SETTINGS if key not in os.environ]
    os.environ.update({key: SETTINGS[key] for key in added})
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic", "urllib3.connectionpool")]
    try:
        import mlflow  # noqa: F401 - configures its loggers, so that the levels below stay

        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
    finally:
        for key in added:
            os.environ.pop(key, None)


def resolve_tracking_uri(flag: str | None = None) -> str:
    """Return the tracking URI: the flag, else `MLFLOW_TRACKING_URI`, else → `default_tracking_uri`.

    A sqlite URI or a path is made absolute, so that it means the same wherever a worker or the UI is started.

    Raises:
        TrackingError: If the URI is a database in memory, which nobody else could see.
    """
    uri = flag or os.environ.get("MLFLOW_TRACKING_URI") or ""
    if not uri.strip():
        return default_tracking_uri()
    uri = uri.strip().rstrip("/") if is_server(uri) else uri.strip()
    if uri.startswith("sqlite:"):
        name = uri.removeprefix("sqlite:///").partition("?")[0]
        if not uri.startswith("sqlite:///") or name in ("", ":memory:"):
            raise TrackingError(
                f"{uri} is a database in memory; name a file, for example sqlite:////absolute/mlflow.db"
            )
        return f"sqlite:///{Path(name).expanduser().absolute()}"
    if "://" not in uri and not uri.startswith(("file:", "databricks", "uc:")):
        path = Path(uri).expanduser().absolute()
        return f"sqlite:///{path}" if path.suffix in (".db", ".sqlite") else path.as_uri()
    return uri


def default_tracking_uri() -> str:
    """Return the absolute sqlite URI in the user's data directory."""
    return f"sqlite:///{data_directory() / 'mlflow.db'}"


def is_server(uri: str) -> bool:
    """Return whether the URI is that of a tracking server, not of a local store."""
    return uri.startswith(("http://", "https://"))


def public_uri(uri: str) -> str:
    """Return the URI without user name and password, for messages and files."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def sqlite_path(uri: str) -> Path | None:
    """Return the file of an absolute sqlite URI, None for any other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def ensure_store(uri: str) -> None:
    """Create the sqlite database of `uri`, or migrate our own one, once, under a file lock.

    Two processes that open a fresh MLflow database at once run its migrations twice and break it. Other kinds of store
    are left to their server.

    Raises:
        TrackingError: If the database cannot be created, opened or migrated.
    """
    path = sqlite_path(uri)
    if path is None or ((os.getpid(), uri) in _ready and path.exists()):
        return
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=LOCK_TIMEOUT_S), quiet_mlflow():
            _open_database(uri, path)
    except Timeout:
        raise TrackingError(f"{path} is being created by another process for too long; stop it and try again") from None
    except OSError as error:
        raise TrackingError(f"{path} cannot be written: {error}; name another store with --tracking-uri") from None
    _ready.add((os.getpid(), uri))


def open_client(uri: str) -> MlflowClient:
    """Return a client of the store, which is created first where it is a local file.

    Raises:
        TrackingError: If the store cannot be created or opened.
    """
    ensure_store(uri)
    with quiet_mlflow():
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def ensure_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Return the id of the experiment, created (with its artifacts beside a sqlite database) or undeleted at need."""
    from mlflow.exceptions import MlflowException

    path = sqlite_path(uri)
    location = None if path is None else (path.parent / "artifacts" / name).as_uri()
    # The tag tells the UI that runs and charts matter here, not traces of language models.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    experiment: Any = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=tags))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another process was first
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def _open_database(uri: str, path: Path) -> None:
    """Let MLflow create what is missing; migrate the database if it is ours and of an older version."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    artifacts = (path.parent / "artifacts").as_uri()
    try:
        try:
            SqlAlchemyStore(uri, artifacts)
        except MlflowException as error:
            if "out-of-date database schema" not in str(error):
                raise
            if uri != default_tracking_uri():
                raise TrackingError(
                    f"{path} is of another version of MLflow; back it up and run `mlflow db upgrade {uri}`"
                ) from None
            _migrate(uri, path)
            SqlAlchemyStore(uri, artifacts)
    except TrackingError:
        raise
    except Exception as error:  # MLflow, SQLAlchemy and Alembic each raise their own
        reason = str(error).splitlines()[0]
        raise TrackingError(f"{path} cannot be opened as an MLflow store ({reason}); name another one") from None


def _migrate(uri: str, path: Path) -> None:
    """Migrate a database to this MLflow's schema; the old one stays beside it, as migrations can fail halfway."""
    from mlflow.store.db import utils

    backup = Path(f"{path}.before-upgrade-{int(time.time())}")
    shutil.copy2(path, backup)
    try:
        utils._upgrade_db(utils.create_sqlalchemy_engine_with_retry(uri))
    except BaseException:
        shutil.move(backup, path)
        raise
