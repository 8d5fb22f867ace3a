"""`Distribution`: a wrapper's model on the ranks of a group, planned when its first batch is there.

A composer, as `planning` is for one machine. Where a plan comes from:

1. The plan that the user gave, or the file of `AUTOPLACE_PLAN`; where hosts are gone and it was made for all of them, 2
   or 3 replace it.
2. `train_step` gives the whole batch to every rank, so all kinds of plans can be tuned on it → `group_tuner`.
3. A call has this rank's part alone, and the caller computes the loss: data parallel, with shares by the speed that
   each rank reaches on its own part. The first call is the measurement; shares are even until then.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from autoplace.errors import InputError, PlanFileError
from autoplace.measure.preserve import clear_gradients, preserved
from autoplace.plan import Plan, Replica
from autoplace.runtime.batch import batch_size
from autoplace.runtime.distributed.lookout import Lookout
from autoplace.runtime.distributed.runner import DistributedModel, part_of
from autoplace.runtime.distributed.sampler import at_least_one
from autoplace.runtime.distributed.session import Session
from autoplace.runtime.stage_program import Exports
from autoplace.slots import tell
from autoplace.workload import default_loss

if TYPE_CHECKING:
    from autoplace.group_tuner import GroupResult

__all__ = ["PLAN_VARIABLE", "Distribution", "give_out"]

PLAN_VARIABLE = "AUTOPLACE_PLAN"
"""Environment variable with the path of a plan file."""
_TIMED_PASSES = 3

_session: Session | None = None


def _joined() -> Session:
    """Return this process's session; all wrappers of a program share it."""
    global _session
    if _session is None:
        _session = Session.join()
        atexit.register(_session.close)
    return _session


def give_out(model: torch.nn.Module, session: Session) -> None:
    """Start all ranks from rank 0's parameters and buffers; every rank has to call it."""
    tensors = [t.detach() for t in (*model.parameters(), *model.buffers()) if not t.is_meta]
    own = [float(t.double().sum()) for t in tensors]
    if any(other != own for other in session.gather(own)):
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)


