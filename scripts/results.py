"""What every benchmark script shares: where a result comes from, and how it is kept under docs/results/."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from autoplace.files import write_text_atomically

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


def provenance(*, seed: int) -> dict[str, Any]:
    """Return machine, date, commit, seed and command of this run."""
    import torch

    return {
        "machine": f"{_cpu_model()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "seed": seed,
        "command": " ".join(["python", *sys.argv]),
    }


def _commit() -> str:
    """Return the working tree's commit, `-dirty` where files differ; results do not count, since nothing runs them."""
    commit = _git("describe", "--always")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)docs/results")
    return f"{commit}-dirty" if commit and changed else commit or "unknown"


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()


def save(name: str, *, seed: int, data: dict[str, Any]) -> Path:
    """Write docs/results/<name>.json and return its path."""
    path = RESULTS / f"{name}.json"
    write_text_atomically(path, json.dumps({"provenance": provenance(seed=seed), **data}, indent=1) + "\n")
    return path


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown CPU"
