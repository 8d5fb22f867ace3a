"""The channels-last knob: image tensors are laid out channels last at the border of a call, and back on the way out.

Convolutions on CPUs, and on GPUs at lower precision, are faster on tensors whose channels lie next to each other; it is
enough that the input of the first one does, as every operation hands the layout on. Values and parameters stay as they
are. Only floating-point tensors of four dimensions that are contiguous in the usual order are laid out anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .tree import Tree

__all__ = ["Laid", "call_channels_last", "lay_out", "take_back"]

Laid = list[tuple[torch.Tensor, torch.Tensor]]
"""Tensors as the caller passed them, and as they were laid out."""


def lay_out(values: list[Any]) -> Laid:
    """Replace the image tensors in a list by such of the same values that are laid out channels last.

    Returns:
        What was replaced by what, for `take_back`.
    """
    laid: Laid = []
    for i, value in enumerate(values):
        if isinstance(value, torch.Tensor) and _is_image(value):
            values[i] = value.to(memory_format=torch.channels_last)
            laid.append((value, values[i]))
    return laid


def take_back(laid: Laid, leaves: list[Any]) -> bool:
    """Bring what a call did with its laid-out inputs to the caller's tensors, and the outputs into the usual order.

    A change in place is made to the caller's tensor, with its gradient; an input that comes back is the caller's own.

    Args:
        laid: From `lay_out`.
        leaves: The outputs; changed in this list.

    Returns:
        Whether any output was changed.
    """
    for given, own in laid:
        if not own.is_inference() and own._version > 0:
            given.copy_(own)
    changed = False
    same = {id(own): given for given, own in laid}
    for i, leaf in enumerate(leaves if laid else ()):
        if id(leaf) in same:
            leaves[i], changed = same[id(leaf)], True
        elif isinstance(leaf, torch.Tensor) and _is_laid_out(leaf):
            leaves[i], changed = leaf.contiguous(), True
    return changed


def call_channels_last(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function with its image inputs, those that are arguments themselves, laid out channels last."""
    values = [*args, *kwargs.values()]
    laid = lay_out(values)
    if not laid:
        return function(*args, **kwargs)
    output = function(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))
    tree = Tree(output)
    leaves = list(tree.leaves)
    return tree.build(leaves) if take_back(laid, leaves) else output


def _is_image(tensor: torch.Tensor) -> bool:
    return (
        tensor.dim() == 4
        and tensor.is_floating_point()
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and not tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _is_laid_out(tensor: torch.Tensor) -> bool:
    return (
        tensor.dim() == 4
        and tensor.layout == torch.strided
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )
