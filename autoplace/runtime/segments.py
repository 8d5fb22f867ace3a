"""Autograd across threads: stretches of the graph that run, forward and backward, in a thread of their own.

A `Segment` is what one thread computed with gradients on, from detached inputs: leaves, outputs and the graph between
them. `join` hangs the segments of one call into the caller's graph as a single node whose backward runs every segment's
backward in its own thread, all at once, and adds up what the parts give to a parameter in the parts' order.

1. A segment's backward is `torch.autograd.grad` on the original Parameter objects. It fires their tensor hooks, which
   belong to the summed gradient; they are held back until the sum arrives (`_quiet`).
2. It runs with the engine's device threads off, so that a GPU's backward stays in the segment's thread. Otherwise the
   engine's GPU thread would wait in our node for a result that only it can compute.
3. Inputs are aliased with their own version counter: a module may modify its input in place (`ReLU(inplace=True)`), and
   the caller's tensor is then rebased on the node as plain PyTorch would.
4. Gradients of gradients are refused with a sentence. Tensors that are neither inputs of the call nor parameters of the
   module (a tensor attribute that requires a gradient) get none; `measure.check` sees no such tensor either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from autoplace.errors import ExecutionError

from .streams import record_streams
from .turns import take_turn
from .worker import Ledger, TaskThread

__all__ = ["Join", "Segment", "alias", "join", "wait_all"]

Grads = list[torch.Tensor | None]


class _Alias(torch.autograd.Function):
    """Identity whose result may be modified in place although its input is a leaf."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor) -> torch.Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def alias(tensor: torch.Tensor, rows: tuple[int, int] | None = None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Cut a tensor off its graph, sharing its memory.

    Args:
        tensor: Any tensor.
        rows: (start, length) along dimension 0, or None for all of it.

    Returns:
        The leaf to ask for a gradient (None when the tensor requires none) and the tensor to compute with.
    """
    own = tensor.data if rows is None else tensor.data.narrow(0, *rows)
    if not tensor.requires_grad:
        return None, own
    leaf = own.requires_grad_()
    return leaf, _Alias.apply(leaf)


@dataclass
class Segment:
    """What one thread computed with gradients on."""

    thread: TaskThread
    ledger: Ledger | None
    leaves: Grads
    """One per source tensor of the call: the leaf that stands for it, or None when it requires no gradient."""
    parameters: list[torch.Tensor]
    """One leaf per source parameter of the call; the parameter itself, or its stand-in on another device."""
    outputs: Grads
    """One per joined output: the part's tensor, or None when it has no graph."""
    label: str = ""
    """What was computed, for timelines."""
    turn: Callable[[], AbstractContextManager[None]] = nullcontext
    """Entered around the backward, where parts take turns on devices."""
    guard: Callable[[], AbstractContextManager[None]] = nullcontext
    """Of a call's first segment: entered around all segments' backward and the summing up of what they give."""

    def backward(self, grads: Grads, keep: bool) -> Grads:
        """Return the gradients of `leaves` and `parameters`, in the segment's thread."""
        pairs = [(o, g) for o, g in zip(self.outputs, grads, strict=True) if o is not None and g is not None]
        targets = [leaf for leaf in (*self.leaves, *self.parameters) if leaf is not None]
        if not pairs or not targets:
            return [None] * (len(self.leaves) + len(self.parameters))
        outputs, given = zip(*pairs, strict=True)
        record_streams(given)
        with self.turn(), torch.autograd.set_multithreading_enabled(False):
            found = iter(torch.autograd.grad(outputs, targets, given, retain_graph=keep, allow_unused=True))
        return [None if leaf is None else next(found) for leaf in (*self.leaves, *self.parameters)]


