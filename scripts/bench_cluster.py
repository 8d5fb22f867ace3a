"""Training on unequal hosts: the fastest host alone, even DDP, torch's equal pipeline, and what autoplace plans.

Every bed is a cluster of unequal hosts on this machine (→ `testbed`): network namespaces, rates by queues, processor
shares by cgroup quotas. One process a host. For every model autoplace tunes (at most 100 real runs); then a run of its
own, of which the tuning knows nothing, times in turn, a step of forward and backward with summed gradients each:

    single      the model on the fastest host, by plain PyTorch; the others wait
    ddp         DistributedDataParallel, equal shares
    pipeline    `torch.distributed.pipelining.pipeline()`, cut into equal numbers of layers, GPipe, where it runs right
    single 2    the first again: the A/A noise
    autoplace   the kept plan

A ratio above 1 says how much faster autoplace is than the best of the others. Beside it stands what the simulator had
foretold, before any run and after calibration; and over all plans that ran on all beds, its median error and Kendall's
tau. Cases are kept one by one in `build/cluster.jsonl`, so that a run that was stopped goes on.

    python scripts/bench_cluster.py [--beds 1:0.5@1000 ...] [--models vit ...] [--summary]
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster_models import MODELS, build
from results import provenance, save
from testbed import BedHost, BedLink, TestBed

_ROWS = Path(__file__).resolve().parent.parent / "build" / "cluster.jsonl"
BEDS = tuple(f"{speeds}@{rate}" for rate in (1000, 100) for speeds in ("1:1", "1:0.5", "1:0.33", "1:0.5:0.25"))
"""Speeds of the hosts, and Mbit/s of their links."""
_MARK = "row: "
_PORT = 29400
_ROUNDS = 9


def bed_of(name: str) -> TestBed:
    """Return the test bed of a name such as `1:0.5@100`; hosts of less than a core share the last one."""
    speeds, _, rate = name.partition("@")
    shares = [float(s) for s in speeds.split(":")]
    cores = sorted(os.sched_getaffinity(0))
    hosts = [BedHost(name=f"h{i}", cpu=share, cores=(cores[min(i, len(cores) - 1)],)) for i, share in enumerate(shares)]
    return TestBed(hosts=hosts, link=BedLink(bytes_per_ms=float(rate) * 125.0), name="bench")


# -- on the hosts ------------------------------------------------------------------------------------------------------


def worker(name: str, options: argparse.Namespace) -> None:
    """Tune one model and time it against the others; rank 0 prints the row."""
    import torch

    from autoplace.group_tuner import tune_group
    from autoplace.runtime.distributed import Session
    from autoplace.runtime.distributed.runner import DistributedModel

    warnings.simplefilter("ignore")
    if options.verbose:
        faulthandler.dump_traceback_later(options.limit_s * 0.8)
    torch.set_num_threads(1)
    session = Session.join()
    model, batch = build(name, options.seed)
    start = time.perf_counter()
    result = tune_group(model, batch, session, budget_s=options.budget)
    tuning_s = time.perf_counter() - start
    alone_ms = [
        (r.measured.latency_ms, r.plan) for r in result.rows if r.plan.shape == "single" and r.measured is not None
    ]
    single = min(alone_ms, key=lambda found: found[0])[1]
    failures: dict[str, str] = {}
    runs: dict[str, Callable[[], Any]] = {}
    alone = DistributedModel(model, single, session)
    ours = DistributedModel(model, result.plan, session)
    runs["single"] = lambda: alone.train_step(batch)
    runs["ddp"] = _ddp(model, batch, session)
    try:
        runs["pipeline"] = _pipeline(name, options.seed, batch, session)
    except Exception as error:
        failures["pipeline"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    runs["single 2"] = runs["single"]
    runs["autoplace"] = lambda: ours.train_step(batch)
    samples: dict[str, list[float]] = {key: [] for key in runs}
    for number in range(_ROUNDS + 1):
        for key, run in runs.items():
            model.zero_grad(set_to_none=True)
            elapsed_ms = _timed(run, session)
            if number:
                samples[key].append(round(elapsed_ms, 3))
    if session.rank == 0:
        plans = [
            {
                "label": r.label,
                "shape": r.plan.shape,
                "predicted_ms": None if r.predicted is None else r.predicted.latency_ms,
                "calibrated_ms": None if r.calibrated is None else r.calibrated.latency_ms,
                "measured_ms": r.measured.latency_ms if r.measured is not None and r.measured.feasible else None,
                "reason": "" if r.measured is None else r.measured.reason,
            }
            for r in result.rows
            if r.measured is not None
        ]
        kept = next(r for r in result.rows if r.plan == result.plan)
        row = {
            "model": name,
            "batch": MODELS[name].batch,
            "plan": kept.label,
            "shares": [round(r.share, 4) for r in result.plan.replicas],
            "microbatches": result.plan.microbatches,
            "predicted_ms": kept.predicted.latency_ms if kept.predicted else None,
            "calibrated_ms": kept.calibrated.latency_ms if kept.calibrated else None,
            "runs": result.runs,
            "noise": result.noise,
            "tuning_s": round(tuning_s, 1),
            "failures": failures,
            "samples_ms": samples,
            "plans": plans,
            "commit": provenance(seed=options.seed)["commit"],
        }
        print(_MARK + json.dumps(row), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _timed(run: Callable[[], Any], session: Any) -> float:
    import torch
    import torch.distributed as dist

    dist.barrier()
    start = time.perf_counter()
    run()
    elapsed = torch.tensor([(time.perf_counter() - start) * 1e3])
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return float(elapsed)


def _ddp(model: Any, batch: dict[str, Any], session: Any) -> Callable[[], Any]:
    """Return a step of DistributedDataParallel as people write it, each rank with an equal part of the batch."""
    from torch.nn.parallel import DistributedDataParallel

    count = len(next(iter(batch.values())))
    bounds = [count * r // session.world_size for r in range(session.world_size + 1)]
    part = {k: v[bounds[session.rank] : bounds[session.rank + 1]] for k, v in batch.items()}
    wrapped: list[Any] = []

    def step() -> None:
        if not wrapped:
            wrapped.append(DistributedDataParallel(model))
        wrapped[0](**part)["loss"].backward()

    return step


def _pipeline(name: str, seed: int, batch: dict[str, Any], session: Any) -> Callable[[], Any]:
    """Return a step of torch's own pipeline, cut into equal numbers of layers, once it has been found right."""
    import torch
    from torch.distributed.pipelining import ScheduleGPipe, SplitPoint, pipeline

    model, _ = build(name, seed)
    count = len(model.get_submodule(MODELS[name].layers))
    size = session.world_size
    points = {f"{MODELS[name].layers}.{count * i // size}": SplitPoint.BEGINNING for i in range(1, size)}
    chunks = 4
    some = {k: v[: len(v) // chunks] for k, v in batch.items()}

    def cut() -> Any:
        pipe = pipeline(model, mb_args=(), mb_kwargs=some, split_spec=points)
        if pipe.num_stages != size:
            raise ValueError(f"it made {pipe.num_stages} stages")
        return pipe

    # Where one rank fails the other waits for it; in a group of its own it does so for a minute and not for ever.
    own = torch.distributed.new_group(timeout=datetime.timedelta(seconds=60))
    stage = session.together(cut).build_stage(session.rank, torch.device("cpu"), own)
    schedule = ScheduleGPipe(stage, chunks, loss_fn=lambda output, _target: output["loss"])
    feed = batch if session.rank == 0 else {}
    target = torch.zeros(chunks) if session.rank == size - 1 else None
    losses: list[Any] = []

    def step() -> None:
        stage.submod.zero_grad(set_to_none=True)
        losses.clear()
        schedule.step(**feed, target=target, losses=losses)

    problem = ""
    try:
        step()
    except Exception as error:
        problem = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
    problem = next((text for text in session.gather(problem) if text), "")
    if problem:
        raise RuntimeError(problem)
    # Right or not, against plain PyTorch on rank 0.
    plain, _ = build(name, seed)
    plain(**batch)["loss"].backward()
    grads = {n: p.grad for n, p in stage.submod.named_parameters() if p.grad is not None}
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    wrong = next(
        (n for n, g in grads.items() if n in wanted and not torch.allclose(g, wanted[n], rtol=1e-2, atol=1e-5)), ""
    )
    wrong = next((text for text in session.gather(wrong) if text), "")
    if wrong:
        raise RuntimeError(f"the gradient of {wrong!r} is wrong")
    return step


# -- the parent --------------------------------------------------------------------------------------------------------


def run_case(bed: TestBed, name: str, port: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one model on a bed that is up."""
    cluster = Path(options.folder) / "cluster.yaml"
    found = bed.cluster()
    found.save(cluster)
    processes = []
    for rank, device in enumerate(found.devices):
        own = {
            "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(found.num_devices), "LOCAL_WORLD_SIZE": "1",
            "GROUP_RANK": str(rank), "MASTER_ADDR": bed.address(found.devices[0].host), "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1", "AUTOPLACE_CLUSTER": str(cluster), "AUTOPLACE_HOST": device.host,
            "AUTOPLACE_TIMEOUT_S": "300",
        }  # fmt: skip
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", name, "--budget", str(options.budget),
                   "--seed", str(options.seed), "--limit-s", str(options.limit_s)]  # fmt: skip
        command += ["--verbose"] if options.verbose else []
        stdout = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        stderr = None if options.verbose else subprocess.DEVNULL
        processes.append(bed.popen(device.host, command, env={**os.environ, **own}, stdout=stdout, stderr=stderr))
    try:
        out, _ = processes[0].communicate(timeout=options.limit_s)
    except subprocess.TimeoutExpired:
        out = b""
    for process in processes:
        process.kill()
        process.wait()
    text = out.decode() if isinstance(out, bytes) else out
    line = next((x for x in text.splitlines() if x.startswith(_MARK)), None)
    if line is None:
        return {"model": name, "error": f"no result within {options.limit_s:g} s, or a rank failed"}
    return json.loads(line.removeprefix(_MARK))  # type: ignore[no-any-return]


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """Return the ratios of a row: against each contender, and the best of them."""
    samples = row["samples_ms"]
    medians = {key: statistics.median(values) for key, values in samples.items()}
    others = [key for key in ("single", "ddp", "pipeline") if key in samples]
    best = min(others, key=lambda key: medians[key])
    pairs = [a / b for a, b in zip(samples[best], samples["autoplace"], strict=True)]
    again = [a / b for a, b in zip(samples["single"], samples["single 2"], strict=True)]
    return {
        "medians_ms": medians,
        "samples_per_s": {key: row["batch"] / ms * 1e3 for key, ms in medians.items()},
        "best": best,
        "over_best": statistics.median(pairs),
        "quartiles": [statistics.quantiles(pairs, n=4)[0], statistics.quantiles(pairs, n=4)[2]],
        "a_a": max(abs(statistics.median(again) - 1.0), (max(again) - min(again)) / 4),
    }


def report(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the table and the summary, and keep them."""
    from autoplace.agents.statistics import summarise

    good = [r for r in rows if "samples_ms" in r]
    found = [(r, figures(r)) for r in good]
    print(f"{'bed':<17}{'model':<8}{'single':>8}{'ddp':>8}{'pipe':>8}{'ours':>8}  samples/s   over best (quartiles)  "
          f"A/A    foretold ms: before, after; measured  plan")  # fmt: skip
    for row, f in found:
        speeds = "".join(
            f"{f['samples_per_s'].get(k, float('nan')):8.1f}" for k in ("single", "ddp", "pipeline", "autoplace")
        )
        before, after = (f"{row[k]:.0f}" if row[k] else "-" for k in ("predicted_ms", "calibrated_ms"))
        print(
            f"{row['bed']:<17}{row['model']:<8}{speeds}             {f['over_best']:.3f} over {f['best']:<8} "
            f"({f['quartiles'][0]:.2f}-{f['quartiles'][1]:.2f}) {f['a_a']:.1%}  {before}, {after}; "
            f"{f['medians_ms']['autoplace']:.0f}  {row['plan']}"
        )
    for row in rows:
        if "samples_ms" not in row:
            print(f"{row['bed']:<17}{row['model']:<8}{row['error']}")
    means: dict[str, Any] = {}
    groups = {
        "unequal beds": [f for r, f in found if not r["bed"].startswith("1:1@")],
        "equal beds": [f for r, f in found if r["bed"].startswith("1:1@")],
    }
    groups |= {bed: [f for r, f in found if r["bed"] == bed] for bed in dict.fromkeys(r["bed"] for r in good)}
    for key, some in groups.items():
        if some:
            mean = summarise([-math.log(f["over_best"]) for f in some])
            interval = [round(1 / mean.high, 4), round(1 / mean.low, 4)] if len(some) > 1 else None
            means[key] = {"ratio": round(1 / mean.geometric_mean, 4), "interval": interval, "cases": len(some),
                          "least": round(min(f["over_best"] for f in some), 4)}  # fmt: skip
            print(f"geometric mean over the best, {key}: {means[key]}")
    simulator = {when: _errors(good, f"{when}_ms") for when in ("predicted", "calibrated")}
    print(f"simulator against measurement: {simulator}")
    kept = [{**{k: v for k, v in row.items() if k != "samples_ms"}, **f} for row, f in found]
    failed = [row for row in rows if "samples_ms" not in row]
    save(
        "cluster",
        seed=options.seed,
        data={"geometric_means": means, "simulator": simulator, "rows": kept, "failed": failed},
    )


def _errors(rows: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    """Return plans, median relative error, and Kendall's tau within a case (pairs of all cases together)."""
    errors: list[float] = []
    agree = total = 0
    for row in rows:
        pairs = [(p[key], p["measured_ms"]) for p in row["plans"] if p[key] and p["measured_ms"]]
        errors += [abs(a / b - 1.0) for a, b in pairs]
        for (a, b), (c, d) in itertools.combinations(pairs, 2):
            total += 1
            agree += (a < c) == (b < d)
    tau = 2 * agree / total - 1 if total else 0.0
    return {"plans": len(errors), "median_error": round(statistics.median(errors), 4) if errors else None,
            "kendall_tau": round(tau, 4)}  # fmt: skip


def main() -> int:
    """Run the cases that are not there yet, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="+", default=list(BEDS), help="speeds@Mbit/s, for example 1:0.5@1000")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--budget", type=float, default=30.0, help="wall seconds of a tuning's real runs")
    parser.add_argument("--limit-s", type=float, default=400.0, help="seconds that one case may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="forget the cases that ran before")
    parser.add_argument("--summary", action="store_true", help="run nothing")
    parser.add_argument("--verbose", action="store_true", help="show what the hosts say")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options)
        return 0
    if options.fresh:
        _ROWS.unlink(missing_ok=True)
    _ROWS.parent.mkdir(exist_ok=True)
    options.folder = str(_ROWS.parent)
    rows = [json.loads(line) for line in _ROWS.read_text().splitlines()] if _ROWS.exists() else []
    done = {(r["bed"], r["model"]) for r in rows if "samples_ms" in r}
    port = _PORT
    for name in [] if options.summary else options.beds:
        left = [m for m in options.models if (name, m) not in done]
        if not left:
            continue
        if missing := TestBed.missing():
            print(f"no test bed here: {missing}")
            return 1
        with bed_of(name) as bed:
            for model in left:
                port += 1
                row = {"bed": name, **run_case(bed, model, port, options)}
                rows = [r for r in rows if (r["bed"], r["model"]) != (name, model)] + [row]
                with _ROWS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                told = figures(row) if "samples_ms" in row else row
                print(
                    name, model, row.get("plan", ""), json.dumps({k: told[k] for k in told if k != "plans"}), flush=True
                )
    report(rows, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
