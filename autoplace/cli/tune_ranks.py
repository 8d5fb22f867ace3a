"""`python -m autoplace.cli.tune_ranks`: what `autoplace tune` runs on every rank of a cluster of several hosts.

Every rank builds the model by its factory and starts from rank 0's parameters; rank 0 writes what was found:
`plan.json`, `explain.txt`, and every real run as it comes to `outcomes.jsonl`, synced to disk.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from autoplace.cli._ranks import shared_workload
from autoplace.errors import InputError
from autoplace.files import make_directory, write_text_atomically

__all__ = ["main", "tune_over_ranks"]


def tune_over_ranks(
    cluster: Path, model: str, output: Path, *, policy: str, budget_s: float, energy_weight: float
) -> int:
    """Start the ranks of a cluster file and tune a training step over them; return the exit code.

    Args:
        cluster: The cluster file, which says how to start processes on its hosts.
        model: Model factory, `file.py:function`; the file must be on every host.
        output: Folder for what is found, on the host of rank 0.
        policy: Learned policy, or `none`.
        budget_s: Seconds for the real runs.
        energy_weight: w of latency^(1-w) * energy^w.

    Raises:
        ClusterFileError: If the file is none, or a host cannot be reached.
    """
    from autoplace.runtime.distributed.launch import run_script

    path, separator, function = model.rpartition(":")
    command = ["-m", "autoplace.cli.tune_ranks", f"{Path(path).resolve()}{separator}{function}", str(output.resolve())]
    command += ["--policy", policy, "--budget", str(budget_s), "--energy-weight", str(energy_weight)]
    return run_script(cluster, command)


def main() -> None:
    """Tune on this rank."""
    from autoplace.group_tuner import tune_group
    from autoplace.problem import Objective
    from autoplace.records import RecordLog
    from autoplace.report.ranks import explain_ranks
    from autoplace.runtime.distributed import Session

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--policy", default="default")
    parser.add_argument("--budget", type=float, default=60.0)
    parser.add_argument("--energy-weight", type=float, default=0.0)
    options = parser.parse_args()
    session = Session.join()
    workload = shared_workload(options.model, session)
    with ExitStack() as stack:
        log: RecordLog | None = None
        if session.rank == 0:
            make_directory(options.output, InputError)
            log = stack.enter_context(RecordLog(options.output / "outcomes.jsonl"))
        result = tune_group(
            workload.model,
            dict(workload.kwargs) if workload.kwargs else workload.args,
            session,
            loss=workload.loss,
            objective=Objective(energy_weight=options.energy_weight),
            policy=None if options.policy == "none" else options.policy,
            budget_s=options.budget,
            record=None
            if log is None
            else lambda plan, outcome: log.append({"plan": plan.to_json(), "outcome": outcome.to_json()}),
        )
    if session.rank == 0:
        result.plan.save(options.output / "plan.json")
        text = explain_ranks(result.plan, session.members, result)
        write_text_atomically(options.output / "explain.txt", text)
        print(f"{text}\n{result.runs} real runs; wrote {options.output / 'plan.json'}", flush=True)
    session.close()


if __name__ == "__main__":
    main()
