"""One replica of a plan as a pipeline: stages cut from the exported graph, run by torch.distributed's schedules.

    model's call → export, split → chain_of → PipelineStage per stage → GPipe | 1F1B | runtime schedule

The split, and what binds it to the live parameters, are those of the engine `graph` (→ `runtime.stage_program`);
stages and schedules, and all that is sent, are `torch.distributed.pipelining`'s. Every rank of the replica calls with
the whole of the replica's batch: inputs are never sent, and the loss is computed inside the last stage.

1. Shapes and types of what is handed over are found by running the stages on fake tensors, on every rank alike (on
   real ones, with buffers put back, where the program looks at values), so that no batch statistics count it.
2. Microbatches have one size: the largest number of them that divides the batch, up to the plan's, is taken. The loss
   is the mean of theirs, as it is for losses that are means over samples.
3. What is handed over is made contiguous. What cannot have a gradient is sent without one.
4. Stages that one rank runs one after the other, in any order of ranks, take the runtime schedule; one stage a rank
   takes GPipe, or 1F1B where there are microbatches enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import (
    _Action,
    _ComputationType,
    _PipelineSchedule,
    _PipelineScheduleRuntime,
)

from autoplace.errors import ExecutionError
from autoplace.measure.preserve import preserved
from autoplace.plan import Replica
from autoplace.runtime.batch import CAT, MEAN, batch_size, join_kinds
from autoplace.runtime.stage_program import Exports, ProgramCache, StageProgram
from autoplace.runtime.tree import Tree
from autoplace.workload import loss_of

from .chain import ChainStage, chain_of
from .session import Session

__all__ = ["Loss", "Pipeline"]

_MOST_PREPARED = 16
"""Kinds of batches whose stages are kept."""

Loss = Callable[..., torch.Tensor]
"""Takes the model's output, and the targets where there are some; returns a scalar."""


