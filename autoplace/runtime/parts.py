"""The engine under the single-device, replicas and stages executors: a pass as parts that run at the same time.

A part is one microbatch of one replica. A replica that lies wholly on one device has its parts run by that device's
worker. A replica over several devices has each part's call of the model made by a control thread, which sends the calls
of the placed modules to their devices and waits; several parts keep several devices busy, a pipeline in which the parts
take turns at each device (→ `turns`). A pass of one part is made by the caller's own thread.

The code between placed modules runs in the control threads: on one intra-op thread each, and on no device's account.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch

from autoplace.errors import ExecutionError
from autoplace.hardware.cluster import Cluster
from autoplace.outcome import Span
from autoplace.plan import Plan

from . import routing
from ._base import Executor
from .batch import batch_size, part_sizes
from .compiling import Compiler
from .layout import call_channels_last
from .segments import wait_all
from .sites import Call, Rows, Site, autocast_dtype, finish
from .tree import shared_object
from .turns import Turns, take_turn
from .worker import TaskThread
from .workers import Workers

__all__ = ["PartsExecutor"]


class PartsExecutor(Executor):
    """Runs a pass as parts on the plan's devices.

    Args:
        model: The model; its modules run themselves.
        plan: A plan with at least one replica.
        cluster: Where the plan's devices are described.

    Raises:
        ExecutionError: If the plan does not fit the model, the cluster or this machine.
    """

    def __init__(self, model: torch.nn.Module, plan: Plan, cluster: Cluster) -> None:
        super().__init__(model, plan, cluster)
        if plan.shape not in self.shapes:
            raise ExecutionError(
                f"{type(self).__name__} runs plans of shape {', '.join(self.shapes)}, not {plan.shape!r}; "
                "let build_executor choose"
            )
        autocast_dtype(plan.precision)  # refuses an unknown one before any thread starts
        replicas = [routing.resolve(model, replica.assignment, cluster) for replica in plan.replicas]
        self._targets = [{id(target.module): target for target in targets} for targets in replicas]
        self._labels = {key: target.path or "model" for targets in self._targets for key, target in targets.items()}
        self._compiler = Compiler(cpp_wrapper=plan.cpp_wrapper)
        self._turns = Turns()
        self._controls: list[Site] = []
        self._gated: list[torch.nn.Module] = []
        self._members: dict[int, list[dict[str, torch.nn.Parameter | None]]] = {}
        self._closed = False
        used = dict.fromkeys(d for targets in self._targets for t in targets.values() for d in t.calls.values())
        self._workers = Workers(plan, cluster, used)
        compiler = self._compiler if plan.compiled else None
        self._sites = {
            name: Site(worker, self._workers.ledger, precision=plan.precision, compiler=compiler)
            for name, worker in self._workers.by_name.items()
        }
        with ExitStack() as stack:
            stack.callback(self.close)
            for target in [t for targets in self._targets if not self._whole(targets) for t in targets.values()]:
                routing.install(target.module)
                self._gated.append(target.module)
            stack.pop_all()

    def _whole(self, targets: Mapping[int, routing.Target]) -> str | None:
        """Return the one device of a replica that lies wholly on it."""
        target = targets.get(id(self.model))
        return None if target is None or len(set(target.calls.values())) > 1 else target.device(0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass; see `Executor.__call__`."""
        if self._closed:
            raise ExecutionError("this executor is closed; build it again")
        whole = [self._whole(targets) for targets in self._targets]
        if len(self._targets) == 1 and self.plan.microbatches == 1 and whole[0] is None:
            with routing.routed(self._targets[0], self._dispatch):
                if self.plan.channels_last:
                    return call_channels_last(self.model, args, kwargs)
                return self.model(*args, **kwargs)
        call = Call(self.model, self.model, args, kwargs, self._parameters(self.model))
        call.channels_last = self.plan.channels_last
        if len(self._targets) == 1 and self.plan.microbatches == 1:
            site = self._sites[whole[0] or ""]
            return finish(call, wait_all([site.start(call)]))
        return self._run_parts(call, whole)

    def _run_parts(self, call: Call, whole: list[str | None]) -> Any:
        shared = shared_object(call.tree.leaves)
        if shared is not None:
            raise ExecutionError(
                f"an input of type {type(shared).__name__} cannot be split with the batch; use a plan with one part"
            )
        batch = batch_size(call.tree.leaves)
        batched = [isinstance(x, torch.Tensor) and x.dim() > 0 and x.shape[0] == batch for x in call.tree.leaves]
        futures, sizes, start = [], [], 0
        rows: list[Rows] = []
        of_pass = self._turns.new_pass()
        parts = part_sizes(self.plan, batch)
        for number, (replica, size) in enumerate(parts):
            rows = [(start, size) if split else None for split in batched] if len(parts) > 1 else []
            device = whole[replica]
            if device is not None:
                futures.append(self._sites[device].start(call, rows))
            else:
                part = copy.copy(call)
                part.turn = partial(self._turns.part, number, of_pass)
                part.function = self._routed(replica, part.turn)
                futures.append(self._control(number).start(part, rows))
            sizes.append(size)
            start += size
        return finish(call, wait_all(futures), sizes, rows)

    def _parameters(self, module: torch.nn.Module) -> Iterable[torch.nn.Parameter]:
        """Return a module's parameters, each once.

        The modules inside are looked up once per executor: walking them at every call of a layer takes longer than
        handing the call over.
        """
        if id(module) not in self._members:
            self._members[id(module)] = [m._parameters for m in module.modules() if m._parameters]
        return dict.fromkeys(p for own in self._members[id(module)] for p in own.values() if p is not None)

    def _routed(self, replica: int, turn: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with turn(), routing.routed(self._targets[replica], self._dispatch):
                return self.model(*args, **kwargs)

        return run

    def _control(self, number: int) -> Site:
        while len(self._controls) <= number:
            self._controls.append(Site(TaskThread(f"part {len(self._controls)}", threads=1)))
        return self._controls[number]

    def _dispatch(
        self,
        device: str,
        module: torch.nn.Module,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        call = Call(module, function, args, kwargs, self._parameters(module), self._labels[id(module)])
        take_turn(device)
        return finish(call, wait_all([self._sites[device].start(call)]))

    def busy_ms(self) -> dict[str, float]:
        """Return device name to busy milliseconds since the last call; see `Workers.busy_ms`."""
        return self._workers.busy_ms()

    def timeline(self) -> tuple[Span, ...]:
        """Return what ran when on the CPU devices since the last call, from the start of the first task."""
        return self._workers.ledger.take_spans()

    def compile_s(self) -> float:
        """Return the wall seconds that calls of this executor have spent in `torch.compile`, over all workers."""
        return self._compiler.seconds

    def close(self) -> None:
        """End the threads and take the gates out; calling it twice does nothing more."""
        if self._closed:
            return
        self._closed = True
        for module in self._gated:
            routing.remove(module)
        self._workers.close()
        for site in self._controls:
            site.thread.close()
