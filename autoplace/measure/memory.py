"""Memory of real runs: what the host has left, what a pass added at its peak. Linux's `/proc`, and CUDA's counters.

The host's figure is the growth of the process's resident memory, so it belongs to the process and not to one core
group; memory that the allocator kept from earlier runs is given back before, where the C library can.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import psutil
import torch

from autoplace.hardware._sysfs import read_words
from autoplace.hardware.cgroups import memory_limit_bytes
from autoplace.hardware.cluster import Device

__all__ = ["HeapLine", "PeakMemory", "SavedBytes", "give_back", "host_free_bytes", "process_bytes"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_CROWDED = 0.75
"""Part of what a process may add to its heap, above which the heap is given back between passes: it grows from pass to
pass by 10 to 70 MB of 360 while each pass alone needs no more than the first [measured: a chain of linear layers,
glibc, 2026-11-28]."""


def host_free_bytes() -> float:
    """Return the bytes that this process may still take: what the host has, within the control group's limit."""
    own = psutil.Process().memory_info().rss
    return float(max(0.0, min(psutil.virtual_memory().available, memory_limit_bytes() - own)))


def process_bytes() -> float:
    """Return the bytes that this process alone holds: memory that no file stands behind; 0 where it can't be read."""
    return _status_bytes("RssAnon") + _status_bytes("RssShmem")


def give_back() -> None:
    """Give back what the allocator holds and nobody uses, in the arenas of all threads, where the C library can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


class HeapLine:
    """Tells when a CPU's process has grown so far that its heap should be given back before the next pass.

    Passes that follow each other leave the heap in pieces, and it grows, although none of them needs more than the
    first; where a control group limits the process, it would be killed for it.

    Args:
        memory_bytes: What the process may hold in all; infinite = it never tells.
    """

    def __init__(self, memory_bytes: float) -> None:
        self._line_bytes = math.inf
        if not math.isinf(memory_bytes):
            give_back()
            held = process_bytes()
            self._line_bytes = held + _CROWDED * max(0.0, memory_bytes - held)

    @classmethod
    def of(cls, device: Device) -> HeapLine:
        """Return that of the process that runs a device; only a CPU's memory is the process's."""
        return cls(device.memory_bytes if device.kind == "cpu" else math.inf)

    def crossed(self) -> bool:
        """Return whether the process holds more than that."""
        return not math.isinf(self._line_bytes) and process_bytes() > self._line_bytes

    def keep(self) -> None:
        """Give back what nobody uses, where the line is crossed."""
        if self.crossed():
            give_back()


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Count the bytes that autograd keeps for the backward, each tensor's memory once."""

    def __init__(self) -> None:
        self._storages: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def total(self, model: torch.nn.Module) -> int:
        """Return the sum, the model's own parameters and buffers left out."""
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        return sum(size for address, size in self._storages.items() if address not in own)


class PeakMemory:
    """The peak of the process's resident memory, and of every GPU's, over stretches of work."""

    def __init__(self) -> None:
        self.host_bytes = 0.0
        """Largest growth of resident memory over what it was at the start of a stretch; 0 where it can't be read."""
        self.cuda_bytes: dict[int, float] = {}
        """GPU index to the most bytes allocated."""
        self._start = 0.0

    def begin(self, *, trim: bool = False) -> None:
        """Start a stretch; `trim` gives back what the allocator holds, so that growth is seen."""
        if trim:
            give_back()
        try:
            _CLEAR.write_text("5")  # sets the high-water mark to the present size; see proc(5)
        except OSError:
            return
        self._start = _status_bytes("VmRSS")
        if torch.cuda.is_initialized():
            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)

    def end(self) -> None:
        """End the stretch."""
        if self._start:
            self.host_bytes = max(self.host_bytes, _status_bytes("VmHWM") - self._start)
        if torch.cuda.is_initialized():
            for index in range(torch.cuda.device_count()):
                peak = float(torch.cuda.max_memory_allocated(index))
                self.cuda_bytes[index] = max(self.cuda_bytes.get(index, 0.0), peak)


def _status_bytes(key: str) -> float:
    for line in read_words(_STATUS).splitlines():
        if line.startswith(key + ":"):
            return float(line.split()[1]) * 1024
    return 0.0
