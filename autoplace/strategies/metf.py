"""m-ETF, earliest task first with memory limits.

B. Jeon et al., "Baechi: fast device placement of machine learning graphs", SoCC 2020; ETF is J.-J. Hwang et al., SIAM
J. Computing 18(2), 1989. Of all ready ops and all devices with room, the pair that can start earliest goes next, at the
end of its device's schedule. Ties go to the op with the highest upward rank.

Departures:

1. Devices may differ: of those where the same op starts equally early, the one where it ends first wins. A slow
   device that is free still takes ops, as in the paper.
2. A class with a single choice has its memory kept for it; the first op of a co-location class chooses for the class.
3. Where devices that cannot talk lead into a dead end, each group of devices that can is tried alone.

It minimises the makespan of one pass, without contention, whatever the objective is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoplace.strategies._search import Constructive
from autoplace.strategies._support import View, list_schedules

__all__ = ["MetfStrategy"]


class MetfStrategy(Constructive):
    """Propose the placement of m-ETF."""

    name = "metf"

    def candidates(self, view: View) -> list[NDArray[np.int32]]:
        """Return m-ETF's placement, and one per group of devices where not all can talk, earliest finish first."""
        from autoplace.strategies._kernels import metf

        return list_schedules(view, metf)
