"""Two passes compared, tensor by tensor; the errors are defined in → `check`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from autoplace.runtime.tree import Tree

__all__ = ["Comparison", "Run", "Tolerances", "compare", "has_nan", "largest_entry"]


@dataclass(frozen=True, kw_only=True)
class Tolerances:
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
    rounding_factor: float = 2.0
    """A gradient's error may be this many times the largest that rounding makes; 0 = rtol decides alone."""
    rounding_cap: float = 500.0
    """But no more than this many times rtol, and than `rtol_bfloat16`."""

    def rtol(self, dtype: torch.dtype, precision: str = "float32") -> float:
        """Return the tolerance for a type under a plan's precision."""
        names = {torch.float64: "float64", torch.float16: "float16", torch.bfloat16: "bfloat16"}
        own: float = getattr(self, f"rtol_{names.get(dtype, 'float32')}")
        return max(own, getattr(self, f"rtol_{precision}")) if precision != "float32" else own

    def allowed(self, rtol: float, rounding: float) -> float:
        """Return the tolerance for what rounding alone moves by an error of `rounding`."""
        return max(rtol, min(self.rounding_factor * rounding, self.rounding_cap * rtol, self.rtol_bfloat16))


@dataclass
class Run:
    """One pass, as values."""

    output: Tree
    loss: torch.Tensor | None
    grads: dict[str, torch.Tensor | None]
    """By parameter name, and `input 0`, ... of the inputs that require a gradient."""
    buffers: dict[str, torch.Tensor]
    stepped: dict[str, torch.Tensor] = field(default_factory=dict)
    """The parameters during the pass, where it came after an optimizer step."""
    steps: dict[str, float] = field(default_factory=dict)
    """The largest entry of the step of each of those."""


@dataclass(kw_only=True)
class Comparison:
    """What a comparison of two passes found."""

    reason: str = ""
    """Why the other pass is not taken for the same, in one sentence; empty when it is."""
    output_error: float = 0.0
    """The largest error of outputs, loss and buffers."""
    gradient_error: float = 0.0
    """The largest error of gradients and stepped parameters."""


@dataclass(kw_only=True)
class _Verdict(Comparison):
    config: Tolerances
    precision: str = "float32"
    when: str = ""
    rounding: Comparison

    def fail(self, reason: str) -> None:
        self.reason = self.reason or reason + self.when

    def tensor(self, what: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Compare an output, a loss or a buffer."""
        if not self._same_kind(what, a, b):
            return
        a, b = _dense(a), _dense(b)
        if not (a.is_floating_point() or a.is_complex()):
            if not torch.equal(a, b):
                self.fail(f"{what} differs from plain PyTorch's")
            return
        error = _difference(a, b) / max(_largest(a), self.config.floor)
        self.output_error = max(self.output_error, error)
        rtol = self.config.allowed(self.config.rtol(a.dtype, self.precision), self.rounding.output_error)
        self._judge(what, error, rtol)

    def gradient(self, name: str, a: torch.Tensor | None, b: torch.Tensor | None, largest: float) -> None:
        """Compare a parameter's gradient."""
        what = f"the gradient of {name!r}"
        if a is None or b is None:
            if a is not b:
                self.fail(f"{what} is {'there' if a is None else 'missing'}, other than in plain PyTorch")
            return
        a, b = _dense(a), _dense(b)
        if not self._same_kind(what, a, b):
            return
        scale = _largest(a) + self.config.gradient_floor / self.config.rtol_float32 * largest
        error = _difference(a, b) / scale if scale else _difference(a, b)
        self.gradient_error = max(self.gradient_error, error)
        self._judge(what, error, self._gradient_rtol(a.dtype))

    def stepped(self, name: str, a: torch.Tensor, b: torch.Tensor, step: float, largest: float) -> None:
        """Compare a parameter after an optimizer step; see the definitions in `check`."""
        what = f"the parameter {name!r}"
        if not self._same_kind(what, a, b):
            return
        rounding = 2.0 * torch.finfo(a.dtype).eps * _largest(a)
        scale = step + self.config.gradient_floor / self.config.rtol_float32 * largest
        gap = max(0.0, _difference(a, b) - rounding)
        error = gap / scale if scale else gap
        self.gradient_error = max(self.gradient_error, error)
        self._judge(what, error, self._gradient_rtol(a.dtype), "the step")

    def _gradient_rtol(self, dtype: torch.dtype) -> float:
        return self.config.allowed(self.config.rtol(dtype, self.precision), self.rounding.gradient_error)

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

    def _judge(self, what: str, error: float, rtol: float, size: str = "its size") -> None:
        if not error <= rtol:
            self.fail(f"{what} differs from plain PyTorch's by {error:.2g} of {size}, more than {rtol:.2g}")


def compare(
    plain: Run,
    other: Run,
    config: Tolerances,
    precision: str = "float32",
    when: str = "",
    rounding: Comparison | None = None,
) -> Comparison:
    """Compare two passes.

    Args:
        plain: Plain PyTorch's.
        other: The plan's.
        config: Tolerances.
        precision: The plan's precision.
        when: Words that the reason ends with, for example " after an optimizer step".
        rounding: The errors that rounding alone makes; None = the tolerances decide alone.
    """
    verdict = _Verdict(config=config, precision=precision, when=when, rounding=rounding or Comparison())
    if not plain.output.same_structure(other.output):
        verdict.fail("the output's structure differs from plain PyTorch's")
        verdict.output_error = float("inf")
        return verdict
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
    largest = max(plain.steps.values(), default=0.0)
    for name, value in plain.stepped.items():
        verdict.stepped(name, value, other.stepped[name], plain.steps[name], largest)
    return verdict


def has_nan(run: Run) -> str:
    """Return what of a pass holds NaN: `output`, `loss`, the name of a gradient, or nothing."""
    named = [*(("output", x) for x in run.output.leaves), ("loss", run.loss)]
    named += [(f"gradient of {name!r}", grad) for name, grad in run.grads.items()]
    for name, value in named:
        if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
            continue
        if bool(torch.isnan(_dense(value)).any()):
            return name
    return ""


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def largest_entry(tensors: Iterable[torch.Tensor]) -> float:
    """Return the largest finite absolute entry of some tensors; 0 without any."""
    return max((_largest(t) for t in tensors if t.is_floating_point()), default=0.0)


def _largest(tensor: torch.Tensor) -> float:
    if not tensor.numel():
        return 0.0
    values = _dense(tensor).abs()
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
