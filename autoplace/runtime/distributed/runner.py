"""`DistributedModel`: a model under a plan on the ranks of a session, whatever the plan's shape.

    single      one rank runs the model, the others wait for the loss
    replicas    weighted data parallel                                  → `data_parallel`, where sharded `sharded`
    stages      a pipeline                                              → `pipeline`
    hybrid      pipelines, the gradients of their copies summed         → `pipeline`, `gradients`

Parameters are updated where they are held: the user's optimizer does that on every rank, for the parameters that have
a gradient there. Those of other ranks grow stale, and `synchronize` brings them up to date from their holders;
`state_dict` of the model does so first (so all ranks have to call it).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from autoplace.errors import ExecutionError
from autoplace.hardware.buckets import bucket_bytes_of
from autoplace.measure.memory import HeapLine
from autoplace.plan import Plan
from autoplace.runtime.batch import batch_size
from autoplace.runtime.fitness import unfit
from autoplace.runtime.stage_program import Exports
from autoplace.workload import inputs_of, loss_of

from .data_parallel import WeightedDataParallel
from .gradients import SharedGradients
from .lookout import Lookout
from .pipeline import Loss, Pipeline
from .sampler import at_least_one
from .session import Session
from .sharded import ShardedDataParallel

__all__ = ["DistributedModel", "part_of"]


def part_of(values: Any, sizes: Sequence[int], part: int | None) -> Any:
    """Return one part's rows of everything that has the batch's size.

    Args:
        values: Of any nesting.
        sizes: Samples of every part, which make up the batch.
        part: Which one; None, or a part without a sample, gets the batch's first sample.
    """
    total = sum(sizes)
    start = 0 if part is None else sum(sizes[:part])
    rows = slice(0, 1) if part is None or not sizes[part] else slice(start, start + sizes[part])

    def cut(value: Any) -> Any:
        return value[rows] if isinstance(value, torch.Tensor) and value.dim() and len(value) == total else value

    return pytree.tree_map(cut, values)


class DistributedModel:
    """Runs the calls and training steps of one rank.

    Args:
        model: The model; the same on every rank.
        plan: The plan; the same on every rank.
        session: The group.
        loss: Output to scalar loss for `train_step`; None takes the output's `loss`, else a mean square.
        batch_norm: `local` lets replicas compute batch statistics of their own parts, as DistributedDataParallel does;
            `whole` refuses such plans.
        lookout: Watches the other ranks; None = nobody does.
        exports: What other plans of this model have exported, and this one may; see `ProgramCache`.

    Raises:
        ExecutionError: If the ranks have different plans or models, or the plan cannot run the model.
        ClusterFileError: If no process runs one of the plan's devices.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        plan: Plan,
        session: Session,
        *,
        loss: Loss | None = None,
        batch_norm: str = "whole",
        lookout: Lookout | None = None,
        exports: Exports | None = None,
    ) -> None:
        self.model, self.plan, self.session, self._loss = model, plan, session, loss
        self._batch_norm, self._lookout = batch_norm, lookout
        shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.state_dict(keep_vars=True).items()]
        session.agree(
            {"plan": _digest(plan.to_json()), "model": _digest(shapes)},
            what="the ranks do not run the same plan and model",
        )
        names = [list(r.devices) for r in plan.replicas] or [[session.members[0]]]
        self.ranks = [tuple(sorted({session.rank_of(name) for name in devices})) for devices in names]
        """Ranks of every replica."""
        self._shares = [r.share for r in plan.replicas] or [1.0]
        self.replica = next((i for i, ranks in enumerate(self.ranks) if session.rank in ranks), None)
        """The replica that this rank is part of; None where it takes no part."""
        self._groups = [session.group(ranks) for ranks in self.ranks]
        self._world = session.group(tuple(range(session.world_size)))
        working = tuple(sorted(rank for ranks in self.ranks for rank in ranks))
        together = session.group(working)
        self._pipeline: Pipeline | None = None
        self._parallel: WeightedDataParallel | None = None
        self._sharded: ShardedDataParallel | None = None
        self._shared: SharedGradients | None = None
        self._known: set[Any] = set()
        self._holders: dict[str, list[int]] = {}
        self._stale = self._pending = False
        self._accumulating = False
        self._parameters = dict(model.named_parameters())
        session.settle(self._refusal())
        self._working, self._together = working, together
        if plan.sharded:
            self._sharded = ShardedDataParallel(
                model, session, working, together, part=plan.sharded, bucket_bytes=self._bucket_bytes(sharded=True)
            )
        if plan.shape == "replicas" and self.replica is not None:
            if not plan.sharded:
                self._parallel = self._weighted()
            if lookout is not None:
                lookout.role = f"replica {self.replica} of {len(self.ranks)}"
        elif plan.shape in ("stages", "hybrid") and self.replica is not None:
            self._pipeline = Pipeline(
                model,
                plan.replicas[self.replica],
                session,
                self._groups[self.replica],
                microbatches=plan.microbatches,
                loss=loss,
                exports=exports,
            )
        self._heap = HeapLine.of(session.device)
        self._hook = model.register_state_dict_pre_hook(lambda *_: self.synchronize())

    def _bucket_bytes(self, *, sharded: bool = False) -> float:
        cluster, members = self.session.cluster, self.session.members
        size = sum(p.nbytes for p in self._parameters.values() if p.requires_grad)
        devices = [cluster.index[members[rank]] for rank in self._working]
        return bucket_bytes_of(size, devices, cluster, sharded=sharded)

    def _weighted(self) -> WeightedDataParallel:
        return WeightedDataParallel(
            self.model,
            self.session,
            self._together,
            buffers=self._batch_norm == "local" and _has_statistics(self.model),
            bucket_bytes=self._bucket_bytes(),
        )

    def _refusal(self) -> ExecutionError | None:
        parts = self.plan.with_(engine="threads")
        if self.plan.sharded and self.session.torch_device.type != "cpu":
            return ExecutionError("sharded plans run on processors alone so far; tune again, or take `sharded` out")
        if self.plan.sharded and _has_statistics(self.model):
            return ExecutionError("sharded plans do not give batch statistics to all; tune again with another plan")
        if self.plan.shape == "replicas" and self._batch_norm == "local":
            return None
        reason = unfit(self.model, parts, training=self.model.training)
        return ExecutionError(f"the plan does not fit the model: {reason}") if reason else None

    # -- shares ----------------------------------------------------------------------------------------------------

    def rank_shares(self) -> list[float]:
        """Return every rank's part of the batch: its replica's, which all ranks of a pipeline have; 0 for idle ones."""
        shares = [0.0] * self.session.world_size
        for ranks, share in zip(self.ranks, self._shares, strict=True):
            for rank in ranks:
                shares[rank] = share
        return shares

    def sizes(self, batch: int) -> list[int]:
        """Return the samples of every replica of a batch."""
        return at_least_one(batch, self._shares)

    def _part(self, values: Any, sizes: list[int]) -> Any:
        """Return this rank's part of what has the batch's size; one sample where the part is empty."""
        return part_of(values, sizes, self.replica)

    def shard(self, batch: Any) -> Any:
        """Return this rank's part of a whole batch, of any nesting; the next call is expected to run it.

        Raises:
            ExecutionError: If nothing in it has a batch dimension.
        """
        sizes = self.sizes(batch_size(pytree.tree_leaves(batch)))
        if self._parallel is not None:
            self._parallel.expect(sizes[self.replica or 0], sum(sizes))
        return self._part(batch, sizes)

    # -- running ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _watched(self) -> Iterator[None]:
        if self._lookout is None:
            yield
            return
        with self._lookout.watching():
            yield

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run this rank's samples (replicas), or the replica's batch (pipelines, without gradients).

        Raises:
            ExecutionError: If gradients are wanted of a pipeline, or a rank was lost.
        """
        with self._watched():
            if self._pipeline is not None:
                if torch.is_grad_enabled():
                    raise ExecutionError(
                        "this plan is a pipeline over several ranks, whose last one computes the loss; "
                        "train with model.train_step(inputs, targets), or run the model under torch.no_grad()"
                    )
                return self._pipeline.forward(args, kwargs)
            if self._sharded is not None:
                self._call_sharded()
            if torch.is_grad_enabled():
                self._stale = True
            return (self._parallel or self.model)(*args, **kwargs)

    def _call_sharded(self) -> None:
        """Let a call see the newest values; whoever trains by calls alone gets all gradients everywhere, unsharded.

        Raises:
            ExecutionError: If gradients are wanted after steps that left them, and the optimizer's state, to owners.
        """
        assert self._sharded is not None
        if not torch.is_grad_enabled():
            self.synchronize()
        elif self._sharded.began:
            raise ExecutionError(
                "this plan leaves each gradient to one rank; train with model.train_step(inputs, targets) all along, "
                "or run the model under torch.no_grad()"
            )
        else:
            self._sharded = None
            self._parallel = None if self.replica is None else self._weighted()

    def train_step(self, inputs: Any, targets: Any = None) -> torch.Tensor:
        """Run forward and backward of one whole batch, which every rank passes; the optimizer's step is the caller's.

        Args:
            inputs: A tensor, a tuple of positional inputs, or a mapping of keyword inputs.
            targets: Handed to the loss beside the output; None = the loss takes the output alone.

        Returns:
            The loss of the whole batch, a detached scalar, on every rank.

        Raises:
            ExecutionError: If the model cannot be split as planned, or a rank was lost.
        """
        with self._watched():
            self._heap.keep()
            if self._sharded is not None:
                self._sharded.arrange()
            args, kwargs = inputs_of(inputs)
            sizes = self.sizes(batch_size(pytree.tree_leaves((args, kwargs))))
            part_args, part_kwargs = self._part((args, kwargs), sizes)
            part_targets = None if targets is None else self._part(targets, sizes)
            weight = 0.0 if self.replica is None else sizes[self.replica] / sum(sizes)
            if self.plan.shape in ("stages", "hybrid"):
                loss = self._pipelined(inputs, part_args, part_kwargs, part_targets, weight)
            elif self.replica is None:
                loss = None
            else:
                loss = self._alone(part_args, part_kwargs, part_targets, sizes)
            self._stale = True
            total = torch.zeros((), device=self.session.torch_device)
            if loss is not None:
                total += loss.to(total) * weight
            dist.all_reduce(total, group=self._world)
            return total

    def _alone(self, args: Any, kwargs: Any, targets: Any, sizes: list[int]) -> torch.Tensor:
        """Run this rank's samples through the whole model."""
        own, of = sizes[self.replica or 0], sum(sizes)
        if self._sharded is not None:
            return self._sharded.step(
                lambda: loss_of(self._loss, self.model(*args, **kwargs), targets),
                own / of,
                accumulate=self._accumulating,
            )
        if self._parallel is not None:
            self._parallel.expect(own, of)
        output = (self._parallel or self.model)(*args, **kwargs)
        loss = loss_of(self._loss, output, targets)
        loss.backward()
        return loss.detach()

    def _pipelined(self, inputs: Any, args: Any, kwargs: Any, targets: Any, weight: float) -> torch.Tensor | None:
        leaves = pytree.tree_leaves(inputs)
        key = tuple((tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in leaves)
        if (key, self.model.training) not in self._known:
            self._prepare(args, kwargs, targets)
            self._known.add((key, self.model.training))
        if self._pipeline is None:
            return None
        # What is there already is whole, unless it was accumulated on this rank alone, and must not be summed again.
        own = {} if self._pending else self._parameters
        before = [(p, grad) for p in own.values() if (grad := p.grad) is not None]
        for parameter, _ in before:
            parameter.grad = None
        loss = self._pipeline.step(args, kwargs, targets, weight=weight) if weight else None
        if self._accumulating:
            self._pending = True
        else:
            if self._shared is not None:
                self._shared.reduce()
            self._pending = False
        for parameter, grad in before:
            parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)
        return loss

    def _prepare(self, args: Any, kwargs: Any, targets: Any) -> None:
        """Split the model for a new kind of batch on all ranks, or raise on all of them."""

        def own() -> tuple[list[str], str]:
            if self._pipeline is None:
                return [], ""
            prepared = self._pipeline.prepare(args, kwargs, targets)
            held = {id(tensor) for tensor in self._pipeline.held(prepared)}
            every = (*self._parameters.items(), *self.model.named_buffers())
            stages = [i for i, rank in enumerate(prepared.ranks) if rank == self.session.rank]
            described = [(s.device, s.takes, [p.outputs for p in s.pieces]) for s in prepared.chain]
            if self._lookout is not None:
                self._lookout.role = f"stage {', '.join(map(str, stages))} of {len(prepared.ranks)}"
            return [name for name, tensor in every if id(tensor) in held], _digest(described)

        names, description = self.session.together(own)
        found = self.session.gather((self.replica, names, description))
        for replica, _, theirs in found:
            if replica == self.replica and theirs != description:
                raise ExecutionError("the ranks cut the model differently; install the same versions on all hosts")
        holders: dict[str, list[int]] = {}
        for rank, (_, held, _) in enumerate(found):
            for name in held:
                holders.setdefault(name, []).append(rank)
        if holders != self._holders:
            self._holders = holders
            shared = {n: ranks for n, ranks in holders.items() if n in self._parameters and len(ranks) > 1}
            shared = {n: ranks for n, ranks in shared.items() if self._parameters[n].requires_grad}
            self._shared = SharedGradients(self.session, self._parameters, shared)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Add gradients up where they arise; the first backward, or `train_step`, after it sums them over the ranks."""
        before, self._accumulating = self._accumulating, True
        try:
            if self._parallel is not None:
                with self._parallel.no_sync():
                    yield
            else:
                yield
        finally:
            self._accumulating = before

    # -- state -----------------------------------------------------------------------------------------------------

    def holders(self, name: str) -> list[int]:
        """Return the ranks on which a parameter or buffer is up to date, the first of which is its owner."""
        if self.plan.shape in ("stages", "hybrid"):
            return self._holders.get(name, list(range(self.session.world_size)))
        if self._sharded is not None and name in self._parameters:
            owner = self._sharded.owner(self._parameters[name])
            if owner is not None:
                return [owner]
        return sorted(rank for ranks in self.ranks for rank in ranks)

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients so that their norm is at most `max_norm`; every rank has to call it.

        Returns:
            The norm before, over every parameter once, wherever it is held.
        """
        own = [(n, p.grad) for n, p in self._parameters.items() if p.grad is not None]
        squares = torch.zeros((), device=self.session.torch_device)
        for name, grad in own:
            if self.holders(name)[0] == self.session.rank:
                squares += grad.to(squares.dtype).square().sum()
        dist.all_reduce(squares, group=self._world)
        norm = squares.sqrt()
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
        for _, grad in own:
            grad.mul_(factor)
        return norm

    def synchronize(self) -> None:
        """Bring all parameters and buffers up to date on all ranks; every rank has to call it."""
        if not self._stale:
            return
        with self._watched(), torch.no_grad():
            for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
                holders = self.holders(name)
                if len(holders) < self.session.world_size:
                    dist.broadcast(tensor.detach(), src=holders[0], group=self._world)
        self._stale = False
        if self._sharded is not None:
            self._sharded.caught_up()

    def close(self) -> None:
        """Undo the hook at the model; the process group stays."""
        self._hook.remove()
        self._parallel = self._pipeline = self._sharded = None


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _has_statistics(model: torch.nn.Module) -> bool:
    return any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
