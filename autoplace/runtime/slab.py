"""Tensors in memory that two processes share: an arena that one side packs and the other looks into.

A slab is an unnamed file in memory (`memfd_create(2)`), mapped by both sides and grown by the packing side alone. What
is packed next overwrites what was packed before, so the looking side copies what it wants to keep. Knows nothing of
models and messages.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from autoplace.errors import ExecutionError

__all__ = ["Packed", "Slab"]

Packed = tuple[Any, ...]
"""Where a tensor lies: (dtype, shape, stride, offset in bytes), or ("coo", shape, indices, values, coalesced)."""

_ALIGN = 64
"""Bytes; a cache line, and a multiple of every element's size."""
_MAX_VIEWS = 512
"""Views that are kept for the next call with the same shapes."""
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)
_NUMBER = {dtype: i for i, dtype in enumerate(_DTYPES)}


class Slab:
    """One side's view of a shared arena.

    Args:
        fd: The memory's file descriptor; it becomes this object's own. None makes new memory.
    """

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("autoplace") if fd is None else fd
        self._bytes = 0
        self._storage = torch.UntypedStorage(0)
        self._views: dict[Packed, torch.Tensor] = {}

    def __del__(self) -> None:
        os.close(self.fd)

    def pack(self, tensors: Sequence[torch.Tensor | None]) -> list[Packed | None]:
        """Copy tensors into the slab, over what was there, and return where each lies.

        Raises:
            ExecutionError: If a tensor is not a plain or sparse (COO) tensor in the host's memory.
        """
        packed: list[Packed | None] = []
        parts: list[tuple[torch.Tensor, Packed]] = []
        end = 0
        for tensor in tensors:
            if tensor is None:
                packed.append(None)
                continue
            place, end = _place(tensor, end, parts)
            packed.append(place)
        if end > self._bytes:
            size = max(2 * self._bytes, -(-end // 4096) * 4096)
            os.ftruncate(self.fd, size)
            self._map(size)
        with torch.no_grad():
            for part, place in parts:
                self._dense(place).copy_(part)
        return packed

    def look(self, place: Packed) -> torch.Tensor:
        """Return the tensor that lies there, without a copy; it changes with the next packing."""
        if place[0] == "coo":
            _, shape, indices, values, coalesced = place
            return torch.sparse_coo_tensor(
                self.look(indices), self.look(values), shape, is_coalesced=coalesced, check_invariants=False
            )
        return self._dense(place)

    def _dense(self, place: Packed) -> torch.Tensor:
        view = self._views.get(place)
        if view is None:
            number, shape, stride, offset = place
            dtype = _DTYPES[number]
            with torch.inference_mode(False):  # it is used again outside
                view = torch.empty(0, dtype=dtype)
                if 0 not in shape:
                    self._see(offset + _span_bytes(shape, dtype))
                    view.set_(self._storage, offset // dtype.itemsize, shape, stride)  # type: ignore[call-overload]
                else:
                    view = view.new_empty(shape)
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            self._views[place] = view
        return view

    def _see(self, end: int) -> None:
        """Map the memory anew if the other side has grown it."""
        if end > self._bytes:
            self._map(os.fstat(self.fd).st_size)

    def _map(self, size: int) -> None:
        self._views.clear()
        self._storage = torch.UntypedStorage._new_shared_fd_cpu(self.fd, size)  # type: ignore[attr-defined]
        self._bytes = size


def _place(tensor: torch.Tensor, end: int, parts: list[tuple[torch.Tensor, Packed]]) -> tuple[Packed, int]:
    """Return where a tensor will lie and where the next one may start; adds what is to be copied to `parts`."""
    if tensor.device.type != "cpu" or tensor.is_nested or tensor.is_quantized:
        raise ExecutionError("only plain tensors in the host's memory travel to other processes; use a plan of threads")
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.detach()
        indices, end = _place(tensor._indices(), end, parts)
        values, end = _place(tensor._values(), end, parts)
        return ("coo", tuple(tensor.shape), indices, values, tensor.is_coalesced()), end
    number = _NUMBER.get(tensor.dtype)
    if tensor.layout != torch.strided or number is None:
        raise ExecutionError(
            f"a tensor of layout {tensor.layout} and type {tensor.dtype} does not travel to other processes; "
            "use a plan of threads"
        )
    shape = tuple(tensor.shape)
    place = (number, shape, _stride(tensor), end)
    parts.append((tensor.detach(), place))
    return place, end + -(-_span_bytes(shape, tensor.dtype) // _ALIGN) * _ALIGN


def _stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the strides of a dense copy: channels last where the tensor is, else contiguous (empty)."""
    if tensor.is_contiguous():
        return ()
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tuple(tensor.stride())
    if tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return tuple(tensor.stride())
    return ()


def _span_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count
