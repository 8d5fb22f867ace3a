"""`capture`: from a model and its inputs to an OpGraph, by a ladder of three rungs.

1. `export`: the whole graph by `torch.export`, → `export_capture`.
2. `dispatch`: the ops of one real run, → `dispatch_capture`.
3. `module`: the model as one op, → `_one_op`.

The first rung that works is taken, and why the ones above it failed is kept as the reason. The model is the same before
and after, → `preserve_model`, and can be run by other threads meanwhile, → `graph.tracing`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from autoplace.errors import InputError
from autoplace.graph.caches import caches_off, capture_kwargs
from autoplace.graph.dispatch_capture import capture_by_dispatch
from autoplace.graph.export_capture import capture_by_export
from autoplace.graph.opgraph import OpGraph
from autoplace.graph.preserve import preserve_model
from autoplace.graph.tracing import modules_to_trace
from autoplace.workload import Workload

__all__ = ["Capture", "capture"]

Rung = Literal["export", "dispatch", "module"]


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What capture reached."""

    graph: OpGraph
    """One op per ATen call that computes, in execution order; views are folded away."""
    rung: Rung
    """`export`, `dispatch` or `module`."""
    reason: str = ""
    """Why no higher rung was reached; empty for `export`."""
    called: frozenset[str] = frozenset({""})
    """Paths of the modules that were called; containers such as `ModuleList` never are."""
    dynamic_batch: bool = False
    """Whether the exported graph holds for other batch sizes, too."""


def capture(workload: Workload, *, tried: Workload | None = None) -> Capture:
    """Capture the forward pass of a workload's model in the workload's mode.

    Args:
        workload: Model, inputs and mode.
        tried: What is run where export, which runs nothing, fails: the same with fewer samples, where memory may have
            no room for all. The graph's figures are carried over to the whole batch. None = the workload.

    Returns:
        The graph, the rung that gave it and why no higher one did.

    Raises:
        InputError: If the model itself raises on these inputs.
    """
    with modules_to_trace(workload.model) as model:
        return _climb(replace(workload, model=model), replace(tried or workload, model=model))


def _climb(workload: Workload, tried: Workload) -> Capture:
    kwargs, reasons = capture_kwargs(workload), []
    try:
        graph, called, dynamic = _guarded(workload, kwargs, lambda: capture_by_export(workload, kwargs))
        return Capture(graph=graph, rung="export", called=frozenset(called), dynamic_batch=dynamic)
    except Exception as error:
        reasons.append(f"torch.export: {_first_line(error)}")
    kwargs = capture_kwargs(tried)
    try:
        graph, called = _guarded(tried, kwargs, lambda: capture_by_dispatch(tried, kwargs))
        graph = _enlarged(graph, workload.batch_size / tried.batch_size)
        return Capture(graph=graph, rung="dispatch", called=frozenset(called), reason="; ".join(reasons))
    except Exception as error:
        _check_runs(tried)
        reasons.append(f"recording a run: {_first_line(error)}")
    return Capture(graph=_one_op(workload), rung="module", reason="; ".join(reasons))


def _enlarged(graph: OpGraph, times: float) -> OpGraph:
    """Return the graph of a batch so many times as large: all but the weights grows with it."""
    if times == 1.0:
        return graph

    def grown(values: Any) -> Any:
        return (values * times).astype(values.dtype)

    return replace(
        graph,
        flops=grown(graph.flops),
        bytes_moved=grown(graph.bytes_moved),
        activation_bytes=grown(graph.activation_bytes),
        tensor_bytes=grown(graph.tensor_bytes),
    )


def _guarded(workload: Workload, kwargs: Mapping[str, Any], run: Callable[[], Any]) -> Any:
    with preserve_model(workload.model), workload.mode(), caches_off(workload.model, kwargs):
        return run()


def _check_runs(workload: Workload) -> None:
    """Raise InputError if the model cannot run plainly, too: then the fault is not capture's."""
    try:
        _guarded(workload, workload.kwargs, workload.forward)
    except Exception as error:
        raise InputError(
            f"the model cannot run on these inputs ({_first_line(error)}); "
            "pass inputs that `model(*args, **kwargs)` takes"
        ) from error


def _first_line(error: Exception, limit: int = 160) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"\s+", " ", lines[0]) if lines else ""
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _one_op(workload: Workload) -> OpGraph:
    """The model as one op that holds all weights and whose costs are unknown (zero)."""
    weights = [*workload.model.parameters(), *workload.model.buffers()]
    held = sum(t.numel() * t.element_size() for t in weights if not _is_lazy(t))
    return OpGraph.build(
        names=["."], edges=[], kinds=["model"], modules=[""], weight_bytes=[held], bytes_moved=[float(held)],
        frees=[not workload.training],
    )  # fmt: skip


def _is_lazy(tensor: torch.Tensor) -> bool:
    return torch.nn.parameter.is_lazy(tensor)
