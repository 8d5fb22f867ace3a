"""Key-value caches off while a model is captured: they are outputs of a type that graphs cannot return.

`transformers` says in three places whether a model makes a cache: an argument `use_cache`, a keyword of that name that
`forward` passes on in its `**kwargs`, and the attribute of the configuration that counts where neither is given. The
first is answered by an argument (→ `capture_kwargs`), the rest in the configurations (→ `caches_off`): `torch.export`
takes no keyword that the signature does not name when the batch is to stay free (torch 2.13, `_get_range_constraints`).
Nothing is changed where the user has answered.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from autoplace.workload import Workload

__all__ = ["caches_off", "capture_kwargs"]

_SWITCH = "use_cache"


def capture_kwargs(workload: Workload) -> dict[str, Any]:
    """Return the keyword inputs with caches switched off where the model has that argument and the user left it."""
    kwargs = dict(workload.kwargs)
    try:
        signature = inspect.signature(workload.model.forward)
        given = signature.bind_partial(*workload.args, **kwargs).arguments
    except (TypeError, ValueError):
        return kwargs
    if _SWITCH not in given and _SWITCH not in kwargs and _SWITCH in signature.parameters:
        kwargs[_SWITCH] = False
    return kwargs


@contextmanager
def caches_off(model: torch.nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Let the configurations of a model's modules say that there is no cache, unless the keywords say that there is."""
    changed: list[Any] = []
    try:
        for module in [] if kwargs.get(_SWITCH) else model.modules():
            config = vars(module).get("config")
            if getattr(config, _SWITCH, None) is True:
                setattr(config, _SWITCH, False)
                changed.append(config)
        yield
    finally:
        for config in changed:
            setattr(config, _SWITCH, True)
