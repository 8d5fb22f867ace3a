"""Plain PyTorch against the plan that `autoplace` keeps, on this machine's devices, for the models in `examples/`.

Every row comes from one call of `autoplace.tune`: plain PyTorch runs twice a round, interleaved with the plans, and the
winner is confirmed in a longer interleaved run of its own. A speed-up of exactly 1 means that nothing beat plain
PyTorch beyond the noise and the model runs as it is.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from results import save

from autoplace import Objective, TuneConfig, tune
from autoplace.cli.factory import load_workload

CASES = (
    ("examples/bert.py:build", False),
    ("examples/bert.py:build", True),
    ("examples/vit.py:build", False),
    ("examples/vit.py:build", True),
    ("examples/mlp.py:build", False),
    ("examples/mlp.py:build", True),
)


def _short(candidate: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the results wants of a measured candidate."""
    measured, predicted = candidate["measured"], candidate["predicted"] or {}
    return {
        **{key: candidate[key] for key in ("label", "speedup", "speedup_interval", "gain", "verdict", "kept")},
        "predicted_ms": predicted.get("latency_ms"),
        **{key: measured[key] for key in ("latency_ms", "energy_j", "energy_source", "samples_ms") if key in measured},
    }


def main() -> None:
    """Tune every case, print a table and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--energy-weight", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = TuneConfig(objective=Objective(energy_weight=options.energy_weight), seed=options.seed)
    rows = []
    print(
        f"{'model':<26}{'mode':<12}{'plain ms':>10}{'kept ms':>10}{'speed-up':>10}  {'quartiles':<14}{'noise':>7}  kept"
    )
    for spec, training in CASES:
        result = tune(load_workload(spec, training=training), config)
        plain, kept = result.baseline.measured, result.chosen.measured
        assert plain is not None and kept is not None
        low, high = result.chosen.speedup_interval or (1.0, 1.0)
        speedup = result.chosen.speedup or 1.0
        print(
            f"{spec:<26}{result.mode:<12}{plain.latency_ms:>10.2f}{kept.latency_ms:>10.2f}{speedup:>10.3f}"
            f"  {low:.3f}-{high:.3f}   {result.noise:>7.1%}  {result.chosen.label}",
            flush=True,
        )
        rows.append({"case": spec, **result.to_json(), "chosen": result.chosen.label, "chosen_speedup": speedup})
    mean = math.exp(sum(math.log(float(r["chosen_speedup"])) for r in rows) / len(rows))
    print(f"geometric mean of the speed-ups over plain PyTorch: {mean:.3f}")
    for row in rows:
        row["candidates"] = [_short(c) for c in row["candidates"] if c["measured"]]
    save("local", seed=options.seed, data={"geometric_mean": mean, "rows": rows})


if __name__ == "__main__":
    main()
