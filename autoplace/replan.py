"""Is an installed plan still worth it? What the wrapper asks when the calls under a plan have drifted.

A composer: it puts the measuring evaluator and the rules of `autoplace.choose` together on the present inputs. What is
computed was checked when the plan was installed; a re-check is about time and energy alone.

The user's training goes on around it: gradients, random state and buffers are left alone, the buffers so far that not
even their version counters move, as outputs of earlier calls may still have their backward to run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from autoplace import choose as choosing
from autoplace.hardware.cluster import Cluster
from autoplace.plan import Plan
from autoplace.problem import Objective
from autoplace.result import Candidate
from autoplace.runtime.fitness import HOOKS, defined_in, has_global_hooks, records_outputs
from autoplace.runtime.monitor import Monitor
from autoplace.tracer import compiling_here
from autoplace.workload import Workload

__all__ = [
    "Recheck",
    "Signature",
    "Watch",
    "in_the_open",
    "lent_buffers",
    "may_interrupt",
    "recheck",
    "signature_of",
    "silenced_hooks",
    "under_compiler",
]

Signature = tuple[Any, ...]
"""What of a call its latency is taken to depend on; hashable. → `signature_of`"""

_WARMUP = 2
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 15
"""Fewer rounds give no quartiles worth the name; more are not needed to see a drift."""
_PASSES_A_ROUND = 6
"""Plain PyTorch twice and the plan, each timed pass with an untimed one before it."""
_TRAINING_FACTOR = 3.0
"""A pass with its backward over the forward alone: two more matrix products for each."""


class Watch:
    """A monitor, and which calls it may compare: of the same thread and signature as the first one.

    Args:
        signature: Of the call that the plan was installed on.
        noise: A/A noise of the run that chose the plan, as a fraction.
    """

    def __init__(self, signature: Signature, noise: float = 0.0) -> None:
        self.monitor = Monitor(noise=noise)
        self._thread = threading.get_ident()
        self._signature = signature

    def covers(self, signature: Signature) -> bool:
        """Return whether a call of the present thread can be compared; counts those that cannot."""
        if threading.get_ident() == self._thread and signature == self._signature:
            return True
        self.monitor.observe_other()
        return False


def signature_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Signature:
    """Return shapes, flags, texts and nesting of a call's inputs, the gradient mode, and whether autocast is on."""
    return (
        torch.is_grad_enabled(),
        torch._C._is_any_autocast_enabled(),
        *[_shape(value) for value in args],
        *[(name, _shape(value)) for name, value in kwargs.items()],
    )


def _shape(value: Any) -> Any:
    """Return what of an input a call's latency is taken to depend on."""
    if isinstance(value, torch.Tensor):
        return value.shape
    if isinstance(value, (tuple, list)):
        return tuple(map(_shape, value))
    if isinstance(value, Mapping):
        return tuple((str(key), _shape(inner)) for key, inner in value.items())
    return value if isinstance(value, (bool, str)) else type(value)


@dataclass(frozen=True, kw_only=True)
class Recheck:
    """What a comparison of the installed plan with plain PyTorch found."""

    keep: bool
    """Whether the plan is to stay."""
    verdict: str
    """Why, in one phrase."""
    speedup: float | None = None
    """Plain PyTorch's latency over the plan's; None when one of them could not be measured."""


def under_compiler() -> bool:
    """Return whether `torch.compile` traces the present code, or runs code around it that it would trace further."""
    return compiling_here() or torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


def in_the_open() -> bool:
    """Return whether other threads see what the present one sees: nobody traces, transforms or intercepts operations.

    Modes of that kind (fake tensors, `torch.set_default_device`, `torch.func`) belong to the thread that enters them.
    A process group counts as one: its collectives have to keep their order.
    """
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (torch.distributed.is_available() and torch.distributed.is_initialized())
    )


def may_interrupt(model: torch.nn.Module) -> bool:
    """Return whether passes of our own may run before the present call.

    Not inside a backward, nor while somebody traces, captures or intercepts operations; not where one process of a
    group would start collectives by itself; not where gradients trigger the user's optimizer; and not where hooks wait
    for the calls of all modules.
    """
    if not in_the_open() or under_compiler() or torch.fx._symbolic_trace._is_fx_tracing_flag or has_global_hooks():
        return False
    if torch._C._current_graph_task_id() != -1:
        return False
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return False
    return not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())


