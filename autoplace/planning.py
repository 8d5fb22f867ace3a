"""How the calls of a wrapper get their plan: given, from the cache, tuned now, or tuned beside the program.

A composer. The user's program goes on around it: hooks of the user's are taken off while our own passes run, the model
works on copies of its buffers and the tuner on copies of the inputs, and gradients, random state, train/eval flags and
the modes of the calling thread are as before afterwards.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from autoplace.errors import AutoplaceError, ExecutionError, PlanFileError
from autoplace.hardware.cluster import Cluster
from autoplace.plan import Plan
from autoplace.problem import Objective
from autoplace.replan import Signature, Watch, lent_buffers, recheck, signature_of, silenced_hooks
from autoplace.result import TuneResult
from autoplace.runtime import build_executor
from autoplace.runtime.fitness import Habits, unfit
from autoplace.runtime.tree import Tree
from autoplace.slots import Mode, Slot, State, tell
from autoplace.workload import Workload, default_loss, own_loss

__all__ = ["ModeWorkload", "plan_slot", "quietly", "replan_slot", "tune_slot", "workload_of"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class ModeWorkload(Workload):
    """A workload as the user calls it: the modules' own train/eval flags, and gradients on or off whatever the mode."""

    gradients: bool = False
    """Whether the forward runs with gradients on."""

    def forward(self, call: Callable[..., Any] | None = None) -> Any:
        """Run `call` (the model when None) on the inputs and return its output."""
        with torch.set_grad_enabled(self.gradients):
            return (self.model if call is None else call)(*self.args, **self.kwargs)

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Leave the modules' flags as the user has set them, layers frozen in `eval()` among them."""
        yield


def _default_loss(output: Any) -> torch.Tensor:
    """Return the default loss of an output of any type, dataclasses that PyTorch does not know included."""
    return default_loss(Tree(output).leaves if own_loss(output) is None else output)


def workload_of(state: State, mode: Mode, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModeWorkload:
    """Return the workload of a call, on copies of its inputs."""

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)

    copied_args, copied_kwargs = pytree.tree_map(copy, (args, dict(kwargs)))
    return ModeWorkload(
        model=state.model,
        args=copied_args,
        kwargs=copied_kwargs,
        training=mode.training and mode.gradients,
        gradients=mode.gradients,
        loss=state.options["loss"] or _default_loss,
        name=type(state.model).__name__,
    )


@contextmanager
def quietly(state: State, mode: Mode) -> Iterator[None]:
    """Hold what the user would notice of passes of our own: hooks, buffers, random state."""
    from autoplace.measure.preserve import RandomState

    random = RandomState()
    # Weights that autocast has cast are kept until it ends, and the check's optimizer step would not be seen in them.
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(mode.gradients),
            silenced_hooks(state.model) as silenced,
            lent_buffers(state.model),
        ):
            state.exclusive = state.exclusive or silenced
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        random.restore()


