"""Training on unequal hosts: the fastest host alone, even DDP, torch's equal pipeline, and what autoplace plans.

Every bed is a cluster of unequal hosts on this machine (→ `testbed`): network namespaces, rates by queues, processor
shares by cgroup quotas. One process a host. For every model autoplace tunes (at most 100 real runs); then a run of its
own, of which the tuning knows nothing, times in turn, a step of forward and backward with summed gradients each:

    single        the model on the fastest host, by plain PyTorch; the others wait
    ddp           DistributedDataParallel, equal shares
    pipeline      `torch.distributed.pipelining.pipeline()`, cut into equal numbers of layers, GPipe, the better of 4
                  and 8 microbatches, where it runs right
    autoplace     the kept plan
    autoplace 2   the same again: the A/A noise

The pipeline has rounds of its own, beside autoplace. A ratio above 1 says how much faster autoplace is than the best of
the others. Beside it stands what the simulator had foretold, before any run and after calibration. Between tuning and
timing, plans drawn at random are foretold by the simulator as the tuning's runs calibrated it, and run: its median
error and Kendall's tau over plans that it never saw.
Cases are kept one by one in `build/cluster.jsonl`, so that a run that was stopped goes on.

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
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster_models import MODELS, Scores, build
from memory_limits import limit_of
from results import provenance, save
from testbed import BedHost, BedLink, TestBed

if TYPE_CHECKING:
    import random

    from autoplace.group_tuner import GroupResult
    from autoplace.plan import Plan
    from autoplace.problem import Problem
    from autoplace.runtime.distributed import Session

_ROWS = Path(__file__).resolve().parent.parent / "build" / "cluster.jsonl"
BEDS = (
    *(f"{speeds}@{rate}" for rate in (1000, 100) for speeds in ("1:1", "1:0.5", "1:0.33", "1:0.5:0.25")),
    "1:0.5@1000@mem",
)
"""Speeds of the hosts, and Mbit/s of their links; `mem`: no host's memory holds a step of the whole batch, which is
twice as large there."""
_MARK = "row: "
_PORT = 29400
_PARTS = 8
_TIMED = 2
"""Steps of a contender that are timed in a round, after one that is not."""


def bed_of(name: str, model: str) -> TestBed:
    """Return the test bed of a name such as `1:0.5@100` for a model; hosts of less than a core share the last one."""
    speeds, rate, *more = name.split("@")
    shares = [float(s) for s in speeds.split(":")]
    memory = limit_of(model, _batch(name, model)) if more else None
    cores = sorted(os.sched_getaffinity(0))
    hosts = [
        BedHost(name=f"h{i}", cpu=share, cores=(cores[min(i, len(cores) - 1)],), memory_bytes=memory)
        for i, share in enumerate(shares)
    ]
    return TestBed(hosts=hosts, link=BedLink(bytes_per_ms=float(rate) * 125.0), name="bench")


def _batch(bed: str, model: str) -> int:
    return MODELS[model].batch * (2 if bed.endswith("@mem") else 1)


# -- on the hosts ------------------------------------------------------------------------------------------------------


def worker(options: argparse.Namespace) -> None:
    """Tune the models one after the other and time each against the others; rank 0 prints their rows."""
    import torch

    from autoplace.runtime.distributed import Session

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    session = Session.join()
    for name in options.models:
        if options.verbose:
            faulthandler.dump_traceback_later(options.limit_s * 0.8)
        row = _case(name, session, options)
        if session.rank == 0:
            print(_MARK + json.dumps(row), flush=True)
        if "pipeline" in row["failures"]:
            os._exit(0)  # see `_case`; the parent starts processes anew
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _case(name: str, session: Session, options: argparse.Namespace) -> dict[str, Any]:
    from autoplace.group_tuner import tune_group
    from autoplace.runtime.distributed.runner import DistributedModel
    from autoplace.runtime.stage_program import Exports

    model, batch = build(name, options.seed, _batch(options.beds[0], name))
    exports: Exports = {}
    start = time.perf_counter()
    result = tune_group(model, batch, session, budget_s=options.budget, exports=exports)
    tuning_s = time.perf_counter() - start
    unseen = _unseen(model, batch, session, result, exports, options)
    failures: dict[str, str] = {}
    runs: dict[str, Callable[[], Any]] = {}
    alone = [r for r in result.rows if r.plan.shape == "single" and r.measured is not None and r.measured.feasible]
    if alone:
        fastest = min(alone, key=lambda r: r.measured.latency_ms if r.measured else math.inf).plan
        single = DistributedModel(model, fastest, session)
        runs["single"] = lambda: single.train_step(batch)
    if any(r.baseline and r.plan.shape == "replicas" for r in result.rows):
        runs["ddp"] = _ddp(model, batch, session)
    else:
        failures["ddp"] = "not run: it is not expected to fit in memory"
    ours = DistributedModel(model, result.plan, session, exports=exports)
    runs["autoplace"] = lambda: ours.train_step(batch)
    runs["autoplace 2"] = runs["autoplace"]
    samples = _in_turn(runs, model, session, options)
    # Last, and beside ours alone: where it fails, gloo's thread goes on spinning and takes half of the host.
    try:
        if not _holds_equal_stages(result):
            raise MemoryError("not run: it is not expected to fit in memory")
        theirs = {"pipeline": _pipeline(name, options.seed, batch, session), "autoplace 3": runs["autoplace"]}
        samples |= _in_turn(theirs, model, session, options)
    except Exception as error:
        failures["pipeline"] = _in_short(error)
    kept = next(r for r in result.rows if r.plan == result.plan)
    return {
        "model": name,
        "batch": _batch(options.beds[0], name),
        "plan": kept.label,
        "shape": result.plan.shape,
        "sharded": result.plan.sharded,
        "shares": [round(r.share, 4) for r in result.plan.replicas],
        "microbatches": result.plan.microbatches,
        "predicted_ms": kept.predicted.latency_ms if kept.predicted else None,
        "calibrated_ms": kept.calibrated.latency_ms if kept.calibrated else None,
        "runs": result.runs,
        "noise": result.noise,
        "tuning_s": round(tuning_s, 1),
        "seconds": {k: round(v, 1) for k, v in result.seconds.items()},
        "factors": result.calibration.factors.sentence if result.calibration else "",
        "failures": failures,
        "samples_ms": samples,
        "plans": [
            {
                "label": r.label,
                "shape": r.plan.shape,
                "predicted_ms": None if r.predicted is None else r.predicted.latency_ms,
                "calibrated_ms": None if r.calibrated is None else r.calibrated.latency_ms,
                "measured_ms": r.measured.latency_ms if r.measured.feasible else None,
                "reason": r.measured.reason,
            }
            for r in result.rows
            if r.measured is not None
        ],
        "unseen": unseen,
        "commit": provenance(seed=options.seed)["commit"],
    }


def _in_turn(
    runs: dict[str, Callable[[], Any]], model: Any, session: Session, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Time steps in turn, ms."""
    samples: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(options.rounds):
        for key, run in runs.items():
            for number in range(1 + _TIMED):
                model.zero_grad(set_to_none=True)
                elapsed_ms = _timed(run, session)
                if number:  # as it runs again and again, and not what another contender left behind
                    samples[key].append(round(elapsed_ms, 3))
    return samples


