"""What one ATen op costs: floating-point operations and bytes, from shapes alone.

Formulas come, in this order, from the table here (ops that export keeps whole), from `torch.utils.flop_counter`'s
registry, from running a composite op's parts on the meta device under `FlopCounterMode`, and else one operation per
output element. A multiply-add counts as two. Backward passes and fused kernels are not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, flop_registry

__all__ = ["bytes_moved", "concrete", "concrete_int", "is_copy", "op_flops", "op_kind", "tensor_bytes", "tensors_of"]

_KIND_ALIASES = {
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "native_dropout": "dropout",
    "native_batch_norm": "batch_norm",
    "convolution": "conv",
    "conv1d": "conv",
    "conv2d": "conv",
    "conv3d": "conv",
    "thnn_fused_lstm_cell": "lstm",
}

# fmt: off
_MOVES_ONLY = frozenset({
    "arange", "cat", "clone", "constant_pad_nd", "contiguous", "copy", "embedding", "empty", "empty_like",
    "empty_strided", "fill", "flatten", "flip", "full", "full_like", "gather", "index", "index_copy", "index_put",
    "index_select", "lift_fresh_copy", "masked_select", "new_empty", "new_empty_strided", "new_full", "new_ones",
    "new_zeros", "ones", "ones_like", "pad", "pixel_shuffle", "ravel", "repeat", "repeat_interleave", "reshape",
    "roll", "scalar_tensor", "scatter", "select_scatter", "slice_scatter", "stack", "to", "to_copy", "zero", "zeros",
    "zeros_like",
})
# fmt: on
"""Kinds that move or create data and compute nothing."""


_GATHERS = frozenset({"embedding", "gather", "index", "index_select", "embedding_bag"})
"""Kinds that read only some rows of their first operand."""


def op_kind(op: Any) -> str:
    """Return an op's simplified name: `aten._scaled_dot_product_flash_attention` → `scaled_dot_product_attention`."""
    packet = getattr(op, "overloadpacket", op)
    name = getattr(packet, "__name__", None) or str(packet)
    name = name.rsplit(".", 1)[-1].strip("_") or "op"
    if name.startswith("scaled_dot_product"):
        return "scaled_dot_product_attention"
    return _KIND_ALIASES.get(name, name)


def concrete_int(value: Any) -> int:
    """Return a size as a number: a symbolic one by the hint of the example inputs, 1 where it depends on data."""
    if isinstance(value, torch.SymInt):
        return int(value.node.hint) if value.node.has_hint() else 1
    return int(value)


