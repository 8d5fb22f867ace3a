"""Times of ops and transfers in one pass, as the policy's tables count them. Knows a problem, no plan."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoplace.problem import Problem
from autoplace.simulate.arrays import link_matrices

__all__ = ["mean_link", "pass_latency", "transfer_times"]


def pass_latency(problem: Problem) -> NDArray[np.float64]:
    """Return the time of every op on every device in one pass, all microbatches, ms; inf = cannot run there."""
    latency, overhead = problem.latency_ms, problem.overhead_ms
    if overhead is not None and problem.semantics.microbatches > 1:
        latency = latency + (problem.semantics.microbatches - 1) * np.minimum(overhead, latency)
    return np.where(problem.can_run, latency, np.inf).astype(np.float64)


def transfer_times(problem: Problem) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return latency (ms) and inverse bandwidth (ms per byte) between devices, float64[D, D], by the problem's route.

    Over the host's memory they are the sums of both legs. A pair that cannot talk has latency 0 and inverse inf.
    """
    devices, host = problem.num_devices, problem.semantics.route == "host"
    latency, inverse = link_matrices(problem.cluster, host=host)
    if host:
        apart = ~np.eye(devices, dtype=bool)
        up, down = latency[:devices, devices][:, None], latency[devices, :devices][None, :]
        latency = np.where(apart, up + down, 0.0)
        inverse = np.where(apart, inverse[:devices, devices][:, None] + inverse[devices, :devices][None, :], 0.0)
    latency, inverse = latency[:devices, :devices].copy(), inverse[:devices, :devices].copy()
    missing = ~np.isfinite(latency) | ~np.isfinite(inverse)
    latency[missing], inverse[missing] = 0.0, np.inf
    return latency, inverse


def mean_link(problem: Problem) -> tuple[float, float]:
    """Return the mean latency (ms) and mean inverse bandwidth (ms per byte) over connected pairs; 0, 0 without any."""
    latency, inverse = transfer_times(problem)
    usable = np.isfinite(inverse) & ~np.eye(problem.num_devices, dtype=bool)
    if not usable.any():
        return 0.0, 0.0
    return float(latency[usable].mean()), float(inverse[usable].mean())
