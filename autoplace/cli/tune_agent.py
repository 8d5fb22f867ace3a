"""`autoplace tune-agent`: search PPO's hyperparameters with Optuna, each trial a run below the study's in MLflow."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoplace.errors import InputError
from autoplace.files import make_directory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from autoplace.agents.tune_agent import TuneAgentConfig, TuneAgentResult
    from autoplace.zoo import RunTracker

__all__ = ["tune_agent"]

BEST = 5
"""Trials in the table."""


def tune_agent(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the study and best.json; a study there goes on.")
    ],
    trials: Annotated[int, typer.Option("--trials", help="Trials in all, those of earlier runs included.")] = 24,
    start: Annotated[
        str | None,
        typer.Option("--start", help="Policy that every trial starts from: name, folder or URI. Default: imitation."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Decisions of PPO in one trial.")] = 131_072,
    problems: Annotated[int, typer.Option("--problems", help="Synthetic training problems.")] = 200,
    instances: Annotated[int, typer.Option("--instances", help="Problems that trials are compared on.")] = 48,
    confirmations: Annotated[
        int,
        typer.Option("--confirmations", help="Seeds with which the best trial has to win again on other problems."),
    ] = 2,
    epochs: Annotated[int, typer.Option("--epochs", help="Epochs of imitation where there is no --start.")] = 15,
    max_ops: Annotated[
        int | None,
        typer.Option("--max-ops", help="Largest number of ops of a problem; default: as in training."),
    ] = None,
    ppo: Annotated[
        Path | None, typer.Option("--ppo", help="best.json with the hyperparameters of the first trial.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything drawn.")] = 0,
    tracking_uri: Annotated[str | None, typer.Option("--tracking-uri", help="MLflow store.")] = None,
) -> None:
    """Search PPO's hyperparameters; run it again with the same folder to go on."""
    from rich.console import Console

    from autoplace.agents.ppo import PpoConfig
    from autoplace.agents.ppo_file import load_ppo
    from autoplace.agents.train import TrainConfig
    from autoplace.agents.tune_agent import TuneAgentConfig

    config = TuneAgentConfig(
        output=output,
        start=_find_policy(start, tracking_uri),
        trials=trials,
        steps=steps,
        problems=problems,
        instances=instances,
        confirmations=confirmations,
        imitate_epochs=epochs,
        max_ops=TrainConfig.max_ops if max_ops is None else max_ops,
        seed=seed,
        base=PpoConfig() if ppo is None else load_ppo(ppo),
    )
    make_directory(output, InputError)
    console = Console()
    _show(console, _run(console, config, tracking_uri))


def _find_policy(policy: str | None, tracking_uri: str | None) -> Path | None:
    if policy is None:
        return None
    from autoplace.zoo import find_policy

    return find_policy(policy, tracking_uri=tracking_uri)


def _run(console: Console, config: TuneAgentConfig, tracking_uri: str | None) -> TuneAgentResult:
    """Search inside an MLflow run; trials are runs of their own below it."""
    from autoplace.agents.tune_agent import tune_agent as search
    from autoplace.progress import progress_bars
    from autoplace.zoo.tracking import track_run

    params = {k: v for k, v in asdict(config).items() if k not in ("output", "base", "start")}
    params |= {"start": str(config.start), **{f"base.{k}": v for k, v in asdict(config.base).items()}}
    with track_run("tune-agent", config.output.name, tracking_uri=tracking_uri, params=params) as parent:

        def open_trial(number: int, drawn: dict[str, Any]) -> AbstractContextManager[RunTracker]:
            # The name of the parent's record stands for it where MLflow could not be reached for its id.
            tags = {"autoplace.parent": parent.record_path.stem}
            if parent.run_id is not None:
                tags["mlflow.parentRunId"] = parent.run_id
            name = f"{config.output.name} trial {number}"
            return track_run("tune-agent", name, tracking_uri=tracking_uri, params=drawn, tags=tags)

        with progress_bars(console) as progress:
            result = search(config, open_trial=open_trial, progress=progress)
        parent.log_metrics({f"search/{k}": v for k, v in result.search.items()} | {"tuned": float(result.tuned)})
        if result.confirmation is not None:
            parent.log_metrics({f"confirmation/{k}": v for k, v in result.confirmation.items()})
        parent.log_params({f"best.{k}": v for k, v in asdict(result.ppo).items()})
        parent.log_artifact(result.path)
        parent.log_artifact(config.output / "study.journal")
    return result


def _show(console: Console, result: TuneAgentResult) -> None:
    """Print the best trials, what the best one is worth, and where the file is."""
    from rich.table import Table

    from autoplace.agents.ppo_space import SEARCHED

    best = [row for row in result.trials if row.value is not None][:BEST]
    table = Table("trial", *(str(row.number) for row in best), title="The best trials, the best first")
    table.add_row("J / J heuristics", *(f"{math.exp(-(row.value or 0.0)):.4f}" for row in best), end_section=True)
    for name in SEARCHED:
        table.add_row(name, *(_short(getattr(row.ppo, name)) for row in best))
    table.add_row("seconds", *(f"{row.seconds:.0f}" for row in best))
    console.print(table)
    states = [row.state for row in result.trials]
    console.print(f"{len(states)} trials: {', '.join(f'{states.count(s)} {s}' for s in sorted(set(states)))}.")
    if result.search["gain"] != 1.0:
        console.print(f"In the search the best trial {_gain(result.search)}; that it was chosen there flatters it.")
    if result.confirmation is not None:
        console.print(f"With other seeds on other problems it {_gain(result.confirmation)}.")
    kept = (
        "the tuned hyperparameters"
        if result.tuned
        else "those of the first trial, which nothing has beaten beyond chance"
    )
    console.print(f"{result.path} holds {kept}.", soft_wrap=True, highlight=False)


def _gain(figures: Mapping[str, float]) -> str:
    """Return a comparison in words."""
    gain = figures["gain"]
    side = f"costs {1 - 1 / gain:.2%} less" if gain >= 1 else f"costs {1 / gain - 1:.2%} more"
    runs = f"{figures['instances']} problems, {figures['seeds']} seed{'s' * (figures['seeds'] != 1)}"
    return f"{side} than the first one (Wilcoxon p = {figures['p']:.3g}; {runs})"


def _short(value: float | None) -> str:
    return "none" if value is None else str(value) if isinstance(value, int) else f"{value:.3g}"
