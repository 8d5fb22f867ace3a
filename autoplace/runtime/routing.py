"""Which module calls go to which device, and the gates in the modules that send them there.

A plan names its op groups by module path ("." is the whole model, "path#k" the k-th further call of a module). The
calls that are sent are those of the largest modules that lie wholly on one device; the code of the modules above them
runs in the thread that called the model. Names that hold "~" (backward ops, barriers) are the planner's own and are
ignored.

A gate stands in for `module.forward` on the instance, so that `__call__` and hooks run around it once, in the calling
thread. Without a route in that thread (nested calls in a worker, calls from outside the executor) it calls the
original.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from autoplace.errors import ExecutionError
from autoplace.graph.coarsen import group_modules
from autoplace.hardware.cluster import Cluster
from autoplace.tracer import compiling_here

__all__ = ["Gate", "Target", "install", "remove", "resolve", "routed"]

Dispatch = Callable[[str, torch.nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""(device name, module, its original forward, args, kwargs) to the call's result."""


@dataclass(frozen=True)
class Target:
    """A module whose calls are sent away."""

    path: str
    """Its path in the model; "" is the model itself."""
    module: torch.nn.Module
    calls: Mapping[int, str]
    """Number of the call within one pass to device name; further calls go where call 0 goes."""

    def device(self, call: int) -> str:
        """Return the device of the module's `call`-th call in a pass."""
        return self.calls.get(call) or next(iter(self.calls.values()))


def resolve(model: torch.nn.Module, assignment: Mapping[str, str], cluster: Cluster) -> list[Target]:
    """Return the modules to send away: the largest ones that lie wholly on one device.

    Args:
        model: The model.
        assignment: Op group name to device name.
        cluster: The devices that may be named.

    Raises:
        ExecutionError: If a group or device does not exist, or a module and one inside it are on different devices.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    own: dict[str, dict[int, str]] = {}
    for name, device in assignment.items():
        if "~" in name:
            continue
        number = name.rpartition("#")[2] if "#" in name else "0"
        if device not in cluster.index:
            raise ExecutionError(f"the plan names device {device!r}, which the cluster does not have; tune again")
        for path in group_modules(name):
            if path not in modules or not number.isdigit():
                raise ExecutionError(
                    f"the plan names {name!r}, which the model does not have; tune again for this model"
                )
            own.setdefault(path, {})[int(number)] = device
    if not own:
        raise ExecutionError("the plan places no module of the model; tune again")
    targets = list(_largest(modules, {path: dict(sorted(calls.items())) for path, calls in own.items()}))
    _refuse_conflicts(targets)
    return targets


def _largest(modules: Mapping[str, torch.nn.Module], own: Mapping[str, dict[int, str]]) -> Iterator[Target]:
    below: dict[str, set[str]] = {}
    for path, calls in own.items():
        parts = path.split(".") if path else []
        for depth in range(len(parts) + 1):
            below.setdefault(".".join(parts[:depth]), set()).update(calls.values())
    for path in sorted(below, key=lambda p: (p.count(".") if p else -1, p)):
        parents = [".".join(path.split(".")[:depth]) for depth in range(len(path.split(".")))] if path else []
        if any(len(below[parent]) == 1 and _is_called(modules[parent]) for parent in parents):
            continue
        above = next((parent for parent in parents if parent in own), None)
        if above is not None:
            raise ExecutionError(
                f"the plan places both {above or '.'!r} and {path!r} inside it, on different devices; tune again"
            )
        if len(below[path]) == 1 and _is_called(modules[path]):
            yield Target(path, modules[path], {0: next(iter(below[path]))})
        elif path in own and not any(other != path and _inside(other, path) for other in own):
            yield Target(path, modules[path], own[path])


def _is_called(module: torch.nn.Module) -> bool:
    """Return whether a module can be called; a `ModuleList` only holds others, which are."""
    return type(module).forward is not torch.nn.Module.forward


def _inside(path: str, parent: str) -> bool:
    return not parent or path.startswith(parent + ".")


def _refuse_conflicts(targets: list[Target]) -> None:
    seen: dict[int, Target] = {}
    for target in targets:
        other = seen.setdefault(id(target.module), target)
        if other.calls != target.calls:
            raise ExecutionError(
                f"{other.path!r} and {target.path!r} are one module, and the plan places them on different devices"
            )


@dataclass
class _Route:
    targets: Mapping[int, Target]
    dispatch: Dispatch
    counts: dict[int, int]


class _Local(threading.local):
    route: _Route | None = None


_local = _Local()
_lock = threading.Lock()


class Gate:
    """Stands in for a module's `forward` while executors use the module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.original: Callable[..., Any] = module.forward
        self.in_instance = "forward" in vars(module)
        self.users = 0
        self._key = id(module)
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Send the call where the calling thread's route says, or run it here."""
        if compiling_here():  # whoever traces the model must not see the gate
            return self.original(*args, **kwargs)
        route = _local.route
        target = None if route is None else route.targets.get(self._key)
        if route is None or target is None:
            return self.original(*args, **kwargs)
        number = route.counts.get(self._key, 0)
        route.counts[self._key] = number + 1
        return route.dispatch(target.device(number), target.module, self.original, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> Any:
        return _same, (self.original,)


def _same(value: Any) -> Any:
    return value


def install(module: torch.nn.Module) -> None:
    """Put a gate before a module's `forward`, or count one more user of the gate that is there."""
    with _lock:
        gate = vars(module).get("forward")
        if not isinstance(gate, Gate):
            gate = vars(module)["forward"] = Gate(module)
        gate.users += 1


def remove(module: torch.nn.Module) -> None:
    """Count one user less, and give the module its own `forward` back after the last."""
    with _lock:
        gate = vars(module).get("forward")
        if not isinstance(gate, Gate):
            return
        gate.users -= 1
        if gate.users > 0:
            return
        if gate.in_instance:
            vars(module)["forward"] = gate.original
        else:
            del vars(module)["forward"]


@contextmanager
def routed(targets: Mapping[int, Target], dispatch: Dispatch) -> Iterator[None]:
    """Send the calling thread's calls of the targets (by module id) through `dispatch`."""
    before = _local.route
    _local.route = _Route(targets, dispatch, {})
    try:
        yield
    finally:
        _local.route = before
