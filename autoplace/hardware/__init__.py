"""What a model can be placed on: devices, links, clusters; their discovery, profiling and power."""

from autoplace.hardware.cluster import Cluster, Device, Link

__all__ = ["Cluster", "Device", "Link"]
