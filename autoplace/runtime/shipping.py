"""What of a model, its inputs and its outputs goes to another process, and how.

A value travels as a pickle of its structure, with the tensors taken out and numbered; they go through a `Slab`. A model
travels likewise, but its parameters' storages are moved to shared memory in place: Parameter objects, optimizers that
hold them and `state_dict` stay as they are, and what one process writes the others see.

1. Objects of the running program's own main file do not travel: the other process would have to run it again.
2. Hooks do not travel: they belong to the caller's process. The recorders of `transformers` are left behind, and made
   anew by the copy.
3. Buffers travel by value (→ `mirror`), since running statistics written by two processes at once would be lost.
"""

from __future__ import annotations

import io
import os
import pickle
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autoplace.errors import ExecutionError

from .fitness import HOOKS, records_outputs
from .routing import Gate

__all__ = ["RECORDING", "Shipment", "dump", "load", "receive_model", "ship_model", "supported"]

RECORDING = "_output_capturing_hooks_installed"
"""Attribute by which a model of `transformers` says that its recorders are installed → `fitness.records_outputs`."""
_SHM = "/dev/shm"
_SPARE_FILES = 64
"""Descriptors that are left to the program."""

Meta = tuple[int, torch.dtype, int, tuple[int, ...], tuple[int, ...]]
"""A tensor in a shared storage: number of the storage, type, offset in elements, shape, strides."""


class _Pickler(pickle.Pickler):
    """Takes tensors out, and refuses what the other process cannot import."""

    def __init__(self, file: io.BytesIO, number: Callable[[torch.Tensor], Any]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._number = number

    def persistent_id(self, obj: Any) -> Any:
        """Return a tensor's number; None pickles the object by value."""
        return self._number(obj) if isinstance(obj, torch.Tensor) else None

    def reducer_override(self, obj: Any) -> Any:
        """Refuse classes and functions of the main file; leave this process's gates and recorders behind."""
        if isinstance(obj, torch.nn.Module):
            own = vars(obj)
            return (
                _without_local(obj)
                if own.get("_forward_hooks") or RECORDING in own or "forward" in own
                else NotImplemented
            )
        if isinstance(obj, type) or callable(obj):
            name = getattr(obj, "__qualname__", None)
            if name is not None and getattr(obj, "__module__", None) == "__main__":
                raise ExecutionError(
                    f"{name!r} is defined in the program's main file, which other processes cannot import; "
                    "move it to a module of its own"
                )
        return NotImplemented


def _without_local(module: torch.nn.Module) -> Any:
    """Return how a module pickles, without gates, and without recorders, which the copy installs for itself."""
    reduced = module.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    state: Any = reduced[2] if isinstance(reduced, tuple) and len(reduced) > 2 else None
    if not isinstance(state, dict):
        return reduced
    state = dict(state)
    state.pop(RECORDING, None)
    if isinstance(state.get("forward"), Gate):
        del state["forward"]
    hooks = state.get("_forward_hooks")
    if hooks:  # `_refuse` has seen that all are recorders
        state["_forward_hooks"] = type(hooks)()
    return (*reduced[:2], state, *reduced[3:])


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, tensor: Callable[[Any], torch.Tensor]) -> None:
        super().__init__(io.BytesIO(data))
        self._tensor = tensor

    def persistent_load(self, pid: Any) -> torch.Tensor:
        return self._tensor(pid)


def _pickle(value: Any, what: str, number: Callable[[torch.Tensor], Any]) -> bytes:
    file = io.BytesIO()
    try:
        _Pickler(file, number).dump(value)
    except ExecutionError:
        raise
    except Exception as error:  # whatever a user's __reduce__ raises
        raise ExecutionError(
            f"{what} cannot be pickled for another process ({type(error).__name__}: {error}); use a plan of threads"
        ) from None
    return file.getvalue()


def dump(value: Any, known: Sequence[torch.Tensor] = (), what: str = "an input") -> tuple[bytes, list[torch.Tensor]]:
    """Return a value's structure and its tensors.

    Args:
        value: Anything that pickles.
        known: Tensors that are numbered first, in this order.
        what: What the value is, for the error.

    Raises:
        ExecutionError: If it does not pickle.
    """
    tensors = list(known)
    numbers: dict[int, int] = {}
    for i, tensor in enumerate(tensors):
        numbers.setdefault(id(tensor), i)

    def number(tensor: torch.Tensor) -> int:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise ExecutionError(f"{what} is a {type(tensor).__name__}, which does not travel; use a plan of threads")
        if id(tensor) not in numbers:
            numbers[id(tensor)] = len(tensors)
            tensors.append(tensor)
        return numbers[id(tensor)]

    return _pickle(value, what, number), tensors


def load(structure: bytes, tensors: Sequence[torch.Tensor]) -> Any:
    """Return the value of a structure with these tensors."""
    return _Unpickler(structure, tensors.__getitem__).load()


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """A model ready to travel."""

    structure: bytes
    parameters: tuple[tuple[Meta, bool], ...]
    """Where every parameter lies, and whether it requires a gradient; in `model.parameters()`'s order."""
    storages: tuple[tuple[int, int], ...]
    """Descriptor and size in bytes of every shared storage. The model keeps the descriptors open."""


