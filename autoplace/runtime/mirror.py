"""Keeping a model's copy in another process as the original is: flags, simple attributes, buffers, gradient flags.

Parameters need no keeping, as their memory is shared; that they are still the same ones is checked at every call. Of
the modules' and their `config` objects' attributes those that were numbers, texts or None when the copy was made are
carried over, as in `copies`. Modules that are added later are not seen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from autoplace.errors import ExecutionError

from .fitness import HOOKS, records_outputs
from .shipping import RECORDING

__all__ = ["Changes", "Mirror", "apply_changes"]

_SIMPLE = (bool, int, float, str)


_UNKNOWN: Any = object()
_UNSEEN = (-1, -1)


class Changes(NamedTuple):
    """What a copy is to take over before its next pass."""

    attributes: list[tuple[int, str, Any]]
    """(number of the holder, name, value)."""
    requires_grad: list[bool] | None
    """One per parameter; None = as before."""
    buffers: list[int]
    """Numbers of the buffers whose values follow."""


def _holders(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Return the attribute dictionaries of modules and configs, in an order that survives pickling."""
    found: dict[int, dict[str, Any]] = {}
    for module in model.modules():
        for holder in (module, vars(module).get("config")):
            if hasattr(holder, "__dict__"):
                found.setdefault(id(vars(holder)), vars(holder))
    return list(found.values())


def _buffer_slots(model: torch.nn.Module) -> list[tuple[dict[str, Any], str]]:
    return [(m._buffers, name) for m in model.modules() for name, b in m._buffers.items() if b is not None]


class Mirror:
    """Sees what has changed in a model since it last looked.

    Args:
        model: The original.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        holders = _holders(model)
        named = [
            (i, name)
            for i, own in enumerate(holders)
            for name, value in own.items()
            if (value is None or type(value) in _SIMPLE) and name != RECORDING
        ]
        self._names = named
        self._slots = [(holders[i], name) for i, name in named]
        self._training = [position for position, (_, name) in enumerate(named) if name == "training"]
        self._values = self._read()
        self._hooks = [getattr(m, hooks) for m in model.modules() for hooks in HOOKS]
        self._handles = RemovableHandle.next_id
        self._members = [m._parameters for m in model.modules() if m._parameters]
        self.parameters = list(model.parameters())
        """All parameters, each once."""
        self._places = self._look()
        self._requires = [p.requires_grad for p in self.parameters]
        self._buffers = _buffer_slots(model)
        self._floats = any(b.is_floating_point() for b in self._buffer_tensors())
        self._seen = self._see()
        self._versions = -1
        self.training = any(self._values[i] for i in self._training)
        """Whether any module is in training mode, as of the last look."""

    def _read(self) -> list[Any]:
        try:
            return [own[name] for own, name in self._slots]
        except KeyError:
            return [own.get(name) for own, name in self._slots]

    def _look(self) -> list[int]:
        """Return identity and address of every parameter."""
        current = [p for own in self._members for p in own.values() if p is not None]
        return [id(p) for p in current] + [p.data_ptr() for p in current]

    def _buffer_tensors(self) -> list[torch.Tensor]:
        return [own[name] for own, name in self._buffers if own.get(name) is not None]

    def _see(self) -> list[tuple[int, int]]:
        return [(b.data_ptr(), -1 if b.is_inference() else b._version) for b in self._buffer_tensors()]

    def changes(self, *, everything: bool = False) -> tuple[Changes, list[torch.Tensor]]:
        """Return what the copies have to take over, and the values of its buffers.

        Args:
            everything: Also what has not changed since the last look, as a copy may have missed it.

        Batch norm changes its statistics without a new version, so in training, and when the parameters have changed,
        all floating-point buffers are sent.

        Raises:
            ExecutionError: If the model can no longer be followed.
        """
        if RemovableHandle.next_id != self._handles:  # a hook was registered somewhere
            if not all(records_outputs(hook) for hooks in self._hooks for hook in hooks.values()):
                raise ExecutionError("a hook was registered on the model, which its processes do not have; tune again")
            self._handles = RemovableHandle.next_id
        if self._look() != self._places:
            raise ExecutionError(
                "a parameter was replaced, so that the model's processes no longer share it; tune again, or change "
                "parameters in place"
            )
        if everything:
            self._values, self._requires, self._seen = [_UNKNOWN] * len(self._values), [], [_UNSEEN] * len(self._seen)
        attributes = self._changed_attributes()
        requires = [p.requires_grad for p in self.parameters]
        changed = requires if requires != self._requires else None
        self._requires = requires
        numbers, values = self._stale_buffers()
        return Changes(attributes, changed, numbers), values

    def _changed_attributes(self) -> list[tuple[int, str, Any]]:
        values = self._read()
        if values == self._values:
            return []
        found = []
        for (holder, name), old, new in zip(self._names, self._values, values, strict=True):
            if type(new) is not type(old) or new != old:
                if new is not None and type(new) not in _SIMPLE:
                    raise ExecutionError(
                        f"the attribute {name!r} of a module became a {type(new).__name__}; tune again"
                    )
                found.append((holder, name, new))
        self._values = values
        self.training = any(values[i] for i in self._training)
        return found

    def _stale_buffers(self) -> tuple[list[int], list[torch.Tensor]]:
        if not self._buffers:
            return [], []
        seen, tensors = self._see(), self._buffer_tensors()
        if len(tensors) != len(self._buffers) or len(seen) != len(self._seen):
            raise ExecutionError("a buffer of the model was removed or added; tune again")
        versions = sum(p._version for p in self.parameters) if self._floats else 0
        all_floats = self._floats and (self.training or versions != self._versions)
        stale = [
            i
            for i, (now, before) in enumerate(zip(seen, self._seen, strict=True))
            if now != before or (all_floats and tensors[i].is_floating_point())
        ]
        self._seen, self._versions = seen, versions
        return stale, [tensors[i] for i in stale]


def apply_changes(model: torch.nn.Module, changes: Changes, values: list[torch.Tensor]) -> None:
    """Make a copy of the model follow its original.

    Args:
        model: The copy.
        changes: What `Mirror.changes` returned.
        values: The buffers' new values, in the order of `changes.buffers`; they are copied.
    """
    if changes.attributes:
        holders = _holders(model)
        for holder, name, value in changes.attributes:
            holders[holder][name] = value
    if changes.requires_grad is not None:
        for parameter, requires in zip(model.parameters(), changes.requires_grad, strict=True):
            parameter.requires_grad_(requires)
    if changes.buffers:
        slots = _buffer_slots(model)
        for number, value in zip(changes.buffers, values, strict=True):
            own, name = slots[number]
            if own[name].shape == value.shape and own[name].dtype == value.dtype:
                own[name].data.copy_(value)  # graphs that wait for their backward must not see a new version
            else:
                own[name] = value.clone()
