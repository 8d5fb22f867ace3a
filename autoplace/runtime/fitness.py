"""Would a plan keep the model's habits: hooks as often as before, batch statistics over the whole batch, checkpointing?

`unfit` looks at every module and says why not, in a sentence. `Habits` watches an installed plan at little cost a call:

- `RemovableHandle.next_id` grows with every registration of a hook anywhere; only then are the modules looked at.
  Removing a hook does not move it, so while a plan is unfit every look is a full one.
- Flags that switch a module's habits (`training` of batch norms, `gradient_checkpointing`) are compared themselves.
- Simple attributes of a model whose exported graph runs are constants there, and are compared with what they were.
- A count of registered modules (PyTorch's global registration hook) grows when any model is changed; only then is the
  list of modules compared.

What it does not know: hooks on tensors, which the executors hold back until gradients are summed up, and checkpointing
that is written into a `forward`, which the check of the plan meets.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any

import torch
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.hooks import RemovableHandle

from autoplace.plan import Plan

__all__ = ["HOOKS", "Habits", "defined_in", "has_global_hooks", "records_outputs", "unfit"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes of a module that hold its hooks, by handle."""
_CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing")
"""Flags by which libraries of models switch checkpointing of a module on."""
_PARALLEL = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel")


def unfit(model: torch.nn.Module, plan: Plan, *, training: bool) -> str:
    """Return why a plan would not keep the model's habits, in one sentence; nothing when it does.

    Args:
        model: The model, its modules in the modes in which they are to run.
        plan: Any plan for it.
        training: Whether calls are to run with gradients, in `train()`.
    """
    if plan.is_plain and not plan.compiled:
        return ""
    modules = list(model.modules())
    parts = max(1, len(plan.replicas)) * plan.microbatches
    return (
        _parallel_reason(modules)
        or _compiled_reason(modules, plan)
        or _hooks_reason(modules, plan, parts)
        or (_statistics_reason(modules, training=training, trusted=model.training == training) if parts > 1 else "")
        or (_checkpoint_reason(modules, plan, parts) if training else "")
    )


def has_global_hooks() -> bool:
    """Return whether hooks are registered for all modules of the process."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def defined_in(hook: Any) -> str:
    """Return the name of the Python module that a hook's code is from."""
    owner = getattr(hook, "func", hook)  # a functools.partial
    return str(getattr(owner if hasattr(owner, "__qualname__") else type(owner), "__module__", ""))


def records_outputs(hook: Any) -> bool:
    """Return whether a hook is how `transformers` collects hidden states and attentions: part of the model's forward.

    It keeps apart by context what passes at the same time collect.
    """
    return defined_in(hook) == "transformers.utils.output_capturing"


def is_compiled(module: torch.nn.Module) -> bool:
    """Return whether `torch.compile` has compiled a module."""
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def _parallel_reason(modules: Iterable[torch.nn.Module]) -> str:
    for module in modules:
        for base in type(module).__mro__:
            if base.__name__ in _PARALLEL and base.__module__.startswith("torch."):
                return f"{base.__name__} inside the model spreads it over devices itself"
    return ""


def _compiled_reason(modules: Iterable[torch.nn.Module], plan: Plan) -> str:
    if not any(map(is_compiled, modules)) or (plan.shape == "single" and plan.microbatches == 1 and not plan.compiled):
        return ""
    return "torch.compile has compiled the model, or modules of it, as a whole already; wrap the model before compiling"


def _hooks_reason(modules: Iterable[torch.nn.Module], plan: Plan, parts: int) -> str:
    if parts == 1 and plan.engine == "threads" and not plan.compiled:
        return ""
    holders = (getattr(module, name) for module in modules for name in HOOKS)
    if not has_global_hooks() and all(records_outputs(hook) for hooks in holders for hook in hooks.values()):
        return ""
    if parts > 1:
        return f"the model has hooks, which would fire {parts} times a call, once for every part of the batch"
    if plan.compiled:
        return "the model has hooks, which compiled code does not always call"
    return f"the model has hooks, which the engine {plan.engine!r} does not call"


def _statistics_reason(modules: Iterable[torch.nn.Module], *, training: bool, trusted: bool) -> str:
    """Say which module computes statistics over the batch.

    Args:
        training: Whether the model is to run in `train()`.
        trusted: Whether the modules' own flags are already those of the run.
    """
    for module in modules:
        live = module.training if trusted else training
        name = type(module).__name__
        if isinstance(module, _BatchNorm) and (live or module.running_mean is None):
            return f"{name} computes statistics over the whole batch, which a split batch does not have"
        if isinstance(module, _InstanceNorm) and live and module.track_running_stats:
            return f"{name} updates its running statistics once a call, and would once for every part of the batch"
    return ""


