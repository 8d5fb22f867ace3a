"""What a wrapper remembers of each mode and input signature: the plan, its executor, and how often it was called.

A *mode* is `train()` or `eval()`, with gradients on or off. A *signature* is the shapes, flags and nesting of a call's
inputs → `autoplace.replan.signature_of`. A *slot* is what runs the calls of a signature. The rules:

1. The first call of a mode is planned (→ `autoplace.planning`); a call of another signature runs plain PyTorch at once.
2. A signature that came `CALLS_BEFORE_PLANNING` times gets a plan of its own, `MORE_PLANNINGS` of them a mode at most.
3. A plan that the user gave runs all signatures of its mode; one that its executor cannot run goes to plain PyTorch.
4. A call while another thread plans runs plain PyTorch where that is safe (inference, no hooks taken off), else waits.
5. After `os.fork` the child, which has none of the threads, runs plain PyTorch.

Holds no reference to the wrapper, so that a wrapper that is no longer used ends its threads.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from autoplace.errors import ExecutionError, PlanFileError, PolicyError, TrackingError
from autoplace.hardware.cluster import Cluster
from autoplace.plan import Plan
from autoplace.replan import Signature, Watch, in_the_open, may_interrupt, signature_of, under_compiler
from autoplace.runtime import Executor
from autoplace.runtime.fitness import Habits

if TYPE_CHECKING:
    from autoplace.background import BackgroundTuning
    from autoplace.distribution import Distribution
    from autoplace.result import TuneResult

__all__ = ["Mode", "Slot", "State", "tell"]

CALLS_BEFORE_PLANNING = 32
"""Calls of a signature before it gets a plan of its own."""
MORE_PLANNINGS = 3
"""Plannings of a mode after its first."""
_MOST_SIGNATURES = 512
"""Signatures that are remembered per mode."""
_PACKAGE = str(Path(__file__).parent)


def tell(message: str) -> None:
    """Warn, at the line of the user's that led here."""
    frame, level = sys._getframe(1), 2
    torch_folder = str(Path(torch.__file__).parent)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_PACKAGE, torch_folder)):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


