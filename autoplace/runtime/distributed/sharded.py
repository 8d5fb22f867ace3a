"""Data parallel where parameters have one owner each, who alone gets the gradient: half of the traffic goes elsewhere.

A sum of gradients that all ranks need has to be through before the optimizer's step, and can hide behind the backward
alone. Here the ranks send their part of a gradient to the parameter's owner during the backward, the caller's
optimizer updates it there (the others have no gradient, so it passes them by), and the owner sends the new values out
while the next forward runs: as many bytes, hidden behind twice as many passes. Each rank keeps the optimizer's state
of its own parameters alone. The idea is that of ZeRO, stage 2 [S. Rajbhandari et al., "ZeRO: memory optimizations
toward training trillion parameter models", SC 2020].

    backward   bucket by bucket, as they fill:  each rank --- its part, weighted by b/B ---> the owner, who sums
    step       the optimizer, where there is a gradient
    forward    bucket by bucket, in the order of use:  the owner --- new values ---> each rank

Where a forward is too short to hide its half, a part of the parameters (`part`), those that the forward uses first, is
enough: the gradients of the others, which the backward finds first, are summed for all ranks.

1. Buckets hold neighbours in the order of registration, have one owner each, and the owners take turns, so that both
   directions of a link carry something all the time. The last ones registered go first in the backward.
2. A parameter that has not come yet is waited for when it is first used: every call of PyTorch's that it is handed to
   is seen by → `_Arrivals`, and every module's call waits for the module's own. What PyTorch cannot look into, compiled
   and scripted modules, waits for all of them at the start.
3. The loss is weighted, not the gradient, so what is accumulated (`accumulate=True`) needs no other care.
4. It sends from rank to rank, by gloo: processors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from autoplace.errors import ExecutionError
from autoplace.runtime.fitness import is_compiled

from .gradients import flatten, spread
from .session import Session

__all__ = ["ShardedDataParallel"]

_PLAIN_FACTS = frozenset({"device", "dtype", "grad", "is_leaf", "is_meta", "layout", "ndim", "requires_grad", "shape"})
"""Attributes of a parameter that do not depend on its values."""


@dataclass(eq=False)
class _Bucket:
    """Parameters of one owner, or of all, and of one type, which travel together."""

    number: int
    """Tells its messages from others': twice it for gradients, one more for values."""
    owner: int | None
    """Rank; None where all ranks get the gradients."""
    parameters: list[torch.nn.Parameter]
    missing: set[torch.nn.Parameter] = field(default_factory=set)
    """Those whose gradients this backward has not brought yet."""
    own: torch.Tensor | None = None
    """This rank's part of the gradients."""
    parts: list[tuple[torch.Tensor, dist.Work]] = field(default_factory=list)
    """At the owner: the other ranks' parts, by rank, on their way. Without one: the sum."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return sum(p.numel() for p in self.parameters)


class ShardedDataParallel:
    """The whole model on every rank of a group, each with its own part of the batch and of the gradients.

    Args:
        model: The model, of processors.
        session: The group of all ranks.
        ranks: Those that take part. Where this one is not among them, the object knows who owns what, and no more.
        group: Their process group.
        part: Of the parameters' bytes, that have owners; above 0.
        bucket_bytes: Of a bucket.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        session: Session,
        ranks: Sequence[int],
        group: dist.ProcessGroup | None,
        *,
        part: float,
        bucket_bytes: float,
    ) -> None:
        self._model, self._rank, self._ranks, self._group = model, session.rank, tuple(ranks), group
        self._part, self._bucket_bytes = part, bucket_bytes
        self._buckets: list[_Bucket] = []
        """In the order of the backward."""
        self._bucket_of: dict[torch.nn.Parameter, _Bucket] = {}
        self._behind = False
        """Whether owners may have newer values than the others."""
        self._local = False
        """Whether gradients of all ranks were accumulated on this one alone."""
        self._sending: list[tuple[torch.Tensor, dist.Work]] = []
        self.began = False
        """Whether a step ran: from then on the optimizer's state is where the owners are."""
        self.arrange()

    def arrange(self) -> None:
        """Give an owner to parameters that have none and want gradients; all ranks of the session do so alike."""
        fresh = [p for p in reversed(list(self._model.parameters())) if p.requires_grad and p not in self._bucket_of]
        everybodys = (1.0 - self._part) * sum(p.nbytes for p in fresh)
        loads = dict.fromkeys(self._ranks, 0)
        for bucket in self._buckets:
            if bucket.owner is not None:
                loads[bucket.owner] += sum(p.nbytes for p in bucket.parameters)
        size = passed = 0
        for i, parameter in enumerate(fresh):
            owned = passed + 0.5 * parameter.nbytes >= everybodys
            last = self._buckets[-1] if i else None
            if (
                last is None
                or size + parameter.nbytes > self._bucket_bytes
                or parameter.dtype != last.parameters[0].dtype
                or owned is (last.owner is None)
            ):
                size = 0
                owner = min(self._ranks, key=lambda rank: (loads[rank], rank)) if owned else None
                last = _Bucket(number=len(self._buckets), owner=owner, parameters=[])
                self._buckets.append(last)
            last.parameters.append(parameter)
            self._bucket_of[parameter] = last
            size += parameter.nbytes
            passed += parameter.nbytes
            if last.owner is not None:
                loads[last.owner] += parameter.nbytes

    def owner(self, parameter: torch.nn.Parameter) -> int | None:
        """Return the rank that has a parameter's gradient and its newest values; None where all have it."""
        bucket = self._bucket_of.get(parameter)
        return None if bucket is None else bucket.owner

    def caught_up(self) -> None:
        """Say that all ranks have the owners' values."""
        self._behind = False

    def step(self, call: Callable[[], torch.Tensor], weight: float, *, accumulate: bool = False) -> torch.Tensor:
        """Run forward and backward of this rank's samples.

        Args:
            call: Runs the model and returns the mean loss of the samples.
            weight: This rank's part of the batch.
            accumulate: Whether gradients stay on this rank until a step without it.

        Returns:
            The loss, detached.

        Raises:
            ExecutionError: If a parameter's gradient comes in several parts.
        """
        self.began = True
        if not self._local and self._rank != self._ranks[0]:
            # All ranks have the sum of earlier steps, and one of them puts it into the next.
            for parameter, bucket in self._bucket_of.items():
                if bucket.owner is None:
                    parameter.grad = None
        self._local = accumulate
        loss = self._pulling(call) if self._behind else call()
        if accumulate:
            (loss * weight).backward()
            return loss.detach()
        with self._pushing():
            (loss * weight).backward()
        self._collect()
        self._behind = True
        return loss.detach()

    # -- values, in the forward ------------------------------------------------------------------------------------

    def _pulling(self, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return a loss that was computed while the owners' values came in."""
        arrivals = _Arrivals()
        with torch.no_grad():
            for bucket in reversed(self._buckets):
                tag = 2 * bucket.number + 1
                if bucket.owner is None:
                    continue
                if bucket.owner == self._rank:
                    flat = torch.cat([p.reshape(-1) for p in bucket.parameters])
                    self._sending += [(flat, self._sent(flat, rank, tag)) for rank in self._others]
                else:
                    flat = torch.empty(bucket.numel, dtype=bucket.parameters[0].dtype)
                    arrivals.expect(bucket.parameters, flat, self._expected(flat, bucket.owner, tag))
        if _opaque(self._model):
            arrivals.finish()
        try:
            with arrivals.watching():
                return call()
        finally:  # where the model raises on all ranks, a step may follow
            arrivals.finish()
            self._behind = False

    # -- gradients, in the backward --------------------------------------------------------------------------------

    @contextmanager
    def _pushing(self) -> Iterator[None]:
        """Send every bucket of gradients to its owner as soon as it and those before it are full."""
        for bucket in self._buckets:
            bucket.missing = {p for p in bucket.parameters if p.requires_grad}
            bucket.parts.clear()
            if bucket.owner == self._rank:
                first = bucket.parameters[0]
                for rank in self._others:
                    part = torch.empty(bucket.numel + len(bucket.parameters), dtype=first.dtype)
                    bucket.parts.append((part, self._expected(part, rank, 2 * bucket.number)))
        waiting = iter(self._buckets)
        head = next(waiting, None)

        def filled(parameter: torch.nn.Parameter) -> None:
            nonlocal head
            missing = self._bucket_of[parameter].missing
            if parameter not in missing:
                raise ExecutionError(
                    "a parameter got its gradient in several parts, which a sharded plan cannot send early; "
                    "use checkpoint(..., use_reentrant=False), or tune again"
                )
            missing.remove(parameter)
            while head is not None and not head.missing:
                self._push(head)
                head = next(waiting, None)

        hooks = [p.register_post_accumulate_grad_hook(filled) for p in self._bucket_of if p.requires_grad]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        while head is not None:  # had unused parameters in it, or before it
            self._push(head)
            head = next(waiting, None)

    def _push(self, bucket: _Bucket) -> None:
        bucket.own = flatten(bucket.parameters)
        if bucket.owner is None:
            work = dist.all_reduce(bucket.own, group=self._group, async_op=True)
            assert work is not None  # this rank is in the group
            bucket.parts.append((bucket.own, work))
        elif bucket.owner != self._rank:
            self._sending.append((bucket.own, self._sent(bucket.own, bucket.owner, 2 * bucket.number)))

    def _collect(self) -> None:
        """Sum at the owners, and leave the gradients there alone; what has none is summed already."""
        for bucket in self._buckets:
            assert bucket.own is not None  # was pushed
            if bucket.owner in (self._rank, None):
                for part, work in bucket.parts:
                    work.wait()
                    if part is not bucket.own:
                        bucket.own += part
                spread(bucket.parameters, bucket.own)
            else:
                for parameter in bucket.parameters:
                    parameter.grad = None
            bucket.own = None
            bucket.parts.clear()
        for _, work in self._sending:
            work.wait()
        self._sending.clear()

    # -- messages --------------------------------------------------------------------------------------------------

    @property
    def _others(self) -> list[int]:
        return [rank for rank in self._ranks if rank != self._rank]

    def _sent(self, flat: torch.Tensor, rank: int, tag: int) -> dist.Work:
        work = dist.isend(flat, rank, group=self._group, tag=tag)
        assert work is not None  # this rank is in the group
        return work

    def _expected(self, flat: torch.Tensor, rank: int, tag: int) -> dist.Work:
        work = dist.irecv(flat, rank, group=self._group, tag=tag)
        assert work is not None  # this rank is in the group
        return work


class _Arrivals(TorchFunctionMode):
    """Values on their way to their parameters, which wait for them when they are used."""

    def __init__(self) -> None:
        super().__init__()
        self._coming: dict[int, tuple[Sequence[torch.nn.Parameter], torch.Tensor, dist.Work]] = {}
        """By the identity of each parameter."""

    def expect(self, parameters: Sequence[torch.nn.Parameter], flat: torch.Tensor, work: dist.Work) -> None:
        """Let parameters wait for their values."""
        self._coming.update((id(p), (parameters, flat, work)) for p in parameters)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Let what is used wait for its values."""
        if not self._coming:
            yield
            return
        hook = register_module_forward_pre_hook(lambda module, _: self._used(module._parameters.values()))
        try:
            with self:
                yield
        finally:
            hook.remove()

    def finish(self) -> None:
        """Wait for all that has not come."""
        while self._coming:
            self._take(next(iter(self._coming.values())))

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run a function once the parameters that it takes are there."""
        if self._coming and getattr(getattr(func, "__self__", None), "__name__", "") not in _PLAIN_FACTS:
            self._used(args)
            if kwargs:
                self._used(kwargs.values())
        return func(*args, **(kwargs or {}))

    def _used(self, values: Any) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                found = self._coming.get(id(value))
                if found is not None:
                    self._take(found)
            elif isinstance(value, (list, tuple)):
                self._used(value)

    def _take(self, coming: tuple[Sequence[torch.nn.Parameter], torch.Tensor, dist.Work]) -> None:
        parameters, flat, work = coming
        for parameter in parameters:
            del self._coming[id(parameter)]
        work.wait()
        with torch.no_grad():
            pieces = flat.split([p.numel() for p in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.copy_(piece.view(parameter.shape))


def _opaque(model: torch.nn.Module) -> bool:
    """Return whether some module's use of parameters cannot be seen from Python."""
    return any(isinstance(m, torch.jit.ScriptModule) or is_compiled(m) for m in model.modules())
