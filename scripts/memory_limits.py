"""How much memory the hosts of a bed get, so that none holds a training step of the whole batch, and two of them do.

    limit  =  resident at rest  +  what tuning holds besides  +  0.7 · what the step adds        → `limit_of`

The first and the last are measured in a process of its own, by plain PyTorch. A step that adds too little to be told
from what a tuning holds (a planner, exported programs) is refused: the limit would let plain PyTorch run it.

    python scripts/memory_limits.py bert 128
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from cluster_models import MODELS

__all__ = ["limit_of"]

_TUNING_BYTES = 128 << 20
"""A captured graph, what the planner loads, and the reserves of `autoplace.costs.footprint`."""
_PART = 0.7
"""Of what the step adds: half of the batch fits, or a pipeline's stages, and the whole does not."""


@cache
def limit_of(name: str, batch: int, seed: int = 0) -> int:
    """Return the memory of every host of a bed for one model, bytes.

    Args:
        name: Of a model of `cluster_models`.
        batch: Samples of a step.
        seed: Of the model.

    Raises:
        ValueError: If plain PyTorch could run the step within the limit.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", "--seed", str(seed), name, str(batch)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = json.loads(told.splitlines()[-1])
    limit = int(found["resting_bytes"] + _TUNING_BYTES + _PART * found["step_bytes"])
    if found["resting_bytes"] + found["step_bytes"] <= limit:
        raise ValueError(
            f"a step of {batch} samples of {name} adds {found['step_bytes']:.3g} bytes, which is too little to take "
            "away; use a larger batch"
        )
    return limit


def _measure(name: str, batch: int, seed: int) -> dict[str, float]:
    """Return what plain PyTorch holds at rest and what the step adds at its peak, in this process."""
    import torch

    from autoplace.measure.memory import PeakMemory, give_back, process_bytes

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = MODELS[name].make().train()
    inputs = MODELS[name].inputs(batch, torch.Generator().manual_seed(seed))

    def step(samples: int) -> None:
        model.zero_grad(set_to_none=True)
        model(**{key: value[:samples] for key, value in inputs.items()})["loss"].backward()

    step(1)  # what the first step makes once
    model.zero_grad(set_to_none=True)
    give_back()
    resting, peak = process_bytes(), PeakMemory()
    peak.begin(trim=True)
    for _ in range(2):
        step(batch)
    peak.end()
    if peak.host_bytes <= 0.0:
        raise SystemExit("this system does not tell the peak of a process's memory; use Linux")
    return {"resting_bytes": resting, "step_bytes": peak.host_bytes}


def main() -> int:
    """Print the limit of one model's hosts, bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("batch", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_measure(options.model, options.batch, options.seed)))
    else:
        print(limit_of(options.model, options.batch, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
