"""Which group runs when: hooks on the cut modules of a grouping, during real passes of the model.

The rules are those of `graph.coarsen`: what runs between two cut modules (glue) belongs to the group before it, what
runs before the first to the first; consecutive calls of a module are one run, and its k-th further run is group "#k".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from autoplace.graph.coarsen import group_modules

__all__ = ["Call", "GroupIndex", "Stretch", "captured_calls", "marked_runs"]


class GroupIndex:
    """From runs of modules to groups.

    Args:
        names: Group names, as `coarsen` gives them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.count = len(names)
        self.groups: dict[str, list[int]] = {}
        """Module path to the groups that hold its runs, in order."""
        for group, name in enumerate(names):
            for path in group_modules(name):
                self.groups.setdefault(path, []).append(group)

    def modules(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
        """Yield the cut modules with their paths; paths that the model lacks are left out."""
        known = dict(model.named_modules(remove_duplicate=False))
        for path in self.groups:
            if path in known:
                yield path, known[path]

    def assign(self, paths: Sequence[str]) -> list[int]:
        """Return the group of every entry of a sequence of module paths, one entry per stretch of execution."""
        runs: dict[str, int] = {}
        groups = []
        for path, stretch in itertools.groupby(paths):
            number = runs.get(path, 0)
            runs[path] = number + 1
            choices = self.groups[path]
            groups += [choices[min(number, len(choices) - 1)]] * len(list(stretch))
        return groups


class Stretch(NamedTuple):
    """The beginning of a stretch of execution."""

    path: str
    """The cut module whose group it belongs to."""
    glue: bool
    """Whether it is code after that module rather than inside it."""
    mark: Any
    """When it began, as the timer says it."""


@contextmanager
def marked_runs(model: torch.nn.Module, index: GroupIndex, mark: Callable[[], Any]) -> Iterator[list[Stretch]]:
    """Collect the beginnings of stretches of execution, in order, while the context is open."""
    found: list[Stretch] = []
    stack: list[str] = []

    def enter(path: str) -> None:
        stack.append(path)
        found.append(Stretch(path, False, mark()))

    def leave() -> None:
        left = stack.pop()
        # a module that two parents share may run inside another cut module
        found.append(Stretch(stack[-1], False, mark()) if stack else Stretch(left, True, mark()))

    handles = []
    for path, module in index.modules(model):
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: enter(path), prepend=True))
        handles.append(module.register_forward_hook(lambda *_: leave(), always_call=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Call:
    """One call of a cut module, ready to be made again."""

    path: str
    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def captured_calls(model: torch.nn.Module, index: GroupIndex) -> Iterator[list[Call]]:
    """Collect the outermost calls of cut modules with their inputs, detached, while the context is open."""
    found: list[Call] = []
    depth = [0]

    def enter(path: str, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if depth[0] == 0:
            args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
            found.append(Call(path, module, args, kwargs))
        depth[0] += 1

    def leave() -> None:
        depth[0] -= 1

    handles = []
    for path, module in index.modules(model):
        handles.append(
            module.register_forward_pre_hook(
                lambda module, args, kwargs, path=path: enter(path, module, args, kwargs), with_kwargs=True
            )
        )
        handles.append(module.register_forward_hook(lambda *_: leave(), always_call=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