class _Storages:
    """The storages of a model's parameters, numbered."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self.all: list[torch.UntypedStorage] = []
        self._numbers: dict[int, int] = {}
        for parameter in parameters:
            storage = parameter.untyped_storage()
            if storage._cdata not in self._numbers:
                self._numbers[storage._cdata] = len(self.all)
                self.all.append(storage)

    def meta(self, tensor: torch.Tensor) -> Meta | None:
        """Return where a tensor lies; None when it is in none of them."""
        number = self._numbers.get(tensor.untyped_storage()._cdata)
        if number is None:
            return None
        return number, tensor.dtype, int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())


def _structure(model: torch.nn.Module, storages: _Storages) -> bytes:
    parameters = {id(p): i for i, p in enumerate(model.parameters())}
    buffers = {id(b) for b in model.buffers()}

    def number(tensor: torch.Tensor) -> Any:
        if id(tensor) in parameters:
            return parameters[id(tensor)]
        if tensor.requires_grad:
            raise ExecutionError(
                "the model holds a tensor that requires a gradient and is none of its parameters; use a plan of threads"
            )
        plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided and id(tensor) not in buffers
        return storages.meta(tensor) if plain else None

    return _pickle(model, "the model", number)


def _refuse(model: torch.nn.Module) -> None:
    """Raise for what does not travel, before anything is pickled or moved."""
    if not sys.platform.startswith("linux") or not sys.executable:
        raise ExecutionError("replicas in processes need Linux and an interpreter of their own; use a plan of threads")
    for path, module in model.named_modules():
        name = path or type(module).__name__
        if any(not records_outputs(hook) for hooks in HOOKS for hook in getattr(module, hooks, {}).values()):
            raise ExecutionError(f"{name!r} has hooks, which belong to this process; use a plan of threads")
        if not isinstance(vars(module).get("forward"), Gate | None):
            raise ExecutionError(f"the forward of {name!r} was replaced on the instance; use a plan of threads")
        if isinstance(module, torch.jit.ScriptModule):
            raise ExecutionError(f"{name!r} is a TorchScript module, which does not travel; use a plan of threads")
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            plain = torch.nn.Parameter if kind == "parameter" else torch.Tensor
            if type(tensor) not in (plain, torch.nn.Buffer) or tensor.layout != torch.strided or tensor.is_quantized:
                raise ExecutionError(
                    f"{kind} {name!r} is a {type(tensor).__name__} of layout {tensor.layout}, which other processes "
                    "cannot share; use a plan of threads"
                )
            if tensor.device.type != "cpu":
                raise ExecutionError(
                    f"{kind} {name!r} is on {tensor.device}; processes share the host's memory alone, use threads"
                )


def _refuse_room(storages: _Storages) -> None:
    """Raise if shared memory or file descriptors would run out."""
    missing = [s for s in storages.all if not s.is_shared() and s.nbytes()]
    need = sum(s.nbytes() for s in missing)
    limits = os.statvfs(_SHM)
    if need and need * 1.05 > limits.f_bavail * limits.f_frsize:
        raise ExecutionError(
            f"the parameters take {need / 2**20:.0f} MiB and {_SHM} has "
            f"{limits.f_bavail * limits.f_frsize / 2**20:.0f} MiB free; enlarge it or use a plan of threads"
        )
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and len(os.listdir("/proc/self/fd")) + len(missing) + _SPARE_FILES > most:  # noqa: PTH208
        raise ExecutionError(
            f"sharing {len(missing)} parameters would open more than the {most} files that this process may; "
            "raise it (ulimit -n) or use a plan of threads"
        )


def supported(model: torch.nn.Module) -> str:
    """Return why the model cannot run in other processes; '' when it can. Moves and changes nothing."""
    try:
        _refuse(model)
        storages = _Storages(list(model.parameters()))
        _refuse_room(storages)
        _structure(model, storages)
    except ExecutionError as error:
        return str(error)
    return ""


def ship_model(model: torch.nn.Module) -> Shipment:
    """Move the model's parameters to shared memory, in place, and return what another process needs to use them.

    Raises:
        ExecutionError: If something of the model does not travel, before anything has been moved.
    """
    _refuse(model)
    storages = _Storages(list(model.parameters()))
    _refuse_room(storages)
    structure = _structure(model, storages)
    shared = []
    for storage in storages.all:
        fd, size = storage._share_fd_cpu_() if storage.nbytes() else (-1, 0)
        if size and fd < 0:
            raise ExecutionError("a parameter is mapped from a file; load the model without memory mapping")
        shared.append((fd, size))
    metas = []
    for parameter in model.parameters():
        meta = storages.meta(parameter)
        assert meta is not None  # its storage was collected above
        metas.append((meta, parameter.requires_grad))
    return Shipment(structure=structure, parameters=tuple(metas), storages=tuple(shared))


def receive_model(shipment: Shipment) -> torch.nn.Module:
    """Return the model in the process that it was sent to; closes the descriptors of the shared storages."""
    storages = []
    for fd, size in shipment.storages:
        if size:
            storages.append(torch.UntypedStorage._new_shared_fd_cpu(fd, size))  # type: ignore[attr-defined]
            os.close(fd)
        else:
            storages.append(torch.UntypedStorage(0))

    def tensor(meta: Meta) -> torch.Tensor:
        number, dtype, offset, shape, stride = meta
        return torch.empty(0, dtype=dtype).set_(storages[number], offset, shape, stride)  # type: ignore[call-overload]

    parameters = [torch.nn.Parameter(tensor(meta), requires) for meta, requires in shipment.parameters]
    model = _Unpickler(shipment.structure, lambda pid: parameters[pid] if isinstance(pid, int) else tensor(pid)).load()
    assert isinstance(model, torch.nn.Module)  # it was one when it was pickled
    _register_recorders(model)
    return model


def _register_recorders(model: torch.nn.Module) -> None:
    """Let `transformers` know what its models can record, as their constructors do in the process that made them."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    registry = getattr(capturing, "_CAN_RECORD_REGISTRY", None)
    if registry is not None:
        for module in model.modules():
            recordable = getattr(module, "_can_record_outputs", None)
            if recordable is not None:
                registry[module] = recordable
