"""`autoplace train`: train a placement policy, on the simulator and on the devices themselves."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoplace.errors import InputError
from autoplace.files import make_directory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from autoplace.agents.experience import Experience
    from autoplace.agents.measured import MeasuredCase
    from autoplace.agents.train import TrainConfig
    from autoplace.hardware.cluster import Cluster
    from autoplace.problem import Objective, Problem, Semantics
    from autoplace.workload import Workload
    from autoplace.zoo import RunTracker

__all__ = ["find_start", "run_stages", "train"]


def train(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for policy, checkpoints and records.")],
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", help="imitate, simulate or measure; repeatable. Default: all that can run."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="Model factory file.py:function to train on; repeatable.")
    ] = None,
    training: Annotated[
        bool | None, typer.Option("--training/--inference", help="Default: the mode each model is returned in.")
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(
            "--cluster",
            help="Cluster file; with several hosts, the stage measure runs on all of them. Default: this machine.",
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            help="Policy to start from: name, folder, URI, or none. Default: fresh weights; over several hosts, the "
            "policy that ships.",
        ),
    ] = None,
    records: Annotated[
        bool,
        typer.Option("--records", help="Learn from the best measured plans of earlier tunings too."),
    ] = False,
    records_dir: Annotated[
        Path | None, typer.Option("--records-dir", help="Folder of those records; default: the data directory's.")
    ] = None,
    problems: Annotated[int, typer.Option("--problems", help="Training problems that are drawn.")] = 800,
    captured: Annotated[
        float, typer.Option("--captured", help="Share of them that are graphs of `transformers` models.")
    ] = 0.3,
    max_ops: Annotated[int, typer.Option("--max-ops", help="Largest number of ops of those, about.")] = 300,
    max_devices: Annotated[int, typer.Option("--max-devices", help="Largest number of devices of those.")] = 16,
    teacher_evaluations: Annotated[
        int, typer.Option("--teacher-evaluations", help="Placements simulated to find each problem's teacher.")
    ] = 20_000,
    workers: Annotated[int, typer.Option("--workers", help="Processes that search for teachers.")] = 2,
    without: Annotated[
        list[str] | None,
        typer.Option("--without", help="Ablation: imitation, message-passing or masks; repeatable."),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", help="Epochs of imitation.")] = 30,
    steps_simulate: Annotated[
        int, typer.Option("--steps-simulate", help="Decisions of PPO by simulation.")
    ] = 5_000_000,
    plans_measure: Annotated[int, typer.Option("--plans-measure", help="Real plans of PPO by measurement.")] = 100,
    groups_measure: Annotated[int, typer.Option("--groups-measure", help="Most groups of a measured model.")] = 12,
    microbatches_measure: Annotated[
        int,
        typer.Option(
            "--microbatches-measure",
            min=1,
            help="Parts of the batch where a plan has several devices of one host; over hosts each plan has its own.",
        ),
    ] = 2,
    energy_weight: Annotated[
        float, typer.Option("--energy-weight", help="w of latency^(1-w) * energy^w that real runs are rewarded for.")
    ] = 0.0,
    validation: Annotated[int, typer.Option("--validation", help="Problems that choose among checkpoints.")] = 96,
    held_out: Annotated[int, typer.Option("--held-out", help="Held-out problems of the last evaluation.")] = 96,
    hidden: Annotated[int, typer.Option("--hidden", help="Width of the network.")] = 32,
    ppo: Annotated[
        Path | None, typer.Option("--ppo", help="PPO's hyperparameters: the best.json of `autoplace tune-agent`.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything drawn.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    tracking_uri: Annotated[str | None, typer.Option("--tracking-uri", help="MLflow store.")] = None,
) -> None:
    """Train a placement policy: imitation, PPO on the simulator, PPO on measured runs."""
    from rich.console import Console

    from autoplace.agents.captured import available
    from autoplace.agents.ppo import PpoConfig
    from autoplace.agents.ppo_file import load_ppo
    from autoplace.agents.train import STAGES, TrainConfig
    from autoplace.hardware.cluster import Cluster
    from autoplace.problem import Objective, Semantics

    console = Console()
    devices = Cluster.load(cluster) if cluster is not None else None
    over_hosts = devices is not None and len(devices.hosts) > 1
    stages = tuple(stage) if stage else STAGES if model else STAGES[:2]
    if not stage and not model:
        console.print("Without --model there is nothing to run for real: the stage measure is left out.")
    if captured > 0.0 and not available():
        console.print("transformers is not installed: training looks at synthetic graphs alone.")
    config = TrainConfig(
        output=output,
        stages=stages,
        seed=seed,
        problems=problems,
        captured=captured,
        max_ops=max_ops,
        max_devices=max_devices,
        teacher_evaluations=teacher_evaluations,
        workers=workers,
        without=tuple(without or ()),
        imitate_epochs=epochs,
        simulate_steps=steps_simulate,
        measure_plans=plans_measure,
        validation=validation,
        held_out=held_out,
        hidden=hidden,
        ppo=PpoConfig() if ppo is None else load_ppo(ppo),
        start=None if over_hosts else find_start(policy, tracking_uri),
        resume=resume,
        command=_command(),
    )
    if "measure" in stages and not model:
        raise InputError("the stage measure needs a model to run; pass --model file.py:function")
    if over_hosts and cluster is not None:
        from autoplace.cli.train_ranks import train_over_ranks

        _check_over_hosts(stages, model or [], training, records or records_dir is not None)
        code = train_over_ranks(
            cluster,
            (model or [])[0],
            config,
            policy="default" if policy is None else policy,
            max_groups=groups_measure,
            energy_weight=energy_weight,
            tracking_uri=tracking_uri,
        )
        if code:
            raise typer.Exit(code)
        return
    objective = Objective(energy_weight=energy_weight)
    semantics = Semantics(microbatches=microbatches_measure)
    found, measured = _models(console, model or [], devices, training, stages, objective, groups_measure, semantics)
    experience = _experience(console, records_dir) if records or records_dir is not None else []
    run_stages(console, config, found, measured, experience, tracking_uri=tracking_uri)


def _check_over_hosts(stages: tuple[str, ...], model: list[str], training: bool | None, records: bool) -> None:
    """Refuse what trainings over several hosts do not do."""
    if set(stages) != {"measure"} or records:
        raise InputError(
            "over several hosts real runs alone train a policy: pass --stage measure without records, and --policy for "
            "what the other stages have made"
        )
    if training is False:
        raise InputError("over several hosts a training step is measured; leave --inference out")
    if len(model) > 1:
        raise InputError("over several hosts one model is run; pass --model once and train the next from this policy")


def _command() -> str:
    """Return the command line as typed, without the program's path and the store, which may hold a password."""
    import sys

    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word == "--tracking-uri":
            next(words, None)
        elif not word.startswith("--tracking-uri="):
            kept.append(word)
    return shlex.join(["autoplace", *kept])


