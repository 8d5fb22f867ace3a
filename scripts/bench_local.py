"""Ten models on this machine: plain eager, plain `torch.compile`, an even split, and `OptimizedParallel`, interleaved.

Every case (model, batch, inference or training) is tuned once by the wrapper, which is told to try `torch.compile`
whatever it takes; then a run of its own, of which the tuning knows nothing, times in turn

    eager        the model with all threads, twice a round: the second series gives the A/A noise
    compile      `torch.compile(model)`, its defaults, compiled before the tuning
    even split   the batch in equal parts over the core groups, as `torch.nn.DataParallel` splits it over GPUs
    autoplace    the wrapper: what the user calls

A ratio above 1 says how much faster the wrapper is; intervals of a case are the quartiles of its pairwise ratios, those
of the geometric mean Student's t on the logs over cases (`autoplace.agents.statistics`). Cases are kept one by one in
`build/local.jsonl`, so that a run that was stopped goes on; `--summary` prints and writes what is there.

    python scripts/bench_local.py                          # full precision
    python scripts/bench_local.py --precision auto         # bfloat16 allowed
    python scripts/bench_local.py --summary
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from local_models import CASES, workload
from results import provenance, save
from rich.console import Console
from rich.table import Table

from autoplace import Cluster, OptimizedParallel, Plan
from autoplace.agents.statistics import summarise
from autoplace.errors import AutoplaceError
from autoplace.measure.preserve import clear_gradients
from autoplace.measure.protocol import aa_noise, interleave, pair_ratios
from autoplace.plan import Replica
from autoplace.runtime import Executor, build_executor
from autoplace.workload import Workload

_ROWS = Path(__file__).resolve().parent.parent / "build" / "local.jsonl"
_PASS_LIMIT_S = 180.0
"""The first pass of a compiled model compiles."""
_WARM_PASSES = 5
"""Of the compiled baseline before the tuning."""
_NEVER_BELOW = 0.98
"""Of the better of eager and compile."""


def run_case(name: str, *, batch: int, training: bool, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tune one case, time it against the three others, and return the row."""
    case = workload(name, batch=batch, training=training, seed=options.seed)
    cluster = Cluster.discover()
    wrapper = OptimizedParallel(
        case.model,
        loss=case.loss,
        cluster=cluster,
        budget_s=options.budget,
        run_s=options.run_s,
        precision=precision,
        compile=True if options.compile == "always" else "auto",
        track=False,
        cache=False,
        replan=False,
    )
    compiled = torch.compile(case.model)
    failures: dict[str, str] = {}
    _warm(case, compiled, failures)
    start = time.perf_counter()
    with torch.set_grad_enabled(training):
        result = wrapper.tune((*case.args,) or dict(case.kwargs))
    tuning_s = time.perf_counter() - start
    even = _even_split(case, cluster)
    runs: dict[str, Callable[..., Any]] = {"eager": case.model, "again": case.model, "autoplace": wrapper}
    if even is not None:
        runs["even split"] = even
    if not failures:
        runs["compile"] = compiled
    try:
        samples = interleave(
            {key: partial(_step, case, call) for key, call in runs.items()},
            repeats=_rounds(case, options.seconds),
            warmup=2,
            deadline_s=_PASS_LIMIT_S,
            before=lambda _name: clear_gradients(case.model),
            failed=lambda key, error: failures.__setitem__(key, f"{type(error).__name__}: {error}"[:200]),
        )
    finally:
        wrapper.close()
        if even is not None:
            even.close()
    kept = result.chosen
    return {
        "model": name,
        "batch": batch,
        "mode": "training" if training else "inference",
        "precision": precision,
        "plan": kept.label,
        "shape": kept.plan.shape,
        "knobs": {
            "engine": kept.plan.engine,
            "compiled": kept.plan.compiled,
            "cpp_wrapper": kept.plan.cpp_wrapper,
            "channels_last": kept.plan.channels_last,
            "precision": kept.plan.precision,
            "threads": dict(kept.plan.threads),
            "microbatches": kept.plan.microbatches,
            "shares": [round(r.share, 4) for r in kept.plan.replicas],
        },
        "tuned_speedup": kept.speedup or 1.0,
        "tuning_s": round(tuning_s, 1),
        "measured_plans": sum(c.measured is not None for c in result.candidates),
        "capture": result.capture_rung,
        "failures": failures,
        "samples_ms": {key: [round(v, 4) for v in values] for key, values in samples.items() if key not in failures},
        "commit": provenance(seed=options.seed)["commit"],
    }


def _warm(case: Workload, compiled: Callable[..., Any], failures: dict[str, str]) -> None:
    """Compile the baseline before anything else compiles the model, and let it find out which sizes change."""
    try:
        for _ in range(_WARM_PASSES):
            case.step(compiled)
    except Exception as error:  # whatever the compiler runs into, the others are compared without it
        failures["compile"] = f"{type(error).__name__}: {error}"[:200]
    clear_gradients(case.model)


def _step(case: Workload, call: Callable[..., Any]) -> None:
    case.step(call)


def _rounds(case: Workload, seconds: float) -> int:
    """Return how many rounds of five runs, each with an untimed one before it, fit into the seconds: 11 to 61."""
    case.step()
    start = time.perf_counter()
    case.step()
    clear_gradients(case.model)
    return max(11, min(61, int(seconds / (10 * (time.perf_counter() - start)))))