def _checkpoint_reason(modules: Iterable[torch.nn.Module], plan: Plan, parts: int) -> str:
    for module in modules:
        if not any(getattr(module, flag, False) is True for flag in _CHECKPOINTING):
            continue
        if plan.engine == "graph":
            return "the model checkpoints its activations, which the engine 'graph' does not keep"
        call = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(call, "keywords", {}).get("use_reentrant") and (parts > 1 or plan.shape != "single"):
            return "the model checkpoints its activations with use_reentrant=True, which runs a backward of its own"
    return ""


class _Registrations:
    """Counts registrations in modules that are watched, from the first use on.

    Many models slice a `ModuleList` in every forward, which makes a new one. TorchDynamo traces the hook with that: a
    count that it could see would be a constant of the compiled code, which would be compiled again at every call.
    """

    def __init__(self) -> None:
        self.count = 0
        self._parents: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._handle: RemovableHandle | None = None

    def watch(self, modules: Iterable[torch.nn.Module]) -> None:
        self._parents.update(modules)
        if self._handle is None:
            self._handle = torch_module.register_module_module_registration_hook(self._seen)

    def _seen(self, parent: torch.nn.Module, *_: Any) -> None:
        if not torch.compiler.is_dynamo_compiling() and parent in self._parents:
            self.count += 1


_registrations = _Registrations()


_Frozen = list[tuple[dict[str, Any], Callable[[dict[str, Any]], Any], Any]]


def _simple_attributes(model: torch.nn.Module) -> _Frozen:
    """Return what an exported graph holds as constants: (holder, getter, values) of each module and configuration."""
    holders = {id(holder): holder for m in model.modules() for holder in (m, getattr(m, "config", None))}
    frozen: _Frozen = []
    for holder in holders.values():
        attributes = getattr(holder, "__dict__", {})
        simple = [k for k, v in attributes.items() if v is None or isinstance(v, (bool, int, float, str))]
        names = [name for name in simple if name not in _CHECKPOINTING]  # these have a reason of their own
        if names:
            get = itemgetter(*names)
            frozen.append((attributes, get, get(attributes)))
    return frozen


def _as_frozen(frozen: _Frozen) -> bool:
    try:
        return all(get(attributes) == values for attributes, get, values in frozen)
    except KeyError:  # one was deleted
        return False


class Habits:
    """Whether a plan that was fit still is.

    Args:
        model: The model.
        plan: The plan that runs it.
        training: Whether calls run with gradients, in `train()`.
    """

    def __init__(self, model: torch.nn.Module, plan: Plan, *, training: bool) -> None:
        modules = list(model.modules())
        _registrations.watch(modules)
        self._model, self._plan, self._training = model, plan, training
        self._modules = [id(module) for module in modules]
        self._registered = _registrations.count
        self._frozen = _simple_attributes(self._model) if plan.engine == "graph" else []
        self._look()

    def reason(self) -> str:
        """Return why the plan must not run the present call, in one sentence; nothing when it may."""
        if (
            self._handles != RemovableHandle.next_id
            or self._reason
            or self._registered != _registrations.count
            or (self._watched and self._read() != self._flags)
            or (self._frozen and not _as_frozen(self._frozen))
        ):
            self._look()
        return self._reason

    def _look(self) -> None:
        self._handles, registered = RemovableHandle.next_id, _registrations.count
        modules = list(self._model.modules())
        if self._registered != registered and [id(module) for module in modules] != self._modules:
            self._reason = "modules of the model were replaced since it was planned; call tune() to plan again"
            return
        self._registered = registered
        if not _as_frozen(self._frozen):
            self._reason = "attributes of the model changed since its graph was exported; call tune() to plan again"
            return
        parts = max(1, len(self._plan.replicas)) * self._plan.microbatches
        norms = (_BatchNorm, _InstanceNorm) if parts > 1 else ()
        self._watched: list[tuple[torch.nn.Module, str]] = [(m, "training") for m in modules if isinstance(m, norms)]
        if self._training:
            self._watched += [(m, flag) for m in modules for flag in _CHECKPOINTING if hasattr(m, flag)]
        self._flags = self._read()
        self._reason = unfit(self._model, self._plan, training=self._training)

    def _read(self) -> list[Any]:
        return [getattr(module, name) for module, name in self._watched]
