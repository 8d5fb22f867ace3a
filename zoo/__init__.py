"""Where policies live (files that ship with the package, the MLflow registry) and where runs are tracked."""

from .store import PolicyInfo, find_policy, list_policies, load_policy
from .sync import SyncCounts, replay
from .tracking import RunTracker, resolve_tracking_uri, track_run

__all__ = [
    "PolicyInfo",
    "RunTracker",
    "SyncCounts",
    "find_policy",
    "list_policies",
    "load_policy",
    "replay",
    "resolve_tracking_uri",
    "track_run",
]
