"""Logs a tuning as an MLflow run: the record on disk first, then MLflow. A composer: it reaches up to the zoo."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from autoplace.result import Candidate, TuneResult

__all__ = ["log_tune"]


def log_tune(result: TuneResult, *, tracking_uri: str | None = None, artifacts: Sequence[Path] = ()) -> str:
    """Log a tuning as one run of the experiment of tunings.

    Args:
        result: What the tuning found.
        tracking_uri: MLflow store; None = `MLFLOW_TRACKING_URI`, else the user's data directory.
        artifacts: Files to keep with the run, for example the report.

    Returns:
        The link of the experiment's chart view, or of the store where no server is known.
    """
    from autoplace.zoo.tracking import track_run

    params = {
        "model": result.model_name,
        "mode": result.mode,
        "batch_size": result.batch_size,
        "devices": " ".join(d.name for d in result.cluster.devices),
        "goal": result.objective.goal,
        "energy_weight": result.objective.energy_weight,
        "capture": result.capture_rung,
        "groups": result.num_groups,
        "chosen": result.chosen.label,
    }
    name = f"{result.model_name} {result.mode}"
    with track_run("tune", name, tracking_uri=tracking_uri, params=params, tags=dict(result.environment)) as run:
        for step, candidate in enumerate(result.candidates):
            for outcome in (candidate.predicted, candidate.measured):
                if outcome is not None:
                    run.log_outcome(candidate.label, outcome, step)
        run.log_metrics(_headline(result.baseline, result.chosen, result.noise))
        with tempfile.TemporaryDirectory() as folder:
            plan, whole = Path(folder) / "plan.json", Path(folder) / "result.json"
            result.chosen.plan.save(plan)
            whole.write_text(json.dumps(result.to_json()), encoding="utf-8")
            for path in (plan, whole, *artifacts):
                run.log_artifact(path)
        return str(run.url)


def _headline(plain: Candidate, chosen: Candidate, noise: float) -> dict[str, float]:
    metrics = {"noise": noise, "speedup": chosen.speedup or 1.0, "gain": chosen.gain or 1.0}
    for prefix, candidate in (("plain", plain), ("chosen", chosen)):
        outcome = candidate.measured
        if outcome is not None and outcome.feasible:
            metrics[f"{prefix}_latency_ms"] = outcome.latency_ms
            metrics[f"{prefix}_throughput_sps"] = outcome.throughput_sps
            if outcome.energy_j is not None:
                metrics[f"{prefix}_energy_j"] = outcome.energy_j
    if chosen.predicted is not None:
        metrics["chosen_predicted_ms"] = chosen.predicted.latency_ms
    return metrics
