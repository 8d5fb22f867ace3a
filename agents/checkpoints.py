"""Checkpoints of a training: weights as safetensors, the optimizer's tensors, progress as JSON. Nothing is unpickled.

A checkpoint is a folder that appears whole (written aside, then renamed); the newest one counts, the one before it is
then removed.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from autoplace.errors import InputError
from autoplace.files import read_json

__all__ = ["Checkpoint", "Checkpoints"]

FORMAT = "autoplace.checkpoint/1"
_DAMAGE = (
    KeyError,
    TypeError,
    AttributeError,
    ValueError,
    OSError,
    RuntimeError,
    SafetensorError,
    pickle.UnpicklingError,
)
Tensors = dict[str, NDArray[np.float32]]


@dataclass(kw_only=True)
class Checkpoint:
    """Where a training is."""

    stage: str
    """Stage that is running, or the last one done."""
    chunk: int = 0
    """Chunks of the stage that are done: epochs of imitation, chunks of PPO."""
    weights: Tensors = field(default_factory=dict)
    best: Tensors = field(default_factory=dict)
    """Weights of the best chunk of the stage by validation."""
    best_value: float = -float("inf")
    """Validation of those: mean log(J_baseline / J)."""
    optimizer: Mapping[str, Any] | None = None
    """State of the stage's optimizer; None before its first chunk."""
    updates: int = 0
    """PPO updates of the stage."""
    step: int = 0
    """Running number of metrics."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds spent on each stage so far."""


class Checkpoints:
    """The checkpoints of one training.

    Args:
        directory: Where they are.
        config: JSON-ready configuration; resuming asks for the same one.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        self.directory = directory
        self._config = json.loads(json.dumps(config))

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint and remove the one before."""
        older = self._found()
        number = older[-1][0] + 1 if older else 1
        self.directory.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=self.directory, prefix=".writing-"))
        try:
            save_file(checkpoint.weights, staging / "weights.safetensors")
            if checkpoint.best:
                save_file(checkpoint.best, staging / "best.safetensors")
            if checkpoint.optimizer is not None:
                torch.save(dict(checkpoint.optimizer), staging / "optimizer.pt")
            state = {
                "format": FORMAT,
                "config": self._config,
                "stage": checkpoint.stage,
                "chunk": checkpoint.chunk,
                "best_value": checkpoint.best_value if checkpoint.best else None,
                "updates": checkpoint.updates,
                "step": checkpoint.step,
                "seconds": checkpoint.seconds,
            }
            (staging / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
            for path in staging.iterdir():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
            staging.rename(self.directory / f"checkpoint-{number:06d}")
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        for _, path in older:
            shutil.rmtree(path, ignore_errors=True)

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint; None when there is none.

        Raises:
            InputError: If it is damaged or belongs to another configuration.
        """
        found = self._found()
        if not found:
            return None
        path = found[-1][1]
        state = read_json(path / "state.json", InputError)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise InputError(f"{path} is not a checkpoint of this version; train without --resume")
        self._check(state.get("config"), path)
        try:
            optimizer = path / "optimizer.pt"
            best = path / "best.safetensors"
            return Checkpoint(
                stage=str(state["stage"]),
                chunk=int(state["chunk"]),
                weights=load_file(path / "weights.safetensors"),
                best=load_file(best) if best.exists() else {},
                best_value=-float("inf") if state["best_value"] is None else float(state["best_value"]),
                optimizer=torch.load(optimizer, weights_only=True) if optimizer.exists() else None,
                updates=int(state["updates"]),
                step=int(state["step"]),
                seconds={str(stage): float(value) for stage, value in state["seconds"].items()},
            )
        except _DAMAGE as error:
            raise InputError(
                f"{path} is damaged ({type(error).__name__}); remove it, or train without --resume"
            ) from None

    def clear(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _check(self, other: Any, path: Path) -> None:
        for key, value in self._config.items():
            if not isinstance(other, dict) or other.get(key) != value:
                was = other.get(key) if isinstance(other, dict) else None
                raise InputError(f"{path} was made with {key} = {was!r}, not {value!r}; use that, or drop --resume")

    def _found(self) -> list[tuple[int, Path]]:
        if not self.directory.is_dir():
            return []
        numbered = [(re.fullmatch(r"checkpoint-(\d+)", p.name), p) for p in self.directory.iterdir()]
        return sorted((int(match[1]), path) for match, path in numbered if match)
