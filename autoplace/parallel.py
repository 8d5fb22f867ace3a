"""`OptimizedParallel`: the one changed line. A wrapper that behaves like the model and runs it under the best plan.

The wrapper and the model have one `__dict__`: parameters, buffers, children, hooks, flags, attributes are the model's
own under their own names, read or set, before or after wrapping. Its class is made for the model's class, so that
special methods and overridden ones are the model's too → `autoplace.disguise`. What runs a call is decided by mode and
input shapes → `autoplace.slots`; where plans come from → `autoplace.planning`.
"""

from __future__ import annotations

import copy
import os
import pickle
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from autoplace.disguise import disguised
from autoplace.errors import InputError
from autoplace.hardware.cluster import Cluster
from autoplace.plan import Plan
from autoplace.planning import plan_slot, replan_slot, tune_slot
from autoplace.problem import Objective
from autoplace.result import TuneResult
from autoplace.runtime.monitor import Monitor
from autoplace.slots import State
from autoplace.tracer import compiling_here
from autoplace.tuner import Progress
from autoplace.workload import inputs_of, loss_of

__all__ = ["OptimizedParallel"]

_WEIGHTS = {"latency": 0.0, "edp": 0.5, "energy": 1.0}
"""Names of objectives that `tune` takes, and their energy weights."""


