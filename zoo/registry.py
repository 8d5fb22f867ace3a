"""Policies in the MLflow model registry: a version is a policy directory logged as a run's artifact."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoplace.errors import PolicyError, TrackingError
from autoplace.policy.store import SUMS, read_policy
from autoplace.records import data_directory

from ._client import ensure_experiment, open_client, public_uri, quiet_mlflow, resolve_tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["download_policy", "register_policy"]

EXPERIMENT = "autoplace-policies"
ARTIFACT_FOLDER = "policy"


def register_policy(directory: str | Path, name: str, alias: str | None = None, tracking_uri: str | None = None) -> int:
    """Register a policy directory as a new version in the model registry.

    Args:
        directory: A whole, checked policy.
        name: Name of the registered model.
        alias: Points to this version from now on, for `models:/name@alias`; None sets no alias.
        tracking_uri: As given by the user; None = the usual store.

    Returns:
        The version's number.

    Raises:
        PolicyError: If the directory holds no good policy, or name or alias cannot be used.
        TrackingError: If the registry cannot be reached or refuses.
    """
    stored = read_policy(directory)
    if not re.fullmatch(r"[\w\-. ]{1,200}", name):
        raise PolicyError(f"{name!r} cannot name a policy; use letters, digits, dots, dashes and underscores")
    if alias is not None and (not re.fullmatch(r"[\w\-]{1,200}", alias) or re.fullmatch(r"latest|[vV]\d+", alias)):
        raise PolicyError(f"{alias!r} cannot be an alias; use letters, digits, dashes and underscores, and not v1")
    uri = resolve_tracking_uri(tracking_uri)
    client = open_client(uri)
    try:
        with quiet_mlflow():
            return _create_version(client, uri, stored.directory, name, alias)
    except Exception as error:  # MLflow, its HTTP client and its artifact stores each raise their own
        raise TrackingError(f"{public_uri(uri)} did not register the policy: {_first_line(error)}") from None


def download_policy(uri: str, *, tracking_uri: str | None = None) -> Path:
    """Download a registered policy and return its directory, checked.

    Args:
        uri: `models:/name@alias` or `models:/name/version`.
        tracking_uri: As given by the user; None = the usual store.

    Returns:
        A directory in the user's data directory; a version that is there already is not downloaded again.

    Raises:
        PolicyError: If the URI is malformed, there is no such version, or what was downloaded is no good policy.
        TrackingError: If the registry cannot be reached.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([\w\-]+)|/(\d+))", uri)
    if not match:
        raise PolicyError(f"{uri!r} names no registered policy; write models:/name@alias or models:/name/version")
    name, alias, number = match.groups()
    store = resolve_tracking_uri(tracking_uri)
    client = open_client(store)
    version = _find_version(client, store, uri, name, alias, number)
    # A registry that was deleted and filled again counts its versions from 1 again; the creation time tells them apart.
    key = hashlib.sha256(f"{public_uri(store)} {version.creation_timestamp}".encode()).hexdigest()[:12]
    target = data_directory() / "policies" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}-{version.version}-{key}"
    with suppress(PolicyError):
        return read_policy(target).directory
    _download(client, store, uri, version, target)
    return read_policy(target).directory


def _create_version(client: MlflowClient, uri: str, directory: Path, name: str, alias: str | None) -> int:
    from mlflow.exceptions import MlflowException

    run = client.create_run(ensure_experiment(client, uri, EXPERIMENT), run_name=name)
    client.log_artifacts(run.info.run_id, str(directory), ARTIFACT_FOLDER)
    client.set_terminated(run.info.run_id)
    with suppress(MlflowException):  # it may exist; if it could not be created, the next call says so
        client.create_registered_model(name)
    version = client.create_model_version(
        name,
        source=f"{run.info.artifact_uri}/{ARTIFACT_FOLDER}",
        run_id=run.info.run_id,
        tags={"autoplace.sha256": hashlib.sha256((directory / SUMS).read_bytes()).hexdigest()},
    )
    if alias is not None:
        client.set_registered_model_alias(name, alias, version.version)
    return int(version.version)


def _find_version(client: MlflowClient, store: str, uri: str, name: str, alias: str | None, number: str | None) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        with quiet_mlflow():
            if alias:
                return client.get_model_version_by_alias(name, alias)
            return client.get_model_version(name, str(number))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise PolicyError(
                f"{uri} is not registered at {public_uri(store)}; register it with `autoplace zoo register`, or name "
                "the store with --tracking-uri"
            ) from None
        raise TrackingError(f"{public_uri(store)} cannot be reached: {_first_line(error)}") from None


def _download(client: MlflowClient, store: str, uri: str, version: Any, target: Path) -> None:
    """Download a version into a temporary folder, check it and rename it into place."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder, quiet_mlflow():
            from mlflow.artifacts import download_artifacts

            source = client.get_model_version_download_uri(version.name, version.version)
            found = Path(download_artifacts(artifact_uri=source, dst_path=folder, tracking_uri=store))
            read_policy(found)
            shutil.rmtree(target, ignore_errors=True)
            with suppress(FileExistsError):  # another process may have put the same version there
                found.rename(target)
    except PolicyError as error:
        raise PolicyError(f"{uri} holds no good policy: {str(error).replace(str(target.parent), '')}") from None
    except Exception as error:  # MLflow and its artifact stores each raise their own
        raise TrackingError(f"{uri} could not be downloaded from {public_uri(store)}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