class Pipeline:
    """The stages of one replica on its ranks.

    Args:
        model: The model; its parameters are shared.
        replica: Op group to device.
        session: The group; every rank of the replica makes this object.
        group: The process group of the replica's ranks.
        microbatches: At most so many.
        loss: Used in training; None takes the output's `loss`, else a mean square.
        exports: What other plans of this model have exported, and this one may; see `ProgramCache`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        replica: Replica,
        session: Session,
        group: dist.ProcessGroup | None,
        *,
        microbatches: int = 1,
        loss: Loss | None = None,
        exports: Exports | None = None,
    ) -> None:
        self.model, self.session, self.group = model, session, group
        self.ranks = tuple(sorted({session.rank_of(name) for name in replica.devices}))
        self._microbatches, self._loss = microbatches, loss
        places = dict.fromkeys(replica.devices, session.torch_device)
        self._cache = ProgramCache(model, replica.assignment, places, exports)
        self._prepared: dict[Any, _Prepared] = {}

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], targets: Any = None) -> _Prepared:
        """Export, split and set the stages up for a call; nothing is sent and nothing runs.

        Raises:
            ExecutionError: If the model cannot be split, or a stage would hand over something that is no tensor.
        """
        tree = Tree((args, dict(sorted(kwargs.items()))))
        if any(isinstance(x, torch.Tensor) and x.requires_grad for x in tree.leaves):
            raise ExecutionError("an input requires a gradient, which a pipeline of ranks does not return; detach it")
        size = batch_size(tree.leaves)
        count = next(n for n in range(min(self._microbatches, max(size, 1)), 0, -1) if size % n == 0)
        parts = _parts(tree.leaves, size, count)
        tensors = [x for x in parts[0] if isinstance(x, torch.Tensor)]
        each = size // count
        program = self._cache.find(tree, tensors, each if each > 1 else None)
        backward = torch.is_grad_enabled()
        # A program may hold for any batch; what `PipelineStage` is told of shapes holds for one.
        key = (id(program), count, backward, tuple(tuple(t.shape) for t in tensors))
        if key not in self._prepared:
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            self._prepared[key] = _Prepared.of(program, tensors, count, self)
        prepared = self._prepared[key]
        prepared.feed = [[x for x in part if isinstance(x, torch.Tensor)] for part in parts]
        prepared.targets = [part[0] if targets is not None else None for part in _parts([targets], size, count)]
        return prepared

    def held(self, prepared: _Prepared) -> list[torch.Tensor]:
        """Return the parameters and buffers that this rank's stages read or write."""
        own = [stage for stage, rank in zip(prepared.chain, prepared.ranks, strict=True) if rank == self.session.rank]
        names = dict.fromkeys(name for stage in own for piece in stage.pieces for name in piece.inputs)
        found = [prepared.program.weight(name) for name in names if name in prepared.program.split.weights]
        return [tensor for tensor in found if tensor is not None]

    def step(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], targets: Any = None, *, weight: float = 1.0
    ) -> torch.Tensor | None:
        """Run forward and backward; gradients of `weight` times the loss are added to the stages' parameters.

        Returns:
            The loss, not weighted, on the rank of the last stage; None on the others.
        """
        prepared = self.prepare(args, kwargs, targets)
        prepared.weights = [weight / prepared.count] * prepared.count
        prepared.run()
        return torch.stack(prepared.losses).mean() if prepared.losses else None

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the forward alone, without gradients; the output on every rank of the replica."""
        with torch.no_grad():
            prepared = self.prepare(args, kwargs)
            prepared.run()
        own = prepared.ranks[-1] == self.session.rank
        box = [_merged(prepared.outputs, batch_size(Tree((args, dict(kwargs))).leaves)) if own else None]
        dist.broadcast_object_list(box, src=prepared.ranks[-1], group=self.group)
        return box[0]


@dataclass(eq=False)
class _Prepared:
    """The stages of one exported program on this rank, and the schedule that runs them."""

    program: StageProgram
    chain: tuple[ChainStage, ...]
    ranks: tuple[int, ...]
    """Rank of every stage."""
    count: int
    """Microbatches."""
    schedule: _PipelineSchedule
    runs_first: bool
    backward: bool
    feed: list[list[torch.Tensor]]
    """Input tensors of every microbatch."""
    targets: list[Any]
    weights: list[float]
    losses: list[torch.Tensor]
    outputs: list[Tree]
    loss: Loss | None

    @staticmethod
    def of(program: StageProgram, tensors: Sequence[torch.Tensor], count: int, pipeline: Pipeline) -> _Prepared:
        session, backward = pipeline.session, torch.is_grad_enabled()
        chain = chain_of(program.split)
        ranks = tuple(session.rank_of(stage.device) for stage in chain)
        handed = _handed(program, chain, tensors, pipeline.model)
        self = _Prepared(
            program=program, chain=chain, ranks=ranks, count=count, schedule=None,  # type: ignore[arg-type]
            runs_first=ranks[0] == session.rank, backward=backward, feed=[], targets=[], weights=[], losses=[],
            outputs=[], loss=pipeline._loss,
        )  # fmt: skip
        place = {rank: i for i, rank in enumerate(pipeline.ranks)}
        own: list[PipelineStage] = []
        for i in range(len(chain)):
            if ranks[i] != session.rank:
                continue
            module = _StageModule(self, i)
            last = i == len(chain) - 1
            module.gives = [] if last else [tuple(f.shape) for f in handed[i + 1]]
            made = PipelineStage(
                module,
                i,
                len(chain),
                session.torch_device,
                input_args=_empty(handed[i], session.torch_device) if i else (torch.zeros(1, dtype=torch.long),),
                output_args=(torch.zeros((), requires_grad=backward),)
                if last
                else _empty(handed[i + 1], session.torch_device),
                group=pipeline.group,
            )
            made.stage_index_to_group_rank = {n: place[rank] for n, rank in enumerate(ranks)}
            own.append(made)
        self.schedule = _schedule(own, [place[rank] for rank in ranks], count, backward)
        return self

    def run(self) -> None:
        self.losses, self.outputs = [], []
        numbers = torch.arange(self.count)
        args = (numbers,) if self.runs_first else ()
        targets = numbers if self.backward else None
        try:
            self.schedule.step(*args, target=targets, return_outputs=False, microbatch=numbers)
        except RuntimeError as error:
            if error.__cause__ is not None and "failed to run" in str(error):  # what the model raised, told at length
                raise error.__cause__ from None
            raise
        finally:
            self.feed, self.targets = [], []


class _StageModule(torch.nn.Module):
    """A stage as `PipelineStage` calls it; the parameters are the model's and not its own."""

    def __init__(self, prepared: _Prepared, index: int) -> None:
        super().__init__()
        self._run = (prepared, index)
        self.gives: list[tuple[int, ...]] = []
        """Shapes of what it hands over, as the next stage expects them."""

    def forward(self, *handed: torch.Tensor, microbatch: torch.Tensor) -> Any:
        prepared, index = self._run
        number = int(microbatch)
        stage, program = prepared.chain[index], prepared.program
        values = _run_stage(program, stage, handed if index else (), prepared.feed[number], program.weight)
        if index < len(prepared.chain) - 1:
            given = tuple(_sendable(values[name]) for name in stage.gives)
            if [tuple(value.shape) for value in given] != self.gives:
                raise ExecutionError(
                    "what a stage hands over has another shape than in the first batch: it follows from the inputs' "
                    "values; use a plan with other cuts, or of replicas"
                )
            return given
        output = program.output(values.__getitem__)
        if not prepared.backward:
            prepared.outputs.append(output)
            return torch.zeros(())
        built = output.build(output.leaves)
        loss = loss_of(prepared.loss, built, prepared.targets[number])
        prepared.losses.append(loss.detach())
        return loss * prepared.weights[number]


