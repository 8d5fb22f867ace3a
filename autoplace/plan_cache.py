"""Plans of earlier tunings, by fingerprint: one JSON file per key in the user's cache directory, beside the costs.

A key stands for everything that a plan's worth is taken to depend on: the model's structure (classes, forward code,
simple attributes, parameters, ties), the inputs' shapes, the mode, devices, threads, versions and options. It does not
know parameters' values, and attributes that are neither simple values nor containers of them count by class alone: who
loads a plan checks it on its own inputs, as with any plan file.

The files hold plain data, never code. One that is damaged or of another format is a miss and costs a log warning; a
directory that cannot be written is no error.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autoplace.costs.cache import cache_dir
from autoplace.errors import InputError, PlanFileError
from autoplace.files import parse_json, write_text_atomically
from autoplace.hardware.cluster import Cluster
from autoplace.likeness import describe, describe_model
from autoplace.plan import Plan
from autoplace.result import TuneResult
from autoplace.workload import Workload

__all__ = ["CachedPlan", "cache_key", "clear", "facts_of", "load_plan", "store_plan"]

_log = logging.getLogger(__name__)

FORMAT = "autoplace.cached-plan/1"
MOST_FILES = 1000
"""Plans that are kept; those not used for longest go first."""


@dataclass(frozen=True, kw_only=True)
class CachedPlan:
    """A plan that an earlier tuning kept, and what it found."""

    plan: Plan
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What `store_plan` was given, as → `facts_of` makes it; JSON-ready."""


def cache_key(workload: Workload, cluster: Cluster, *, options: Mapping[str, Any]) -> str:
    """Return the key under which a workload's plan is kept: 32 hex digits, the same in every process.

    Args:
        workload: Model, inputs and mode; none of the tensors' values count, and nothing is run.
        cluster: The devices.
        options: What else decides on a plan: objective, precision, whether to compile, for how long to run, ...
    """
    import autoplace

    autocasts = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    facts = {
        "model": describe_model(workload.model),
        "training": workload.training,
        "grad": torch.is_grad_enabled(),
        "autocast": [[kind, str(torch.get_autocast_dtype(kind))] for kind in autocasts],
        "inputs": describe((workload.args, dict(workload.kwargs))),
        "loss": describe(workload.loss),
        "cluster": cluster.fingerprint,
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "versions": [autoplace.__version__, torch.__version__, platform.python_version()],
        "options": describe(dict(sorted(options.items()))),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def facts_of(result: TuneResult) -> dict[str, Any]:
    """Return what a tuning found about the plan that it kept, JSON-ready; `report.explain` reads it."""
    chosen = result.chosen
    return {
        "model": result.model_name,
        "mode": result.mode,
        "batch_size": result.batch_size,
        "label": chosen.label,
        "kept": "plain" if chosen is result.baseline else "plan",
        "speedup": chosen.speedup,
        "interval": list(chosen.speedup_interval) if chosen.speedup_interval else None,
        "noise": result.noise,
        "check": chosen.check,
        "capture_rung": result.capture_rung,
        "capture_reason": result.capture_reason,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {k: v for k, v in result.environment.items() if k in ("autoplace", "torch", "python")},
    }


def store_plan(key: str, plan: Plan, facts: Mapping[str, Any]) -> None:
    """Keep a plan under its key, atomically; over the cap, those not used for longest are removed.

    Args:
        key: What → `cache_key` returned.
        plan: The plan that a tuning kept; the identity plan too, so that nobody tunes in vain again.
        facts: What is to be known about it later, for example → `facts_of`; figures that are not finite become null.

    Raises:
        InputError: If `key` is no such key.
    """
    path = _path(key)
    data = {"format": FORMAT, "key": key, "plan": plan.to_json(), "facts": _finite(facts)}
    try:
        write_text_atomically(path, json.dumps(data, default=str) + "\n")
        _remove_oldest(path.parent)
    except OSError as error:
        _log.warning("autoplace could not keep its plan in %s: %s; the next process tunes again", path.parent, error)


def load_plan(key: str) -> CachedPlan | None:
    """Return the plan kept under a key; None when there is none that can be used.

    Raises:
        InputError: If `key` is no key of → `cache_key`.
    """
    path = _path(key)
    try:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:  # there is none, or another process has just removed it
            return None
        except (OSError, UnicodeDecodeError) as cause:
            raise PlanFileError(f"it cannot be read: {cause}") from None
        data = parse_json(text, path, PlanFileError)
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("key") != key:
            raise PlanFileError(f'its "format" is not {FORMAT!r}, or its key is not its name')
        facts = data.get("facts", {})
        if not isinstance(facts, dict):
            raise PlanFileError('its "facts" are no object')
        plan = Plan.from_json(data.get("plan"), where="its plan")
    except PlanFileError as error:
        _log.warning("autoplace ignores the cached plan %s, and tunes again: %s", path, error)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return CachedPlan(plan=plan, facts=facts)


def clear() -> int:
    """Remove all cached plans and return how many there were."""
    paths = list(_folder().glob("*.json"))
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


def _folder() -> Path:
    return cache_dir() / "plans"


def _path(key: str) -> Path:
    if not re.fullmatch("[0-9a-f]{8,64}", key):
        raise InputError(f"{key!r} is no key of a cached plan; use what cache_key returned")
    return _folder() / f"{key}.json"


def _remove_oldest(folder: Path) -> None:
    """Hold the cap; another process may remove the same files meanwhile."""
    used: list[tuple[float, Path]] = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            used.append((path.stat().st_mtime, path))
    for _, path in sorted(used)[: max(0, len(used) - MOST_FILES)]:
        path.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """Return JSON-ready data with null where a figure is not finite, which JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value
