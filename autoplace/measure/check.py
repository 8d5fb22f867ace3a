"""Does a plan compute the same thing? Outputs, loss, gradients and buffers compared with plain PyTorch's.

Definitions, with a the plain tensor and b the plan's:

- Error of an output, loss or buffer: max|a - b| / max(max|a|, floor). → `CheckReport.max_output_error`
- Error of a gradient: max|a - b| / (max|a| + gradient_floor / rtol_float32 * G), G being the largest gradient entry of
  the whole model: gradients that are zero but for rounding (the bias of attention keys) have no scale of their own.
- A plan passes when every error is at most `rtol` of its type, structure, types and shapes are equal, integers and
  booleans are equal, and the same parameters have no gradient.

Dropout is off and the random state is the same in both runs. What random numbers remain (noise in the model) differ
between a plan of several parts and plain PyTorch, and such a plan fails, with a word about it. Tensors that require a
gradient and are neither inputs nor parameters are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from autoplace.runtime import Executor
from autoplace.runtime.tree import Tree
from autoplace.workload import Workload, default_loss

from .preserve import RandomState, clear_gradients, no_dropout, preserved
from .protocol import Guard

__all__ = ["CheckConfig", "CheckReport", "Reference", "check_plan"]


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """How far a plan's numbers may be from plain PyTorch's."""

    rtol_float64: float = 1e-9
    rtol_float32: float = 1e-4
    rtol_float16: float = 1e-2
    rtol_bfloat16: float = 5e-2
    """The largest error, by the lowest of the tensor's type and the plan's precision."""
    floor: float = 1e-5
    """Outputs smaller than this everywhere are compared as if their largest entry had this size."""
    gradient_floor: float = 1e-5
    """A gradient may differ by this share of the largest entry of all gradients (times rtol / rtol_float32)."""

    def rtol(self, dtype: torch.dtype, precision: str = "float32") -> float:
        """Return the tolerance for a type under a plan's precision."""
        names = {torch.float64: "float64", torch.float16: "float16", torch.bfloat16: "bfloat16"}
        own: float = getattr(self, f"rtol_{names.get(dtype, 'float32')}")
        return max(own, getattr(self, f"rtol_{precision}")) if precision != "float32" else own


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What the comparison found."""

    ok: bool
    reason: str = ""
    """Why not, in one sentence; empty when ok."""
    max_output_error: float = 0.0
    """Largest error of outputs, loss and buffers; see the module's definitions."""
    max_gradient_error: float = 0.0


@dataclass
class _Run:
    """One pass, as values."""

    output: Tree
    loss: torch.Tensor | None
    grads: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]


class Reference:
    """Plain PyTorch's results on a workload, kept to compare several plans with.

    Args:
        workload: Model and inputs; the model is left as it was.
        call: What to run; None = the model.
    """

    def __init__(self, workload: Workload, call: Callable[..., Any] | None = None) -> None:
        self.workload = workload
        self._random = RandomState()
        with preserved(workload.model), no_dropout(workload.model), workload.mode():
            self.run = self.pass_(call)
            other = self.pass_(call, reseed=False)
        problem, *_ = _compare(self.run, other, CheckConfig(), "float32")
        self.noisy = bool(problem)
        """Whether two plain runs with different random numbers, dropout off, differ."""

    def pass_(self, call: Callable[..., Any] | None, *, reseed: bool = True) -> _Run:
        """Run one pass from the same buffers, without gradients to start with, and return copies of all results."""
        model = self.workload.model
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        if reseed:
            self._random.restore()
        clear_gradients(model)
        output = self.workload.forward(call)
        loss: torch.Tensor | None = None
        if self.workload.training:
            loss = (self.workload.loss or default_loss)(output)
            loss.backward()
            loss = loss.detach().clone()
        tree = Tree(output)
        tree.leaves = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in tree.leaves]
        after = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        grads = {name: p.grad for name, p in model.named_parameters()} if self.workload.training else {}
        clear_gradients(model)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        return _Run(tree, loss, grads, after)


def check_plan(
    workload: Workload,
    executor: Executor,
    *,
    config: CheckConfig = CheckConfig(),
    reference: Reference | None = None,
    limit_s: float | None = None,
) -> CheckReport:
    """Compare one pass of an executor with plain PyTorch's on the workload's inputs.

    The model is left as it was: gradients, buffers, train/eval flags, dropout and random state.

    Args:
        workload: Model and inputs, inference or training.
        executor: Runs the plan.
        config: Tolerances.
        reference: Plain results of the same workload, if at hand.
        limit_s: Seconds that the executor's pass may take; None = no limit. The model is put back in any case.

    Returns:
        The verdict; never raises for wrong numbers.

    Raises:
        ExecutionError: If the pass overruns `limit_s`; it is left behind in its threads.
        Exception: Whatever the model or the executor raises.
    """
    reference = reference or Reference(workload)
    if _has_nan(reference.run):
        return CheckReport(ok=False, reason="plain PyTorch's own output holds NaN on these inputs; give other inputs")
    with preserved(workload.model), no_dropout(workload.model), workload.mode():
        run = _within(lambda: reference.pass_(executor), limit_s)
    reason, output_error, gradient_error = _compare(reference.run, run, config, executor.plan.precision)
    if reason and reference.noisy:
        reason += " (the model draws random numbers besides dropout, so two plain runs differ too)"
    return CheckReport(ok=not reason, reason=reason, max_output_error=output_error, max_gradient_error=gradient_error)


