"""PPO's hyperparameters as a file, `autoplace.ppo/1`: what `autoplace tune-agent` writes and training reads.

    {"format": "autoplace.ppo/1", "ppo": {field of PpoConfig: value}, "provenance": {…}}

A field that the file leaves out has its default. The provenance is for people and is not read back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autoplace.errors import InputError
from autoplace.files import read_json, write_text_atomically

from .ppo import PpoConfig

__all__ = ["FORMAT", "load_ppo", "save_ppo"]

FORMAT = "autoplace.ppo/1"


def save_ppo(path: str | Path, ppo: PpoConfig, *, provenance: Mapping[str, Any] | None = None) -> None:
    """Write hyperparameters, and where they come from, as JSON.

    Args:
        path: File to write; an old one is replaced as a whole.
        ppo: Hyperparameters.
        provenance: JSON-ready facts, finite numbers only.
    """
    data = {"format": FORMAT, "ppo": asdict(ppo), "provenance": dict(provenance or {})}
    write_text_atomically(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def load_ppo(path: str | Path) -> PpoConfig:
    """Read hyperparameters.

    Raises:
        InputError: If the file is missing, of another format, names a field that PPO does not have, or holds a value
            that the field cannot take.
    """
    data = read_json(path, InputError)
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("ppo"), dict):
        raise InputError(
            f"{path} is not a file of format {FORMAT}; use the best.json that `autoplace tune-agent` wrote"
        )
    defaults = asdict(PpoConfig())
    values: dict[str, Any] = {}
    for name, value in data["ppo"].items():
        if name not in defaults:
            raise InputError(f"{path}: PPO has no {name!r}; use {', '.join(defaults)}")
        if name == "target_kl" and value is None:
            values[name] = None
            continue
        values[name] = _checked(f"{path}: {name}", value, defaults[name], least=int(name != "warmup_updates"))
    return PpoConfig(**values)


def _checked(where: str, value: Any, default: Any, *, least: int) -> Any:
    """Return a value as the type of the default, or say what is wrong with it; whole numbers are `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where} is {json.dumps(value)[:60]}; use a number")
    if isinstance(default, int):
        if not isinstance(value, int) or value < least:
            raise InputError(f"{where} is {value}; use a whole number, {least} or more")
        return value
    if not math.isfinite(value) or value < 0:
        raise InputError(f"{where} is {value}; use a finite number, 0 or more")
    return float(value)