class Slot:
    """What runs the calls of a signature.

    Args:
        plan: The plan that runs, or the one that waits until it fits the model's habits.
        executor: Runs it; None = plain PyTorch runs.
        habits: Says whether the plan may run; None for plain PyTorch.
        watch: Compares the calls' latency; None = nobody does.
        cluster: The devices that the plan names.
        facts: What is known of the plan, for → `autoplace.report.explain`.
    """

    __slots__ = ("cluster", "executor", "facts", "failure", "habits", "paused", "plan", "watch")

    def __init__(
        self,
        plan: Plan,
        executor: Executor | None = None,
        habits: Habits | None = None,
        watch: Watch | None = None,
        *,
        cluster: Cluster,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.plan, self.executor, self.habits, self.watch = plan, executor, habits, watch
        self.cluster, self.facts = cluster, facts or {}
        self.paused = ""
        """Why plain PyTorch runs for now."""
        self.failure = ""
        """Why planning failed; a slot with one is not installed yet."""

    @property
    def waits(self) -> bool:
        """Whether the plan has never run, as the model's habits forbade it."""
        return self.executor is None and self.habits is not None

    @property
    def running(self) -> Plan:
        """The plan that runs: the identity plan where the slot's own is paused."""
        return Plan.plain() if self.executor is None or self.paused else self.plan

    def close(self) -> None:
        """End the executor's threads."""
        if self.executor is not None:
            self.executor.close()


class Mode:
    """The slots of one mode of the model.

    Args:
        training: Whether the model is in `train()`.
        gradients: Whether gradients are on.
    """

    def __init__(self, training: bool, gradients: bool) -> None:
        self.training, self.gradients = training, gradients
        self.slots: dict[Signature, Slot] = {}
        self.first: Slot | None = None
        """The slot of the first planning, or of the plan that the user gave."""
        self.common = False
        """Whether `first` runs all signatures."""
        self.plannings = 0
        self.counts: dict[Signature, int] = {}
        """Calls of signatures that have no slot."""
        self.pending: BackgroundTuning | None = None
        self.pending_signature: Signature = ()
        self.settled = False
        """Whether plain PyTorch runs everything from now on."""
        self.result: TuneResult | None = None

    def put(self, signature: Signature, slot: Slot, *, common: bool = False) -> Slot:
        """Install a slot, and end what it replaces.

        Args:
            signature: Whose calls it runs.
            slot: What runs them.
            common: Whether it runs the calls of all other signatures too, and no more is to be planned.
        """
        old = self.first if common else self.slots.get(signature)
        if old is not None:
            old.close()
            self.slots = {key: other for key, other in self.slots.items() if other is not old}
        if self.first is None or self.first is old:
            self.first, self.common = slot, common
        self.slots[signature] = slot
        self.counts.pop(signature, None)
        self.plannings = MORE_PLANNINGS + 1 if common else self.plannings + 1
        self.settle()
        return slot

    def settle(self) -> None:
        """Find out whether anything but plain PyTorch can still come."""
        done = self.common or self.plannings > MORE_PLANNINGS
        plain = all(slot.executor is None and slot.habits is None for slot in self.slots.values())
        self.settled = done and plain and self.pending is None and self.first is not None

    def due(self, signature: Signature) -> bool:
        """Count a call of a signature without a slot; return whether it is to be planned."""
        if self.plannings > MORE_PLANNINGS or self.pending is not None:
            return False
        if self.plannings == 0:
            return True
        if len(self.counts) >= _MOST_SIGNATURES:
            self.counts.clear()
        self.counts[signature] = calls = self.counts.get(signature, 0) + 1
        return calls > CALLS_BEFORE_PLANNING

    def close(self) -> None:
        """End all executors' threads, and a tuning in the background."""
        if self.pending is not None:
            self.pending.cancel()
        for slot in {id(slot): slot for slot in (*self.slots.values(), self.first) if slot is not None}.values():
            slot.close()


class State:
    """All that a wrapper knows besides the model's own state.

    Args:
        model: The wrapped model.
        options: The wrapper's arguments.
        planner: Finds the slot for a signature: `autoplace.planning.plan_slot`.
        replanner: Looks into a plan whose calls became slower: `autoplace.planning.replan_slot`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        options: Mapping[str, Any],
        planner: Callable[..., Slot | None],
        replanner: Callable[..., Slot],
    ) -> None:
        self.model, self.options = model, dict(options)
        self._plan_slot, self._replan_slot = planner, replanner
        self.lock = threading.Lock()
        self.owner: int | None = None
        """The thread that plans."""
        self.exclusive = False
        """Whether other threads must wait for it."""
        self.told: set[str] = set()
        self.results: list[TuneResult] = []
        self.last_call: tuple[Mode, tuple[Any, ...], Mapping[str, Any]] | None = None
        """Mode and inputs of the last plan that came from the cache, to be tuned on when a report is asked for."""
        self.forked = False
        self._abandoned: list[Any] = []
        self.moves = torch.accelerator.is_available()
        """Whether inputs may be on another device than the model."""
        self._home: torch.device | None = None
        self._home_of: torch.Tensor | None = None
        self._home_known = False
        self.modes: list[Mode] = []
        self.distribution: Distribution | None = None
        """What runs the model where torchrun started this process; None on one machine."""
        self.forget()
        _states.add(self)

    # -- the modes ------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Start anew, without any plan."""
        self.modes = [Mode(bool(i // 2), bool(i % 2)) for i in range(4)]
        self._home_known = False

    def drop(self) -> None:
        """End all plans' threads and start anew."""
        modes = self.modes
        self.forget()
        for mode in modes:
            mode.close()

    def mode(self) -> Mode:
        """Return the present mode's slots."""
        return self.modes[2 * bool(self.model.training) + torch.is_grad_enabled()]

    def shown(self) -> Mode:
        """Return the present mode, or its like with gradients off (or on) where that alone has been planned for.

        People call under `torch.no_grad()` and ask outside of it.
        """
        mode = self.mode()
        other = self.modes[2 * mode.training + (not mode.gradients)]
        return other if mode.first is None and other.first is not None else mode

    def once(self, key: str, message: str) -> None:
        """Warn, the first time that the key comes."""
        if key not in self.told:
            self.told.add(key)
            tell(message)

    @contextmanager
    def planning(self, *, exclusive: bool) -> Iterator[bool]:
        """Hold the lock; yields False at once where another thread holds it or this one already does."""
        if self.owner == threading.get_ident() or not self.lock.acquire(blocking=False):
            yield False
            return
        self.owner, self.exclusive = threading.get_ident(), exclusive
        lock = self.lock
        try:
            yield True
        finally:
            self.owner, self.exclusive = None, False
            lock.release()

    # -- calls ----------------------------------------------------------------------------------------------------

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call whose mode is not settled."""
        model = self.model
        if self.distribution is not None:
            return self.distribution.call(args, kwargs)
        if self.forked:
            self._tell_forked()
            return model(*args, **kwargs)
        if not in_the_open() or under_compiler():
            self._tell_untuned()
            return model(*args, **kwargs)
        if self.owner is not None and not self._may_go_on():
            return model(*args, **kwargs)
        mode = self.mode()
        if mode.pending is not None and mode.pending.done:
            found = self._plan(mode, mode.pending_signature, args, kwargs)
            if found is not None and found.failure:
                self._failed(mode, mode.pending_signature, found)
        signature = signature_of(args, kwargs)
        slot = mode.slots.get(signature)
        if slot is None or (slot.habits is not None and slot.waits and not slot.habits.reason()):
            slot = self._missed(mode, signature, args, kwargs)
        if slot is None or slot.executor is None:
            output = model(*args, **kwargs)  # where planning failed, this raises the model's own error
            if slot is not None and slot.failure:
                self._failed(mode, signature, slot)
            return output
        return self._planned(mode, slot, signature, args, kwargs)

    def _may_go_on(self) -> bool:
        """Wait for another thread's planning where it must not be disturbed; False where plain PyTorch is to run."""
        if self.owner == threading.get_ident() or not self.exclusive:
            return False
        with self.lock:
            return True

    def _missed(self, mode: Mode, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Slot | None:
        first = mode.first
        if mode.common and first is not None:
            if not first.waits:
                if len(mode.slots) < _MOST_SIGNATURES:
                    mode.slots[signature] = first
                return first
            if first.habits is not None and first.habits.reason():
                return None
        elif not mode.due(signature):
            return None
        return self._plan(mode, signature, args, kwargs) if self._worth_planning(args, kwargs) else None

    def _plan(self, mode: Mode, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Slot | None:
        """Plan a signature; whatever goes wrong, plain PyTorch runs and the user is told why."""
        with self.planning(exclusive=mode.training) as mine:
            if not mine:
                return mode.slots.get(signature)
            try:
                return self._plan_slot(self, mode, signature, args, kwargs)
            except (PolicyError, PlanFileError, TrackingError):  # the user's options, not the call
                raise
            except Exception as error:
                slot = Slot(Plan.plain(), cluster=self.options["cluster"] or Cluster.discover(measure_links=False))
                slot.failure = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
                return slot

    def _failed(self, mode: Mode, signature: Signature, slot: Slot) -> None:
        self.once(f"failed {slot.failure}", f"autoplace runs plain PyTorch, as planning failed: {slot.failure}")
        slot.facts, slot.failure = {"verdict": f"planning failed: {slot.failure}"}, ""
        mode.put(signature, slot)

    def _worth_planning(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether passes of our own may run now, and could tell anything; tells why not, once."""
        parameters = list(self.model.parameters())
        if any(not isinstance(p, torch.nn.Parameter) or torch.nn.parameter.is_lazy(p) for p in parameters):
            return False  # lent for one call (torch.func.functional_call), or made by this first call
        if any(p.is_meta for p in parameters):
            self.once(
                "meta",
                "autoplace runs plain PyTorch: the model is on the meta device, where nothing can be measured; it "
                "plans on the first call after to_empty() or load_state_dict(assign=True)",
            )
            return False
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x.dim() > 0 and x.shape[0] == 0 for x in tensors[:1]):
            self.once("empty", "autoplace runs plain PyTorch: an empty batch is nothing to plan for")
            return False
        if not may_interrupt(self.model):
            self._tell_untuned()
            return False
        return True

    def _planned(
        self, mode: Mode, slot: Slot, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        model, watch, executor = self.model, slot.watch, slot.executor
        assert executor is not None and slot.habits is not None  # a plan that runs has both
        slot.paused = slot.habits.reason()
        if slot.paused:
            self.once(slot.paused, f"autoplace runs plain PyTorch: {slot.paused}")
            return model(*args, **kwargs)
        try:
            if watch is None or not watch.covers(signature):
                return executor(*args, **kwargs)
            if watch.monitor.due and may_interrupt(model):
                slot = self._replanned(mode, slot, signature, args, kwargs)
            start = time.perf_counter()
            output = (slot.executor or model)(*args, **kwargs)
            watch.monitor.observe((time.perf_counter() - start) * 1e3)
            return output
        except ExecutionError as error:
            refusal = str(error)
        output = model(*args, **kwargs)  # where the executor met the model's own error, this raises it
        if mode.slots.get(signature) is slot:
            mode.slots[signature] = Slot(Plan.plain(), cluster=slot.cluster)
            if not mode.common and mode.first is not slot:
                slot.close()
        self.once(f"cannot {refusal}", f"autoplace runs this batch by plain PyTorch: {refusal}")
        return output

    def _replanned(
        self, mode: Mode, slot: Slot, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Slot:
        with self.planning(exclusive=mode.training) as mine:
            return self._replan_slot(self, mode, slot, signature, args, kwargs) if mine else slot

    # -- inputs on another device ---------------------------------------------------------------------------------

    @property
    def home(self) -> torch.device | None:
        """The device that all parameters and buffers are on; None when there is no such one, or nothing can be moved.

        Models that `accelerate` has spread over devices move their inputs themselves.
        """
        if not self._home_known or (self._home_of is not None and self._home_of.device != self._home):
            tensors = [*self.model.parameters(), *self.model.buffers()]
            one = len({tensor.device for tensor in tensors}) == 1 and not hasattr(self.model, "hf_device_map")
            one = one and not tensors[0].is_meta
            self._home_of, self._home = (tensors[0], tensors[0].device) if one else (None, None)
            self._home_known = True
        return self._home

    def call_moving(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call with inputs on the model's device, and outputs where the inputs were."""
        home = self.home
        strangers = [
            x
            for x in pytree.tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor) and x.device != home and x.dim()
        ]
        if home is None or not strangers or any(x.is_meta for x in strangers):
            return self.model(*args, **kwargs) if self.mode().settled else self.call(args, kwargs)
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: x.to(home), (args, kwargs))
        output = self.call(args, kwargs)
        back = strangers[0].device
        return pytree.tree_map_only(torch.Tensor, lambda x: x.to(back) if x.device == home else x, output)

    # -- words ----------------------------------------------------------------------------------------------------

    def _tell_untuned(self) -> None:
        if under_compiler():
            return
        self.once(
            "untuned",
            "autoplace runs plain PyTorch for now: passes of its own, or its threads, would meet the collectives, "
            "traces, modes or gradient hooks of this program; call the model once before they are installed",
        )

    def _tell_forked(self) -> None:
        self.once(
            "forked",
            "autoplace runs plain PyTorch in this process: it was forked, and the plan's threads stayed in its parent; "
            "wrap the model in the child, or start it by the 'spawn' method",
        )
        for mode in self.modes:
            mode.settled = True

    def after_fork(self) -> None:
        """Leave the parent's threads alone and run plain PyTorch from now on."""
        self._abandoned.append(self.modes)
        self.lock, self.owner, self.exclusive = threading.Lock(), None, False
        self.forked = True
        self.forget()


_states: weakref.WeakSet[State] = weakref.WeakSet()


def _after_fork() -> None:
    for state in list(_states):
        state.after_fork()


os.register_at_fork(after_in_child=_after_fork)