def find_start(policy: str | None, tracking_uri: str | None) -> Path | None:
    """Return the directory of a policy to start from; None where fresh weights are wanted."""
    if policy is None or policy == "none":
        return None
    from autoplace.zoo import find_policy

    return find_policy(policy, tracking_uri=tracking_uri)


def _experience(console: Console, directory: Path | None) -> list[Experience]:
    """Load what earlier tunings measured, and say how much it is."""
    from autoplace.agents.experience import load_experience

    found = load_experience(directory)
    console.print(f"Learning from the best measured plans of {len(found)} tuned problem{'s' * (len(found) != 1)}.")
    return found


def _models(
    console: Console,
    specs: list[str],
    cluster: Cluster | None,
    training: bool | None,
    stages: tuple[str, ...],
    objective: Objective,
    groups: int,
    semantics: Semantics,
) -> tuple[list[Problem], list[MeasuredCase]]:
    """Build the problems of the person's models, and the small ones that are run for real."""
    if not specs:
        return [], []
    from autoplace.agents.models import model_problem, variants
    from autoplace.cli.factory import load_workload
    from autoplace.hardware.cluster import Cluster

    cluster = cluster or Cluster.discover()
    problems: list[Problem] = []
    measured: list[MeasuredCase] = []
    for spec in specs:
        workload = load_workload(spec, training=training)
        console.print(f"Capturing and profiling {spec} on {', '.join(d.name for d in cluster.devices)}.")
        if set(stages) & {"imitate", "simulate"}:
            problems += variants([model_problem(workload, cluster, max_groups=g) for g in (16, 64)])
        if "measure" in stages:
            measured.append(_case(workload, cluster, objective, groups, semantics))
    return problems, measured


