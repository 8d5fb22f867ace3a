"""Does a plan compute the same thing? Outputs, loss, gradients, buffers and stepped parameters against plain PyTorch's.

Definitions, with a the plain tensor and b the plan's:

- Error of an output, loss or buffer: max|a - b| / max(max|a|, floor). → `CheckReport.max_output_error`
- Error of a gradient: max|a - b| / (max|a| + gradient_floor / rtol_float32 * G), G being the largest gradient entry of
  the whole model: gradients that are zero but for rounding (the bias of attention keys) have no scale of their own.
- In training both then make one step of plain gradient descent, p - lr * grad, each by its own gradients, and run the
  forward once more. lr makes the largest step of the model `step_size` of its largest parameter. → `Reference`
  Error of a stepped parameter: (max|a - b| - 2 eps max|a|)+ / (s + gradient_floor / rtol_float32 * S), s being the
  largest entry of its own step and S that of all. The step is the scale, for against the whole parameter a wrong step
  would look small; eps is the type's rounding, which a step cannot be finer than. The second forward finds what runs on
  a copy of the weights that nobody refreshed: its outputs have the error of outputs.
- A plan passes when every error is at most `rtol` of its type, structure, types and shapes are equal, integers and
  booleans are equal, and the same parameters have no gradient.
- Where a gradient, or what follows from it, fails that, rounding decides: the error may be `rounding_factor` times the
  largest of its kind that plain PyTorch has against itself when its parameters move by rounding (8 eps, at random,
  three times), up to `rounding_cap`. Gradients of a ReLU network are not continuous: in a CNN with batch normalisation
  plain float32 gradients are 2e-3 from float64's, and moves of 8 eps change them by 1e-2, as another kernel's rounding
  does [measured: ResNet, batch 16, 2026-11-24]. The outputs of the first forward and the buffers have no such leave.
  → `Reference.rounding`

Dropout is off and the random state is the same in both runs. What random numbers remain (noise in the model) differ
between a plan of several parts and plain PyTorch, and such a plan fails, with a word about it. Tensors that require a
gradient and are neither inputs nor parameters are not looked at. The parameters that a step has moved get their values,
bit for bit, and their version counters back, so that graphs that were made before still have their backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from autoplace.runtime import Executor
from autoplace.runtime.tree import Tree
from autoplace.workload import Workload, default_loss

from .comparison import Comparison, Run, Tolerances, compare, has_nan, largest_entry
from .preserve import RandomState, clear_gradients, no_dropout, preserved
from .protocol import Guard

__all__ = ["CheckConfig", "CheckReport", "Reference", "check_plan"]

T = TypeVar("T")

_AFTER = " after an optimizer step"
_ROUNDING_EPS = 8.0
"""How far rounding is taken to move a parameter: in units of its type's eps, as a standard deviation."""
_ROUNDING_PASSES = 3


@dataclass(frozen=True, kw_only=True)
class CheckConfig(Tolerances):
    """What is compared, and how far a plan's numbers may be from plain PyTorch's."""

    step_size: float = 1e-2
    """The largest step of the check's optimizer, in units of the largest parameter; 0 = no step, for models that other
    threads use meanwhile."""


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What the comparison found."""

    ok: bool
    reason: str = ""
    """Why not, in one sentence; empty when ok."""
    max_output_error: float = 0.0
    """Largest error of outputs, loss and buffers; see the module's definitions."""
    max_gradient_error: float = 0.0
    """Largest error of gradients and of parameters after the step."""


