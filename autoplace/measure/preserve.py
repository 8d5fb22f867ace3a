"""Contexts that give a model back as it was: gradients, buffers, random state; and switch dropout off meanwhile.

Random state is not put back in threads that are to leave the process's own alone → `autoplace.hands_off`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd

from autoplace.hands_off import is_hands_off

__all__ = ["RandomState", "clear_gradients", "no_dropout", "preserved"]


class RandomState:
    """The state of torch's random generators, to be put back any number of times."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        """Put it back; in hands-off threads, leave it as it is."""
        if is_hands_off():
            return
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


def clear_gradients(model: torch.nn.Module) -> None:
    """Set every parameter's `.grad` to None."""
    for parameter in model.parameters():
        parameter.grad = None


@contextmanager
def preserved(model: torch.nn.Module) -> Iterator[None]:
    """Start without gradients, and put gradients (the same tensors), buffers' values and random state back after."""
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    random = RandomState()
    clear_gradients(model)
    try:
        yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        random.restore()


@contextmanager
def no_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Set dropout to 0 everywhere, and back after.

    That is `p` of PyTorch's dropout modules, and every float attribute of a module, or of its `config`, whose name
    holds "drop" (`dropout`, `attn_pdrop`, `layerdrop`, `drop_path_prob`, ...).
    """
    changed: list[tuple[dict[str, Any], str, float]] = []
    seen: set[int] = set()
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            if holder is None or id(holder) in seen or not hasattr(holder, "__dict__"):
                continue
            seen.add(id(holder))
            for name, value in vars(holder).items():
                off = "drop" in name or (name == "p" and isinstance(holder, _DropoutNd))
                if off and isinstance(value, float) and value != 0.0:
                    changed.append((vars(holder), name, value))
    try:
        for attributes, name, _ in changed:
            attributes[name] = 0.0
        yield
    finally:
        for attributes, name, value in changed:
            attributes[name] = value
