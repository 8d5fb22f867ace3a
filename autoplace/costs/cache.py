"""A cache of measurements: one JSON file per key in the user's cache directory. Holds plain data, never code.

An entry that is missing, damaged or of another format is a miss; a directory that cannot be written is no error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from autoplace.errors import AutoplaceError
from autoplace.files import read_json, write_text_atomically

__all__ = ["cache_dir", "cache_key", "load", "store"]

FORMAT = "autoplace.costs/1"


def cache_dir() -> Path:
    """Return `AUTOPLACE_CACHE_DIR`, else `$XDG_CACHE_HOME/autoplace`, else `~/.cache/autoplace`."""
    if own := os.environ.get("AUTOPLACE_CACHE_DIR"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "autoplace"


def cache_key(facts: dict[str, Any]) -> str:
    """Return the key of a measurement: sha256 (32 hex digits) of everything that changes it."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def load(key: str) -> dict[str, Any] | None:
    """Return an entry's data, or None when there is none that can be used."""
    try:
        entry = read_json(_path(key), AutoplaceError)
    except AutoplaceError:
        return None
    if not isinstance(entry, dict) or entry.get("format") != FORMAT or entry.get("key") != key:
        return None
    data = entry.get("data")
    return data if isinstance(data, dict) else None


def store(key: str, data: dict[str, Any]) -> None:
    """Keep an entry, atomically; a directory that cannot be written loses it silently."""
    with contextlib.suppress(OSError):
        write_text_atomically(_path(key), json.dumps({"format": FORMAT, "key": key, "data": data}) + "\n")


def _path(key: str) -> Path:
    return cache_dir() / "costs" / f"{key}.json"
