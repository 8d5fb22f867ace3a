"""`OptimizedParallel`: the one changed line. A wrapper that behaves like the model and runs it under the best plan.

The wrapper shares the model's own dictionaries of parameters, buffers and modules, so that `state_dict` keys,
`parameters()` and `modules()` are the model's own objects under their own names. The first call in a mode (inference or
training) tunes on the inputs of that call, and every later call runs the plan that was kept. A batch that the plan
cannot run, and a mode for which nothing beat plain PyTorch, runs plain PyTorch. Calls under a plan are watched: when
they have become slower, the plan is measured beside plain PyTorch again, and dropped if it is no longer better.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from autoplace.errors import AutoplaceError, ExecutionError, InputError, PlanFileError
from autoplace.hardware.cluster import Cluster
from autoplace.plan import Plan
from autoplace.problem import Objective
from autoplace.replan import Watch, lent_buffers, may_interrupt, recheck, under_compiler
from autoplace.result import TuneResult
from autoplace.runtime import Executor, build_executor
from autoplace.runtime.monitor import Monitor
from autoplace.workload import Workload

__all__ = ["OptimizedParallel"]

_log = logging.getLogger(__name__)


class OptimizedParallel(torch.nn.Module):
    """Run a model under the placement plan that short real runs on this machine's devices found best.

    Args:
        model: Any module. It is shared, never copied.
        energy_aware: Minimise the energy-delay product instead of latency; the same as `energy_weight=0.5`.
        energy_weight: w of J = latency^(1-w) * energy^w; None leaves it to `energy_aware`.
        plan: A plan, or the path of a plan file, to run without tuning; checked on the first inputs.
        loss: Output to scalar loss, for tuning in training; None takes `output.loss`, else a mean square.
        cluster: The devices; None discovers this machine's.
        policy: Learned policy that proposes beside the other strategies; None goes without.
        budget_s: Wall seconds for the real runs of one tuning.
        track: Whether a tuning is logged as an MLflow run.
        replan: What to do once calls under the plan have become slower: True measures the plan beside plain PyTorch
            again, for a few seconds before a call, and goes back to plain PyTorch if the plan is no longer better;
            `"tune"` then tunes again as well; False does nothing. Only calls of the thread, and with the input shapes,
            that the plan was installed with are watched.

    Raises:
        InputError: If `model` is no module, a weight is out of range or `replan` is none of its values.
        PlanFileError: If the plan file is missing or malformed.
    """

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
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise InputError(f"OptimizedParallel wraps a torch.nn.Module and got a {type(model).__name__}")
        if replan not in (True, False, "tune"):
            raise InputError(f"replan is {replan!r}; use True, False or 'tune'")
        super().__init__()
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
        }
        # Shared dictionaries: this module's parameters, buffers and children are the model's, under the same keys.
        state = self.__dict__
        state.update(_wrapped=model, _options=options, _executors={}, _watches={}, _results={})
        for shared in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            state[shared] = model.__dict__[shared]
        state["training"] = model.training

    def __getattr__(self, name: str) -> Any:
        """Return a parameter, buffer or child, else the wrapped model's attribute."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_wrapped" not in self.__dict__:  # half-made, as while unpickling
                raise
            return getattr(self.__dict__["_wrapped"], name)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the executors' threads behind; a copy tunes again on its first call."""
        return {**self.__dict__, "_executors": {}, "_watches": {}}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; the first call in a mode tunes on its inputs."""
        executor = self._executors.get(self.training)
        if executor is None:
            if not may_interrupt(self._wrapped):
                return self._run_untuned(args, kwargs)
            executor = self._prepare(args, kwargs)
        watch = self._watches.get(self.training)
        try:
            if watch is None or under_compiler() or not watch.covers(args, kwargs):
                return executor(*args, **kwargs)
            if watch.monitor.due and may_interrupt(self._wrapped):
                executor = self._replan(watch, executor, args, kwargs)
            start = time.perf_counter()
            output = executor(*args, **kwargs)
            watch.monitor.observe((time.perf_counter() - start) * 1e3)
            return output
        except ExecutionError as error:
            warnings.warn(f"autoplace runs this batch by plain PyTorch: {error}", stacklevel=2)
            return self._wrapped(*args, **kwargs)

    def tune(self, *args: Any, **kwargs: Any) -> TuneResult:
        """Tune for the present mode on these inputs, replace the plan, and return what was found."""
        from autoplace.tracked import tracked_tune
        from autoplace.tuner import TuneConfig, tune

        options = self._options
        config = TuneConfig(objective=options["objective"], budget_s=options["budget_s"], policy=options["policy"])
        tuned = tracked_tune if options["track"] else tune
        with lent_buffers(self._wrapped):
            result = tuned(self._workload(args, kwargs), config, cluster=options["cluster"])
        self._results[self.training] = result
        self._install(result.chosen.plan, result.cluster, Watch(args, kwargs, result.noise))
        return result

    @property
    def plan(self) -> Plan | None:
        """The plan of the present mode; None before the first call."""
        executor = self._executors.get(self.training)
        return executor.plan if executor is not None else None

    @property
    def monitor(self) -> Monitor | None:
        """What watches the calls of the present mode for drift; None where plain PyTorch runs or nothing is watched."""
        watch = self._watches.get(self.training)
        return watch.monitor if watch is not None else None

    def visualize_performance(self, output_dir: str | Path = "./visualizations") -> Path:
        """Write the report of the last tuning (HTML, plots, trace) and return the path of the HTML file.

        Raises:
            InputError: If nothing has been tuned yet.
        """
        from autoplace.report import write_report

        if not self._results:
            raise InputError("nothing to show yet: call the model once, so that it is tuned on real inputs")
        last = list(self._results.values())[-1]
        path: Path = write_report(last, Path(output_dir))
        return path

    def _run_untuned(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run plain PyTorch where passes of our own would be seen; say so once."""
        if not under_compiler() and not self._options.get("told"):
            self._options["told"] = True
            warnings.warn(
                "autoplace runs plain PyTorch for now: passes of its own would set off collectives, traces or gradient "
                "hooks of this program; call the model once before they are installed",
                stacklevel=3,
            )
        return self._wrapped(*args, **kwargs)

    def _prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Executor:
        given = self._options["plan"]
        if given is None:
            self.tune(*args, **kwargs)
        else:
            self._install_checked(given, self._workload(args, kwargs), Watch(args, kwargs))
        executor: Executor = self._executors[self.training]
        return executor

    def _install_checked(self, plan: Plan, workload: Workload, watch: Watch) -> None:
        """Install a plan that came from outside, if it fits this machine and computes the same."""
        from autoplace.measure import check_plan

        cluster = self._options["cluster"] or Cluster.discover(measure_links=False)
        if plan.cluster_fingerprint and plan.cluster_fingerprint != cluster.fingerprint:
            raise PlanFileError("the plan was made for other devices than these; tune again on this machine")
        executor = build_executor(self._wrapped, plan, cluster)
        report = check_plan(workload, executor)
        executor.close()
        if not report.ok:
            warnings.warn(
                f"autoplace runs plain PyTorch, as the plan does not compute the same: {report.reason}", stacklevel=4
            )
        self._install(plan if report.ok else Plan.plain(), cluster, watch)

    def _install(self, plan: Plan, cluster: Cluster, watch: Watch) -> None:
        old = self._executors.pop(self.training, None)
        self._watches.pop(self.training, None)
        if old is not None:
            old.close()
        self._executors[self.training] = build_executor(self._wrapped, plan, cluster)
        if self._options["replan"] and not plan.is_plain:
            self._watches[self.training] = watch

    def _replan(self, watch: Watch, executor: Executor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Executor:
        """Measure a plan whose calls have drifted once more, and return what is to run from now on."""
        monitor, again = watch.monitor, self._options["replan"] == "tune"
        expected_ms, now_ms = monitor.expected_ms or 0.0, monitor.latency_ms or 0.0
        found = recheck(
            self._workload(args, kwargs),
            executor.plan,
            executor.cluster,
            objective=self._options["objective"],
            forward_ms=now_ms,
        )
        monitor.reset()
        story = f"calls under the plan took {now_ms:.3g} ms after {expected_ms:.3g} ms at first"
        if found.keep:
            _log.info("autoplace keeps its plan: %s, and beside plain PyTorch it is %s", story, found.verdict)
            return executor
        self._install(Plan.plain(), executor.cluster, watch)
        advice = "it tunes again now" if again else "call tune() on the wrapper to plan again"
        warnings.warn(
            f"autoplace went back to plain PyTorch: {story}, and measured beside plain PyTorch the plan is "
            f"refused: {found.verdict}; {advice}",
            stacklevel=5,
        )
        if again:
            self._tune_again(monitor, args, kwargs)
        replanned: Executor = self._executors[self.training]
        return replanned

    def _tune_again(self, monitor: Monitor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Tune in the middle of the user's work; the old monitor stays, since it knows how long to wait."""
        try:
            with lent_buffers(self._wrapped):
                noise = self.tune(*args, **kwargs).noise
        except AutoplaceError as error:
            warnings.warn(f"autoplace stays with plain PyTorch, as it could not tune again: {error}", stacklevel=6)
            return
        if self.training in self._watches:
            monitor.noise = noise
            self._watches[self.training].monitor = monitor

    def _workload(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Workload:
        """Tuning runs on copies of the inputs, so that theirs is left alone."""

        def copy(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return leaf.detach().clone().requires_grad_(leaf.requires_grad)

        copied_args, copied_kwargs = pytree.tree_map(copy, (args, dict(kwargs)))
        return Workload(
            model=self._wrapped,
            args=copied_args,
            kwargs=copied_kwargs,
            training=self.training and torch.is_grad_enabled(),
            loss=self._options["loss"],
            name=type(self._wrapped).__name__,
        )

    def train(self, mode: bool = True) -> OptimizedParallel:
        """Set the model to training or inference."""
        self.__dict__["_wrapped"].train(mode)
        self.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the wrapped model's own state."""
        return self._wrapped.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state of the wrapped model."""
        return self._wrapped.load_state_dict(*args, **kwargs)

    def close(self) -> None:
        """End the executors' threads; the next call tunes again."""
        for executor in self._executors.values():
            executor.close()
        self._executors.clear()
        self._watches.clear()

    def extra_repr(self) -> str:
        """Describe the plan."""
        plan = self.plan
        return f"plan={plan.shape if plan is not None else 'not tuned yet'}"
