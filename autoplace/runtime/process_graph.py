"""The graphs of one pass over several processes, as the segments that `segments` hangs into the caller's graph.

The caller's own share has a graph here, and every other process keeps one, of which the caller holds the number.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .process_link import WorkerProcess
from .process_worker import Backward, intra_op_threads
from .segments import Grads, Segment
from .shipping import load
from .tree import Tree
from .worker import Ledger

__all__ = ["Here", "Later", "Outputs", "OwnSegment", "RemoteSegment", "There"]

_MOST_KNOWN = 64
"""Structures that are kept."""


class Outputs:
    """Outputs that came from another process, taken apart; the structure of an earlier one is not read anew."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[Tree, list[int | None]]] = {}
        """Structure to an output and, per leaf, the number of the tensor that it is."""

    def tree(self, structure: bytes, tensors: list[torch.Tensor]) -> Tree:
        """Return the output of a structure with these tensors.

        Args:
            structure: From `shipping.dump`.
            tensors: Its tensors, by number.
        """
        known = self._known.get(structure)
        if known is not None:
            tree, numbers = copy.copy(known[0]), known[1]
            leaves = zip(tree.leaves, numbers, strict=True)
            tree.leaves = [leaf if number is None else tensors[number] for leaf, number in leaves]
            return tree
        tree = Tree(load(structure, tensors), objects=True)
        places = {id(tensor): i for i, tensor in enumerate(tensors)}
        found = [places.get(id(leaf)) for leaf in tree.leaves]
        if set(found) >= set(range(len(tensors))):  # none is hidden inside a leaf
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            pattern = copy.copy(tree)
            pattern.leaves = [leaf if number is None else None for leaf, number in zip(tree.leaves, found, strict=True)]
            self._known[structure] = (pattern, found)
        return tree


class Later:
    """A future whose work is done when its result is asked for."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result = work


class Here:
    """Stands where segments have a thread: runs tasks in the caller's, when their result is asked for.

    Args:
        name: The device.
        threads: Intra-op threads.
    """

    def __init__(self, name: str, threads: int) -> None:
        self.name, self._threads = name, threads

    def submit(self, task: Callable[[], Any], ledger: Ledger, label: str) -> Later:
        """Return a future of the task."""
        return Later(partial(self._run, task, ledger, label))

    def _run(self, task: Callable[[], Any], ledger: Ledger, label: str) -> Any:
        start_s = time.perf_counter()
        try:
            with intra_op_threads(self._threads):
                return task()
        finally:
            ledger.add_task(self.name, label, start_s, time.perf_counter())


class There:
    """Stands where segments have a thread: tasks that send something and return the future of the answer."""

    def __init__(self, name: str) -> None:
        self.name = name

    def submit(self, task: Callable[[], Any], ledger: Ledger, label: str) -> Any:
        """Run the task at once."""
        return task()


@dataclass
class OwnSegment(Segment):
    """The graph of the replica that runs here."""

    known: list[bool] = field(default_factory=list)
    """Which gradients some replica has given so far in the running backward; one list for all segments of a pass."""

    def backward(self, grads: Grads, keep: bool) -> Grads:
        """Return the gradients of `leaves` and `parameters`."""
        found = super().backward(grads, keep)
        self.known[:] = [grad is not None for grad in found]
        return found


@dataclass(kw_only=True)
class RemoteSegment(Segment):
    """The caller's end of a graph in another process."""

    process: WorkerProcess
    number: int
    """Number of the pass there."""
    views: dict[int, int]
    """Identity of the tensor that stands for an output here to that output's number there."""
    extras: slice
    """Which of the answer's gradients are of tensors that are no sources of the call."""
    known: list[bool]

    def backward(self, grads: Grads, keep: bool) -> Any:  # a future, as `There` wants it
        """Start the backward there and return a future of the gradients, which lie in shared memory."""
        pairs = [
            (self.views[id(o)], g) for o, g in zip(self.outputs, grads, strict=True) if o is not None and g is not None
        ]
        if not pairs:
            return Later(lambda: [None] * len(self.known))
        places = self.process.inputs.pack([grad for _, grad in pairs])
        self.process.ask(Backward(0, [], self.number, keep, [number for number, _ in pairs], places))
        return Later(self._take)

    def _take(self) -> Grads:
        answer = self.process.take()
        if self.ledger is not None:
            self.ledger.add_task(self.process.device, f"{self.label} backward", *answer.span)
        places = list(answer.tensors)
        del places[self.extras]
        found: Grads = []
        for i, place in enumerate(places):
            grad = None if place is None else self.process.outputs.look(place)
            # The sum of several is new; one alone would stay in the slab.
            found.append(grad if grad is None or self.known[i] else grad.clone())
            self.known[i] = self.known[i] or grad is not None
        return found
