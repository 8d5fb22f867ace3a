"""`Workload`: a model, example inputs and what is to be done with them. What capture, costs and measurement run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from autoplace.errors import InputError

__all__ = ["Workload", "default_loss", "inputs_of", "loss_of", "own_loss"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """A model, example inputs, and inference or training."""

    model: torch.nn.Module
    args: tuple[Any, ...] = ()
    """Positional inputs of `model.forward`."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Keyword inputs of `model.forward`."""
    training: bool = False
    """Whether one pass is forward and backward (gradients of every parameter) or forward alone."""
    loss: Callable[[Any], torch.Tensor] | None = None
    """Model output to scalar loss; None = → `default_loss`. Used in training only."""
    name: str = "model"

    @property
    def batch_size(self) -> int:
        """Size of the first dimension of the first input tensor that has one; 1 when there is none."""
        for leaf in pytree.tree_leaves((self.args, dict(self.kwargs))):
            if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
                return int(leaf.shape[0])
        return 1

    def forward(self, call: Callable[..., Any] | None = None) -> Any:
        """Run `call` (the model when None) on the inputs in the workload's mode of gradients and return its output."""
        with torch.set_grad_enabled(self.training):
            return (self.model if call is None else call)(*self.args, **self.kwargs)

    def step(self, call: Callable[..., Any] | None = None) -> Any:
        """Run one pass: forward, and in training loss and backward into `.grad`. Returns the output."""
        output = self.forward(call)
        if self.training:
            (self.loss or default_loss)(output).backward()
        return output

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Hold the model in `train()` or `eval()` as the workload wants, and put every module's flag back after."""
        flags = [(m, m.training) for m in self.model.modules()]
        self.model.train(self.training)
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag


def own_loss(output: Any) -> torch.Tensor | None:
    """Return the scalar `loss` that an output has as an attribute or under that key; None where it has none."""
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return own if isinstance(own, torch.Tensor) and own.dim() == 0 else None


def default_loss(output: Any) -> torch.Tensor:
    """Return the output's own loss, else the mean square of all its floating-point tensors, as a scalar.

    Raises:
        InputError: If the output holds no floating-point tensor that requires a gradient.
    """
    own = own_loss(output)
    if own is not None:
        return own
    leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    leaves = [t for t in leaves if t.requires_grad]
    if not leaves:
        raise InputError("the model's output holds no tensor with a gradient; pass a loss, or tune in eval mode")
    return torch.stack([t.float().square().mean() for t in leaves]).sum()


def inputs_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword inputs: of a tuple, of a mapping, or of one input."""
    if isinstance(inputs, tuple):
        return inputs, {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,), {}


def loss_of(loss: Callable[..., torch.Tensor] | None, output: Any, targets: Any = None) -> torch.Tensor:
    """Return the scalar loss of an output.

    Args:
        loss: Takes the output, and the targets where there are some; None = `default_loss`.
        output: The model's.
        targets: None = the loss takes the output alone.

    Raises:
        InputError: If there are targets and no loss that could take them.
    """
    if targets is None:
        return (loss or default_loss)(output)
    if loss is None:
        raise InputError("targets were given and no loss that takes them; pass loss= to OptimizedParallel")
    return loss(output, targets)
