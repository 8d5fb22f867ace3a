"""Nested inputs and outputs as a flat list of leaves.

PyTorch's pytrees, dataclasses that are not registered there and, for outputs, plain objects that hold tensors, such as
the key-value caches of `transformers`. Knows nothing of batches and devices. `None` is a leaf.

An object is taken apart by its `__dict__` and rebuilt as a shallow copy. What has no `__dict__`, refers to itself or is
a module, a function or a type stays a leaf.
"""

from __future__ import annotations

import copy
import enum
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = ["Tree", "shared_object"]

_CONSTANT = (
    bool, int, float, complex, str, bytes, type, enum.Enum, torch.dtype, torch.device, torch.layout,
    torch.memory_format, torch.Size, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType,
)  # fmt: skip
"""Leaves that several parts of a batch may have in common."""


class Tree:
    """A nested value taken apart.

    Args:
        value: Any nesting of tuples, lists, dicts, registered pytree nodes (such as `ModelOutput`) and dataclasses.
        objects: Whether plain objects that hold tensors are taken apart, too.
        keep: Objects that stay leaves all the same, by identity: an output that is one of the inputs.
    """

    def __init__(self, value: Any, *, objects: bool = False, keep: Collection[Any] = ()) -> None:
        flat, self._spec = pytree.tree_flatten(value)
        self._count = len(flat)
        self._nested: dict[int, tuple[Any, list[str], Tree]] = {}
        self.leaves: list[Any] = []
        """The leaves, in a fixed order."""
        for i, leaf in enumerate(flat):
            names = self._names(leaf, objects, keep)
            if names is None:
                self.leaves.append(leaf)
                continue
            inner = Tree([getattr(leaf, name) for name in names], objects=objects, keep=keep)
            self._nested[i] = (leaf, names, inner)
            self.leaves += inner.leaves

    @staticmethod
    def _names(leaf: Any, objects: bool, keep: Collection[Any]) -> list[str] | None:
        """Return the attributes to take apart; None for a leaf."""
        if isinstance(leaf, torch.Tensor) or leaf is None or isinstance(leaf, _CONSTANT):
            return None
        if is_dataclass(leaf):
            return [f.name for f in fields(leaf) if hasattr(leaf, f.name)]
        if objects and not any(leaf is kept for kept in keep) and _holds_tensors(leaf):
            return list(vars(leaf))
        return None

    def build(self, leaves: Sequence[Any]) -> Any:
        """Return a value of the same structure with other leaves."""
        return self._build(iter(leaves))

    def _build(self, leaves: Iterator[Any]) -> Any:
        flat = []
        for i in range(self._count):
            if i not in self._nested:
                flat.append(next(leaves))
                continue
            pattern, names, inner = self._nested[i]
            value = copy.copy(pattern)
            for name, field_value in zip(names, inner._build(leaves), strict=True):
                object.__setattr__(value, name, field_value)
            flat.append(value)
        return pytree.tree_unflatten(flat, self._spec)

    def same_structure(self, other: Tree) -> bool:
        """Return whether both have the same nesting, keys, dataclasses and objects."""
        if self._spec != other._spec or self._nested.keys() != other._nested.keys():
            return False
        for i, (leaf, names, inner) in self._nested.items():
            leaf_other, names_other, inner_other = other._nested[i]
            if type(leaf) is not type(leaf_other) or names != names_other or not inner.same_structure(inner_other):
                return False
        return True


def _holds_tensors(value: Any, above: tuple[int, ...] = ()) -> bool:
    """Return whether a plain object has tensors in it at any depth, and no way back to itself."""
    if isinstance(value, (torch.nn.Module, *_CONSTANT)) or not hasattr(value, "__dict__") or _is_slotted(value):
        return False
    if id(value) in above:
        return False
    found = False
    for leaf in pytree.tree_leaves(list(vars(value).values())):
        if isinstance(leaf, torch.Tensor):
            found = True
        elif id(leaf) in (*above, id(value)):
            return False
        else:
            found = _holds_tensors(leaf, (*above, id(value))) or found
    return found


def _is_slotted(value: Any) -> bool:
    """Return whether part of an object's state is outside its `__dict__`: slots, or a container's own."""
    kinds = type(value).__mro__[:-1]
    return isinstance(value, (Mapping, Sequence)) or any(vars(kind).get("__slots__") for kind in kinds)


def shared_object(leaves: Sequence[Any]) -> Any:
    """Return the first leaf that parts of a batch cannot have in common, or None.

    That is any object that is neither a tensor nor a constant: it cannot be split, and one part could change it under
    another.
    """
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, (torch.Tensor, *_CONSTANT)):
            return leaf
    return None