def plan_slot(
    state: State, mode: Mode, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Slot | None:
    """Find a plan for a call, and install it.

    Args:
        state: The wrapper's state; the present thread holds its lock.
        mode: The mode of the call.
        signature: The call's.
        args, kwargs: The call's inputs.

    Returns:
        The installed slot; None where plain PyTorch is to run meanwhile.

    Raises:
        Exception: Whatever went wrong; nothing was installed then.
    """
    if mode.pending is not None:
        return _take(state, mode)
    given = state.options["plan"] if mode.first is None or mode.common else None
    with quietly(state, mode):
        workload = workload_of(state, mode, args, kwargs)
        if given is not None:
            cluster = _cluster(state)
            if given.cluster_fingerprint and given.cluster_fingerprint != cluster.fingerprint:
                raise PlanFileError("the plan was made for other devices than these; tune again on this machine")
            plan, refusal = given, unfit(state.model, given, training=workload.training)
            if not refusal:
                refusal = _differs(workload, given, cluster)
                plan = Plan.plain() if refusal else given
        elif (slot := _cached(state, mode, signature, workload)) is not None:
            return slot
        elif state.options["background"]:
            _start(state, mode, signature, workload)
            return None
        else:
            result = tune_now(state, workload)
    if given is None:
        return install_result(state, mode, signature, result)
    if refusal:
        tell(f"autoplace runs plain PyTorch: {refusal}")
    facts = {"origin": "the plan that was given" + (f", refused: {refusal}" if refusal else "")}
    return install(state, mode, signature, plan, cluster, common=True, facts=facts)


def _differs(workload: Workload, plan: Plan, cluster: Cluster) -> str:
    """Return why a plan that came from outside does not compute the same; nothing when it does."""
    from autoplace.measure import check_plan

    if is_identity(plan):
        return ""
    with build_executor(workload.model, plan, cluster) as executor:
        try:
            report = check_plan(workload, executor)
        except ExecutionError as error:
            return f"the plan cannot run this batch: {error}"
    return "" if report.ok else f"the plan does not compute the same: {report.reason}"


def is_identity(plan: Plan) -> bool:
    """Return whether a plan is plain PyTorch and nothing else."""
    bare = plan.with_(strategy=Plan.plain().strategy, graph_fingerprint="", cluster_fingerprint="")
    return bare == Plan.plain()


def _cluster(state: State) -> Cluster:
    return state.options["cluster"] or Cluster.discover(measure_links=False)


def install(
    state: State,
    mode: Mode,
    signature: Signature,
    plan: Plan,
    cluster: Cluster,
    *,
    noise: float = 0.0,
    common: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Slot:
    """Put a plan to work for a signature; one that does not fit the model's habits waits until it does.

    Args:
        state: The wrapper's state.
        mode: The mode.
        signature: Whose calls run it.
        plan: A plan that was found to compute the same, unless it is unfit.
        cluster: The devices that it names.
        noise: A/A noise of the run that chose it, as a fraction.
        common: Whether it is to run all signatures of the mode.
        facts: What is known of it.
    """
    if is_identity(plan):
        return mode.put(signature, Slot(plan, cluster=cluster, facts=facts), common=common)
    habits = Habits(state.model, plan, training=mode.training and mode.gradients)
    if habits.reason():
        return mode.put(signature, Slot(plan, None, habits, cluster=cluster, facts=facts), common=common)
    watch = Watch(signature, noise) if state.options["replan"] and not plan.is_plain else None
    executor = build_executor(state.model, plan, cluster)
    return mode.put(signature, Slot(plan, executor, habits, watch, cluster=cluster, facts=facts), common=common)


def install_result(state: State, mode: Mode, signature: Signature, result: TuneResult) -> Slot:
    """Put what a tuning chose to work."""
    mode.result = result
    state.results.append(result)
    return install(state, mode, signature, result.chosen.plan, result.cluster, noise=result.noise)


def tune_now(
    state: State, workload: Workload, *, budget_s: float | None = None, objective: Objective | None = None
) -> TuneResult:
    """Tune a workload by the wrapper's options, and keep the plan for the next program."""
    from autoplace.background import cancellable
    from autoplace.plan_cache import facts_of, store_plan
    from autoplace.progress import terminal_progress
    from autoplace.tracked import tracked_tune
    from autoplace.tuner import TuneConfig, tune

    options = state.options
    config = TuneConfig(
        objective=objective or options["objective"],
        budget_s=budget_s or options["budget_s"],
        policy=options["policy"],
        compile=options["compile"],
        run_s=options["run_s"],
        precision=options["precision"],
    )
    progress = options["progress"]
    progress = terminal_progress() if progress is None else progress or None
    tuned = tracked_tune if options["track"] else tune
    # Before the runs: those may move what counts as structure, such as a model's own counter of calls.
    key = _key(state, workload, _cluster(state), objective) if options["cache"] else ""
    result = tuned(workload, config, cluster=options["cluster"], progress=cancellable(progress))
    if key:
        store_plan(key, result.chosen.plan, facts_of(result))
    return result


def _key(state: State, workload: Workload, cluster: Cluster, objective: Objective | None = None) -> str:
    from autoplace.plan_cache import cache_key

    options = state.options
    return cache_key(
        workload,
        cluster,
        options={
            "objective": objective or options["objective"],
            "gradients": getattr(workload, "gradients", workload.training),
            "precision": options["precision"],
            "compile": options["compile"],
            "run_s": options["run_s"],
        },
    )


def _cached(state: State, mode: Mode, signature: Signature, workload: Workload) -> Slot | None:
    """Install the plan of an earlier program, if it still fits, computes the same and wins."""
    from autoplace.plan_cache import load_plan

    if not state.options["cache"]:
        return None
    cluster = _cluster(state)
    found = load_plan(_key(state, workload, cluster))
    if found is None:
        return None
    plan, noise = found.plan, float(found.facts.get("noise") or 0.0)
    if not is_identity(plan):
        refusal = unfit(state.model, plan, training=workload.training) or _differs(workload, plan, cluster)
        if refusal:
            _log.info("autoplace tunes again, as the plan in the cache is of no use: %s", refusal)
            return None
        found_again = recheck(
            workload, plan, cluster, objective=state.options["objective"], forward_ms=_plain_ms(workload)
        )
        if not found_again.keep:
            _log.info("autoplace tunes again, as the plan in the cache no longer wins: %s", found_again.verdict)
            return None
    state.last_call = (mode, workload.args, workload.kwargs)
    facts = {**found.facts, "origin": "the cache, from an earlier tuning"}
    return install(state, mode, signature, plan, cluster, noise=noise, facts=facts)


def _plain_ms(workload: Workload) -> float:
    start = time.perf_counter()
    workload.forward()
    return (time.perf_counter() - start) * 1e3


def _start(state: State, mode: Mode, signature: Signature, workload: Workload) -> None:
    """Tune a copy of the model in a thread of its own, while plain PyTorch serves."""
    from autoplace.background import BackgroundTuning

    mode.pending = BackgroundTuning(workload, lambda copied: tune_now(state, copied))
    mode.pending_signature = signature


def _take(state: State, mode: Mode) -> Slot:
    """Install what a tuning in the background has found, unless the model has hooks by now that it would not keep."""
    assert mode.pending is not None  # the caller asked
    pending, mode.pending = mode.pending, None
    return install_result(state, mode, mode.pending_signature, pending.result())


def tune_slot(
    state: State,
    mode: Mode,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    budget_s: float | None = None,
    objective: Objective | None = None,
) -> TuneResult:
    """Tune on inputs for the present mode and install what was found.

    Args:
        state: The wrapper's state; the present thread holds its lock.
        mode: The mode.
        args, kwargs: The inputs.
        budget_s: Wall seconds for the real runs; None = the wrapper's.
        objective: What to tune for; None = the wrapper's.
    """
    with quietly(state, mode):
        result = tune_now(state, workload_of(state, mode, args, kwargs), budget_s=budget_s, objective=objective)
    if mode.common and mode.first is not None:  # the plan that the user gave makes room
        mode.first.close()
        mode.slots, mode.first, mode.common, mode.plannings = {}, None, False, 0
    with torch.set_grad_enabled(mode.gradients):
        install_result(state, mode, signature_of(args, kwargs), result)
    return result


def replan_slot(
    state: State, mode: Mode, slot: Slot, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Slot:
    """Measure a plan whose calls have drifted once more, and return what is to run from now on."""
    assert slot.watch is not None and slot.executor is not None  # only such plans drift
    monitor, again, cluster = slot.watch.monitor, state.options["replan"] == "tune", slot.executor.cluster
    expected_ms, now_ms = monitor.expected_ms or 0.0, monitor.latency_ms or 0.0
    with quietly(state, mode):
        found = recheck(
            workload_of(state, mode, args, kwargs),
            slot.plan,
            cluster,
            objective=state.options["objective"],
            forward_ms=now_ms,
        )
    monitor.reset()
    story = f"calls under the plan took {now_ms:.3g} ms after {expected_ms:.3g} ms at first"
    if found.keep:
        _log.info("autoplace keeps its plan: %s, and beside plain PyTorch it is %s", story, found.verdict)
        return slot
    slot = install(state, mode, signature, Plan.plain(), cluster, common=mode.common)
    advice = "it tunes again now" if again else "call tune() on the wrapper to plan again"
    tell(
        f"autoplace went back to plain PyTorch: {story}, and measured beside plain PyTorch the plan is "
        f"refused: {found.verdict}; {advice}"
    )
    if not again:
        return slot
    try:
        tune_slot(state, mode, args, kwargs)
    except AutoplaceError as error:
        tell(f"autoplace stays with plain PyTorch, as it could not tune again: {error}")
        return slot
    slot = mode.slots[signature]
    if slot.watch is not None:  # the old monitor stays, since it knows how long to wait
        monitor.noise = slot.watch.monitor.noise
        slot.watch.monitor = monitor
    return slot
