"""How the policy's kernels are compiled, and the small functions that all of them use.

Kernels are inlined into a few entries, and only the entries are cached on disk. A cache sees changes of its own file
alone, so that entries close over → `sources_version`.
"""

from __future__ import annotations

import math
from pathlib import Path

from autoplace.jit import digest, inline

__all__ = ["TINY", "clip", "scaled", "slog", "sources_version", "total"]

TINY = 1e-12
"""Guards divisions; far below any latency (ms) or energy (J) that occurs."""


def sources_version() -> int:
    """Return a number that changes with the sources of this folder."""
    return digest(sorted(Path(__file__).parent.glob("*.py")))


@inline
def slog(value):
    """Return sign(x) log(1 + |x|)."""
    return math.log1p(value) if value >= 0.0 else -math.log1p(-value)


@inline
def clip(value, limit):
    """Return the value within [-limit, limit]."""
    return min(max(value, -limit), limit)


@inline
def scaled(value, unit):
    """Return slog(value / unit) within [-10, 10]."""
    return clip(slog(clip(value / unit, 1e6)), 10.0)


@inline
def total(values):
    """Return the sum of a short array."""
    found = 0.0
    for d in range(len(values)):
        found += values[d]
    return found