class Reference:
    """Plain PyTorch's results on a workload, kept to compare several plans with.

    Args:
        workload: Model and inputs; the model is left as it was.
        call: What to run; None = the model.
        step_size: → `CheckConfig.step_size`
    """

    def __init__(
        self,
        workload: Workload,
        call: Callable[..., Any] | None = None,
        *,
        step_size: float = CheckConfig.step_size,
    ) -> None:
        self.workload, self._call = workload, call
        self._random = RandomState()
        self._buffers = {name: buffer.detach().clone() for name, buffer in workload.model.named_buffers()}
        with preserved(workload.model), no_dropout(workload.model), workload.mode():
            self.run = self.pass_(call)
            other = self.pass_(call, reseed=False)
            self.learning_rate = self._learning_rate(step_size)
            """Of the step that is compared; 0 = none is."""
            self.after_step = self.pass_after_step(self.run, call) if self.learning_rate else None
        self._rounding: tuple[Comparison, Comparison] | None = None
        self.noisy = bool(compare(self.run, other, CheckConfig()).reason)
        """Whether two plain runs with different random numbers, dropout off, differ."""

    def _learning_rate(self, step_size: float) -> float:
        if not self.workload.training or has_nan(self.run):
            return 0.0
        moved = [p.detach() for name, p in self._parameters() if self.run.grads[name] is not None]
        gradient = largest_entry(g for g in self.run.grads.values() if g is not None)
        return step_size * largest_entry(moved) / gradient if gradient else 0.0

    def rounding(self) -> tuple[Comparison, Comparison]:
        """Return the largest errors that rounding makes in a pass's gradients, and in everything after the step.

        Nothing where parameters must not be moved.
        """
        if self._rounding is None:
            first, second = self._rounding = Comparison(), Comparison()
            if self.after_step is None:
                return self._rounding
            for seed in range(_ROUNDING_PASSES):
                with _rounded(dict(self._parameters()), seed):
                    run = self.pass_(self._call)
                after = self.pass_after_step(run, self._call)
                found = compare(self.run, run, CheckConfig())
                first.gradient_error = max(first.gradient_error, found.gradient_error)
                found = compare(self.after_step, after, CheckConfig())
                second.gradient_error = max(second.gradient_error, found.gradient_error)
                second.output_error = max(second.output_error, found.output_error)
        return self._rounding

    def _parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self.workload.model.named_parameters())

    def pass_(
        self,
        call: Callable[..., Any] | None,
        *,
        reseed: bool = True,
        backward: bool = True,
        limit_s: float | None = None,
    ) -> Run:
        """Run one pass from the same buffers, without gradients to start with, and return copies of all results.

        Args:
            call: What to run; None = the model.
            reseed: Whether to start from the same random numbers.
            backward: Whether a training pass has its backward.
            limit_s: Seconds that it may take; None = no limit.

        Raises:
            ExecutionError: If it takes longer.
        """
        model, training = self.workload.model, self.workload.training
        found = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self._set_buffers(self._buffers)
        inputs = _Inputs(self.workload)
        if reseed:
            self._random.restore()
        clear_gradients(model)
        inputs.clear()

        def run() -> tuple[Any, torch.Tensor | None]:
            output = self.workload.forward(call)
            loss = (self.workload.loss or default_loss)(output) if training else None
            if loss is not None and backward:
                loss.backward()
            return output, None if loss is None else loss.detach().clone()

        output, loss = _within(run, limit_s)
        tree = Tree(output)
        tree.leaves = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in tree.leaves]
        after = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        grads: dict[str, torch.Tensor | None] = {}
        if training and backward:
            grads = {name: x.grad for name, x in [*self._parameters(), *inputs.needy.items()]}
        clear_gradients(model)
        inputs.clear()
        inputs.put_back()
        self._set_buffers(found)
        return Run(tree, loss, grads, after)

    def _set_buffers(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, buffer in self.workload.model.named_buffers():
                buffer.copy_(values[name])

    def pass_after_step(self, run: Run, call: Callable[..., Any] | None, limit_s: float | None = None) -> Run:
        """Step the parameters by a pass's gradients, run the forward once more, and put the parameters back.

        Args:
            run: A pass with its gradients.
            call: What to run; None = the model.
            limit_s: Seconds that the forward may take; None = no limit.

        Raises:
            ExecutionError: If it takes longer.
        """
        with _stepped(dict(self._parameters()), run.grads, self.learning_rate) as moved:
            after = self.pass_(call, backward=False, limit_s=limit_s)
            after.stepped = {name: parameter.detach().clone() for name, parameter in moved.items()}
        gradients = {name: run.grads[name] for name in after.stepped}
        after.steps = {n: self.learning_rate * largest_entry([g]) for n, g in gradients.items() if g is not None}
        return after


class _Inputs:
    """The input tensors of a workload: their gradients, and their values, should the model write into them."""

    def __init__(self, workload: Workload) -> None:
        leaves = Tree((workload.args, dict(workload.kwargs))).leaves
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        self.needy = {f"input {i}": x for i, x in enumerate(tensors) if x.requires_grad and x.is_leaf}
        self._held = [(x, _version(x), x.detach().clone()) for x in tensors]

    def clear(self) -> None:
        """Set their `.grad` to None."""
        for x in self.needy.values():
            x.grad = None

    def put_back(self) -> None:
        """Give those that were written into the values that they had."""
        for x, version, value in self._held:
            if _version(x) != version or (version is None and not torch.equal(x, value)):
                with torch.inference_mode(version is None):
                    x.data.copy_(value)


def _version(tensor: torch.Tensor) -> int | None:
    """Return the version counter; None of an inference tensor, which has none."""
    return None if tensor.is_inference() else tensor._version


@contextmanager
def _held(parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[None]:
    """Let parameters be changed in place, and give them back what they held, their version counters too."""
    tensors = tuple(parameters.values())
    values = [p.detach().clone() for p in tensors]
    with _unsafe_preserve_version_counter(tensors):
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(tensors, values, strict=True):
                    parameter.copy_(value)


@contextmanager
def _stepped(
    parameters: Mapping[str, torch.nn.Parameter], grads: Mapping[str, torch.Tensor | None], learning_rate: float
) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Let every parameter with a gradient be stepped by it; yields those, and puts them back."""
    moved = {name: p for name, p in parameters.items() if grads[name] is not None}
    with _held(moved):
        with torch.no_grad():
            for name, parameter in moved.items():
                parameter.add_(grads[name], alpha=-learning_rate)  # type: ignore[arg-type]  # not None, see above
        yield moved


@contextmanager
def _rounded(parameters: Mapping[str, torch.nn.Parameter], seed: int) -> Iterator[None]:
    """Move every parameter by a few units of its type's rounding, at random, and put it back."""
    moved = {name: p for name, p in parameters.items() if p.is_floating_point()}
    with _held(moved):
        with torch.no_grad():
            for i, parameter in enumerate(moved.values()):
                random = torch.Generator().manual_seed(1000 * seed + i)
                noise = torch.randn(parameter.shape, generator=random).to(parameter)
                parameter.mul_(1.0 + _ROUNDING_EPS * torch.finfo(parameter.dtype).eps * noise)
        yield


def _precision(own: str) -> str:
    """Return a plan's precision, or where that is full, that of the autocast that the caller runs the model under."""
    for kind in ("cpu", "cuda"):
        if own == "float32" and torch.is_autocast_enabled(kind):
            return str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
    return own


def _compared(
    reference: Reference, run: Run, config: CheckConfig, precision: str, *, stepped: bool = False
) -> Comparison:
    """Compare a plan's pass with plain PyTorch's, `stepped` the one after the step; rounding decides where it fails."""
    plain, when = (reference.after_step, _AFTER) if stepped else (reference.run, "")
    assert plain is not None  # a plan has a pass after the step where plain PyTorch has one
    found = compare(plain, run, config, precision, when)
    if found.reason and config.rounding_factor:
        found = compare(plain, run, config, precision, when, reference.rounding()[stepped])
    return found


def check_plan(
    workload: Workload,
    executor: Executor,
    *,
    config: CheckConfig = CheckConfig(),
    reference: Reference | None = None,
    limit_s: float | None = None,
) -> CheckReport:
    """Compare passes of an executor with plain PyTorch's on the workload's inputs.

    The model is left as it was: parameters, gradients, buffers, train/eval flags, dropout and random state.

    Args:
        workload: Model and inputs, inference or training.
        executor: Runs the plan.
        config: Tolerances.
        reference: Plain results of the same workload, if at hand.
        limit_s: Seconds that a pass of the executor may take; None = no limit. The model is put back in any case.

    Returns:
        The verdict; never raises for wrong numbers.

    Raises:
        ExecutionError: If a pass overruns `limit_s`; what workers do of it goes on to its end.
        Exception: Whatever the model or the executor raises.
    """
    reference = reference or Reference(workload, step_size=config.step_size)
    if what := has_nan(reference.run):
        where = "output" if what in ("output", "loss") else what
        return CheckReport(ok=False, reason=f"plain PyTorch's own {where} holds NaN on these inputs; give other inputs")
    precision = _precision(executor.plan.precision)
    with preserved(workload.model), no_dropout(workload.model), workload.mode():
        run = reference.pass_(executor, limit_s=limit_s)
        found = _compared(reference, run, config, precision)
        reason, output_error, gradient_error = found.reason, found.output_error, found.gradient_error
        if not reason and reference.after_step is not None:
            again = reference.pass_after_step(run, executor, limit_s)
            found = _compared(reference, again, config, precision, stepped=True)
            reason = found.reason
            output_error = max(output_error, found.output_error)
            gradient_error = max(gradient_error, found.gradient_error)
    if reason and reference.noisy:
        reason += " (the model draws random numbers besides dropout, so two plain runs differ too)"
    return CheckReport(ok=not reason, reason=reason, max_output_error=output_error, max_gradient_error=gradient_error)


def _within(fn: Callable[[], T], limit_s: float | None) -> T:
    if limit_s is None:
        return fn()
    guard = Guard()
    try:
        return guard.run(fn, limit_s)
    finally:
        guard.close()