class OptimizedParallel(torch.nn.Module):
    """Run a model under the placement plan that short real runs on this machine's devices found best.

    The first call in a mode (`train()` or `eval()`, gradients on or off) tunes on the inputs of that call; later calls
    with inputs of those shapes run the plan that was kept. Calls with other shapes run plain PyTorch at once. Shapes
    that come 32 times get a tuning of their own, three more a mode at most. A plan given as `plan` runs all shapes that
    it can. A plan that would change the model's habits (hooks that fire once a part, batch statistics of a part of the
    batch) does not run as long as that is so. Only calls of the model run a plan: its methods (`generate`) call the
    model itself, as do tracers, `torch.compile` of the wrapper, transforms of `torch.func` and processes of a group.

    Attributes and methods are the model's, but for those documented here, which hide the model's of the same name.

    Args:
        model: Any module. It is shared, never copied.
        energy_aware: Minimise the energy-delay product instead of latency; the same as `energy_weight=0.5`.
        energy_weight: w of J = latency^(1-w) * energy^w; None leaves it to `energy_aware`.
        plan: A plan, or the path of a plan file, to run without tuning; checked on the first inputs.
        loss: Output to scalar loss, for tuning in training; None takes the output's `loss`, else a mean square.
        cluster: The devices; None discovers this machine's.
        policy: Learned policy that proposes beside the other strategies; None goes without.
        budget_s: Wall seconds for the real runs of one tuning.
        track: Whether a tuning is logged as an MLflow run.
        replan: What to do once calls under the plan have become slower: True measures the plan beside plain PyTorch
            again, for a few seconds before a call, and goes back to plain PyTorch if the plan is no longer better;
            `"tune"` then tunes again as well; False does nothing. Only calls of the thread, and with the input shapes,
            that the plan was installed with are watched.
        precision: `"float32"` computes as the model does; `"auto"` allows bfloat16 autocast.
        compile: Whether plans may use `torch.compile`; `"auto"` = where its compile time pays back within `run_s`.
        run_s: Seconds that the model is going to run, all calls together.
        background: Whether tuning runs beside the program, on a copy of the model, while plain PyTorch serves.
        cache: Whether plans of earlier programs are used, after a short check, and the ones found are kept.
        progress: Told about a tuning's phases; None shows them on a terminal, False shows nothing.
        batch_norm: Over several ranks, `"whole"` refuses plans that split the batch of a model with batch norm, as its
            statistics would be those of a part; `"local"` takes that, as DistributedDataParallel does.

    In a process that torchrun (or `autoplace run`) started, the model runs over all ranks → `autoplace.distribution`: a
    call takes this rank's part of the batch (see `shard`), and `train_step` the whole batch.

    Raises:
        InputError: If `model` is no module, a weight is out of range or an option is none of its values.
        PlanFileError: If the plan file is missing or malformed.
    """

    __slots__ = ("_state",)

    def __new__(cls, model: Any = None, *_: Any, **__: Any) -> OptimizedParallel:
        """Make an instance of the class for the model's class."""
        if isinstance(model, OptimizedParallel):
            model = model._state.model
        made = disguised(cls, type(model)) if isinstance(model, torch.nn.Module) else cls
        wrapper: OptimizedParallel = object.__new__(made)
        return wrapper

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        energy_aware: bool = False,
        energy_weight: float | None = None,
        plan: Plan | str | Path | None = None,
        loss: Callable[[Any], torch.Tensor] | None = None,
        cluster: Cluster | None = None,
        policy: str | None = "default",
        budget_s: float = 60.0,
        track: bool = True,
        replan: bool | Literal["tune"] = True,
        precision: Literal["float32", "auto"] = "float32",
        compile: bool | Literal["auto"] = "auto",
        run_s: float = 600.0,
        background: bool = False,
        cache: bool = True,
        progress: Progress | Literal[False] | None = None,
        batch_norm: Literal["whole", "local"] = "whole",
    ) -> None:
        # No `super().__init__()`: it would make a state beside the model's.
        if isinstance(model, OptimizedParallel):
            model = model._state.model
        if not isinstance(model, torch.nn.Module):
            raise InputError(f"OptimizedParallel wraps a torch.nn.Module and got a {type(model).__name__}")
        for name, value, allowed in (
            ("replan", replan, (True, False, "tune")),
            ("precision", precision, ("float32", "auto")),
            ("compile", compile, (True, False, "auto")),
            ("batch_norm", batch_norm, ("whole", "local")),
        ):
            if value not in allowed:
                raise InputError(f"{name} is {value!r}; use {', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}")
        if budget_s <= 0:
            raise InputError(f"budget_s is {budget_s}; use more than 0")
        weight = energy_weight if energy_weight is not None else (0.5 if energy_aware else 0.0)
        options = {
            "objective": Objective(energy_weight=weight),
            "plan": Plan.load(plan) if isinstance(plan, (str, Path)) else plan,
            "loss": loss,
            "cluster": cluster,
            "policy": policy,
            "budget_s": budget_s,
            "track": track,
            "replan": replan,
            "precision": precision,
            "compile": compile,
            "run_s": run_s,
            "background": background,
            "cache": cache,
            "progress": progress,
            "batch_norm": batch_norm,
        }
        state = State(model, options, plan_slot, replan_slot)
        if "WORLD_SIZE" in os.environ:  # torchrun's
            from autoplace.distribution import Distribution

            state.distribution = Distribution.of(model, options)
        object.__setattr__(self, "__dict__", model.__dict__)
        object.__setattr__(self, "_state", state)
        weakref.finalize(self, State.drop, state)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run the model; the first call in a mode finds a plan for it."""
        state = self._state
        model = state.model
        if compiling_here():
            return model(*args, **kwargs)
        if state.moves:
            return state.call_moving(args, kwargs)
        if state.modes[2 * model.training + torch.is_grad_enabled()].settled:
            return model(*args, **kwargs)
        return state.call(args, kwargs)

    def forward(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run the model without its own hooks, as `forward` of any module does."""
        model = self._state.model
        if model._forward_hooks or model._forward_pre_hooks or model._backward_hooks or model._backward_pre_hooks:
            return model.forward(*args, **kwargs)
        return self(*args, **kwargs)

    # -- feeling like the model ------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Return the model's attribute."""
        if name == "_state":  # half-made
            raise AttributeError(f"this {type(self).__name__} has not been initialised")
        return getattr(self._state.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set the model's attribute."""
        setattr(self._state.model, name, value)

    def __delattr__(self, name: str) -> None:
        """Delete the model's attribute."""
        delattr(self._state.model, name)

    def __dir__(self) -> list[str]:
        """Return the model's names and the wrapper's own."""
        return sorted({*object.__dir__(self), *dir(self._state.model)})

    def __repr__(self) -> str:
        """Show what runs, and the model."""
        plan = self.plan
        runs = "not planned yet" if plan is None else plan.shape
        return f"OptimizedParallel(plan={runs}, model={self._state.model!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedParallel:
        """Return a wrapper around a copy of the model; it plans for itself."""
        twin = _rebuild(copy.deepcopy(self._state.model, memo), self._state.options)
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> Any:
        """Pickle the model and the options; what runs plans stays behind, and what cannot be pickled is left out."""
        options = {**self._state.options, "progress": None}
        try:
            pickle.dumps(options["loss"])
        except Exception:  # a lambda, say; the model itself would pickle
            options["loss"] = None
        return _rebuild, (self._state.model, options)

    # -- plans -----------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan | None:
        """The plan that runs in the present mode; None before its first call."""
        if self._state.distribution is not None:
            return self._state.distribution.plan
        first = self._state.shown().first
        return None if first is None else first.running

    @property
    def monitor(self) -> Monitor | None:
        """What watches the calls of the present mode for drift; None where plain PyTorch runs or nothing is watched."""
        first = self._state.shown().first
        return None if first is None or first.watch is None else first.watch.monitor

    def tune(
        self,
        inputs: Any,
        *,
        budget_s: float | None = None,
        objective: Objective | Literal["latency", "energy", "edp"] | None = None,
    ) -> TuneResult:
        """Tune for the present mode on these inputs, replace the plan for their shapes, and return what was found.

        Args:
            inputs: A tensor, a tuple of positional inputs, or a mapping of keyword inputs.
            budget_s: Wall seconds for the real runs; None = the wrapper's.
            objective: What to tune for: an Objective, or `latency`, `energy`, or `edp` (energy-delay product); None =
                the wrapper's.

        Raises:
            InputError: If the model cannot run on the inputs, or another thread is tuning.
        """
        if isinstance(objective, str):
            if objective not in _WEIGHTS:
                raise InputError(f"objective {objective!r} is unknown; use {', '.join(_WEIGHTS)} or an Objective")
            objective = Objective(energy_weight=_WEIGHTS[objective])
        if self._state.distribution is not None:
            raise InputError("over several ranks the first train_step() tunes, or `autoplace tune --cluster` does")
        args, kwargs = inputs_of(inputs)
        state = self._state
        mode = state.mode()
        with state.planning(exclusive=mode.training) as mine:
            if not mine:
                raise InputError("another thread is tuning this model; wait for it")
            return tune_slot(state, mode, args, kwargs, budget_s=budget_s, objective=objective)

    # -- over several ranks, and as plain PyTorch on one ------------------------------------------------------------

    def train_step(self, inputs: Any, targets: Any = None) -> torch.Tensor:
        """Run forward and backward of a whole batch; the optimizer's step is the caller's.

        Over several ranks every one passes the whole batch and gets its loss, whatever the plan; the first call tunes.
        On one machine it is a call, the loss and its backward.

        Args:
            inputs: A tensor, a tuple of positional inputs, or a mapping of keyword inputs.
            targets: Handed to `loss` beside the output; None = it takes the output alone.

        Returns:
            The loss, a detached scalar.

        Raises:
            ExecutionError: If the plan cannot run this batch, or a rank was lost.
        """
        if self._state.distribution is not None:
            return self._state.distribution.train_step(inputs, targets)
        args, kwargs = inputs_of(inputs)
        loss = loss_of(self._state.options["loss"], self(*args, **kwargs), targets)
        loss.backward()
        return loss.detach()

    def shard(self, batch: Any) -> Any:
        """Return this rank's part of a whole batch, of any nesting; all of it on one machine."""
        distribution = self._state.distribution
        return batch if distribution is None else distribution.shard(batch)

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate gradients on this rank alone; the first backward after it sums them over the ranks."""
        distribution = self._state.distribution
        return nullcontext() if distribution is None else distribution.no_sync()

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their norm over all ranks' parameters is at most `max_norm`; return the norm."""
        distribution = self._state.distribution
        if distribution is None:
            return torch.nn.utils.clip_grad_norm_(self._state.model.parameters(), max_norm)
        return distribution.clip_grad_norm_(max_norm)

    def save_checkpoint(self, path: str | Path, optimizer: torch.optim.Optimizer | None = None, **extra: Any) -> None:
        """Write parameters, buffers and the optimizer's state as a folder; every rank calls it.

        Args:
            path: The folder, which all ranks can write to.
            optimizer: Of this model's parameters.
            **extra: What else JSON can hold, for `load_checkpoint` to return.
        """
        from autoplace.runtime.distributed.state import save_checkpoint

        distribution = self._state.distribution
        if distribution is None:
            save_checkpoint(self._state.model, path, optimizer, **extra)
            return
        with distribution.lookout.watching(step=False):
            save_checkpoint(self._state.model, path, optimizer, runner=distribution.runner, **extra)

    def load_checkpoint(self, path: str | Path, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
        """Read what `save_checkpoint` wrote, under whatever plan and on however many ranks; returns its `extra`.

        Raises:
            InputError: If there is no complete checkpoint, or it is of another model.
        """
        from autoplace.runtime.distributed.state import load_checkpoint

        distribution = self._state.distribution
        with nullcontext() if distribution is None else distribution.lookout.watching(step=False):
            return load_checkpoint(self._state.model, path, optimizer)

    def _rank_shares(self) -> tuple[list[float], int]:
        """Return every rank's part of the batch, and this rank, for `WeightedDistributedSampler`."""
        distribution = self._state.distribution
        return ([1.0], 0) if distribution is None else distribution.shares()

    def explain(self) -> str:
        """Return what runs where, and why, as a table for people."""
        from autoplace.report.explain import explain_plan

        state = self._state
        if state.distribution is not None:
            return state.distribution.explain()
        mode = state.shown()
        slot = mode.first
        if slot is None:
            return "Nothing is planned yet: call the model once, or its tune()."
        text = explain_plan(
            state.model,
            slot.running,
            cluster=slot.cluster,
            result=mode.result,
            facts=slot.facts,
            mode="training" if mode.training and mode.gradients else "inference",
        )
        return f"Plain PyTorch runs for now: {slot.paused}.\n\n{text}" if slot.paused else text

    def visualize_performance(self, output_dir: str | Path = "./visualizations") -> Path:
        """Write the report of the last tuning (HTML, plots, trace) and return the path of the HTML file.

        Where the plan came from the cache of an earlier program, it tunes first.

        Raises:
            InputError: If nothing has been tuned yet.
        """
        from autoplace.report import write_report

        state = self._state
        if not state.results and state.last_call is not None:
            mode, args, kwargs = state.last_call
            with state.planning(exclusive=mode.training) as mine:
                if mine:
                    tune_slot(state, mode, args, kwargs)
        if not state.results:
            raise InputError("nothing to show yet: call the model once, so that it is tuned on real inputs")
        path: Path = write_report(state.results[-1], Path(output_dir))
        return path

    def close(self) -> None:
        """End the threads of the plans; the next call plans again."""
        self._state.drop()
        if self._state.distribution is not None:
            self._state.distribution.close()


def _rebuild(model: torch.nn.Module, options: Mapping[str, Any]) -> OptimizedParallel:
    given = dict(options)
    weight = given.pop("objective").energy_weight
    return OptimizedParallel(model, energy_weight=weight, **given)
