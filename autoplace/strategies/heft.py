"""HEFT, the heterogeneous earliest finish time list scheduler.

H. Topcuoglu, S. Hariri, M.-Y. Wu, "Performance-effective and low-complexity task scheduling for heterogeneous
computing", IEEE Trans. Parallel and Distributed Systems 13(3), 2002. Upward ranks with mean latencies and mean
transfers, then each op in rank order on the device where it finishes earliest, gaps between scheduled ops included.

Departures:

1. A device without memory for an op's class is no choice; a class with a single choice has its memory kept for it.
2. The first op of a co-location class chooses for the class.
3. Where devices that cannot talk lead into a dead end, each group of devices that can is tried alone.
4. At most 512 gaps of a device are looked at for one op.

It minimises the makespan of one pass, without contention, whatever the objective is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoplace.strategies._search import Constructive
from autoplace.strategies._support import View, list_schedules

__all__ = ["HeftStrategy"]


class HeftStrategy(Constructive):
    """Propose the placement of HEFT."""

    name = "heft"

    def candidates(self, view: View) -> list[NDArray[np.int32]]:
        """Return HEFT's placement, and one per group of devices where not all can talk, earliest finish first."""
        from autoplace.strategies._kernels import heft

        return list_schedules(view, heft)
