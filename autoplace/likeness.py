"""What makes two models, or two inputs, alike: their structure as JSON-ready data that is the same in every process.

Nothing in it depends on memory addresses, hash seeds or tensors' values. Simple values and containers of them count in
full; functions by their code; configurations and dataclasses by their fields; every other object by its class alone.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import types
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["describe", "describe_model"]

_DEPTH = 8
"""Containers inside containers are looked into so far; this also ends cycles."""
_CLOSURE_DEPTH = 2
"""What a function holds on to is often half a program."""
_LENGTH = 1000
"""Entries of a container that count, besides its length: a vocabulary of millions says no more."""
_BOOKKEEPING = frozenset(vars(torch.nn.Module())) - {"training"}
"""Attributes that every module has: dictionaries of parameters, hooks and children, looked at by themselves."""


def describe_model(model: torch.nn.Module) -> list[Any]:
    """Return a model's structure: its modules, then its parameters and buffers, each with path and ties."""
    seen: dict[int, Any] = {}
    modules: dict[int, str] = {}
    facts: list[Any] = []
    for path, module in model.named_modules(remove_duplicate=False):
        first = modules.setdefault(id(module), path)
        facts.append([path, first] if first != path else [path, *_describe_module(module, seen)])
    tensors: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        facts.append([name, tensors.setdefault(id(tensor), name), _tensor(tensor)])
    return facts


def describe(value: Any) -> Any:
    """Return what of a value counts, as JSON-ready data."""
    return _describe(value, _DEPTH, {})


def _describe_module(module: torch.nn.Module, seen: dict[int, Any]) -> list[Any]:
    # A `forward` on the instance is an executor's gate, or its copy's.
    own = {k: v for k, v in sorted(vars(module).items()) if k not in _BOOKKEEPING and k != "forward"}
    hooks = [len(v) for k, v in vars(module).items() if k.endswith("_hooks") and k in _BOOKKEEPING]
    kind = type(module)
    if id(kind) not in seen:
        seen[id(kind)] = [_name(kind), _code(inspect.unwrap(kind.forward))]
    return [seen[id(kind)], hooks, _describe(own, _DEPTH, seen)]


def _describe(value: Any, depth: int, seen: dict[int, Any]) -> Any:
    if isinstance(value, enum.Enum):
        return [_name(type(value)), value.name]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, (float, complex, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return [type(value).__name__, repr(value)]
    if isinstance(value, type):
        return _name(value)
    if isinstance(value, torch.nn.Module) or depth == 0:
        return _name(type(value))
    return _container(value, depth - 1, seen)


def _container(value: Any, depth: int, seen: dict[int, Any]) -> Any:
    def inner(item: Any) -> Any:
        return _describe(item, depth, seen)

    kind = _name(type(value))
    if isinstance(value, Mapping):
        items = list(value.items())
        return [kind, len(items), [[inner(k), inner(v)] for k, v in items[:_LENGTH]]]
    if isinstance(value, (list, tuple, deque)):
        return [kind, len(value), [inner(v) for v in list(value)[:_LENGTH]]]
    if isinstance(value, (set, frozenset)):
        return [kind, sorted(json.dumps(inner(v)) for v in value)[:_LENGTH]]
    if isinstance(value, functools.partial):
        return [kind, inner(value.func), inner(value.args), inner(value.keywords)]
    if isinstance(value, types.MethodType):
        return [kind, inner(value.__func__), inner(value.__self__)]
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return [_name(value), _code(value), _describe(_closure(value), min(depth, _CLOSURE_DEPTH), seen)]
    if dataclasses.is_dataclass(value):
        return [kind, [[f.name, inner(getattr(value, f.name, None))] for f in dataclasses.fields(value)]]
    if callable(getattr(value, "to_dict", None)):
        return _configuration(value, depth, seen)
    return kind


def _configuration(value: Any, depth: int, seen: dict[int, Any]) -> Any:
    """Describe what has a `to_dict`, once: every module of a model may hold the same configuration."""
    if id(value) not in seen:
        try:
            content = value.to_dict()
        except Exception:  # a method of that name that is something else
            content = None
        seen[id(value)] = [_name(type(value)), _describe(content, depth, seen)]
    return seen[id(value)]


def _tensor(tensor: torch.Tensor) -> list[Any]:
    try:
        shape, stride = list(tensor.shape), list(tensor.stride()) if tensor.layout == torch.strided else None
    except RuntimeError:  # not initialised yet: a lazy parameter
        shape, stride = [], None
    facts = [tensor.dtype, tensor.device, tensor.layout]
    return [_name(type(tensor)), shape, stride, *map(str, facts), tensor.requires_grad]


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', None)}.{getattr(thing, '__qualname__', repr(type(thing)))}"


def _closure(function: Any) -> list[Any]:
    """Return the values that a function holds on to: defaults, and variables of the functions around it."""
    values = [*(getattr(function, "__defaults__", None) or ())]
    for cell in getattr(function, "__closure__", None) or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            values.append(None)
    return values


def _code(function: Any) -> str | None:
    """Return a digest of a function's byte code with its constants and names; None for what has none."""
    code = getattr(function, "__code__", None)
    return None if code is None else _code_digest(code)


@functools.lru_cache(maxsize=4096)
def _code_digest(code: types.CodeType) -> str:
    constants = [_code_digest(c) if isinstance(c, types.CodeType) else _describe(c, _DEPTH, {}) for c in code.co_consts]
    facts = [code.co_code.hex(), constants, code.co_names, code.co_varnames]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
