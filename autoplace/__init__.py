"""autoplace: places PyTorch models on the devices you have, for less time and less energy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autoplace.hardware.cluster import Cluster
from autoplace.plan import Plan
from autoplace.problem import Objective, Problem

if TYPE_CHECKING:
    from autoplace.parallel import OptimizedParallel
    from autoplace.tuner import TuneConfig, tune
    from autoplace.workload import Workload

__all__ = ["Cluster", "Objective", "OptimizedParallel", "Plan", "Problem", "TuneConfig", "Workload", "tune"]

__version__ = "0.1.0"

_LAZY = {
    "OptimizedParallel": "autoplace.parallel",
    "TuneConfig": "autoplace.tuner",
    "Workload": "autoplace.workload",
    "tune": "autoplace.tuner",
}


def __getattr__(name: str) -> Any:
    """Import the composers when first asked for, so that `import autoplace` stays light."""
    if name not in _LAZY:
        raise AttributeError(f"module 'autoplace' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
