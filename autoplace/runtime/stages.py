"""Modules of one model on several devices; microbatches keep the devices busy at the same time.

Each microbatch's pass visits the devices in the model's own order, and each device serves the passes first come, first
served: with gradients, all forwards and then all backwards (GPipe's schedule: Huang et al. 2019). Activations return to
the inputs' device between modules. Hybrids are several such replicas, each on its share of the batch.
"""

from __future__ import annotations

from typing import ClassVar

from .parts import PartsExecutor

__all__ = ["Stages"]


class Stages(PartsExecutor):
    """Sends every placed module's calls to its device."""

    shapes: ClassVar[tuple[str, ...]] = ("stages", "hybrid")
