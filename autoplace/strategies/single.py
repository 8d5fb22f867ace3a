"""The whole problem on one device: the baseline that needs no transfer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoplace.strategies._search import Constructive
from autoplace.strategies._support import View

__all__ = ["SingleStrategy"]


class SingleStrategy(Constructive):
    """Propose every device alone that can run everything and holds its memory, the fastest first."""

    name = "single"

    def candidates(self, view: View) -> list[NDArray[np.int32]]:
        """Return one assignment per able device, by summed latency."""
        total = view.class_latency_ms.sum(axis=0)
        able = np.flatnonzero(np.isfinite(total) & (view.class_bytes.sum() <= view.capacity))
        ops = len(view.op_class)
        return [np.full(ops, d, np.int32) for d in sorted(able, key=lambda d: (total[d], d))]
