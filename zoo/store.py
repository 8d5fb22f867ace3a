"""The shelf of policies: those that ship with the package, those in directories, those in the MLflow registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoplace.errors import PolicyError
from autoplace.policy.store import read_policy

if TYPE_CHECKING:
    from autoplace.policy.policy import Policy

__all__ = ["PolicyInfo", "find_policy", "list_policies", "load_policy", "pretrained_directory"]

REGISTRY_SCHEME = "models:/"


@dataclass(frozen=True, kw_only=True)
class PolicyInfo:
    """What is known of a shipped policy without building its network."""

    name: str
    directory: Path
    summary: str = ""
    """First sentence of the card."""
    num_parameters: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    """Why it cannot be used, in one sentence; empty when it can."""


def pretrained_directory() -> Path:
    """Return the directory of the policies that ship with the package."""
    return Path(str(resources.files("autoplace.zoo"))) / "pretrained"


def list_policies() -> list[PolicyInfo]:
    """Return the shipped policies by name, each read and checked; a broken one says what is wrong with it."""
    return [_info(directory) for directory in _shipped().values()]


def find_policy(spec: str | Path, *, tracking_uri: str | None = None) -> Path:
    """Return the directory of a policy.

    Args:
        spec: A shipped policy's name, a directory, or `models:/name@alias` of the MLflow registry (downloaded).
        tracking_uri: Store of the registry; None = the usual one. Asked only for `models:/`.

    Raises:
        PolicyError: If there is no such policy; names those that there are.
        TrackingError: If the registry cannot be reached.
    """
    text = str(spec)
    if text.startswith(REGISTRY_SCHEME):
        from .registry import download_policy

        return download_policy(text, tracking_uri=tracking_uri)
    shipped = _shipped()
    if text in shipped:
        return shipped[text]
    path = Path(text).expanduser()
    if path.is_dir() or path.is_file():
        return path.absolute()  # a file is refused by the reader, which says why
    known = ", ".join(shipped) or "none"
    raise PolicyError(
        f"policy {text!r} is neither a shipped policy ({known}) nor a directory; "
        "name one of these, a policy directory, or models:/name@alias"
    )


def load_policy(spec: str | Path, *, tracking_uri: str | None = None) -> Policy:
    """Find, check and build a policy; see `find_policy`."""
    from autoplace.policy.policy import Policy

    return Policy.load(find_policy(spec, tracking_uri=tracking_uri))


def _shipped() -> dict[str, Path]:
    root = pretrained_directory()
    if not root.is_dir():
        return {}
    return {d.name: d for d in sorted(root.iterdir()) if d.is_dir() and not d.name.startswith((".", "_"))}


def _info(directory: Path) -> PolicyInfo:
    try:
        stored = read_policy(directory)
    except PolicyError as error:
        return PolicyInfo(name=directory.name, directory=directory, problem=str(error))
    return PolicyInfo(
        name=directory.name,
        directory=directory,
        summary=_first_sentence(stored.card),
        num_parameters=stored.num_parameters,
        config=stored.config,
        evaluation=stored.evaluation,
    )


def _first_sentence(card: str) -> str:
    """Return the first sentence of a card that is no heading, or its first heading."""
    lines = [line.strip() for line in card.splitlines() if line.strip()]
    text = next((line for line in lines if not line.startswith(("#", "|", "-", "`"))), "")
    if not text:
        return lines[0].lstrip("# ") if lines else ""
    return text.split(". ")[0].rstrip(".")
