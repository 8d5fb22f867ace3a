"""Local copies of weights that live on another device than the stage that uses them.

A copy is refreshed when the weight has another version or address than last time, and always while gradients are on and
in the first call after (an optimizer may have stepped through `.data`), as in `copies`, which does the same for whole
modules. Gradients of a copy are given to the weight by the caller. Used by one worker's thread alone.
"""

from __future__ import annotations

import torch

from .room import make_room

__all__ = ["Standins"]


class Standins:
    """The copies on one device.

    Args:
        device: Where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._seen: dict[int, tuple[int, int, bool]] = {}

    def local(self, weight: torch.Tensor) -> bool:
        """Return whether a weight lives on this device, and so has no copy."""
        return weight.device == self._device

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight itself where it is on this device, else its copy, up to date."""
        if self.local(weight):
            return weight
        grad, key = torch.is_grad_enabled(), id(weight)
        source, copy = self._copies.get(key, (None, None))
        if source is not weight or copy is None or copy.shape != weight.shape or copy.dtype != weight.dtype:
            make_room(self, self._device, weight.nbytes, first=not self._copies)
            with torch.inference_mode(False), torch.no_grad():
                copy = weight.detach().to(self._device, copy=True)
            self._copies[key] = (weight, copy)
        elif grad or self._seen[key] != (weight._version, weight.data_ptr(), False):
            # `.data`: graphs that wait for their backward hold the same values and must not see a new version.
            copy.data.copy_(weight.detach(), non_blocking=True)
        if copy.requires_grad != weight.requires_grad:
            copy.requires_grad_(weight.requires_grad)
        self._seen[key] = (weight._version, weight.data_ptr(), grad)
        return copy

    def write_back(self, weight: torch.Tensor) -> None:
        """Give a weight what a stage wrote to its copy, if it differs."""
        if self.local(weight):
            return
        with torch.no_grad():
            value = self._copies[id(weight)][1].to(weight.device)
            if not torch.equal(value, weight):
                weight.copy_(value)
