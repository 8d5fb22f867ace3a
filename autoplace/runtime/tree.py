"""Nested inputs and outputs as a flat list of leaves: PyTorch's pytrees, and dataclasses that are not registered there.

Knows nothing of batches and devices. `None` is a leaf.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch.utils import _pytree as pytree

__all__ = ["Tree"]


class Tree:
    """A nested value taken apart.

    Args:
        value: Any nesting of tuples, lists, dicts, registered pytree nodes (such as `ModelOutput`) and dataclasses.
    """

    def __init__(self, value: Any) -> None:
        flat, self._spec = pytree.tree_flatten(value)
        self._count = len(flat)
        self._dataclasses: dict[int, tuple[Any, list[str], Tree]] = {}
        self.leaves: list[Any] = []
        """The leaves, in a fixed order."""
        for i, leaf in enumerate(flat):
            if is_dataclass(leaf) and not isinstance(leaf, type):
                names = [f.name for f in fields(leaf) if hasattr(leaf, f.name)]
                inner = Tree([getattr(leaf, name) for name in names])
                self._dataclasses[i] = (leaf, names, inner)
                self.leaves += inner.leaves
            else:
                self.leaves.append(leaf)

    def build(self, leaves: Sequence[Any]) -> Any:
        """Return a value of the same structure with other leaves."""
        return self._build(iter(leaves))

    def _build(self, leaves: Iterator[Any]) -> Any:
        flat = []
        for i in range(self._count):
            if i not in self._dataclasses:
                flat.append(next(leaves))
                continue
            pattern, names, inner = self._dataclasses[i]
            value = copy.copy(pattern)
            for name, field_value in zip(names, inner._build(leaves), strict=True):
                object.__setattr__(value, name, field_value)
            flat.append(value)
        return pytree.tree_unflatten(flat, self._spec)

    def same_structure(self, other: Tree) -> bool:
        """Return whether both have the same nesting, keys and dataclasses."""
        if self._spec != other._spec or self._dataclasses.keys() != other._dataclasses.keys():
            return False
        for i, (leaf, names, inner) in self._dataclasses.items():
            leaf_other, names_other, inner_other = other._dataclasses[i]
            if type(leaf) is not type(leaf_other) or names != names_other or not inner.same_structure(inner_other):
                return False
        return True
