"""All errors that autoplace raises on purpose: one root, one sentence each.

A message says what is wrong, where, and what to do next. The command line prints it alone and exits with code 2;
anything that is not an `AutoplaceError` is a bug and keeps its traceback.
"""

__all__ = [
    "AutoplaceError",
    "CaptureError",
    "ClusterFileError",
    "ExecutionError",
    "InfeasibleError",
    "InputError",
    "ModelFactoryError",
    "PlanFileError",
    "PolicyError",
    "ProblemFileError",
    "TrackingError",
    "TuningCancelled",
    "in_one_line",
]


def in_one_line(error: Exception) -> str:
    """Return an exception's type and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class AutoplaceError(Exception):
    """Raised when autoplace refuses to go on; the root of all errors below."""


class ProblemFileError(AutoplaceError):
    """Raised when a problem file is missing, unreadable or says something that no problem can mean."""


class ClusterFileError(AutoplaceError):
    """Raised when a cluster file is missing, unreadable or describes no usable cluster."""


class PlanFileError(AutoplaceError):
    """Raised when a plan file is missing, unreadable or was made for another graph or cluster."""


class PolicyError(AutoplaceError):
    """Raised when a policy is unknown, incomplete, of another format version, or fails its checksum."""


class ModelFactoryError(AutoplaceError):
    """Raised when the `file.py:function` that should build the model is missing or raises."""


class InputError(AutoplaceError):
    """Raised when example inputs or options do not fit the model or the call."""


class CaptureError(AutoplaceError):
    """Raised when one rung of the capture ladder fails; the next rung is then tried."""


class InfeasibleError(AutoplaceError):
    """Raised when no placement can satisfy the problem; names the op or the memory that makes it so."""


class ExecutionError(AutoplaceError):
    """Raised when a plan cannot be executed: a batch that does not split, outputs that do not merge, a dead worker."""


class TrackingError(AutoplaceError):
    """Raised when the MLflow store cannot be opened or created."""


class TuningCancelled(AutoplaceError):
    """Raised when a background tuning was cancelled before it ended."""
