"""`export_flat`: export of a module that takes and returns nothing but tensors, for programs that are to be run.

Unlike the capture for planning it must be right for every call that it is used for: it refuses what an exported graph
would lose (activation checkpointing), and follows the caller's modes of gradients and autocast. The graph has to be run
under the same autocast: what the model asks of types is fixed by it (`.to(x.dtype)`), casts of its own are not in it.

Other threads may be running the model meanwhile → `graph.tracing`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils import checkpoint

from autoplace.errors import CaptureError
from autoplace.graph.export_capture import _quiet
from autoplace.graph.preserve import preserve_random
from autoplace.graph.tracing import traces_alone

__all__ = ["export_flat"]

_CHECKPOINTS = ("_checkpoint_without_reentrant_generator", "CheckpointFunction")
"""What every way to call `torch.utils.checkpoint.checkpoint` ends in, as names of its module."""


class _Checkpointed(Exception):
    """Raised when the model checkpoints activations as it is exported."""


def export_flat(
    module: torch.nn.Module, tensors: Sequence[torch.Tensor], *, batch: int | None
) -> torch.export.ExportedProgram:
    """Export `module(*tensors)`.

    Args:
        module: Takes tensors, as `forward(self, *tensors)`, and returns a tuple of tensors and numbers.
        tensors: Example inputs.
        batch: The size that stays free as first dimension of every tensor that has it, where the model allows that;
            None fixes all sizes.

    Raises:
        CaptureError: If the module cannot be exported, or would lose something by it.
    """
    with traces_alone(), ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        grad = torch.is_grad_enabled()
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(preserve_random())
        stack.enter_context(_quiet())
        if grad:
            stack.enter_context(_no_checkpoints())
        try:
            return _export(module, tensors, batch)
        except _Checkpointed:
            raise CaptureError(
                "the model checkpoints activations, which an exported graph would not; use another engine"
            ) from None
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            told = f": {lines[0]}" if lines else ""
            raise CaptureError(f"the model cannot be exported ({type(error).__name__}{told[:200]})") from error


def _examples(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return tensors to export with. A failed attempt leaves marks on its own, which would make the next dynamic."""
    own = [t.clone() if t.is_inference() else t for t in tensors]
    return tuple(o.detach().requires_grad_(t.requires_grad) for o, t in zip(own, tensors, strict=True))


def _export(
    module: torch.nn.Module, tensors: Sequence[torch.Tensor], batch: int | None
) -> torch.export.ExportedProgram:
    free = [t.dim() > 0 and t.shape[0] == batch for t in tensors]
    if batch is not None and batch > 1 and any(free):
        shapes = {"tensors": tuple({0: torch.export.Dim.AUTO} if is_free else None for is_free in free)}
        try:
            return torch.export.export(module, _examples(tensors), strict=False, dynamic_shapes=shapes)
        except _Checkpointed:
            raise
        except Exception:  # whatever it is, the sizes as they are may do
            pass
    return torch.export.export(module, _examples(tensors), strict=False)


@contextmanager
def _no_checkpoints() -> Iterator[None]:
    """Let checkpointing raise `_Checkpointed` in this thread."""
    own = threading.get_ident()
    before = {name: getattr(checkpoint, name) for name in _CHECKPOINTS}

    def refuse(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == own:
                raise _Checkpointed
            return original(*args, **kwargs)

        return call

    class _Reentrant:
        apply = staticmethod(refuse(before["CheckpointFunction"].apply))

    try:
        checkpoint._checkpoint_without_reentrant_generator = refuse(  # type: ignore[assignment]
            before["_checkpoint_without_reentrant_generator"]
        )
        checkpoint.CheckpointFunction = _Reentrant  # type: ignore[assignment,misc]
        yield
    finally:
        for name, value in before.items():
            setattr(checkpoint, name, value)
