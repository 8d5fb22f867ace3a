"""Checkpoints of a model under any plan, by torch.distributed.checkpoint: written by the ranks that hold the tensors.

A checkpoint is a folder. Every parameter and buffer is in it once, written by its owner; so is every tensor of the
optimizer's state, under the name of the parameter that it belongs to, so that it can be loaded under another plan and
by another number of ranks: who holds a parameter there reads its state. Numbers (an optimizer's `step`, the caller's
own `extra`) are tensors or JSON text.

A checkpoint is complete once its folder has its final name: it is written beside it and renamed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from autoplace.errors import ExecutionError, InputError

from .runner import DistributedModel

__all__ = ["load_checkpoint", "save_checkpoint"]

_MODEL, _OPTIMIZER, _EXTRA = "model/", "optimizer/", "extra"


def save_checkpoint(
    model: torch.nn.Module,
    path: str | Path,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    runner: DistributedModel | None = None,
    **extra: Any,
) -> None:
    """Write a checkpoint; every rank has to call it, with a path that all of them can write to.

    Args:
        model: The model.
        path: The folder; one that is there already is replaced once the new one is complete.
        optimizer: Whose state is kept, for parameters of the model.
        runner: Runs the model under its plan; None = every rank that there is holds all of it.
        **extra: What JSON can hold: the epoch, for example.

    Raises:
        InputError: If the optimizer is of another model.
        ExecutionError: If a rank cannot write its part.
    """
    rank, path = dist.get_rank() if dist.is_initialized() else 0, Path(path)

    def owns(name: str) -> bool:
        return rank == (0 if runner is None else runner.holders(name)[0])

    partial = path.with_name(path.name + ".partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
    _wait()
    tensors: dict[str, torch.Tensor] = {}
    every = (*model.named_parameters(), *model.named_buffers())
    tensors |= {_MODEL + name: t.detach() for name, t in every if owns(name)}
    if optimizer is not None:
        names = {id(p): name for name, p in model.named_parameters()}
        for parameter, state in optimizer.state.items():
            name = names.get(id(parameter))
            if name is None:
                raise InputError("the optimizer has a parameter that is none of the model's; make it of this model's")
            if owns(name):
                tensors |= {f"{_OPTIMIZER}{name}//{key}": torch.as_tensor(value) for key, value in state.items()}
    writer = dcp.FileSystemWriter(str(partial), sync_files=True)
    try:
        dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    except CheckpointException as failed:  # of the files, on some rank; it is no Exception
        where, (cause, _) = min(failed.failures.items())
        raise ExecutionError(
            f"the checkpoint at {path} was not written: rank {where}: {type(cause).__name__}: {cause}; "
            "check that all ranks can write there"
        ) from None
    if rank == 0:
        (partial / f"{_EXTRA}.json").write_text(json.dumps(extra), encoding="utf-8")
        old = path.with_name(path.name + ".old")
        if path.exists():  # else the old one is all there is until the next line but one
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    _wait()


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def load_checkpoint(
    model: torch.nn.Module, path: str | Path, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Read a checkpoint into a model, and its optimizer's state, whatever plan and number of ranks wrote it.

    Args:
        model: Of the same structure; every rank reads all of its parameters.
        path: The folder.
        optimizer: Over the model's parameters; its state is replaced.

    Returns:
        What was given as `extra`.

    Raises:
        InputError: If there is no complete checkpoint, or it is of another model.
    """
    path = Path(path)
    old = path.with_name(path.name + ".old")
    if not path.exists() and old.exists():  # ended between the two renames
        path = old
    if not (path / f"{_EXTRA}.json").exists():
        raise InputError(f"there is no complete checkpoint at {path}; give the folder that save_checkpoint wrote")
    reader = dcp.FileSystemReader(str(path))
    known = reader.read_metadata().state_dict_metadata
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found = known.get(_MODEL + name)
        if found is None or tuple(getattr(found, "size", ())) != tuple(tensor.shape):
            raise InputError(f"the checkpoint at {path} is of another model: {name!r} is missing or of another shape")
        tensors[_MODEL + name] = tensor.detach()
    states: dict[str, dict[str, torch.Tensor]] = {}
    if optimizer is not None:
        for key, found in known.items():
            if key.startswith(_OPTIMIZER):
                name, _, item = key.removeprefix(_OPTIMIZER).partition("//")
                empty = torch.empty(tuple(found.size), dtype=found.properties.dtype)  # type: ignore[union-attr]
                tensors[key] = states.setdefault(name, {})[item] = empty
    dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    if optimizer is not None:
        parameters = dict(model.named_parameters())
        optimizer.state.clear()
        for name, state in states.items():
            parameter = parameters[name]
            optimizer.state[parameter] = {
                key: value if value.dim() == 0 else value.to(parameter.device) for key, value in state.items()
            }
    extra: dict[str, Any] = json.loads((path / f"{_EXTRA}.json").read_text(encoding="utf-8"))
    return extra
