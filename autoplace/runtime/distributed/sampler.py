"""`WeightedDistributedSampler`: whole batches dealt out to the ranks by their shares, for a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from autoplace.errors import InputError
from autoplace.runtime.batch import largest_remainder

__all__ = ["WeightedDistributedSampler", "at_least_one"]


class WeightedDistributedSampler(Sampler[list[int]]):
    """Deal every batch of a dataset out to the ranks by their shares; use it as a DataLoader's `batch_sampler`.

    All ranks yield the same number of batches, and every rank with a share at least one sample of each. A last batch of
    fewer samples than ranks is left out. A rank without a share yields one sample, which counts for nothing.

    Args:
        dataset: Anything with a length.
        model: The `OptimizedParallel` model; its plan says the shares, even ones as long as nothing is planned.
        batch_size: Samples of the whole batch, over all ranks.
        shuffle: Whether each epoch has an order of its own; the same on all ranks.
        seed: Of that order.
        drop_last: Whether a last batch that is smaller is left out.

    Raises:
        InputError: If the batch size is below 1.
    """

    def __init__(
        self, dataset: Any, model: Any, *, batch_size: int, shuffle: bool = True, seed: int = 0, drop_last: bool = False
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; use 1 or more samples for all ranks together")
        self._length, self._batch_size, self._drop_last = len(dataset), batch_size, drop_last
        self._shares: Callable[[], tuple[Sequence[float], int]] = model._rank_shares
        self._shuffle, self._seed, self._epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; call it before each one, as with torch's DistributedSampler."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches."""
        whole, rest = divmod(self._length, self._batch_size)
        working = sum(share > 0 for share in self._shares()[0])
        return whole + (rest >= working and not self._drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's indices of every batch."""
        order = list(range(self._length))
        if self._shuffle:
            random = torch.Generator().manual_seed(self._seed + self._epoch)
            order = torch.randperm(self._length, generator=random).tolist()
        for number in range(len(self)):
            batch = order[number * self._batch_size : (number + 1) * self._batch_size]
            shares, rank = self._shares()
            sizes = at_least_one(len(batch), shares)
            start = sum(sizes[:rank])
            yield batch[start : start + sizes[rank]] or batch[:1]


def at_least_one(total: int, shares: Sequence[float]) -> list[int]:
    """Split samples by shares, one at least for every share above 0 as long as there are enough.

    Args:
        total: Samples.
        shares: Sum to 1.
    """
    sizes = largest_remainder(total, shares)
    for i, share in enumerate(shares):
        if share > 0 and sizes[i] == 0 and max(sizes) > 1:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[i] = 1
    return sizes