def _unseen(
    model: Any, batch: Any, session: Session, result: GroupResult, exports: Any, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Predict plans drawn at random, which the tuning never ran, and then run them."""
    import random

    from autoplace.measure.pool import plan_key
    from autoplace.runtime.distributed.pool import GroupEvaluator
    from autoplace.simulate.collectives import ClusterEvaluator

    problem = result.problem
    assert problem is not None  # a tuning profiles
    factors = result.calibration.factors if result.calibration else None
    dice = random.Random(f"{options.seed} {problem.name} {problem.num_devices}")
    known = {plan_key(r.plan) for r in result.rows}
    before, after = ClusterEvaluator(problem), ClusterEvaluator(problem, factors=factors)
    plans: list[Plan] = []
    for _ in range(100 * options.unseen):
        plan = _random_plan(problem, dice)
        if len(plans) < options.unseen and plan_key(plan) not in known and after.evaluate([plan])[0].feasible:
            known.add(plan_key(plan))
            plans.append(plan)
    if not plans:
        return []
    outcomes = GroupEvaluator(model, batch, session, exports=exports).evaluate_interleaved(plans, 3)
    return [
        {
            "shape": plan.shape,
            "shares": [round(r.share, 4) for r in plan.replicas],
            "microbatches": plan.microbatches,
            "predicted_ms": before.predict_ms(plan),
            "calibrated_ms": after.predict_ms(plan),
            "measured_ms": outcome.latency_ms if outcome.feasible else None,
            "reason": outcome.reason,
        }
        for plan, outcome in zip(plans, outcomes, strict=True)
    ]


def _random_plan(problem: Problem, dice: random.Random) -> Plan:
    """Return a plan over two devices or more: shares, or cuts and microbatches, at random."""
    import numpy as np

    from autoplace.strategies.pipelines import stages_plan
    from autoplace.strategies.weighted import replicas_plan

    devices = dice.sample(range(problem.num_devices), dice.randint(2, problem.num_devices))
    if dice.random() < 0.5:
        cuts = sorted(dice.sample(range(1, problem.batch_size), len(devices) - 1))
        counts = tuple(b - a for a, b in itertools.pairwise([0, *cuts, problem.batch_size]))
        return replicas_plan(problem, sorted(devices), counts, strategy="random")
    forward = problem.num_ops // 2
    cuts = sorted(dice.sample(range(1, forward), len(devices) - 1))
    order = [op for op in problem.graph.topological_order.tolist() if op < forward]
    row = np.zeros(problem.num_ops, np.int32)
    row[order] = np.repeat(devices, np.diff([0, *cuts, forward]))
    return stages_plan(problem, row, strategy="random", microbatches=dice.choice((1, 2, 4, 8)))


def _holds_equal_stages(result: GroupResult) -> bool:
    """Return whether equal stages under GPipe, which holds all microbatches at once, are expected to fit in memory."""
    import numpy as np

    from autoplace.simulate.collectives import ClusterEvaluator
    from autoplace.strategies.pipelines import stages_plan

    problem = result.problem
    assert problem is not None  # a tuning profiles
    forward = problem.num_ops // 2
    order = [op for op in problem.graph.topological_order.tolist() if op < forward]
    row = np.zeros(problem.num_ops, np.int32)
    row[order] = np.arange(forward) * problem.num_devices // forward
    plan = stages_plan(problem, row, strategy="equal", microbatches=8)
    return ClusterEvaluator(problem, gpipe=True).evaluate([plan])[0].feasible


def _timed(run: Callable[[], Any], session: Session) -> float:
    import torch
    import torch.distributed as dist

    dist.barrier()
    start = time.perf_counter()
    run()
    elapsed = torch.tensor([(time.perf_counter() - start) * 1e3])
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return float(elapsed)


def _ddp(model: Any, batch: dict[str, Any], session: Session) -> Callable[[], Any]:
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


def _pipeline(name: str, seed: int, batch: dict[str, Any], session: Session) -> Callable[[], Any]:
    """Return a step of torch's own pipeline, cut into equal numbers of layers, once it has been found right.

    It gets what it takes best: tensors by position, scores as output, the loss outside. The best of a few numbers of
    microbatches is kept.
    """
    import torch
    from torch.distributed.pipelining import ScheduleGPipe, SplitPoint, pipeline

    model, _ = build(name, seed, 1)
    scores = Scores(name, model, batch)
    path = f"model.{MODELS[name].layers}"
    count, size = len(scores.get_submodule(path)), session.world_size
    points = {f"{path}.{count * i // size}": SplitPoint.BEGINNING for i in range(1, size)}
    plain, _ = build(name, seed, 1)
    rows = len(scores.targets) // _PARTS
    for i in range(_PARTS):  # the whole batch may have no room
        part = {key: value[i * rows : (i + 1) * rows] for key, value in batch.items()}
        (plain(**part)["loss"] / _PARTS).backward()
    wanted = {f"model.{n}": p.grad for n, p in plain.named_parameters() if p.grad is not None}
    found: list[tuple[float, Callable[[], Any]]] = []
    problem = ""
    for chunks in (4, 8):
        some = tuple(value[: len(value) // chunks] for value in scores.inputs)

        def cut(some: Any = some) -> Any:
            pipe = pipeline(scores, mb_args=some, split_spec=points)
            if pipe.num_stages != size:
                raise ValueError(f"it made {pipe.num_stages} stages")
            return pipe

        # Where one rank fails the other waits for it; in a group of its own it does so for seconds and not for ever.
        own = torch.distributed.new_group(timeout=datetime.timedelta(seconds=20))
        stage = session.together(cut).build_stage(session.rank, torch.device("cpu"), own)
        schedule = ScheduleGPipe(stage, chunks, loss_fn=scores.loss)

        def step(stage: Any = stage, schedule: Any = schedule) -> None:
            stage.submod.zero_grad(set_to_none=True)
            feed = scores.inputs if session.rank == 0 else ()
            target = scores.targets if session.rank == size - 1 else None
            schedule.step(*feed, target=target, losses=[])

        try:
            step()
        except Exception as error:
            problem = _in_short(error)
        problem = next((text for text in session.gather(problem) if text), "")
        if problem:
            break
        grads = {n: p.grad for n, p in stage.submod.named_parameters() if p.grad is not None}
        problem = next(
            (f"the gradient of {n!r} is wrong" for n, g in grads.items()
             if n in wanted and not torch.allclose(g, wanted[n], rtol=1e-2, atol=1e-5)), ""
        )  # fmt: skip
        have = set().union(*session.gather(set(grads)))
        problem = problem or next((f"{n!r} has no gradient" for n in sorted(set(wanted) - have)), "")
        problem = next((text for text in session.gather(problem) if text), "")
        if problem:
            break
        found.append((min(_timed(step, session) for _ in range(2)), step))
    if not found:
        raise RuntimeError(problem)
    return min(found, key=lambda pair: pair[0])[1]


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


# -- the parent --------------------------------------------------------------------------------------------------------


def run_models(
    bed: TestBed, name: str, models: Sequence[str], port: int, options: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run models on a bed that is up, in the same processes until something fails; the rest is for the next call."""
    cluster = Path(options.folder) / "cluster.yaml"
    found = bed.cluster()
    found.save(cluster)
    processes: list[subprocess.Popen[Any]] = []
    for rank, device in enumerate(found.devices):
        own = {
            "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(found.num_devices), "LOCAL_WORLD_SIZE": "1",
            "GROUP_RANK": str(rank), "MASTER_ADDR": bed.address(found.devices[0].host), "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1", "AUTOPLACE_CLUSTER": str(cluster), "AUTOPLACE_HOST": device.host,
            "AUTOPLACE_TIMEOUT_S": "300",
        }  # fmt: skip
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--beds", name, "--models", *models]
        command += ["--budget", str(options.budget), "--seed", str(options.seed), "--limit-s", str(options.limit_s)]
        command += ["--rounds", str(options.rounds), "--unseen", str(options.unseen)]
        command += ["--verbose"] if options.verbose else []
        stdout = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        stderr = None if options.verbose else subprocess.DEVNULL
        processes.append(
            bed.popen(device.host, command, env={**os.environ, **own}, stdout=stdout, stderr=stderr, text=True)
        )
    try:
        for model in models:
            alarm = threading.Timer(options.limit_s, lambda: [p.kill() for p in processes])
            alarm.start()
            try:
                assert processes[0].stdout is not None
                line = next((text for text in processes[0].stdout if text.startswith(_MARK)), None)
            finally:
                alarm.cancel()
            if line is None:
                yield model, {"model": model, "error": f"no result within {options.limit_s:g} s, or a rank failed"}
                return
            row = json.loads(line.removeprefix(_MARK))
            yield model, row
            if "pipeline" in row["failures"]:
                return
    finally:
        for process in processes:
            process.kill()
            process.wait()


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """Return the ratios of a row: against each contender, and the best of them."""
    from autoplace.measure.protocol import aa_noise

    samples = row["samples_ms"]
    medians = {key: statistics.median(values) for key, values in samples.items()}
    others = [key for key in ("single", "ddp", "pipeline") if key in samples]
    found: dict[str, Any] = {
        "medians_ms": medians,
        "samples_per_s": {key: row["batch"] / ms * 1e3 for key, ms in medians.items()},
        "a_a": aa_noise(samples["autoplace"], samples["autoplace 2"]),
    }
    beside = {key: samples["autoplace 3" if key == "pipeline" else "autoplace"] for key in others}
    pairs = {key: [a / b for a, b in zip(samples[key], beside[key], strict=True)] for key in others}
    if not others:  # nobody else can run it
        return found | {"best": "nothing", "over_best": None, "quartiles": None}
    best = min(others, key=lambda key: statistics.median(pairs[key]))
    low, _, high = statistics.quantiles(pairs[best], n=4)
    over = {key: round(statistics.median(some), 4) for key, some in pairs.items()}
    return found | {"best": best, "over_best": statistics.median(pairs[best]), "quartiles": [low, high], "over": over}


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
        low, high = f["quartiles"] or (math.nan, math.nan)
        ratio = f["over_best"] or math.nan
        print(
            f"{row['bed']:<17}{row['model']:<8}{speeds}             {ratio:.3f} over {f['best']:<8} "
            f"({low:.2f}-{high:.2f}) {f['a_a']:.1%}  {before}, {after}; "
            f"{f['medians_ms']['autoplace']:.0f}  {row['plan']}"
        )
    for row in rows:
        if "samples_ms" not in row:
            print(f"{row['bed']:<17}{row['model']:<8}{row['error']}")
    means: dict[str, Any] = {}
    compared = [(r, f) for r, f in found if f["over_best"] is not None]
    groups = {
        "unequal beds": [f for r, f in compared if not r["bed"].startswith("1:1@")],
        "equal beds": [f for r, f in compared if r["bed"].startswith("1:1@")],
    }
    for rate in dict.fromkeys(r["bed"].split("@")[1] for r in good):
        groups[f"unequal beds, {rate} Mbit/s"] = [
            f for r, f in compared if r["bed"].split("@")[1] == rate and not r["bed"].startswith("1:1@")
        ]
    groups |= {bed: [f for r, f in compared if r["bed"] == bed] for bed in dict.fromkeys(r["bed"] for r in good)}
    for key, some in groups.items():
        if some:
            mean = summarise([-math.log(f["over_best"]) for f in some])
            interval = [round(1 / mean.high, 4), round(1 / mean.low, 4)] if len(some) > 1 else None
            means[key] = {"ratio": round(1 / mean.geometric_mean, 4), "interval": interval, "cases": len(some),
                          "least": round(min(f["over_best"] for f in some), 4)}  # fmt: skip
            print(f"geometric mean over the best, {key}: {means[key]}")
    simulator = {
        f"{'the tuning' if which == 'plans' else 'unseen'}, {words}": _errors(good, which, key)
        for which, words, key in (
            ("plans", "before any run", "predicted_ms"),
            ("plans", "calibrated by them", "calibrated_ms"),
            ("unseen", "before any run", "predicted_ms"),
            ("unseen", "calibrated", "calibrated_ms"),
        )
    }
    print(f"simulator against measurement: {json.dumps(simulator, indent=1)}")
    kept = [{**{k: v for k, v in row.items() if k != "samples_ms"}, **f} for row, f in found]
    failed = [row for row in rows if "samples_ms" not in row]
    save(
        "cluster",
        seed=options.seed,
        data={"geometric_means": means, "simulator": simulator, "rows": kept, "failed": failed},
    )


def _errors(rows: Sequence[dict[str, Any]], which: str, key: str) -> dict[str, Any]:
    """Return plans, median relative error, and Kendall's tau within a case (pairs of all cases together)."""
    errors: list[float] = []
    agree = total = 0
    for row in rows:
        pairs = [
            (p[key], p["measured_ms"]) for p in row[which] if p[key] and p["measured_ms"] and math.isfinite(p[key])
        ]
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
    parser.add_argument("--budget", type=float, default=90.0, help="wall seconds of a tuning's real runs")
    parser.add_argument("--rounds", type=int, default=4, help="rounds over the contenders, of two timed steps each")
    parser.add_argument("--unseen", type=int, default=5, help="random plans that are foretold and run")
    parser.add_argument("--limit-s", type=float, default=400.0, help="seconds that one case may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="forget the cases that ran before")
    parser.add_argument("--summary", action="store_true", help="run nothing")
    parser.add_argument("--verbose", action="store_true", help="show what the hosts say")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
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
        while left:
            # Memory is given by model, and so is the bed, then.
            together = left[:1] if name.endswith("@mem") else left
            with bed_of(name, together[0]) as bed:
                while together:
                    port += 1
                    for model, found in run_models(bed, name, together, port, options):
                        row = {"bed": name, **found}
                        rows = [r for r in rows if (r["bed"], r["model"]) != (name, model)] + [row]
                        with _ROWS.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                        told = figures(row) | {"factors": row["factors"]} if "samples_ms" in row else row
                        print(name, model, row.get("plan", ""), json.dumps(told), flush=True)
                        together, left = together[1:], left[1:]
    report(rows, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
