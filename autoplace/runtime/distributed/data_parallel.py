"""Data parallel with unequal shares: DistributedDataParallel, and a communication hook that weighs the gradients.

The gradient of a mean over the whole batch of B samples is the sum over ranks of b/B times the gradient of the mean
over the rank's own b samples, so the hook multiplies every bucket by b/B before it is summed; DDP overlaps the
buckets with the backward as ever. B is known where the batch came from `shard` or the sampler; else the ranks add
their b up while the forward runs.

1. Accumulation (`no_sync`): what was accumulated counts with the weights of its own calls. Where the present call's
   weight differs, the gradients so far are rescaled by the ratio of the two before it runs.
2. A rank without a sample runs one of another's with a weight of (almost) zero, so that its collectives still meet.
3. The loss must be a mean over samples, or over something that every sample has equally many of.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from autoplace.runtime.batch import batch_size

from .session import Session

__all__ = ["WeightedDataParallel"]

_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)
"""What DDP calls the option to give rank 0's buffers to all before a forward; it was renamed."""
_CALLS_BEFORE_LOOKING_BACK = 2
"""Calls with gradients after which the rank looks whether all parameters took part."""
_NOTHING = 1e-12
"""Weight of a rank without a sample: what was accumulated can be divided by it."""


class WeightedDataParallel:
    """The whole model on every rank of a group, each with its own part of the batch.

    Args:
        model: The model.
        session: The group of all ranks.
        group: The process group of the ranks that take part, this one among them.
        buffers: Whether rank 0's buffers (batch statistics) are given to all before each forward.
        bucket_bytes: Of a bucket of gradients; None = DDP's default.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        session: Session,
        group: dist.ProcessGroup | None,
        *,
        buffers: bool = False,
        bucket_bytes: float | None = None,
    ) -> None:
        self._bucket_mb = None if bucket_bytes is None else bucket_bytes / (1 << 20)
        self._group, self._device, self._buffers = group, session.torch_device, buffers
        self._calls = 0
        self.module = self._wrapped(model, unused=True)
        self._share: tuple[int, int] | None = None
        self._counted: tuple[int, torch.Tensor, dist.Work | None] | None = None
        self._weight: float | None = None
        self._accumulated: float | None = None

    def _wrapped(self, model: torch.nn.Module, *, unused: bool) -> DistributedDataParallel:
        buffers: dict[str, Any] = {_BUFFERS: self._buffers}
        module = DistributedDataParallel(
            model,
            device_ids=[self._device.index] if self._device.type == "cuda" else None,
            process_group=self._group,
            bucket_cap_mb=self._bucket_mb,
            find_unused_parameters=unused,
            init_sync=self._calls == 0,
            **buffers,
        )
        module.register_comm_hook(self, _weigh_and_sum)
        return module

    def _stop_looking(self) -> None:
        """Look for unused parameters no more once a step had none on any rank."""
        data = self.module._get_ddp_logging_data()
        unused = torch.tensor([float(data.get("unused_parameter_size", 1))], device=self._device)
        dist.all_reduce(unused, group=self._group)
        if not unused.item():
            self.module = self._wrapped(self.module.module, unused=False)

    def expect(self, samples: int, of: int) -> None:
        """Say how many samples of how many the next call has; without it the ranks count."""
        self._share = (samples, of)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on this rank's samples."""
        if torch.is_grad_enabled():
            if self._calls == _CALLS_BEFORE_LOOKING_BACK:
                self._stop_looking()
            self._calls += 1
            self._begin(args, kwargs)
        return self.module(*args, **kwargs)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        share, self._share = self._share, None
        self._weight, self._counted = None, None
        if share is not None:
            self._weight = max(share[0] / share[1], _NOTHING)
        else:
            own = batch_size(pytree.tree_leaves((args, kwargs)))
            total = torch.tensor([float(own)], dtype=torch.float64, device=self._device)
            self._counted = (own, total, dist.all_reduce(total, group=self._group, async_op=True))
        if self._accumulated is not None:
            ratio = self._accumulated / self.weight()
            if ratio != 1.0:
                for parameter in self.module.module.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(ratio)
            self._accumulated = None
        if not self.module.require_backward_grad_sync:
            self._accumulated = self.weight()

    def weight(self) -> float:
        """Return this rank's part of the batch of the last call."""
        if self._weight is None:
            assert self._counted is not None  # a call began
            own, total, work = self._counted
            if work is not None:
                work.wait()
            self._weight = own / float(total)
        return self._weight

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Add gradients up on this rank alone; the first backward after it sums all of them over the ranks."""
        with self.module.no_sync():
            yield


def _weigh_and_sum(state: WeightedDataParallel, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    gradients = bucket.buffer()
    gradients.mul_(state.weight())
    work = dist.all_reduce(gradients, group=state._group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


# DDP compares the annotations with the types themselves, and here they are text.
_weigh_and_sum.__annotations__.update(bucket=dist.GradBucket, **{"return": torch.futures.Future[torch.Tensor]})