def _within(fn: Callable[[], _Run], limit_s: float | None) -> _Run:
    if limit_s is None:
        return fn()
    guard = Guard()
    try:
        return guard.run(fn, limit_s)
    finally:
        guard.close()


def _has_nan(run: _Run) -> bool:
    tensors = [x for x in [*run.output.leaves, run.loss] if isinstance(x, torch.Tensor)]
    return any(bool(torch.isnan(x).any()) for x in tensors if x.is_floating_point() or x.is_complex())


@dataclass
class _Verdict:
    config: CheckConfig
    precision: str
    reason: str = ""
    output_error: float = 0.0
    gradient_error: float = 0.0

    def fail(self, reason: str) -> None:
        self.reason = self.reason or reason

    def tensor(self, what: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Compare an output, a loss or a buffer."""
        if not self._same_kind(what, a, b):
            return
        if not (a.is_floating_point() or a.is_complex()):
            if not torch.equal(a, b):
                self.fail(f"{what} differs from plain PyTorch's")
            return
        error = _difference(a, b) / max(_largest(a), self.config.floor)
        self.output_error = max(self.output_error, error)
        self._judge(what, error, self.config.rtol(a.dtype, self.precision))

    def gradient(self, name: str, a: torch.Tensor | None, b: torch.Tensor | None, largest: float) -> None:
        """Compare a parameter's gradient."""
        what = f"the gradient of {name!r}"
        if a is None or b is None:
            if a is not b:
                self.fail(f"{what} is {'there' if a is None else 'missing'}, other than in plain PyTorch")
            return
        a, b = (g.to_dense() if g.layout != torch.strided else g for g in (a, b))
        if not self._same_kind(what, a, b):
            return
        scale = _largest(a) + self.config.gradient_floor / self.config.rtol_float32 * largest
        error = _difference(a, b) / scale if scale else _difference(a, b)
        self.gradient_error = max(self.gradient_error, error)
        self._judge(what, error, self.config.rtol(a.dtype, self.precision))

    def _same_kind(self, what: str, a: torch.Tensor, b: torch.Tensor) -> bool:
        lowered = self.precision != "float32" and a.is_floating_point() and b.is_floating_point()
        if a.shape != b.shape:
            self.fail(f"{what} has shape {tuple(b.shape)}, plain PyTorch's {tuple(a.shape)}")
        elif a.dtype != b.dtype and not lowered:
            self.fail(f"{what} is {b.dtype}, plain PyTorch's {a.dtype}")
        elif a.device != b.device:
            self.fail(f"{what} is on {b.device}, plain PyTorch's on {a.device}")
        else:
            return True
        return False

    def _judge(self, what: str, error: float, rtol: float) -> None:
        if not error <= rtol:
            self.fail(f"{what} differs from plain PyTorch's by {error:.2g} of its size, more than {rtol:g}")


def _compare(plain: _Run, other: _Run, config: CheckConfig, precision: str) -> tuple[str, float, float]:
    """Return (reason or "", largest output error, largest gradient error)."""
    verdict = _Verdict(config, precision)
    if not plain.output.same_structure(other.output):
        return "the output's structure differs from plain PyTorch's", float("inf"), 0.0
    for i, (a, b) in enumerate(zip(plain.output.leaves, other.output.leaves, strict=True)):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            verdict.tensor(f"output {i}", a, b)
        elif type(a) is not type(b):
            verdict.fail(f"output {i} is of type {type(b).__name__}, plain PyTorch's of {type(a).__name__}")
        elif isinstance(a, int | float | str) and a != b:
            verdict.fail(f"output {i} is {b!r}, plain PyTorch's {a!r}")
    if plain.loss is not None and other.loss is not None:
        verdict.tensor("the loss", plain.loss, other.loss)
    largest = max((_largest(g) for g in plain.grads.values() if g is not None), default=0.0)
    for name, grad in plain.grads.items():
        verdict.gradient(name, grad, other.grads[name], largest)
    for name, buffer in plain.buffers.items():
        verdict.tensor(f"buffer {name!r}", buffer, other.buffers[name])
    return verdict.reason, verdict.output_error, verdict.gradient_error


def _largest(tensor: torch.Tensor) -> float:
    if not tensor.numel():
        return 0.0
    values = (tensor.to_dense() if tensor.layout != torch.strided else tensor).abs()
    finite = torch.where(torch.isfinite(values), values, torch.zeros_like(values))
    return float(finite.max())


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return max|a - b|; infinities at the same places with the same sign do not differ, NaN differs from all."""
    if not a.numel():
        return 0.0
    wide = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(wide), b.to(wide)
    gap = torch.where(a == b, torch.zeros_like(a), a - b).abs()
    return float("inf") if bool(torch.isnan(gap).any()) else float(gap.max())