class Distribution:
    """What a wrapper asks for in a process that torchrun started.

    Args:
        model: The model; rank 0's parameters are given to all ranks where theirs differ.
        options: The wrapper's.
        session: The group.
    """

    def __init__(self, model: torch.nn.Module, options: Mapping[str, Any], session: Session) -> None:
        self.model, self.session, self._options = model, session, options
        self.lookout = Lookout(session)
        self.runner: DistributedModel | None = None
        self.result: GroupResult | None = None
        """What tuning found; None where the plan was given or no tuning ran."""
        self._outdated = False
        give_out(model, session)

    @staticmethod
    def of(model: torch.nn.Module, options: Mapping[str, Any]) -> Distribution | None:
        """Return one where torchrun started this process and nobody but us made a process group; else None."""
        if not Session.launched():
            return None
        if torch.distributed.is_initialized() and _session is None:
            return None
        return Distribution(model, options, _joined())

    # -- what the wrapper's methods do -----------------------------------------------------------------------------

    @property
    def plan(self) -> Plan | None:
        """The plan that runs; None before the first batch."""
        return None if self.runner is None else self.runner.plan

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call on this rank's part of a batch."""
        runner = self.runner
        if runner is None:
            with self.lookout.watching(step=False):
                runner = self._given()
                if runner is None and torch.is_grad_enabled():
                    runner = self._install(self._by_speed(args, kwargs))
        return (runner or self.model)(*args, **kwargs)

    def train_step(self, inputs: Any, targets: Any = None) -> torch.Tensor:
        """Run forward and backward of a whole batch."""
        runner = self.runner
        if runner is None:
            with self.lookout.watching(step=False):
                runner = self._given() or self.tune(inputs, targets)
        return runner.train_step(inputs, targets)

    def shard(self, batch: Any) -> Any:
        """Return this rank's part of a whole batch."""
        runner = self.runner or self._given()
        if runner is not None:
            return runner.shard(batch)
        shares, rank = self.shares()
        return part_of(batch, at_least_one(batch_size(pytree.tree_leaves(batch)), shares), rank)

    def shares(self) -> tuple[list[float], int]:
        """Return every rank's part of a batch, and this rank; even parts as long as nothing is planned."""
        count, rank = self.session.world_size, self.session.rank
        shares = [1.0 / count] * count if self.runner is None else self.runner.rank_shares()
        if self.runner is not None and self.runner.plan.shape == "hybrid":
            raise InputError("a hybrid plan deals batches out by train_step; give it whole batches")
        return shares, rank

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients on this rank alone."""
        if self.runner is None:
            raise InputError("nothing is planned yet; run one batch before no_sync(), or give a plan")
        with self.runner.no_sync():
            yield

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale all ranks' gradients by their common norm."""
        if self.runner is None:
            raise InputError("there are no gradients yet; run one batch before clip_grad_norm_()")
        return self.runner.clip_grad_norm_(max_norm)

    def explain(self) -> str:
        """Return what runs where, and what was measured, as text."""
        if self.runner is None:
            return "Nothing is planned yet: run one batch."
        from autoplace.report.ranks import explain_ranks

        return explain_ranks(self.runner.plan, self.session.members, self.result)

    def close(self) -> None:
        """End the heartbeats and the plan; the process group stays for other models."""
        self.lookout.close()
        if self.runner is not None:
            self.runner.close()
        self.runner = None

    # -- plans -----------------------------------------------------------------------------------------------------

    def _install(self, plan: Plan, exports: Exports | None = None) -> DistributedModel:
        if self.runner is not None:
            self.runner.synchronize()
            self.runner.close()
        self.runner = DistributedModel(
            self.model,
            plan,
            self.session,
            loss=self._options["loss"],
            batch_norm=self._options["batch_norm"],
            lookout=self.lookout,
            exports=exports,
        )
        return self.runner

    def _given(self) -> DistributedModel | None:
        """Put the user's plan to work, if there is one."""
        plan: Plan | None = self._options["plan"]
        path = os.environ.get(PLAN_VARIABLE)
        if plan is None and path:
            plan = self.session.together(lambda: Plan.load(path))
        if plan is None or self._of_absent_hosts(plan):
            return None
        here = self.session.cluster.fingerprint
        if plan.cluster_fingerprint and plan.cluster_fingerprint != here:
            raise PlanFileError("the plan was made for another cluster than this one; tune again with --cluster")
        return self._install(plan)

    def _of_absent_hosts(self, plan: Plan) -> bool:
        """Return whether a plan was made for hosts that are gone, and say once that another takes its place."""
        session = self.session
        if not session.absent:
            return False
        whole, here = session.whole.fingerprint, session.cluster.fingerprint
        needed = set(plan.devices) - set(session.members)
        if plan.cluster_fingerprint == here or not (plan.cluster_fingerprint == whole or needed):
            return False
        if not self._outdated and session.rank == 0:
            tell(f"the plan was made for hosts that are gone ({', '.join(session.absent)}); a new one replaces it")
        self._outdated = True
        return True

    def tune(self, inputs: Any, targets: Any = None, *, budget_s: float | None = None) -> DistributedModel:
        """Find the plan under which a training step is fastest on these ranks, and put it to work."""
        from autoplace.group_tuner import tune_group

        if self.runner is not None:
            self.runner.synchronize()
        exports: Exports = {}
        self.result = tune_group(
            self.model,
            inputs,
            self.session,
            targets=targets,
            loss=self._options["loss"],
            batch_norm=self._options["batch_norm"],
            objective=self._options["objective"],
            policy=self._options["policy"],
            budget_s=budget_s or self._options["budget_s"],
            exports=exports,
        )
        return self._install(self.result.plan, exports)

    def _by_speed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        """Return the data parallel plan whose shares are the speeds of the ranks on their own parts."""

        def per_sample_s() -> float:
            seconds = []
            with preserved(self.model):
                for _ in range(_TIMED_PASSES + 1):
                    clear_gradients(self.model)
                    start = time.perf_counter()
                    default_loss(self.model(*args, **kwargs)).backward()
                    seconds.append(time.perf_counter() - start)
            return min(seconds[1:]) / batch_size(pytree.tree_leaves((args, kwargs)))

        speeds = [1.0 / s for s in self.session.gather(self.session.together(per_sample_s))]
        total = sum(speeds)
        replicas = tuple(
            Replica(assignment={".": name}, share=speed / total)
            for name, speed in zip(self.session.members, speeds, strict=True)
        )
        return Plan(replicas=replicas, strategy="measured speed", cluster_fingerprint=self.session.cluster.fingerprint)
