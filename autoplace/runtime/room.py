"""Room on a GPU for copies of weights: executors that wait give theirs up to one that runs.

A tuning keeps several executors, and their copies together may not fit where one plan's do, as on a GPU that is smaller
than the model. Before copies are made, all other holders on that GPU release theirs unless half of its memory stays
free; a holder makes its copies again at its next call. What a call in flight uses lives on until that call is over.
Copies of single weights (→ `standins`) are not released: a stage writes what it changed back to them.
"""

from __future__ import annotations

import gc
import weakref
from typing import Protocol

import torch

from autoplace.hardware.gpus import torch_gpus

__all__ = ["Holder", "hold", "make_room"]

_FREE_SHARE = 0.5
"""Activations and workspaces need room, too."""


class Holder(Protocol):
    """Has copies of weights on a device."""

    def release(self) -> bool:
        """Let go of the copies, which are made again when they are needed; returns whether there were any."""


_holders: weakref.WeakKeyDictionary[Holder, torch.device] = weakref.WeakKeyDictionary()


def hold(holder: Holder, device: torch.device) -> None:
    """Let a holder's copies be released when somebody else needs the room.

    Args:
        holder: Its reference is weak.
        device: Where its copies are.
    """
    _holders[holder] = device


def make_room(holder: object, device: torch.device, needed_bytes: int, *, first: bool) -> None:
    """Have the other holders on a GPU release their copies, unless there is room for these as well.

    Args:
        holder: Is about to make copies.
        device: Where; nothing is done on a CPU.
        needed_bytes: Their size.
        first: Whether the holder has none yet; what closed executors left behind is then collected, too.
    """
    if device.type != "cuda" or _has_room(device, needed_bytes):
        return
    others = [other for other, place in list(_holders.items()) if other is not holder and place == device]
    released = [other.release() for other in others]
    if first or any(released):
        gc.collect()  # models may hold themselves in circles
        torch.cuda.empty_cache()


def _has_room(device: torch.device, needed_bytes: int) -> bool:
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.memory_allocated(index) + needed_bytes <= (1.0 - _FREE_SHARE) * torch_gpus()[index].memory_bytes
