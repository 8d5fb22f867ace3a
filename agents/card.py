"""The card of a trained policy: what it is, how it was made, what it was trained on, how it does."""

from __future__ import annotations

import datetime
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

import autoplace
from autoplace.policy.features import FEATURE_VERSION, NUM_FEATURES

from .distribution import (
    HELD_OUT_CLUSTERS,
    HELD_OUT_FAMILIES,
    HELD_OUT_MODELS,
    TRAIN_CLUSTERS,
    TRAIN_FAMILIES,
    TRAIN_MODELS,
)
from .train_config import TrainConfig

__all__ = ["TrainingFacts", "training_record", "write_card"]


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What a training came to, beside its configuration."""

    problems: int
    """Training problems, those of a person's own models included."""
    captured: float
    """Share of the drawn problems whose graph is a captured model's."""
    seconds: dict[str, float]
    """Stage to wall seconds."""


def training_record(config: TrainConfig, facts: TrainingFacts) -> dict[str, Any]:
    """Return what the policy was trained on and how, JSON-ready, for `eval.json`.

    Args:
        config: Of the training.
        facts: What it came to.
    """
    left_out = ("output", "resume", "command", "start", "captured", "workers", "stages")
    split = {"families": TRAIN_FAMILIES, "clusters": TRAIN_CLUSTERS}
    held_out = {"families": HELD_OUT_FAMILIES, "clusters": HELD_OUT_CLUSTERS}
    if facts.captured:
        split, held_out = {**split, "models": TRAIN_MODELS}, {**held_out, "models": HELD_OUT_MODELS}
    return {
        "command": config.command,
        "stages": list(config.ordered_stages),
        "seconds": {stage: round(value, 3) for stage, value in facts.seconds.items()},
        "started_from": None if config.start is None else config.start.name,
        "training_problems": facts.problems,
        "captured": facts.captured,
        "trained_on": {key: list(names) for key, names in split.items()},
        "held_out_of_training": {key: list(names) for key, names in held_out.items()},
        "config": {key: value for key, value in asdict(config).items() if key not in left_out},
    }


def write_card(config: TrainConfig, facts: TrainingFacts, evaluation: dict[str, Any]) -> str:
    """Return the card, Markdown.

    Args:
        config: Of the training.
        facts: What it came to.
        evaluation: Figures of `Bench.compare` by name.
    """
    captured, problems = facts.captured, facts.problems
    spent = ", ".join(f"{stage} {value:.0f} s" for stage, value in facts.seconds.items())
    lines = [
        "# Placement policy",
        "",
        f"Places op graphs on devices, one op group a step: {NUM_FEATURES} features of version {FEATURE_VERSION} per "
        f"device, one scorer of width {config.hidden} shared by all devices.",
        "",
        "## Training",
        "",
        f"- Command: `{config.command or 'autoplace.agents.train.train(...)'}`",
        f"- Date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, seed {config.seed}, "
        f"autoplace {autoplace.__version__}, torch {torch.__version__}, {platform.machine()}",
        f"- Stages: {', '.join(config.ordered_stages)}; {spent}",
    ]
    if problems:
        lines.append(
            f"- Data: {problems} problems, {config.problems} of them drawn: synthetic families "
            + ", ".join(TRAIN_FAMILIES)
            + (f"; {captured:.0%} of them graphs of models {', '.join(TRAIN_MODELS)}" if captured else "")
            + f"; clusters {', '.join(TRAIN_CLUSTERS)} of 2 to {config.max_devices} devices; up to {config.max_ops} ops"
        )
    if config.without:
        lines.append(f"- An ablation, without: {', '.join(config.without)}")
    if "imitate" in config.ordered_stages:
        lines.append(
            f"- Imitation: {config.imitate_epochs} epochs over the best plans of the heuristics and of annealing with "
            f"{config.teacher_evaluations} evaluations"
        )
    if "simulate" in config.stages:
        lines.append(f"- PPO on the simulator: {config.simulate_steps} decisions")
    if "measure" in config.stages:
        lines.append(f"- PPO on real runs: {config.measure_plans} plans")
    if config.start is not None:
        lines.append(f"- Started from: {config.start.name}")
    lines += [
        "",
        "## Evaluation",
        "",
        f"Held-out families {', '.join(HELD_OUT_FAMILIES)}"
        + (f", held-out models {', '.join(HELD_OUT_MODELS)}" if captured else "")
        + f", the held-out cluster {', '.join(HELD_OUT_CLUSTERS)} among "
        "the known ones; simulated. Geometric mean of J_policy / J_other, 95% interval; below 1 the policy is better.",
        "",
    ]
    for name, figures in evaluation.items():
        lines += [
            f"### {name}: {figures['problems']} problems, {figures['infeasible']} infeasible",
            "",
            "| against | ratio | interval | problems |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {other} | {r['geometric_mean']:.3f} | {r['low']:.3f} to {r['high']:.3f} | {r['problems']} |"
            for other, r in figures["ratio"].items()
        ]
        lines.append("")
    return "\n".join(lines)
