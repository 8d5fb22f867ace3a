"""A tuning as an MLflow run: every Outcome goes to the record on disk as it comes, then to MLflow.

A composer: it reaches up to the zoo for tracking.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from autoplace.hardware.cluster import Cluster
from autoplace.problem_file import problem_to_json
from autoplace.result import TuneResult
from autoplace.tuner import Progress, TuneConfig, tune
from autoplace.workload import Workload

if TYPE_CHECKING:
    from autoplace.zoo import RunTracker

__all__ = ["tracked_tune"]


def tracked_tune(
    workload: Workload,
    config: TuneConfig,
    *,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
    tracking_uri: str | None = None,
    artifacts: Callable[[TuneResult], Sequence[Path]] | None = None,
) -> TuneResult:
    """Tune inside a run of the experiment `autoplace-tune`; see `autoplace.tuner.tune`.

    Args:
        workload: What to tune.
        config: What to tune for.
        cluster: The devices; None discovers them.
        progress: Told about every phase.
        tracking_uri: MLflow store; None = `MLFLOW_TRACKING_URI`, else the user's data directory.
        artifacts: Makes files from the result that are to be kept with the run, for example the report.

    Raises:
        TrackingError: If the record cannot be written. A store that fails costs a warning.
    """
    from autoplace.zoo import track_run

    params = {
        "model": workload.name,
        "mode": "training" if workload.training else "inference",
        "batch_size": workload.batch_size,
        "goal": config.objective.goal,
        "energy_weight": config.objective.energy_weight,
        "policy": config.policy or "none",
        "seed": config.seed,
    }
    name = f"{workload.name} {params['mode']}"
    with track_run("tune", name, tracking_uri=tracking_uri, params=params) as run:
        steps = count()
        result = tune(
            workload,
            config,
            cluster=cluster,
            progress=progress,
            record=lambda label, outcome: run.log_outcome(label, outcome, next(steps)),
        )
        _log_result(run, result, artifacts(result) if artifacts is not None else ())
    return result


def _log_result(run: RunTracker, result: TuneResult, artifacts: Sequence[Path]) -> None:
    run.log_params(
        {
            "devices": " ".join(d.name for d in result.cluster.devices),
            "capture": result.capture_rung,
            "groups": result.num_groups,
            "chosen": result.chosen.label,
            **result.environment,
        }
    )
    metrics = {"noise": result.noise, "speedup": result.chosen.speedup or 1.0, "gain": result.chosen.gain or 1.0}
    names = ("handover_ms", "concurrency_scale", "dispatch_ms", "median_error_before", "median_error_after")
    metrics |= {f"calibration/{name}": result.calibration[name] for name in names if name in result.calibration}
    for prefix, candidate in (("plain", result.baseline), ("chosen", result.chosen)):
        outcome = candidate.measured
        if outcome is not None and outcome.feasible:
            metrics[f"{prefix}/latency_ms"] = outcome.latency_ms
            metrics[f"{prefix}/throughput_sps"] = outcome.throughput_sps
            if outcome.energy_j is not None:
                metrics[f"{prefix}/energy_{outcome.energy_source}_j"] = outcome.energy_j
    run.log_metrics(metrics)
    if result.problem is not None:
        measured = [(c.label, c.plan, c.measured) for c in result.candidates if c.measured is not None]
        plans = [{"label": label, "plan": plan.to_json(), "outcome": o.to_json()} for label, plan, o in measured]
        run.log_experience(problem_to_json(result.problem), plans)
    with tempfile.TemporaryDirectory() as folder:
        plan, whole = Path(folder) / "plan.json", Path(folder) / "result.json"
        result.chosen.plan.save(plan)
        whole.write_text(json.dumps(result.to_json()), encoding="utf-8")
        for path in (plan, whole, *artifacts):
            run.log_artifact(path)
