"""Leave no trace: run a model for capture or measurement and put back everything that the run changed.

What it restores: buffers (identity and values), gradients, modules' attributes, and the random generators of torch (CPU
and CUDA), numpy and Python; the generators not in threads that are to leave them alone → `autoplace.hands_off`. What it
does not know: state outside the modules, and objects that a forward mutates in place (a Python list kept as an
attribute).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from autoplace.hands_off import is_hands_off

__all__ = ["preserve_model", "preserve_random"]


@contextmanager
def preserve_random() -> Iterator[None]:
    """Hold the states of all random generators and put them back after; in hands-off threads, leave them alone."""
    if is_hands_off():
        yield
        return
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    torch_state = torch.random.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if cuda else []
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - models use the global one
    try:
        yield
    finally:
        torch.random.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def preserve_model(model: torch.nn.Module) -> Iterator[None]:
    """Hold a model's buffers, gradients, attributes and the random generators, and put them back after.

    Inside, every parameter's gradient starts as None, so that a backward pass never adds to the user's gradients.
    """
    modules = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    with preserve_random():
        try:
            yield
        finally:
            for module, attributes, parameters, named_buffers in modules:
                _restore_dict(module.__dict__, attributes)
                _restore_dict(module._parameters, parameters)
                _restore_dict(module._buffers, named_buffers)
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
            for parameter, gradient in gradients:
                parameter.grad = gradient


def _restore_dict(present: dict[str, Any], saved: dict[str, Any]) -> None:
    if present.keys() == saved.keys() and all(present[key] is saved[key] for key in saved):
        return
    for key in [key for key in present if key not in saved]:
        del present[key]
    for key, value in saved.items():
        if present.get(key) is not value:
            present[key] = value