@dataclass
class Join:
    """How the segments of one call become one node of the caller's graph."""

    sources: list[torch.Tensor]
    """The call's tensors, as the caller passed them; every segment's `leaves` match them. Emptied by `join`."""
    parameters: Sequence[torch.Tensor]
    """The parameters that require gradients; every segment's `parameters` match them."""
    segments: list[Segment] | None
    """None once the backward has freed them."""
    sizes: Sequence[int] = (1,)
    """Samples of every part."""
    split: Sequence[bool] = ()
    """Per source, whether the parts got slices along dimension 0; empty = none."""
    cat: Sequence[bool] = ()
    """Per output, whether it was joined along dimension 0 (else averaged); empty = one part."""
    dirty: list[int] = field(default_factory=list)
    """Positions of the sources that the one part modified in place."""
    blanks: list[torch.Tensor] = field(init=False)
    """One tensor of no elements per source: its device, type and shape but for the first dimension."""

    def __post_init__(self) -> None:
        self.blanks = [s.new_empty((0, *s.shape[1:])) for s in self.sources]

    def part_grads(self, grads: Sequence[torch.Tensor | None], part: int) -> Grads:
        """Return a part's share of the outputs' gradients."""
        if not self.cat:
            return list(grads)
        start, size, total = sum(self.sizes[:part]), self.sizes[part], sum(self.sizes)

        def share(g: torch.Tensor, cat: bool) -> torch.Tensor:
            if not cat:
                return g * (size / total)
            rows = g.shape[0] // total  # a sample may have several
            return g.narrow(0, start * rows, size * rows)

        return [None if g is None else share(g, cat) for g, cat in zip(grads, self.cat, strict=True)]

    def merge(self, parts: Sequence[Grads]) -> Grads:
        """Return the gradients of sources and parameters from those of the parts."""
        merged: Grads = []
        count = len(self.blanks)
        for i, grads in enumerate(zip(*parts, strict=True)):
            sliced = bool(self.split) and i < count and self.split[i]
            source = self.blanks[i] if i < count else self.parameters[i - count]
            merged.append(_stack(grads, source, self.sizes) if sliced else _sum(grads, source.device))
        return merged


def _stack(grads: Sequence[torch.Tensor | None], source: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor | None:
    if all(g is None for g in grads):
        return None
    blanks = [source.new_zeros((size, *source.shape[1:])) for size in sizes]
    return torch.cat([blank if g is None else g for g, blank in zip(grads, blanks, strict=True)])


def _sum(grads: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor | None:
    """Add up in order; only what this function allocated is added to in place."""
    given = [g if g.device == device else g.to(device) for g in grads if g is not None]
    if len(given) < 2:
        return given[0] if given else None
    total = given[0] + given[1]
    for g in given[2:]:
        total = total.add_(g) if total.layout == g.layout == torch.strided else total + g
    return total


@contextmanager
def _quiet(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Hold back the parameters' tensor hooks."""
    held = [(hooks, dict(hooks)) for p in parameters if (hooks := p._backward_hooks)]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, entries in held:
            hooks.update(entries)


def _keeps_graph() -> bool:
    """Return whether the running backward was asked to retain its graph."""
    ask: Callable[[], bool] | None = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask() if ask is not None else False


class _Node(torch.autograd.Function):
    """The one node that stands for all segments of a call."""

    @staticmethod
    def forward(ctx: Any, plan: Join, outputs: list[torch.Tensor], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        dirty = [tensors[i] for i in plan.dirty]
        ctx.mark_dirty(*dirty)
        return (*outputs, *dirty)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        plan: Join = ctx.plan
        if torch.is_grad_enabled():
            raise ExecutionError(
                "gradients of gradients (create_graph=True) do not pass a plan; call the plain model for them"
            )
        if plan.segments is None:
            raise ExecutionError(
                "this output's graph was freed by an earlier backward; pass retain_graph=True to the first one"
            )
        keep = _keeps_graph()
        with plan.segments[0].guard(), _quiet(plan.parameters):
            futures = [
                _send(segment, partial(segment.backward, plan.part_grads(grads, i), keep))
                for i, segment in enumerate(plan.segments)
            ]
            merged = plan.merge(wait_all(futures))
        if not keep:
            plan.segments = None
        record_streams(merged)
        return None, None, *merged


def _send(segment: Segment, task: Callable[[], Grads]) -> Future[Grads]:
    """Give a task to the segment's thread; run it here when its executor was closed before the backward."""
    take_turn(segment.thread.name)
    try:
        return segment.thread.submit(task, segment.ledger, f"{segment.label} backward")
    except ExecutionError:
        done: Future[Grads] = Future()
        done.set_result(task())
        return done


def wait_all(futures: Sequence[Future]) -> list[Any]:
    """Return all results in order; when some raised, wait for the rest and raise the first one's exception."""
    results: list[Any] = []
    first: Exception | None = None
    for future in futures:
        try:
            results.append(TaskThread.wait(future))
        except Exception as error:
            first = first or error
    if first is not None:
        try:
            raise first
        finally:
            first = None  # the traceback refers to this frame; do not close the circle
    return results


def join(plan: Join, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Hang the segments into the caller's graph.

    Args:
        plan: The call's segments, sources and parameters.
        outputs: The joined values that have a gradient, without graph.

    Returns:
        The same values, with one node as their history; a source in `plan.dirty` gets that node as its history too.
    """
    sources, plan.sources = plan.sources, []  # a source modified in place refers to the node: keep no circle
    joined = _Node.apply(plan, outputs, *sources, *plan.parameters)
    return list(joined[: len(outputs)])
