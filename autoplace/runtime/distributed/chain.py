"""`chain_of`: the stages of a split program in one line, as a pipeline of ranks wants them.

The split is a graph of pieces (→ `graph.split`). A pipeline hands values from each stage to the next alone, so pieces
are put in an order in which the device changes as seldom as can be found, runs of one device become one stage, and a
value that jumps stages (a skip connection) is carried along by those in between. Inputs of the model and numbers that
follow from their sizes are on every rank and are never sent; weights are each rank's own.

Knows nothing of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoplace.errors import ExecutionError
from autoplace.graph.split import Split, Stage

__all__ = ["ChainStage", "chain_of"]


@dataclass(frozen=True, kw_only=True)
class ChainStage:
    """What one stage of the pipeline runs, takes and gives."""

    device: str
    pieces: tuple[Stage, ...]
    """In the order in which they run."""
    takes: tuple[str, ...]
    """Names of the values that the stage before hands over."""
    gives: tuple[str, ...]
    """Names of the values that it hands to the next; nothing for the last."""


def chain_of(program: Split) -> tuple[ChainStage, ...]:
    """Return the program's pieces as a pipeline.

    Raises:
        ExecutionError: If a value that stages would have to hand over is no tensor.
    """
    devices = list(dict.fromkeys(piece.device for piece in program.stages))
    runs = min((_runs(program.stages, first) for first in devices), key=len)
    made = {name: i for i, run in enumerate(runs) for piece in run for name in piece.outputs}
    last_use = dict.fromkeys(made, -1)
    for i, run in enumerate(runs):
        for piece in run:
            last_use.update((name, i) for name in piece.inputs if name in made)
    last_use.update((name, len(runs) - 1) for name in program.outputs if isinstance(name, str) and name in made)
    between = [tuple(name for name in made if made[name] < i <= last_use[name]) for i in range(len(runs) + 1)]
    return tuple(
        ChainStage(device=run[0].device, pieces=tuple(run), takes=between[i], gives=between[i + 1])
        for i, run in enumerate(runs)
    )


def _runs(pieces: Sequence[Stage], first: str) -> list[list[Stage]]:
    """Return the pieces as runs of one device each, beginning with a device: a run ends when nothing there is ready."""
    left = dict(enumerate(pieces))
    done: set[int] = set()
    runs: list[list[Stage]] = []
    device = first
    while left:
        run: list[Stage] = []
        while True:
            ready = next((i for i, p in left.items() if p.device == device and done.issuperset(p.before)), None)
            if ready is None:
                break
            run.append(left.pop(ready))
            done.add(ready)
        if run:
            runs.append(run)
        if left:
            waiting = [(i, p) for i, p in left.items() if done.issuperset(p.before)]
            if not waiting:
                raise ExecutionError("the stages of this plan wait for each other in a circle; tune again")
            others = [p.device for _, p in waiting if p.device != device] or [waiting[0][1].device]
            device = max(dict.fromkeys(others), key=lambda d: _reach(left, done, d))
    return runs


def _reach(left: dict[int, Stage], done: set[int], device: str) -> int:
    """Return how many pieces could run on a device without leaving it."""
    have, count = set(done), 0
    for i, piece in left.items():  # in a topological order
        if piece.device == device and have.issuperset(piece.before):
            have.add(i)
            count += 1
    return count