def _case(
    workload: Workload, cluster: Cluster, objective: Objective, groups: int, semantics: Semantics
) -> MeasuredCase:
    from autoplace.agents.measured import MeasuredCase
    from autoplace.agents.models import model_problem
    from autoplace.measure.evaluator import MeasuredEvaluator

    problem = model_problem(workload, cluster, max_groups=groups, objective=objective)
    parts = min(semantics.microbatches, workload.batch_size)
    problem = problem.with_(semantics=replace(semantics, microbatches=parts))
    # Many plans measured shortly teach more than few measured well: the reference runs beside every one of them.
    evaluator = MeasuredEvaluator(workload, cluster, objective=objective, repeats=3)
    return MeasuredCase(problem=problem, evaluator=evaluator)


def run_stages(
    console: Console,
    config: TrainConfig,
    problems: Sequence[Problem] = (),
    measured: Sequence[MeasuredCase] = (),
    experience: Sequence[Experience] = (),
    *,
    tracking_uri: str | None,
) -> None:
    """Train inside a run of the experiment `autoplace-train`, and show what came out; see `agents.train.train`."""
    from autoplace.agents.train import train as run_training
    from autoplace.progress import progress_bars
    from autoplace.zoo.tracking import track_run

    make_directory(config.output, InputError)
    params: dict[str, Any] = {k: v for k, v in asdict(config).items() if k not in ("output", "start", "command")}
    with track_run("train", config.output.name, tracking_uri=tracking_uri, params=params) as tracker:
        with progress_bars(console) as progress:
            directory = run_training(
                config,
                model_problems=problems,
                measured=measured,
                experience=experience,
                log=tracker.log_metrics,
                progress=progress,
            )
        for path in sorted(directory.iterdir()):
            tracker.log_artifact(path, "policy")
        if "measure" in config.stages:
            names = " or the ".join(dict.fromkeys(case.reference_name for case in measured))
            console.print(_log_measured(tracker, config.output, names), highlight=False)
    _show(console, directory)


def _log_measured(tracker: RunTracker, output: Path, reference: str) -> str:
    """Track the record, the plot and the rise of the measured rewards; return what to tell the person."""
    from autoplace.agents.plots import measured_reward_figure, read_measured_rewards
    from autoplace.agents.rise import reward_rise

    records = output / "measured.jsonl"
    rewards = read_measured_rewards(records)
    figure = measured_reward_figure(rewards, reference=reference)
    figure.savefig(output / "measured_reward.png", dpi=120)
    tracker.log_figure(figure, "measured_reward.png")
    tracker.log_artifact(records)
    if len(rewards) < 2:
        return f"{len(rewards)} measured plans show no rise; measure more."
    rise = reward_rise(rewards)
    tracker.log_metrics(rise.metrics)
    return f"{rise}\nThe reward is ln(J reference / J): 0 is the {reference}, 0.69 half its cost."


def _show(console: Console, directory: Path) -> None:
    """Print the evaluation of the policy that was written, and where it is."""
    from rich.table import Table

    from autoplace.policy.policy import Policy

    table = Table("against", "greedy", "95%", "best of 33", "95%", title="Held-out problems: J policy / J other")
    evaluation = Policy.load(directory).evaluation
    sampled = evaluation["held_out_32_samples"]["ratio"]
    for name, greedy in evaluation["held_out_greedy"]["ratio"].items():
        cells = [(f"{r['geometric_mean']:.3f}", f"{r['low']:.3f}-{r['high']:.3f}") for r in (greedy, sampled[name])]
        table.add_row(name, *cells[0], *cells[1])
    console.print(table)
    console.print(f"Policy: {directory}")
    console.print("See the run with `autoplace ui`; use the policy with `autoplace tune --policy`.")
