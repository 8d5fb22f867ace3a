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
    """Return the reward of every episode in a `measured.jsonl`, in order; a torn last line is left out.

    Raises:
        InputError: If the file cannot be read.
    """
    rewards = []
    for line in read_text(path, InputError).splitlines():
        try:
            rewards.append(float(json.loads(line)["reward"]))
        except (ValueError, KeyError, TypeError):
            continue
    return rewards


def measured_reward_figure(rewards: list[float], *, window: int = 10) -> Figure:
    """Return a plot of the measured rewards over real plans.

    Args:
        rewards: log(J_reference / J) of every real plan, in order.
        window: Plans in the moving average.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    plans = np.arange(1, len(rewards) + 1)
    axes.plot(plans, rewards, ".", color="#9aa5b1", label="one plan")
    if rewards:
        sums = np.cumsum([0.0, *rewards])
        first = np.maximum(plans - window, 0)
        axes.plot(plans, (sums[plans] - sums[first]) / (plans - first), color="#1f6feb", label=f"mean of last {window}")
    axes.axhline(0.0, color="#444444", linewidth=0.8, linestyle="--", label="best non-learned plan")
    axes.set_xlabel("plan run on the devices")
    axes.set_ylabel("measured reward, log(J reference / J)")
    axes.set_title("Reward of real runs during training")
    axes.legend()
    return figure
