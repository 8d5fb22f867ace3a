"""The plot of the measured stage: reward of every real plan, and its moving average. Draws; knows no training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autoplace.errors import InputError
from autoplace.files import read_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["measured_reward_figure", "read_measured_rewards"]


def read_measured_rewards(path: str | Path) -> list[float]:
    """Return the reward of every episode in a `measured.jsonl`, in order, without what was foretold and not run.

    A torn last line is left out.

    Raises:
        InputError: If the file cannot be read.
    """
    rewards = []
    for line in read_text(path, InputError).splitlines():
        try:
            record = json.loads(line)
            if (record.get("outcome") or {}).get("source") != "simulated":
                rewards.append(float(record["reward"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return rewards


def measured_reward_figure(
    rewards: list[float], *, window: int = 15, reference: str = "best non-learned plan"
) -> Figure:
    """Return a plot of the measured rewards over real plans.

    Args:
        rewards: log(J_reference / J) of every real plan, in order.
        window: Plans in the moving average, which starts where there are as many.
        reference: What a reward of 0 is.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    values, plans = np.asarray(rewards, float), np.arange(1, len(rewards) + 1)
    axes.plot(plans, values, "o", markersize=4, color="#8b97a5", alpha=0.6, label="one plan")
    if len(values):
        width = min(window, len(values))
        averages = np.convolve(values, np.full(width, 1.0 / width), mode="valid")
        axes.plot(plans[width - 1 :], averages, color="#1f6feb", linewidth=2.2, label=f"mean of the last {width} plans")
    axes.axhline(0.0, color="#222222", linewidth=1.2, linestyle="--", label=reference)
    axes.set_xlabel("plans run on the devices (count)")
    axes.set_ylabel("measured reward, ln(J reference / J)")
    right = axes.secondary_yaxis("right", functions=(lambda y: y, lambda y: y))
    ticks = [0.125, 0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0]
    right.set_yticks([float(np.log(t)) for t in ticks], [f"{t:g}x" for t in ticks])
    right.set_ylabel("J reference / J (ratio)")
    axes.grid(axis="y", color="#e3e6ea")
    axes.set_axisbelow(True)
    axes.set_title("Reward of real runs during training")
    axes.legend(loc="lower right")
    return figure
