"""`GroupEvaluator`: plans in, Outcomes of short real runs on all ranks out; the ranks stay, so a plan takes seconds.

All ranks hold the model, and build what a plan needs of it for as long as it is measured. Either every rank calls
`evaluate` with the same plans, or rank 0 alone does and the others are in `serve`, which is how a policy is trained.

For every plan: build, run one step and compare it with plain PyTorch's, then time the survivors round by round. A
step's time is the slowest rank's, from a barrier on. What fails on one rank is an infeasible Outcome on all.

1. Plain PyTorch's step is run once, on the rank whose device is fastest. What travels of it is its loss and two
   numbers a gradient: its norm, and its product with random signs, which differ as much as the gradients do.
   → `_fingerprints`
2. Where no rank can hold a whole batch, plans are compared on its first `check_samples`.
3. Without dropout, which is random, as long as they are compared.
4. Energy is counted from idle and busy watts of the cluster file, where all devices have them: `model`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from autoplace.errors import AutoplaceError, ExecutionError, in_one_line
from autoplace.measure.memory import give_back
from autoplace.measure.pool import plan_key
from autoplace.measure.preserve import clear_gradients, no_dropout, preserved
from autoplace.measure.protocol import summary
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.problem import Objective
from autoplace.runtime.batch import batch_size
from autoplace.runtime.stage_program import Exports
from autoplace.workload import inputs_of, loss_of

from .pipeline import Loss
from .runner import DistributedModel, part_of
from .session import Session

__all__ = ["GroupEvaluator"]

Drop = Callable[[Sequence[Outcome]], Collection[int]]
"""Takes the Outcomes so far, and returns the positions of plans that take no further part; all of them end the run."""
_RTOL = 2e-3
"""Of a gradient's norm: sums over ranks come in another order than plain PyTorch's."""
_LEAST_ROUNDS = 3
_SMALL = 1e-5
"""Gradients below this part of the largest norm are rounding."""


@dataclass(frozen=True, kw_only=True)
class _Reference:
    loss: float
    prints: Mapping[str, tuple[float, float]]


class GroupEvaluator:
    """Measures plans on the ranks of a session.

    Args:
        model: The model; the same on every rank. It is left as it was found.
        inputs: A whole batch, the same on every rank.
        session: The group.
        targets: For the loss; see `DistributedModel.train_step`.
        loss: Output to scalar loss.
        batch_norm: See `DistributedModel`.
        objective: What `Outcome.objective` is computed by; None = latency.
        repeats: Counted steps of each plan.
        warmup: Steps before them; the check of a plan on the whole batch takes their place.
        settle: Untimed steps right before each counted one: a plan's first step after another's is slower, wherever its
            ranks had nothing to do meanwhile.
        check: Whether the first step that a plan ever runs here is compared with plain PyTorch's.
        check_samples: Samples to compare plans on; None = the whole batch.
        reference_rank: The rank that runs plain PyTorch.
        record: Called on rank 0 with each plan and its Outcome.
        exports: See `DistributedModel`; None = the evaluator's own.
        lots: Where memory is short, divides plans that cannot wait beside each other, by position; the same on every
            rank. None = all wait together.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inputs: Any,
        session: Session,
        *,
        targets: Any = None,
        loss: Loss | None = None,
        batch_norm: str = "whole",
        objective: Objective | None = None,
        repeats: int = 5,
        warmup: int = 1,
        settle: int = 0,
        check: bool = True,
        check_samples: int | None = None,
        reference_rank: int = 0,
        record: Callable[[Plan, Outcome], None] | None = None,
        exports: Exports | None = None,
        lots: Callable[[Sequence[Plan]], list[list[int]]] | None = None,
    ) -> None:
        self.model, self.session = model, session
        self.evaluations = 0
        """Number of plans evaluated so far."""
        self._inputs, self._targets, self._loss, self._batch_norm = inputs, targets, loss, batch_norm
        self._objective = objective or Objective()
        self._repeats, self._warmup, self._check = repeats, warmup, check
        self._settle = settle
        self._reference_rank, self._record = reference_rank, record
        self._reference: _Reference | None = None
        self._exports: Exports = {} if exports is None else exports
        self._right: set[str] = set()
        """Plans whose first step was plain PyTorch's."""
        self._serving = False
        self._lots = lots
        self._batch = batch_size(pytree.tree_leaves(inputs))
        some = check_samples or self._batch
        self._some = part_of((inputs, targets), (some, self._batch - some), 0)
        self._some_is_all = some == self._batch

    # -- plans in, Outcomes out ------------------------------------------------------------------------------------

    def evaluate(self, plans: Sequence[Plan]) -> list[Outcome]:
        """Return one Outcome per plan; see the module's docstring."""
        return self.evaluate_interleaved(plans, self._repeats)

    def evaluate_interleaved(
        self,
        plans: Sequence[Plan],
        rounds: int,
        *,
        budget_s: float | None = None,
        settle: int | None = None,
        drop: Drop | None = None,
    ) -> list[Outcome]:
        """Measure plans against each other, round by round.

        Args:
            plans: Any; the same one may be there twice.
            rounds: Counted steps of each.
            budget_s: Seconds after which no further round begins once there are a few.
            settle: See the class; None = the evaluator's.
            drop: Asked on rank 0, with the Outcomes so far, after every round for the plans that take no further part;
                it is not asked where memory keeps plans apart.
        """
        settle = self._settle if settle is None else settle
        if self._serving:
            self.session.broadcast(([plan.to_json() for plan in plans], rounds, budget_s, settle, drop is not None))
        self.evaluations += len(plans)
        lots = [list(range(len(plans)))] if self._lots is None else self._lots(plans)
        drop = drop if len(lots) == 1 else None
        found: dict[int, Outcome] = {}
        with preserved(self.model):
            for lot in lots:
                own_s = None if budget_s is None else budget_s / len(lots)
                some = [plans[i] for i in lot]
                found.update(zip(lot, self._measured(some, rounds, own_s, settle, drop), strict=True))
        outcomes = [found[i] for i in range(len(plans))]
        if self._record is not None and self.session.rank == 0:
            for plan, outcome in zip(plans, outcomes, strict=True):
                self._record(plan, outcome)
        return outcomes

    def lead(self) -> GroupEvaluator:
        """Let this rank's calls be followed by the others, which are in `serve`; end with `dismiss`."""
        self._serving = True
        return self

    def dismiss(self) -> None:
        """Let the others return from `serve`."""
        if self._serving:
            self.session.broadcast(None)
            self._serving = False

    def serve(self) -> None:
        """Follow rank 0's calls until it calls `dismiss`."""
        while True:
            order: Any = self.session.broadcast(None)
            if order is None:
                return
            plans, rounds, budget_s, settle, drops = order
            self.evaluate_interleaved(
                [Plan.from_json(p) for p in plans],
                rounds,
                budget_s=budget_s,
                settle=settle,
                drop=_told_by_rank_0 if drops else None,
            )

    # -- measuring -------------------------------------------------------------------------------------------------

    def _measured(
        self, plans: Sequence[Plan], rounds: int, budget_s: float | None, settle: int, drop: Drop | None
    ) -> list[Outcome]:
        end = None if budget_s is None else time.perf_counter() + budget_s
        built: list[DistributedModel | None] = []
        reasons: list[str] = []
        samples: list[list[float]] = [[] for _ in plans]
        # Where memory is short, every plan finds a heap without what others left, which its first step makes anew.
        settle = settle if self._lots is None else max(1, settle)
        warm: list[bool] = []
        out: set[int] = set()
        try:
            for plan in plans:
                known = plan_key(plan) in self._right
                runner, reason = self._built(plan)
                built.append(runner)
                reasons.append(reason)
                warm.append(self._check and self._some_is_all and not known)
            for number in range(self._warmup + rounds):
                for i, runner in enumerate(built):
                    if runner is None or reasons[i] or i in out or (warm[i] and number < self._warmup):
                        continue
                    if self._lots is not None:
                        give_back()
                    for _ in range(1 if number < self._warmup else 1 + settle):
                        elapsed_ms, reasons[i] = self._timed(runner)
                        if reasons[i]:
                            break
                    if number >= self._warmup and not reasons[i]:
                        samples[i].append(elapsed_ms)
                if number < self._warmup:
                    continue
                if number - self._warmup + 1 >= _LEAST_ROUNDS and self._over(end):
                    break
                if drop is not None:
                    so_far = zip(plans, samples, reasons, strict=True)
                    told = drop([self._outcome(*one) for one in so_far]) if self.session.rank == 0 else ()
                    out |= set(self.session.broadcast(told))
                    if len(out) == len(plans):
                        break
        finally:
            clear_gradients(self.model)
            for runner in built:
                if runner is not None:
                    runner.close()
            give_back()
        return [self._outcome(plan, s, reason) for plan, s, reason in zip(plans, samples, reasons, strict=True)]

    def _over(self, end: float | None) -> bool:
        """Return whether rank 0's time is up; the same on all ranks."""
        if end is None:
            return False
        return bool(self.session.broadcast(time.perf_counter() > end))

    def _built(self, plan: Plan) -> tuple[DistributedModel | None, str]:
        """Return what runs a plan, and why it may not; the same reason on all ranks."""
        try:
            runner = DistributedModel(
                self.model,
                plan,
                self.session,
                loss=self._loss,
                batch_norm=self._batch_norm,
                exports=self._exports,
            )
        except AutoplaceError as error:
            return None, str(error)
        reason = ""
        try:
            if self._check and plan_key(plan) not in self._right:
                reason = self._differs(runner)
                if not reason:
                    self._right.add(plan_key(plan))
        except AutoplaceError as error:
            reason = str(error)
        clear_gradients(self.model)
        give_back()  # or the next plan's peak would stand on what this one leaves in the heap
        return runner, reason

    def _timed(self, runner: DistributedModel) -> tuple[float, str]:
        """Return the milliseconds of one step, the slowest rank's, or why it failed."""
        clear_gradients(self.model)
        dist.barrier()
        start = time.perf_counter()
        reason = ""
        try:
            runner.train_step(self._inputs, self._targets)
        except AutoplaceError as error:
            reason = str(error)
        elapsed = torch.tensor([(time.perf_counter() - start) * 1e3], device=self.session.torch_device)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
        return float(elapsed), reason

    def _outcome(self, plan: Plan, samples: Sequence[float], reason: str) -> Outcome:
        if reason or not samples:
            return Outcome(source="measured", feasible=False, reason=reason or "it was not measured")
        latency_ms, _ = summary(samples)
        energy_j = self._energy_j(plan, latency_ms) if self._objective.energy_weight else None
        return Outcome(
            source="measured",
            latency_ms=latency_ms,
            period_ms=latency_ms,
            throughput_sps=self._batch / latency_ms * 1e3,
            energy_j=energy_j,
            energy_source=None if energy_j is None else "model",
            objective=self._objective.value(latency_ms, energy_j),
            samples_ms=tuple(samples),
        )

    def _energy_j(self, plan: Plan, latency_ms: float) -> float | None:
        """Return the energy of a step with all devices of the plan busy throughout: an upper bound."""
        total = 0.0
        for device in self.session.cluster.devices:
            if device.idle_watts is None or device.busy_watts is None:
                return None
            watts = device.busy_watts if device.name in plan.devices else device.idle_watts
            total += watts * latency_ms / 1e3
        return total

    # -- the check -------------------------------------------------------------------------------------------------

    def _differs(self, runner: DistributedModel) -> str:
        """Return why a plan's step is not plain PyTorch's, or nothing; the same on all ranks."""
        with no_dropout(self.model):
            if self._reference is None:
                self._reference = self._plain()
            clear_gradients(self.model)
            loss = float(runner.train_step(*self._some))
        wanted = self._reference
        found = _fingerprints(self._held(runner))
        reason = ""
        if abs(loss - wanted.loss) > _RTOL * max(abs(wanted.loss), 1e-3):
            reason = f"the loss is {loss:.6g}, plain PyTorch's {wanted.loss:.6g}"
        largest = max((norm for norm, _ in wanted.prints.values()), default=0.0)
        for name, (norm, product) in found.items():
            if reason:
                break
            theirs = wanted.prints.get(name)
            if theirs is None:
                reason = f"{name!r} has a gradient, plain PyTorch's has none"
            elif max(abs(norm - theirs[0]), abs(product - theirs[1])) > 4 * _RTOL * theirs[0] + _SMALL * largest:
                reason = f"the gradient of {name!r} differs from plain PyTorch's"
        have = set().union(*self.session.gather(set(found)))
        if missing := sorted(set(wanted.prints) - have):
            reason = reason or f"{missing[0]!r} has no gradient, plain PyTorch's has one"
        return next((told for told in self.session.gather(reason) if told), "")

    def _held(self, runner: DistributedModel) -> Iterable[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and self.session.rank in runner.holders(name):
                yield name, parameter.grad

    def _plain(self) -> _Reference:
        """Run plain PyTorch's step on one rank and tell the others."""
        told: Any = None
        if self.session.rank == self._reference_rank:
            try:
                clear_gradients(self.model)
                inputs, targets = self._some
                args, kwargs = inputs_of(inputs)
                loss = loss_of(self._loss, self.model(*args, **kwargs), targets)
                loss.backward()
                grads = ((n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None)
                told = _Reference(loss=float(loss.detach()), prints=_fingerprints(grads))
            except Exception as error:
                told = in_one_line(error)
        told = self.session.broadcast(told, self._reference_rank)
        if not isinstance(told, _Reference):
            raise ExecutionError(f"plain PyTorch cannot run this model on these inputs: {told}")
        return told


def _told_by_rank_0(_: Sequence[Outcome]) -> Collection[int]:
    """Stand for rank 0's `drop` on the ranks that serve, where nobody asks it."""
    return ()


def _fingerprints(gradients: Iterable[tuple[str, torch.Tensor]]) -> dict[str, tuple[float, float]]:
    """Return name to the gradient's norm and its product with random signs."""
    found = {}
    for name, gradient in gradients:
        dense = (gradient if gradient.layout == torch.strided else gradient.to_dense()).double().flatten().cpu()
        random = torch.Generator().manual_seed(len(name) + dense.numel())
        signs = torch.randint(0, 2, (dense.numel(),), generator=random, dtype=torch.int8).double() * 2 - 1
        found[name] = (float(dense.norm()), float(dense @ signs))
    return found
