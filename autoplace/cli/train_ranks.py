"""`python -m autoplace.cli.train_ranks`: what `autoplace train --stage measure` runs on every rank of several hosts.

Every rank builds the model by its factory and starts from rank 0's parameters. Rank 0 refines the policy and writes
what a training on one host writes, and every real run as it comes to `outcomes.jsonl`; the others run what it proposes.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from autoplace.cli._ranks import shared_workload
from autoplace.errors import AutoplaceError, ExecutionError, InputError, in_one_line
from autoplace.files import make_directory

if TYPE_CHECKING:
    from autoplace.agents.train import TrainConfig
    from autoplace.runtime.distributed import Session

__all__ = ["main", "train_over_ranks"]

_TIMEOUT_S = 300.0
"""The others wait while rank 0 compiles, opens the MLflow store and trains; a rank that ends is noticed at once."""


def train_over_ranks(
    cluster: Path,
    model: str,
    config: TrainConfig,
    *,
    policy: str | None,
    max_groups: int,
    energy_weight: float,
    tracking_uri: str | None,
) -> int:
    """Start the ranks of a cluster file and refine a policy by real runs on them; return the exit code.

    Args:
        cluster: The cluster file, which says how to start processes on its hosts.
        model: Model factory, `file.py:function`; the file must be on every host.
        config: Of the training; its stage is `measure`, its output on the host of rank 0.
        policy: Policy to start from, found on the host of rank 0; None = fresh weights.
        max_groups: Most groups of the model.
        energy_weight: w of latency^(1-w) * energy^w.
        tracking_uri: MLflow store.

    Raises:
        ClusterFileError: If the file is none, or a host cannot be reached.
    """
    from autoplace.runtime.distributed.launch import run_script
    from autoplace.runtime.distributed.session import TIMEOUT_VARIABLE

    path, separator, function = model.rpartition(":")
    settings = {**asdict(config), "output": str(config.output.resolve()), "ppo": None, "start": None}
    command = ["-m", "autoplace.cli.train_ranks", f"{Path(path).resolve()}{separator}{function}", json.dumps(settings)]
    command += ["--groups", str(max_groups), "--energy-weight", str(energy_weight)]
    command += [] if policy is None else ["--policy", policy]
    command += [] if tracking_uri is None else ["--tracking-uri", tracking_uri]
    return run_script(cluster, command, timeout_s=None if TIMEOUT_VARIABLE in os.environ else _TIMEOUT_S)


def main() -> None:
    """Train on this rank, or run plans for the one that does."""
    from autoplace.runtime.distributed import Session

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("settings", help="fields of TrainConfig as JSON")
    parser.add_argument("--policy")
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--energy-weight", type=float, default=0.0)
    parser.add_argument("--tracking-uri")
    options = parser.parse_args()
    session = Session.join()
    try:
        _train(session, options)
    except AutoplaceError:
        raise
    except Exception as error:
        device = session.members[session.rank]
        raise ExecutionError(f"rank {session.rank} ({device}): {in_one_line(error)}") from error
    finally:
        session.close()


def _train(session: Session, options: argparse.Namespace) -> None:
    from rich.console import Console

    from autoplace.agents.over_ranks import case_over_ranks
    from autoplace.cli.train import run_stages
    from autoplace.problem import Objective
    from autoplace.records import RecordLog

    config = session.together(lambda: _config(options) if session.rank == 0 else None)
    workload = shared_workload(options.model, session)
    with ExitStack() as stack:
        log: RecordLog | None = None
        if config is not None:
            make_directory(config.output, InputError)
            log = stack.enter_context(RecordLog(config.output / "outcomes.jsonl"))
        case = stack.enter_context(
            case_over_ranks(
                workload,
                session,
                objective=Objective(energy_weight=options.energy_weight),
                max_groups=options.groups,
                record=None
                if log is None
                else lambda plan, outcome: log.append({"plan": plan.to_json(), "outcome": outcome.to_json()}),
            )
        )
        if case is not None and config is not None:
            run_stages(Console(), config, measured=[case], tracking_uri=options.tracking_uri)


def _config(options: argparse.Namespace) -> TrainConfig:
    """Return the configuration that `train_over_ranks` wrote, without hyperparameters, which real runs do not use."""
    from autoplace.agents.train import TrainConfig
    from autoplace.cli.train import find_start

    fields = json.loads(options.settings)
    del fields["ppo"]
    fields |= {"stages": tuple(fields["stages"]), "without": tuple(fields["without"]), "output": Path(fields["output"])}
    return TrainConfig(**{**fields, "start": find_start(options.policy, options.tracking_uri)})


if __name__ == "__main__":
    main()
