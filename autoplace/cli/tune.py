"""`autoplace tune`: from a model factory to a measured plan, a report and an MLflow run."""

from __future__ import annotations

import json
import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from autoplace import tuner
from autoplace.cli.factory import load_workload
from autoplace.errors import InputError
from autoplace.files import make_directory, write_text_atomically
from autoplace.hardware.cluster import Cluster
from autoplace.problem import Objective
from autoplace.progress import progress_bars
from autoplace.report import candidates_table, write_report, write_trace
from autoplace.result import TuneResult
from autoplace.runtime import build_executor
from autoplace.tracked import tracked_tune
from autoplace.workload import Workload

__all__ = ["Precision", "tune"]


class Precision(StrEnum):
    """Values of `--precision`; see `TuneConfig.precision`."""

    float32 = "float32"
    auto = "auto"


def tune(
    model: Annotated[str, typer.Argument(help="Model factory, file.py:function, that returns (model, inputs).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for plan, report and results.")] = Path(
        "autoplace-out"
    ),
    training: Annotated[
        bool | None, typer.Option("--training/--inference", help="Default: the mode the model is returned in.")
    ] = None,
    energy_aware: Annotated[bool, typer.Option("--energy-aware", help="Same as --energy-weight 0.5.")] = False,
    energy_weight: Annotated[
        float | None, typer.Option("--energy-weight", help="w of latency^(1-w) * energy^w.", show_default="0")
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(
            "--cluster", help="Cluster file; one with several hosts tunes over all of them. Default: discover."
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option("--policy", help="Learned policy: name, folder, models:/ URI, or none.")
    ] = "default",
    budget: Annotated[float, typer.Option("--budget", help="Seconds for the real runs that decide.")] = 60.0,
    plans: Annotated[int, typer.Option("--plans", help="How many of the best predicted plans to measure.")] = 5,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Whether torch.compile competes. Default: where it fits the budget and can pay back.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        Precision, typer.Option("--precision", help="auto lets plans compute in bfloat16 where that is faster.")
    ] = Precision.float32,
    run_seconds: Annotated[
        float, typer.Option("--run-seconds", help="How long the model will run: compiling must pay back within it.")
    ] = 600.0,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Reuse measured costs of earlier runs.")] = True,
    seed: Annotated[int, typer.Option("--seed", help="Seed of all searches.")] = 0,
    tracking_uri: Annotated[str | None, typer.Option("--tracking-uri", help="MLflow store.")] = None,
) -> None:
    """Find the fastest plan for a model on these devices, by real runs; plain PyTorch is always a candidate."""
    if energy_aware and energy_weight is not None:
        raise InputError("--energy-aware and --energy-weight say the same thing twice; give one of them")
    weight = energy_weight if energy_weight is not None else (0.5 if energy_aware else 0.0)
    console = Console()
    workload = load_workload(model, training=training)
    config = tuner.TuneConfig(
        objective=Objective(energy_weight=weight),
        budget_s=budget,
        policy=None if policy == "none" else policy,
        measured_plans=plans,
        compile="auto" if compile is None else compile,
        precision=precision.value,
        run_s=run_seconds,
        use_cache=cache,
        seed=seed,
    )
    devices = Cluster.load(cluster) if cluster is not None else None
    if cluster is not None and devices is not None and len(devices.hosts) > 1:
        from autoplace.cli.tune_ranks import tune_over_ranks

        if training is False:
            raise InputError("over several hosts a training step is tuned; leave --inference out")
        code = tune_over_ranks(cluster, model, output, policy=policy, budget_s=budget, energy_weight=weight)
        if code:
            raise typer.Exit(code)
        return
    make_directory(output, InputError)
    with progress_bars(console) as progress:
        result = tracked_tune(
            workload,
            config,
            cluster=devices,
            progress=progress,
            tracking_uri=tracking_uri,
            artifacts=lambda found: [write_report(found, output)],
        )
    _show(console, result)
    _run_chosen(console, workload, result)
    _write(console, result, output, tracking_uri)


def _show(console: Console, result: TuneResult) -> None:
    console.print()
    console.print(candidates_table(result))
    console.print(
        f"Captured by {result.capture_rung} ({result.num_ops} ops in {result.num_groups} groups); "
        f"A/A noise of plain PyTorch ±{result.noise:.1%}."
    )
    if result.capture_reason:
        console.print(f"Not captured higher because: {result.capture_reason}")
    for note in result.notes:
        console.print(f"Note: {note}")


def _run_chosen(console: Console, workload: Workload, result: TuneResult) -> None:
    """Run the chosen plan once as the user would, and say what came out."""
    with (
        workload.mode(),
        build_executor(workload.model, result.chosen.plan, result.cluster) as executor,
    ):
        output = workload.forward(executor)
    tensors = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors[:4])
    console.print(f"Ran the chosen plan ({result.chosen.label}): {type(output).__name__} of shapes {shapes}.")


def _write(console: Console, result: TuneResult, output: Path, tracking_uri: str | None) -> None:
    from autoplace.zoo.tracking import ui_command

    plan_path, result_path, trace_path = output / "plan.json", output / "result.json", output / "trace.json"
    result.chosen.plan.save(plan_path)
    write_text_atomically(result_path, json.dumps(result.to_json(), indent=1) + "\n")
    rows = [("plan", plan_path), ("report", output / "report.html"), ("all candidates", result_path)]
    staged = result.chosen.predicted
    if staged is not None and staged.timeline:
        write_trace(staged, trace_path)
        rows.append(("trace (ui.perfetto.dev)", trace_path))
    console.print()
    for label, path in rows:
        console.print(f"  {label:<24} {path.resolve()}", soft_wrap=True)
    command = ui_command(tracking_uri)
    if shutil.which("autoplace") is None:  # run from a virtual environment that is not active
        command = f"{Path(sys.argv[0]).parent}/{command}"
    console.print(f"  {'compare runs':<24} {command}", soft_wrap=True)
