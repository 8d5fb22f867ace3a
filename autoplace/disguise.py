"""A class of its own for every class of model, so that a wrapper answers as the model does.

Python looks special methods up in the class (`len(wrapper)`, `wrapper[0]`), and `torch.nn.Module` has methods that a
model may override (`to`, `state_dict`, `_load_from_state_dict`). The class made here sends all of them to the model:
the methods of `torch.nn.Module`, and every method that the model's own classes define, special ones included. A method
that returns the model returns the wrapper. Everything else is reached by the wrapper's `__getattr__`.

It knows nothing of plans; methods that move or convert the model are told apart by name. → `MOVES`
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["MOVES", "disguised"]

MOVES = frozenset(
    [
        "_apply",
        "bfloat16",
        "cpu",
        "cuda",
        "double",
        "float",
        "half",
        "ipu",
        "mtia",
        "share_memory",
        "to",
        "to_empty",
        "type",
        "xpu",
    ]
)
"""Methods after which parameters are elsewhere, or of another type: what runs plans is to be built again."""
_KEPT = frozenset(
    [
        "__call__",
        "__class__",
        "__copy__",
        "__deepcopy__",
        "__del__",
        "__delattr__",
        "__dir__",
        "__getattr__",
        "__getattribute__",
        "__getnewargs__",
        "__getnewargs_ex__",
        "__getstate__",
        "__init__",
        "__init_subclass__",
        "__new__",
        "__reduce__",
        "__reduce_ex__",
        "__repr__",
        "__setattr__",
        "__setstate__",
        "__sizeof__",
        "_call_impl",
        "_wrapped_call_impl",
        "_slow_forward",
        "_replicate_for_data_parallel",
    ]
)
"""Never sent to the model."""

_ASKED_FOR = ("get_extra_state", "set_extra_state")
"""PyTorch looks whether a class has methods of its own by these names."""

_made: weakref.WeakKeyDictionary[type, dict[type, type]] = weakref.WeakKeyDictionary()


def disguised(base: type, model_type: type) -> type:
    """Return the subclass of `base` whose methods are the model's.

    Args:
        base: The wrapper's class; its own methods win, but for those of `torch.nn.Module`.
        model_type: The model's class.
    """
    made = _made.setdefault(model_type, {})
    if base not in made:
        own = _own_names(base)
        names = {name: method for name, method in vars(torch.nn.Module).items() if not name.startswith("_")}
        names = {name: method for name, method in names.items() if name not in _ASKED_FOR}
        for parent in reversed(model_type.__mro__[: model_type.__mro__.index(torch.nn.Module)]):
            names |= vars(parent)
        namespace: dict[str, Any] = {
            name: _forwarder(name, getattr(model_type, name))
            for name, method in {**names, **dict.fromkeys(MOVES & set(vars(torch.nn.Module)))}.items()
            if name not in own and name not in _KEPT and (method is None or isinstance(method, types.FunctionType))
        }
        namespace["forward"] = functools.wraps(model_type.forward)(_unbound(base.forward))  # type: ignore[attr-defined]
        namespace.update(__module__=base.__module__, __doc__=base.__doc__)
        namespace["__qualname__"] = f"{base.__qualname__}[{model_type.__qualname__}]"
        made[base] = types.new_class(base.__name__, (base,), {}, lambda body: body.update(namespace))
    return made[base]


def _own_names(base: type) -> set[str]:
    above = base.__mro__[: base.__mro__.index(torch.nn.Module)]
    return {name for parent in above for name in vars(parent)} - {"__doc__", "__module__", "__slots__"}


def _unbound(function: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return forward


def _forwarder(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    moves = name in MOVES

    @functools.wraps(original)
    def forward_to_model(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if moves:
            self._state.drop()
        model = self._state.model
        result = getattr(model, name)(*args, **kwargs)
        return self if result is model else result

    return forward_to_model
