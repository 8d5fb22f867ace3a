"""May plans be compiled here, and about how long does it take? Asked before `torch.compile` is tried.

What compiling really took is counted by the executor → `MeasuredEvaluator.compile_s`; this is a guess for the
first one.
"""

from __future__ import annotations

import torch

__all__ = ["compiler_refusal", "estimate_compile_s"]

_START_S = 4.0
_INFERENCE_S_PER_OP = 0.03
_TRAINING_S_PER_OP = 0.15
"""[measured: 2-core Xeon VM shared with other jobs, torch 2.13, caches off, 2026-11-24]: multi-layer perceptrons, a CNN
and BERTs of 6 to 107 captured ops took 1.6 to 9 s in inference and 4.6 to 21 s in training; a machine that is idle
takes about half."""


def estimate_compile_s(num_ops: int, *, training: bool) -> float:
    """Return about how many seconds `torch.compile` takes for a model's first pass, nothing being cached.

    Args:
        num_ops: Captured operations of the model's forward.
        training: Whether a backward is compiled too.
    """
    return _START_S + num_ops * (_TRAINING_S_PER_OP if training else _INFERENCE_S_PER_OP)


def compiler_refusal(model: torch.nn.Module) -> str:
    """Return why `torch.compile` cannot make code for a model on this machine, in one sentence; nothing when it can."""
    first = next(model.parameters(), None)
    if first is not None and first.device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "torch.compile needs Triton for models on a GPU, and there is none"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:  # whatever the search for one runs into, there is none to use
        return "torch.compile needs a C++ compiler, and there is none; install g++ to let plans be compiled"
    return ""
