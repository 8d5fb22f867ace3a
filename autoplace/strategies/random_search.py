"""Random feasible placements: the baseline that every search must beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoplace.strategies._search import Found, Placer, Scorer
from autoplace.strategies._support import View

__all__ = ["RandomStrategy"]

_BATCH = 32
"""Assignments scored in one call."""
_SAMPLES = 512
"""Assignments drawn where the budget has no limit."""


class RandomStrategy(Placer):
    """Propose the best of random placements that respect memory, co-location and links.

    Half of them draw a device for every class, half for every run of classes of random length. Where memory does not
    fit, the classes are packed, each where it was drawn to prefer.
    """

    name = "random"

    def search(self, scorer: Scorer, *, seed: int) -> Found:
        """Draw until the budget is spent; without one, 512 times."""
        random = np.random.default_rng(seed)
        best: dict[bytes, tuple[float, NDArray[np.int32]]] = {}
        drawn = 0
        while scorer.clock.limited or drawn < _SAMPLES:
            count = scorer.clock.allowed(_BATCH)
            if count == 0:
                break
            drawn += count
            assignments = [a for a in (draw(scorer.view, random) for _ in range(count)) if a is not None]
            if not assignments:
                break
            values = scorer.score(np.stack(assignments))
            able = [(j, a) for j, a in zip(values.tolist(), assignments, strict=True) if np.isfinite(j)]
            unique = {a.tobytes(): (j, a) for j, a in [*best.values(), *able]}
            best = dict(sorted(unique.items(), key=lambda item: item[1][0])[: self.keep])
        return list(best.values())


def draw(view: View, random: np.random.Generator) -> NDArray[np.int32] | None:
    """Draw one assignment int32[N]; None when memory has no room for it that packing finds.

    Where activations are freed, every second draw counts memory without them.
    """
    relaxed = view.relaxed() if random.random() < 0.5 else None
    view = relaxed or view
    allowed = view.allowed
    if not view.talks.all():
        inside = np.zeros(allowed.shape[1], np.bool_)
        inside[view.groups[random.integers(len(view.groups))]] = True
        allowed = allowed & inside
    if not allowed.any(axis=1).all():
        return None
    wish = random.random(allowed.shape)
    if random.random() < 0.5:
        runs = np.cumsum(random.random(view.num_classes) < 1.0 / random.integers(1, view.num_classes + 1))
        wish = random.random((int(runs[-1]) + 1, allowed.shape[1]))[runs]
    class_device = np.where(allowed, wish, np.inf).argmin(axis=1).astype(np.int32)
    if not view.fits(class_device):
        packed = view.pack(allowed, wish)
        packed = view.pack(allowed) if packed is None else packed
        if packed is None:
            return None
        class_device = packed
    return view.spread(class_device)