def concrete(tree: Any) -> Any:
    """Replace tensors by meta tensors of the example's sizes, and symbolic numbers by numbers, in a pytree."""

    def leaf(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _meta(value)
        if isinstance(value, torch.SymInt):
            return concrete_int(value)
        if isinstance(value, torch.SymFloat | torch.SymBool):
            return value.node.hint if value.node.has_hint() else 1
        return value

    return pytree.tree_map(leaf, tree)


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    size = [concrete_int(s) for s in tensor.shape]
    if tensor.layout is not torch.strided:
        return torch.empty(size, dtype=tensor.dtype, device="meta")
    stride = [concrete_int(s) for s in tensor.stride()]
    return torch.empty_strided(size, stride, dtype=tensor.dtype, device="meta")


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """Return the tensors in a pytree, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Return a tensor's size in bytes by its shape, an expanded tensor counting every element."""
    return math.prod(concrete_int(s) for s in tensor.shape) * tensor.element_size()


def is_copy(op: Any, args: Sequence[Any], out: torch.Tensor) -> bool:
    """Whether an op that may return a view (`reshape`, `contiguous`, `to`) copies for these meta arguments."""
    source = next(iter(tensors_of(args)), None)
    if source is None:
        return True
    if source.dtype != out.dtype:
        return True
    if op_kind(op) in ("reshape", "flatten", "ravel"):
        try:
            source.view(out.shape)
        except RuntimeError:
            return True
        return False
    return op_kind(op) == "contiguous" and source.stride() != out.stride()


def bytes_moved(kind: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> float:
    """Bytes read and written; a gather reads as much of its table as it returns, an allocation nothing."""
    if "empty" in kind:
        return 0.0
    written = sum(tensor_bytes(t) for t in outputs)
    read = [tensor_bytes(t) for t in inputs]
    if kind in _GATHERS and read:
        read[0] = min(read[0], written)
    return float(written + sum(read))


def op_flops(op: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, cache: dict[str, float]) -> float:
    """Return the floating-point operations of one op.

    Args:
        op: An `OpOverload`, or any callable.
        args: Positional arguments, tensors on the meta device (→ `concrete`).
        kwargs: Keyword arguments likewise.
        out: The op's output likewise.
        cache: Results of composite ops by signature; the caller keeps it between calls.
    """
    kind, packet = op_kind(op), getattr(op, "overloadpacket", op)
    count = float(sum(t.numel() for t in tensors_of(out)))
    if kind in _MOVES_ONLY:
        return 0.0
    if kind in _FORMULAS:
        return float(_FORMULAS[kind](args, kwargs, out))
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=out))
    if isinstance(op, torch._ops.OpOverload) and _is_composite(op):
        key = f"{op}{pytree.tree_map(_signature, (list(args), kwargs))}"
        if key not in cache:
            cache[key] = _count_by_running(op, args, kwargs)
        return max(count, cache[key])
    if isinstance(op, torch._ops.OpOverload) and torch.Tag.reduction in op.tags:
        return float(max((t.numel() for t in tensors_of(args)), default=count))
    return count


def _is_composite(op: torch._ops.OpOverload) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"))


def _signature(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


def _count_by_running(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> float:
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            op(*args, **{key: value for key, value in kwargs.items() if key != "device"})
    except Exception:  # an op without a meta kernel: its elements are counted instead
        return 0.0
    return float(counter.get_total_flops())


def _linear(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> float:
    return 2.0 * out.numel() * args[0].shape[-1]


def _matrix_vector(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> float:
    return 2.0 * args[0].numel()


def _convolution(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> float:
    transposed = args[6] if len(args) > 8 else False
    base = args[0] if transposed else out
    return 2.0 * base.numel() * args[1].shape[1] * math.prod(args[1].shape[2:])


def _attention(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> float:
    query, key, value = args[:3]
    rows = math.prod(query.shape[:-1])
    return 2.0 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _grouped_matmul(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> float:
    ragged_inner = out.dim() == 3 and args[0].dim() == 2  # the groups share the inner dimension
    return 2.0 * (out[0].numel() if ragged_inner else out.numel()) * args[0].shape[-1]


def _recurrent(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> float:
    matrices = [t for t in tensors_of(args[2:]) if t.dim() == 2]
    steps = args[0].numel() / args[0].shape[-1]
    return 2.0 * steps * sum(t.numel() for t in matrices)


def _encoder_layer(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> float:
    source = args[0]
    weights = sum(t.numel() for t in tensors_of(args[1:]) if t.dim() == 2)
    tokens = source.numel() / source.shape[-1]
    return 2.0 * tokens * weights + 4.0 * tokens * source.shape[-2] * source.shape[-1]


_FORMULAS: dict[str, Callable[[Sequence[Any], dict[str, Any], Any], float]] = {
    "linear": _linear,
    "matmul": _linear,
    "grouped_mm": _grouped_matmul,
    "grouped_mm_fallback": _grouped_matmul,
    "mv": _matrix_vector,
    "dot": _matrix_vector,
    "conv": _convolution,
    "scaled_dot_product_attention": _attention,
    "lstm": _recurrent,
    "gru": _recurrent,
    "rnn_tanh": _recurrent,
    "rnn_relu": _recurrent,
    "transformer_encoder_layer_fwd": _encoder_layer,
}
