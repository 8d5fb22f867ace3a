"""The search space of PPO's hyperparameters, for Optuna. Knows nothing of what a trial does with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .ppo import PpoConfig

if TYPE_CHECKING:
    from optuna import Trial

__all__ = ["SEARCHED", "ppo_of", "suggest_ppo"]

SEARCHED = (
    "learning_rate",
    "entropy",
    "gae_lambda",
    "clip_range",
    "epochs",
    "batch_size",
    "envs",
    "steps",
    "target_kl",
    "value",
)
"""Fields of `PpoConfig` that are searched; the others stay as they are."""


def suggest_ppo(trial: Trial, base: PpoConfig) -> PpoConfig:
    """Draw a trial's hyperparameters.

    Args:
        trial: Of Optuna.
        base: What there is now: every range holds its values, and what is not searched stays as it is there.
    """

    def number(name: str, low: float, high: float, *, log: bool = True) -> float:
        value = getattr(base, name)
        return trial.suggest_float(name, min(low, value), max(high, value), log=log and value > 0)

    def scaled(name: str, factors: Sequence[float]) -> int:
        value = getattr(base, name)
        return int(trial.suggest_categorical(name, sorted({max(1, round(value * factor)) for factor in factors})))

    limits = sorted({0.01, 0.02, 0.03, 0.05, 0.1, base.target_kl or 0.1})
    limit: Any = trial.suggest_categorical("target_kl", [*limits, None])
    return replace(
        base,
        learning_rate=number("learning_rate", 1e-4, 1e-2),
        entropy=number("entropy", 1e-4, 3e-2),
        gae_lambda=number("gae_lambda", 0.9, 1.0, log=False),
        clip_range=number("clip_range", 0.05, 0.4),
        epochs=trial.suggest_int("epochs", 1, max(10, base.epochs)),
        batch_size=scaled("batch_size", (0.25, 0.5, 1, 2, 4)),
        envs=scaled("envs", (0.5, 1, 2)),
        steps=scaled("steps", (0.25, 0.5, 1, 2)),
        target_kl=limit,
        value=number("value", 0.1, 2.0),
    )


def ppo_of(params: Mapping[str, Any], base: PpoConfig) -> PpoConfig:
    """Return the hyperparameters of a trial's parameters; those that it has not drawn are the base's."""
    return replace(base, **{name: params[name] for name in SEARCHED if name in params})