def _run_stage(
    program: StageProgram,
    stage: ChainStage,
    handed: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    weight: Callable[[str], Any],
) -> dict[str, Any]:
    """Return all values that a stage has at its end."""
    values: dict[str, Any] = dict(zip(program.split.inputs, inputs, strict=True))
    if program.split.scalar_names:
        values.update(zip(program.split.scalar_names, program.split.scalars(*inputs), strict=True))
    values.update(zip(stage.takes, handed, strict=True))
    for piece in stage.pieces:
        given = [values[name] if name in values else weight(name) for name in piece.inputs]
        values.update(zip(piece.outputs, piece.module.forward(*given), strict=True))
    return values


def _sendable(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous() if not value.is_contiguous() else value.view_as(value)


def _handed(
    program: StageProgram, chain: Sequence[ChainStage], tensors: Sequence[torch.Tensor], model: torch.nn.Module
) -> list[list[torch.Tensor]]:
    """Return what every stage takes, for a microbatch like `tensors`, as tensors of which shape and type count."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        known: dict[str, Any] = {}

        def weight(name: str) -> Any:
            if name not in known:
                real = program.weight(name)
                known[name] = mode.from_tensor(real) if isinstance(real, torch.Tensor) else real
            return known[name]

        try:
            return _walk(program, chain, [mode.from_tensor(t) for t in tensors], weight)
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
            pass
    with preserved(model):
        return _walk(program, chain, tensors, program.weight)


def _walk(
    program: StageProgram, chain: Sequence[ChainStage], tensors: Sequence[torch.Tensor], weight: Callable[[str], Any]
) -> list[list[torch.Tensor]]:
    found: list[list[torch.Tensor]] = []
    handed: list[torch.Tensor] = []
    for stage in chain:
        found.append(handed)
        values = _run_stage(program, stage, handed, tensors, weight)
        strange = next((n for n in stage.gives if not isinstance(values[n], torch.Tensor)), None)
        if strange is not None:
            raise ExecutionError(
                f"a stage would hand over {strange!r}, a {type(values[strange]).__name__} that follows from the "
                "inputs' values; use a plan with other cuts, or of replicas"
            )
        handed = [_sendable(values[name]) for name in stage.gives]
    return found


def _empty(fakes: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return what tells `PipelineStage` shapes and types: tensors on the meta device."""
    return tuple(
        torch.empty(tuple(f.shape), dtype=f.dtype, device="meta", requires_grad=f.requires_grad) for f in fakes
    )


def _schedule(stages: list[PipelineStage], places: Sequence[int], count: int, backward: bool) -> _PipelineSchedule:
    """Return the schedule for this rank's stages.

    Args:
        stages: Of this rank.
        places: Place in the process group per stage of the pipeline.
        count: Microbatches.
        backward: Whether there is one.
    """
    options: dict[str, Any] = {"loss_fn": _first if backward else None, "scale_grads": False}
    if len(set(places)) == len(places):
        kind = Schedule1F1B if backward and count >= len(places) > 1 else ScheduleGPipe
        return kind(stages[0], count, **options)
    schedule = _PipelineScheduleRuntime(stages, count, **options)
    orders: dict[int, list[_Action | None]] = {place: [] for place in sorted(set(places))}
    for index, place in enumerate(places):
        orders[place] += [_Action(index, _ComputationType.FORWARD, n) for n in range(count)]
    for index in reversed(range(len(places))):  # the schedule wants them in any case; without a loss they do nothing
        orders[places[index]] += [_Action(index, _ComputationType.FULL_BACKWARD, n) for n in range(count)]
    schedule.pipeline_order = orders
    schedule._prepare_schedule_with_comms(orders)
    return schedule


def _first(output: torch.Tensor, _target: Any) -> torch.Tensor:
    return output


def _parts(leaves: Sequence[Any], size: int, count: int) -> list[list[Any]]:
    """Return the leaves of every microbatch: views of what has the batch's size, the rest whole."""
    if count == 1:
        return [list(leaves)]
    split = [isinstance(x, torch.Tensor) and x.dim() > 0 and x.shape[0] == size for x in leaves]
    each = size // count
    return [
        [x[n * each : (n + 1) * each] if cut else x for x, cut in zip(leaves, split, strict=True)] for n in range(count)
    ]


def _merged(outputs: Sequence[Tree], size: int) -> Any:
    """Return the outputs of the microbatches as one."""
    if len(outputs) == 1:
        return outputs[0].build(outputs[0].leaves)
    kinds = join_kinds(outputs, [size // len(outputs)] * len(outputs))
    leaves = []
    for kind, values in zip(kinds, zip(*(o.leaves for o in outputs), strict=True), strict=True):
        if kind == CAT:
            leaves.append(torch.cat(values))
        else:
            leaves.append(torch.stack(values).mean(0) if kind == MEAN else values[0])
    return outputs[0].build(leaves)
