"""Gradients of parameters that several ranks hold, summed over their holders: ties across stages, copies of replicas.

Every rank leaves in `.grad` its part of the whole batch's gradient, weighted already. The parameters are put in
buckets by the set of ranks that hold them, and every bucket is one all-reduce of its holders; the sets come in the
same order on all ranks. A parameter that no holder has a gradient for keeps None, as in plain PyTorch: a bucket
carries one number a parameter beside the gradients, 1 where the rank has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from autoplace.hardware.buckets import BUCKET_BYTES

from .session import Session

__all__ = ["SharedGradients", "flatten", "spread"]


class SharedGradients:
    """Sums the gradients of shared parameters over the ranks that hold them.

    Args:
        session: The group; all of its ranks make this object with the same holders.
        parameters: Name to parameter.
        holders: Name to the ranks that hold it, for every parameter that more than one rank holds.
    """

    def __init__(
        self, session: Session, parameters: Mapping[str, torch.nn.Parameter], holders: Mapping[str, Iterable[int]]
    ) -> None:
        sets: dict[tuple[int, ...], list[str]] = {}
        for name in sorted(holders):
            sets.setdefault(tuple(sorted(set(holders[name]))), []).append(name)
        self._buckets: list[tuple[dist.ProcessGroup | None, list[torch.nn.Parameter]]] = []
        for ranks in sorted(sets):
            if len(ranks) < 2:
                continue
            group = session.group(ranks)
            if session.rank in ranks:
                self._buckets += [(group, some) for some in _buckets([parameters[n] for n in sets[ranks]])]

    def reduce(self) -> None:
        """Sum; every rank has to call it after its backward."""
        running = []
        for group, parameters in self._buckets:
            flat = flatten(parameters)
            running.append((parameters, flat, dist.all_reduce(flat, group=group, async_op=True)))
        for parameters, flat, work in running:
            if work is not None:
                work.wait()
            spread(parameters, flat)


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    buckets: list[list[torch.nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        full = size + parameter.nbytes > BUCKET_BYTES
        if not buckets or full or parameter.dtype != buckets[-1][0].dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets


def flatten(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """Return gradients one after the other, zeros where there is none, and then a 1 or a 0 for each: is there one?"""
    first = parameters[0]
    flat = torch.zeros(sum(p.numel() for p in parameters) + len(parameters), dtype=first.dtype, device=first.device)
    start = 0
    for i, parameter in enumerate(parameters):
        grad = parameter.grad
        if grad is not None:
            dense = grad if grad.layout == torch.strided else grad.to_dense()
            flat[start : start + parameter.numel()].copy_(dense.reshape(-1))
            flat[i - len(parameters)] = 1
        start += parameter.numel()
    return flat


def spread(parameters: Sequence[torch.nn.Parameter], flat: torch.Tensor) -> None:
    """Put summed results of → `flatten` where the gradients are; nothing where no rank had one."""
    start = 0
    present = flat[-len(parameters) :].tolist()
    for parameter, count in zip(parameters, present, strict=True):
        if count:
            summed = flat[start : start + parameter.numel()].view(parameter.shape)
            if parameter.grad is None or parameter.grad.layout != torch.strided:
                parameter.grad = summed.clone()
            else:
                parameter.grad.copy_(summed)
        start += parameter.numel()
