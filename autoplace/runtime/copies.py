"""A module's stand-in on a device where its parameters do not live.

The original stays where it is. The stand-in has its own leaf parameters and buffers on the other device, refreshed
before each use, and shares the original's hooks; gradients of its parameters are given to the originals by the caller.
Where the parameters already live on the device there is no stand-in: the original itself runs.

The modules' `config` objects are shared, and attributes that are numbers, texts or None (a dropout's `p`) carried over
before each use; other attributes are as they were at the first use. Buffers that the module replaces instead of
modifying in place are not brought back.
"""

from __future__ import annotations

import copy

import torch

from .room import hold, make_room
from .routing import Gate

__all__ = ["Copies"]

_SIMPLE = (bool, int, float, str)


class _Standin:
    """One module's copy on one device."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        memo: dict[int, object] = {}
        self.parameters: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        for parameter in module.parameters():
            local = torch.nn.Parameter(parameter.detach().to(device, copy=True), parameter.requires_grad)
            memo[id(parameter)] = local
            self.parameters.append((parameter, local))
        for buffer in module.buffers():
            moved = buffer.detach().to(device, copy=True)
            memo[id(buffer)] = moved
            self.buffers.append((buffer, moved))
        for child in module.modules():
            for name, value in vars(child).items():
                if name == "config" or (name.endswith("_hooks") and isinstance(value, dict)):
                    memo[id(value)] = value
        self.module = copy.deepcopy(module, memo)
        self._flags = list(zip(module.modules(), self.module.modules(), strict=True))
        for original, local_module in self._flags:
            gate = vars(original).get("forward")
            if isinstance(gate, Gate) and not gate.in_instance:
                # Its copy is a method bound to the copied module: a circle, which would hold the GPU's memory.
                del vars(local_module)["forward"]
        self._seen: list[tuple[int, int]] = []
        self._stale = True
        self._buffer_versions: list[int] = []

    def refresh(self, grad: bool) -> None:
        """Copy what may have changed; `grad` says whether the coming call has gradients on.

        That is everything while gradients are on and in the first call after (an optimizer may have stepped, through
        `.data` even), else what has another version or address than last time.
        """
        pairs = [*self.parameters, *self.buffers]
        seen = [(source._version, source.data_ptr()) for source, _ in pairs]
        for i, (source, local) in enumerate(pairs):
            if grad or self._stale or seen[i] != self._seen[i]:
                # `.data`: graphs that wait for their backward hold the same values and must not see a new version.
                local.data.copy_(source.detach(), non_blocking=True)
            if source.requires_grad != local.requires_grad:
                local.requires_grad_(source.requires_grad)
        self._seen, self._stale = seen, grad
        self._buffer_versions = [local._version for _, local in self.buffers]
        for source_module, local_module in self._flags:
            attributes = vars(local_module)
            attributes.update((k, v) for k, v in vars(source_module).items() if v is None or isinstance(v, _SIMPLE))

    def write_back(self) -> None:
        """Copy buffers that the stand-in changed (running statistics) to the originals.

        Batch norm changes its statistics without a new version, so in training values are compared. Equal buffers are
        left alone: a new version would spoil the graphs of other parts that saved them.
        """
        training = any(module.training for _, module in self._flags)
        with torch.no_grad():
            for (source, local), version in zip(self.buffers, self._buffer_versions, strict=True):
                if local._version != version or training:
                    value = local.to(source.device)
                    if not torch.equal(value, source):
                        source.copy_(value)


class Copies:
    """The stand-ins of one device, made when first needed. Used by that device's worker thread alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._standins: dict[int, _Standin] = {}
        hold(self, device)

    def release(self) -> bool:
        """Let go of the stand-ins, from any thread; see `room.Holder`."""
        held, self._standins = self._standins, {}
        return bool(held)

    def needed(self, module: torch.nn.Module) -> bool:
        """Return whether any parameter or buffer of the module lives elsewhere."""
        if self._device.type == "cpu" and not torch.cuda.is_initialized():
            return False
        tensors = [*module.parameters(), *module.buffers()]
        return any(tensor.device != self._device for tensor in tensors)

    def of(self, module: torch.nn.Module) -> _Standin:
        """Return the module's stand-in, up to date."""
        grad = torch.is_grad_enabled()
        standin = self._standins.get(id(module))
        current = [*module.parameters()]
        with torch.inference_mode(False):  # what is made here may have to train later
            if standin is None or [id(p) for p in current] != [id(source) for source, _ in standin.parameters]:
                needed_bytes = sum(tensor.nbytes for tensor in (*current, *module.buffers()))
                make_room(self, self._device, needed_bytes, first=not self._standins)
                standin = self._standins[id(module)] = _Standin(module, self._device)
            standin.refresh(grad)
        return standin