@contextmanager
def lent_buffers(model: torch.nn.Module) -> Iterator[None]:
    """Let the model work on copies of its buffers, and give it its own back after."""
    copies: dict[int, torch.Tensor] = {}
    own: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
    with torch.no_grad():
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    own.append((module._buffers, name, buffer))
                    copies.setdefault(id(buffer), buffer.detach().clone())
    try:
        for buffers, name, buffer in own:
            buffers[name] = copies[id(buffer)]
        yield
    finally:
        for buffers, name, buffer in own:
            buffers[name] = buffer


@contextmanager
def silenced_hooks(model: torch.nn.Module) -> Iterator[bool]:
    """Take the user's hooks off the modules and parameters, and put them back after; yields whether there were any.

    Hooks that are part of the model stay: PyTorch's own (`torch.nn.utils.weight_norm`) and `transformers`' recorders.
    """
    taken: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    holders = [getattr(module, name) for module in model.modules() for name in HOOKS]
    holders += [parameter._backward_hooks for parameter in model.parameters()]
    for hooks in holders:
        if hooks and any(not _is_models(hook) for hook in hooks.values()):
            taken.append((hooks, dict(hooks)))
            for key in [key for key, hook in hooks.items() if not _is_models(hook)]:
                del hooks[key]
    try:
        yield bool(taken)
    finally:
        for hooks, before in taken:
            hooks.clear()
            hooks.update(before)


def _is_models(hook: Any) -> bool:
    return defined_in(hook).startswith("torch.") or records_outputs(hook)


def recheck(
    workload: Workload,
    plan: Plan,
    cluster: Cluster,
    *,
    objective: Objective,
    forward_ms: float,
    budget_s: float = 3.0,
) -> Recheck:
    """Measure a plan against plain PyTorch, interleaved, and judge it by the rules of `autoplace.choose`.

    Args:
        workload: Model and present inputs; the model is left as it was found.
        plan: The installed plan.
        cluster: The devices that it names.
        objective: What it was chosen for; latency counts where energy can no longer be had.
        forward_ms: How long a call of the plan takes by now.
        budget_s: Seconds to spend, roughly; five rounds are run where they take longer.
    """
    from autoplace.hardware.energy import best_meter
    from autoplace.measure.evaluator import MeasuredEvaluator

    pass_ms = max(forward_ms, 1e-3) * (_TRAINING_FACTOR if workload.training else 1.0)
    rounds = min(_MOST_ROUNDS, max(_LEAST_ROUNDS, int(budget_s * 1e3 / (_PASSES_A_ROUND * pass_ms))))
    meter = best_meter(cluster)
    if meter.source == "none":
        objective = Objective()
    evaluator = MeasuredEvaluator(
        workload,
        cluster,
        objective=objective,
        limit_s=max(10.0, 10.0 * pass_ms / 1e3),
        warmup=_WARMUP,
        meter=meter,
        check=False,
    )
    with lent_buffers(workload.model), silenced_hooks(workload.model):
        plain, again, outcome = evaluator.evaluate_interleaved([Plan.plain(), Plan.plain(), plan], rounds)
    if not plain.feasible:
        return Recheck(keep=True, verdict=f"plain PyTorch cannot run this batch: {plain.reason}")
    ratio = choosing.compare(plain, outcome, objective)
    row = Candidate(
        label="plan",
        plan=plan,
        measured=outcome,
        speedup=None if ratio is None else ratio.speedup,
        gain=None if ratio is None else ratio.gain,
        gain_low=None if ratio is None else ratio.gain_low,
    )
    baseline = Candidate(label="plain PyTorch", plan=Plan.plain(), measured=plain, speedup=1.0, gain=1.0)
    noise = choosing.noise_of(plain, again)
    judged = choosing.choose([baseline, row], {row.label}, noise=noise)[1]
    return Recheck(keep=judged.kept, verdict=judged.verdict, speedup=row.speedup)
