"""Model factories: `file.py:function`, a function that returns (model, inputs) or (model, inputs, loss)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from autoplace.errors import ModelFactoryError
from autoplace.workload import Workload

__all__ = ["load_workload"]


def load_workload(spec: str, *, training: bool | None = None) -> Workload:
    """Build the workload that `file.py:function` describes.

    The function takes no arguments and returns `(model, inputs)` or `(model, inputs, loss)`: inputs are a tensor, a
    tuple of positional inputs or a dict of keyword inputs; loss maps the model's output to a scalar.

    Args:
        spec: Path and function name, for example `examples/bert.py:build`.
        training: Forward and backward, or forward alone; None = the mode that the model is returned in.

    Raises:
        ModelFactoryError: If the file or function is missing, raises, or returns something else.
    """
    path, separator, function = spec.rpartition(":")
    if not separator or not function.isidentifier():
        raise ModelFactoryError(f"{spec!r} is not a model factory; write it as file.py:function")
    factory = getattr(_load(Path(path)), function, None)
    if not callable(factory):
        raise ModelFactoryError(f"{path} has no function {function!r}; name one that returns (model, inputs)")
    try:
        made = factory()
    except Exception as error:
        raise ModelFactoryError(f"the model factory {spec} raised {type(error).__name__}: {error}") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], torch.nn.Module):
        raise ModelFactoryError(f"the model factory {spec} must return (model, inputs) or (model, inputs, loss)")
    args, kwargs = _inputs(made[1], spec)
    return Workload(
        model=made[0],
        args=args,
        kwargs=kwargs,
        training=made[0].training if training is None else training,
        loss=made[2] if len(made) == 3 else None,
        name=f"{Path(path).stem}:{function}",
    )


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelFactoryError(f"{path} does not exist; name a Python file with a model factory")
    name = f"autoplace_factory_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise ModelFactoryError(f"{path} is not a Python file; name one that ends in .py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ModelFactoryError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _inputs(inputs: Any, spec: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if hasattr(inputs, "keys"):
        return (), dict(inputs)
    raise ModelFactoryError(f"the inputs of {spec} are a {type(inputs).__name__}; use a tensor, a tuple or a dict")
