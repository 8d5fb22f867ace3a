"""`ClusterFactors`: what separates a plan over several ranks from what was profiled on each rank alone.

A few numbers with a meaning each, neutral by default; real runs fit them → `costs.calibrate_cluster`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from autoplace.errors import InputError
from autoplace.hardware.cluster import Cluster

__all__ = ["ClusterFactors"]

_ASSUMED_OVERLAP = 0.5
"""Where a processor carries the bytes that it also computes with: an assumption, until runs tell."""
_ASSUMED_COPY_BYTES_PER_MS = 2e6
"""A processor writes into a socket at 2 GB/s: an assumption."""


@dataclass(frozen=True, kw_only=True)
class ClusterFactors:
    """Corrections of a prediction over several ranks; the default changes nothing."""

    speed: Mapping[str, float] = field(default_factory=dict)
    """Device name to the factor on all latencies there, above 0; 1 where it is left out."""
    sync_scale: float = 1.0
    """Factor on the time of every all-reduce, above 0."""
    link_scale: float = 1.0
    """Factor on the time of every transfer between stages, above 0."""
    dispatch_ms: float = 0.0
    """Added to every forward and every backward of one stage for one microbatch, ms, 0 or more."""
    overlap_share: float = 1.0
    """Part, 0 to 1, of what could hide behind the backward that really hides there."""
    copy_bytes_per_ms: float = math.inf
    """What a processor writes into its sockets, bytes per ms: a transfer keeps a sender of kind `cpu` so busy."""

    def __post_init__(self) -> None:
        above = [*self.speed.values(), self.sync_scale, self.link_scale]
        if not all(0.0 < value < math.inf for value in above) or not self.copy_bytes_per_ms > 0.0:
            raise InputError("factors of speed, all-reduce and links are finite and above 0; calibrate again")
        if not 0.0 <= self.dispatch_ms < math.inf or not 0.0 <= self.overlap_share <= 1.0:
            raise InputError("dispatch_ms is 0 or more and overlap_share within 0 and 1; calibrate again")

    @staticmethod
    def assumed(cluster: Cluster) -> ClusterFactors:
        """Return what is assumed before anything was measured: neutral, but that processors carry bytes themselves."""
        if all(device.kind != "cpu" for device in cluster.devices):
            return ClusterFactors()
        return ClusterFactors(overlap_share=_ASSUMED_OVERLAP, copy_bytes_per_ms=_ASSUMED_COPY_BYTES_PER_MS)

    @property
    def sentence(self) -> str:
        """The factors in words, those that change something."""
        texts = [f"{name} ×{value:.2f}" for name, value in self.speed.items() if abs(value - 1.0) >= 0.005]
        texts += [f"all-reduce ×{self.sync_scale:.2f}"] if abs(self.sync_scale - 1.0) >= 0.005 else []
        texts += [f"transfers ×{self.link_scale:.2f}"] if abs(self.link_scale - 1.0) >= 0.005 else []
        texts += [f"dispatch +{self.dispatch_ms:.2g} ms a stage and microbatch"] if self.dispatch_ms >= 0.0005 else []
        texts += [f"{self.overlap_share:.0%} of the overlap"] if self.overlap_share < 0.995 else []
        return ", ".join(texts) or "no correction"

    def to_json(self) -> dict[str, Any]:
        """Return the factors as JSON-ready data; an infinite rate becomes null."""
        data = asdict(self) | {"speed": dict(self.speed)}
        return data | {"copy_bytes_per_ms": None if math.isinf(self.copy_bytes_per_ms) else self.copy_bytes_per_ms}

    @staticmethod
    def from_json(data: Any) -> ClusterFactors:
        """Read factors back.

        Raises:
            InputError: If the data holds none.
        """
        try:
            rate = data["copy_bytes_per_ms"]
            return ClusterFactors(
                speed={str(name): float(value) for name, value in data["speed"].items()},
                sync_scale=float(data["sync_scale"]),
                link_scale=float(data["link_scale"]),
                dispatch_ms=float(data["dispatch_ms"]),
                overlap_share=float(data["overlap_share"]),
                copy_bytes_per_ms=math.inf if rate is None else float(rate),
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError("these are no factors of a cluster; calibrate again to make some") from None