def _even_split(case: Workload, cluster: Cluster) -> Executor | None:
    """Equal replicas on all core groups; None where the batch or the outputs do not split."""
    names = [d.name for d in cluster.devices if d.kind == "cpu"]
    share = 1.0 / len(names)
    plan = Plan(replicas=tuple(Replica(assignment={".": n}, share=share) for n in names), strategy="even split")
    executor = build_executor(case.model, plan, cluster)
    try:
        case.forward(executor)
    except AutoplaceError:
        executor.close()
        return None
    return executor


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """Return the ratios of one row: against eager, and against the better of eager and compile."""
    samples = row["samples_ms"]
    ours = samples["autoplace"]
    against = {key: pair_ratios(values, ours) for key, values in samples.items() if key not in ("autoplace", "again")}
    best = min((key for key in ("eager", "compile") if key in samples), key=lambda k: statistics.median(samples[k]))
    noise = aa_noise(samples["eager"], samples["again"])
    ratio, quartiles = against[best]
    return {
        "eager_ms": statistics.median(samples["eager"]),
        "noise": noise,
        "over": {key: {"ratio": r, "quartiles": list(q)} for key, (r, q) in against.items()},
        "best_plain": best,
        "over_best": ratio,
        "below": ratio < _NEVER_BELOW - noise and quartiles[1] < 1.0,
    }


def report(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print tables and geometric means of all rows, and keep them."""
    found = [(row, figures(row)) for row in rows]
    groups: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for row, of_row in found:
        groups.setdefault(f"{row['precision']} {row['mode']}", []).append((row, of_row))
    means: dict[str, Any] = {}
    for title, group in groups.items():
        _print_table(title, group)
        means |= {f"{title} over {key}": mean for key, mean in _means([f for _, f in group]).items()}
    below = [
        f"{r['model']} {r['batch']} {r['mode']} {r['precision']}: {f['over_best']:.3f}" for r, f in found if f["below"]
    ]
    for key, mean in means.items():
        print(f"geometric mean, {key}: {mean['ratio']:.3f} {mean['interval'] or ''}, {mean['cases']} cases")
    print(f"below {_NEVER_BELOW} of the better of eager and compile, beyond the noise: {below or 'none'}")
    kept = [{**{k: v for k, v in row.items() if k != "samples_ms"}, **of_row} for row, of_row in found]
    save("local", seed=options.seed, data={"geometric_means": means, "below": below, "rows": kept})


def _means(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the geometric means of the ratios against eager, compile, the even split and the better plain one."""
    means = {}
    for key in ("eager", "compile", "even split", "the better of eager and compile"):
        ratios = [f["over"][key]["ratio"] if key in f["over"] else f["over_best"] for f in found if _has(f, key)]
        if ratios:
            mean = summarise([-math.log(ratio) for ratio in ratios])
            interval = [round(1 / mean.high, 4), round(1 / mean.low, 4)] if len(ratios) > 1 else None
            means[key] = {"ratio": round(1 / mean.geometric_mean, 4), "interval": interval, "cases": len(ratios)}
    return means


def _has(of_row: dict[str, Any], key: str) -> bool:
    return key in of_row["over"] or key.startswith("the better")


def _print_table(title: str, group: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    table = Table(title=f"{title}: times faster, median of pairs (quartiles)")
    for column in (
        "model",
        "batch",
        "eager ms",
        "A/A",
        "over eager",
        "over compile",
        "over even split",
        "plan that won",
    ):
        table.add_column(column, justify="left" if column in ("model", "plan that won") else "right")
    for row, f in group:
        cells = [_cell(f["over"].get(key)) for key in ("eager", "compile", "even split")]
        table.add_row(row["model"], str(row["batch"]), f"{f['eager_ms']:.2f}", f"{f['noise']:.1%}", *cells, row["plan"])
    Console(width=150).print(table)


def _cell(over: dict[str, Any] | None) -> str:
    if over is None:
        return "-"
    low, high = over["quartiles"]
    return f"{over['ratio']:.3f} ({low:.2f}-{high:.2f})"


def main() -> None:
    """Run the cases that are not there yet, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--batches", nargs="+", type=int, default=[2, 16])
    parser.add_argument("--modes", nargs="+", choices=("inference", "training"), default=["inference", "training"])
    parser.add_argument("--precision", choices=("float32", "auto"), default="float32")
    parser.add_argument("--budget", type=float, default=60.0, help="wall seconds of a tuning's real runs")
    parser.add_argument(
        "--compile",
        choices=("always", "auto"),
        default="always",
        help="always = torch.compile gets its trial even where that outlasts the budget",
    )
    parser.add_argument("--run-s", type=float, default=3600.0, help="run length within which compiling must pay back")
    parser.add_argument("--seconds", type=float, default=10.0, help="wall seconds of the comparison, roughly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="forget the cases that ran before")
    parser.add_argument("--summary", action="store_true", help="run nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.fresh:
        _ROWS.unlink(missing_ok=True)
    rows = [json.loads(line) for line in _ROWS.read_text().splitlines()] if _ROWS.exists() else []
    done = {(r["model"], r["batch"], r["mode"], r["precision"]) for r in rows}
    wanted = [(n, b, m, options.precision) for n in options.models for b in options.batches for m in options.modes]
    _ROWS.parent.mkdir(exist_ok=True)
    for name, batch, mode, precision in [] if options.summary else [key for key in wanted if key not in done]:
        torch._dynamo.reset()
        row = run_case(name, batch=batch, training=mode == "training", precision=precision, options=options)
        rows.append(row)
        with _ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        over = figures(row)["over"]
        print(
            f"{name} {batch} {mode}: {row['plan']} { ({k: round(v['ratio'], 3) for k, v in over.items()}) }", flush=True
        )
    report(rows, options)


if __name__ == "__main__":
    main()
