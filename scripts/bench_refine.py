"""Refining the shipped policy by real runs on unequal hosts: the reward of its plans before and after.

On every bed (→ `bench_cluster`, `testbed`; one process a host, a training step of one model):

    refine    `autoplace train --stage measure --cluster`, as people call it: real runs are the reward
    compare   other processes, profiled and calibrated anew, know both policies and no run of the training. They time in
              turn the fastest single host, twice, the policies' greedy plans and as many samples of each

The reward is ln(J single / J plan) in pairs of one round, J the time of a step: 0 is the fastest host alone, 0.69 twice
as fast. Of greedy plans the median over the rounds with its 95 % interval; of samples the mean of their medians with a
bootstrap interval over the samples. The learning curve has the mean of each update's real runs. A bed that ran is kept
in `build/refine.jsonl`, so that a run that was stopped goes on.

    python scripts/bench_refine.py [--beds 1:0.5@1000 ...] [--model vit] [--plans 50] [--fresh] [--summary]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_cluster import bed_of
from cluster_models import MODELS, build
from results import provenance, save
from testbed import INTERFACE, TestBed

if TYPE_CHECKING:
    from autoplace.agents.measured import MeasuredCase
    from autoplace.plan import Plan
    from autoplace.policy.policy import Policy

BEDS = ("1:0.5@1000", "1:0.5:0.25@1000")
"""Speeds of the hosts, and Mbit/s of their links."""
_BUILD = Path(__file__).resolve().parent.parent / "build"
_ROWS = _BUILD / "refine.jsonl"
_UPDATE = 10
"""Plans between two updates of the policy → `agents.measured.measured_config`."""
_DRAWS = 10_000
_FACTORY = """\
import sys

sys.path.insert(0, {scripts!r})
from cluster_models import build

def make():
    return build({model!r}, {seed})
"""


# -- on the hosts ------------------------------------------------------------------------------------------------------


def worker(options: argparse.Namespace) -> None:
    """Time both policies' plans against the fastest single host; rank 0 writes what came out."""
    from autoplace.agents.over_ranks import case_over_ranks
    from autoplace.policy.policy import Policy
    from autoplace.runtime.distributed import Session
    from autoplace.workload import Workload

    session = Session.join()
    model, batch = build(options.model, options.seed)
    workload = Workload(model=model, kwargs=batch, training=True, name=options.model)
    with case_over_ranks(workload, session, max_groups=options.groups) as case:
        if case is not None:
            policies = {"before": Policy.load(options.before), "after": Policy.load(options.after)}
            Path(options.worker).write_text(json.dumps(_compared(case, policies, options)), encoding="utf-8")
    session.close()


def _compared(case: MeasuredCase, policies: dict[str, Policy], options: argparse.Namespace) -> dict[str, Any]:
    """Return the samples, ms, of the reference and of each policy's plans, and what the plans are."""
    from autoplace.measure.pool import plan_key
    from autoplace.plan import Plan

    reference = case.references[0]
    plans: dict[str, Plan] = {}
    found: dict[str, Any] = {}
    for when, policy in policies.items():
        rows = [policy.greedy(case.problem), *policy.sample(case.problem, options.samples, seed=options.seed + 1)]
        made = [case.as_run(Plan.from_assignment(case.problem, row, strategy=when)) for row in rows]
        keys = [plan_key(plan) for plan in made]
        plans |= dict(zip(keys, made, strict=True))
        found[when] = keys
    single, again, *outcomes = case.evaluator.evaluate([reference, reference, *plans.values()], rounds=options.rounds)
    by_key = dict(zip(plans, outcomes, strict=True))
    rows = {
        when: [{**_described(plans[k]), "samples_ms": by_key[k].samples_ms, "reason": by_key[k].reason} for k in keys]
        for when, keys in found.items()
    }
    return {
        "reference": _described(reference),
        "single_ms": single.samples_ms,
        "single_again_ms": again.samples_ms,
        "microbatches_planned": case.problem.semantics.microbatches,
        "groups": case.problem.num_ops // 2,
        "plans_measured": len(plans),
        **rows,
    }


def _described(plan: Plan) -> dict[str, Any]:
    """Return how a plan cuts the model, forward groups on each device and the microbatches, or shares the batch out."""
    if plan.shape == "replicas":
        shares = {r.devices[0]: round(r.share, 3) for r in plan.replicas}
        return {"shares": shares, "sharded": plan.sharded, "microbatches": 1}
    devices = list(plan.replicas[0].assignment.values())
    forward = devices[: len(devices) // 2]
    return {"groups": {d: forward.count(d) for d in plan.devices}, "microbatches": plan.microbatches}


# -- the parent --------------------------------------------------------------------------------------------------------


def run_bed(bed: TestBed, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Refine and compare on a bed that is up."""
    from autoplace.runtime.distributed.launch import run_script
    from autoplace.zoo import find_policy

    folder = _BUILD / "refine" / name.replace(":", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cluster, factory, told = folder / "cluster.yaml", folder / "factory.py", folder / "compared.json"
    _described_bed(bed, cluster)
    scripts = str(Path(__file__).resolve().parent)
    factory.write_text(_FACTORY.format(scripts=scripts, model=options.model, seed=options.seed), encoding="utf-8")
    start = time.perf_counter()
    words = ["train", "--stage", "measure", "--cluster", cluster, "--model", f"{factory}:make", "-o", folder / "out"]
    words += ["--plans-measure", options.plans, "--groups-measure", options.groups, "--seed", options.seed]
    words += ["--held-out", 1, "--captured", 0, "--policy", options.policy]
    words += ["--tracking-uri", f"sqlite:///{folder}/ml.db"]
    program = [sys.executable, "-c", "from autoplace.cli import main; main()", *map(str, words)]
    subprocess.run(program, check=True, timeout=options.limit_s)
    refined_s = time.perf_counter() - start
    after, before = folder / "out" / "policy", find_policy(options.policy)
    command = [str(Path(__file__).resolve()), "--worker", str(told), "--before", str(before), "--after", str(after)]
    command += ["--model", options.model, "--groups", str(options.groups), "--seed", str(options.seed)]
    command += ["--rounds", str(options.rounds), "--samples", str(options.samples)]
    if run_script(cluster, command, timeout_s=options.limit_s):
        raise SystemExit(f"the comparison on {name} failed; what the hosts said stands above")
    episodes = [json.loads(line) for line in (folder / "out" / "measured.jsonl").read_text().splitlines()]
    runs = [json.loads(line) for line in (folder / "out" / "outcomes.jsonl").read_text().splitlines()]
    return {
        "bed": name,
        "model": options.model,
        "batch": MODELS[options.model].batch,
        "refine_s": round(refined_s, 1),
        "compare_s": round(time.perf_counter() - start - refined_s, 1),
        "real_runs": len(runs),
        "episodes": [
            {"reward": e["reward"], "source": (e["outcome"] or {}).get("source"), "feasible": e["feasible"]}
            for e in episodes
        ],
        "commit": provenance(seed=options.seed)["commit"],
        **json.loads(told.read_text()),
    }


def _described_bed(bed: TestBed, path: Path) -> None:
    """Write the cluster file of a bed, with the words that start a process on each host."""
    from dataclasses import replace

    from autoplace.hardware.cluster import Host

    hosts = tuple(
        Host(name=h.name, address=bed.address(h.name), launch=tuple(bed.prefix(h.name)), interface=INTERFACE)
        for h in bed.hosts
    )
    replace(bed.cluster(), hosts=hosts).save(path)


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """Return rewards before and after with 95 % intervals, and the learning curve."""
    from autoplace.agents.rise import reward_rise
    from autoplace.measure.protocol import aa_noise

    single = row["single_ms"]
    greedy = {when: row[when][0]["samples_ms"] for when in ("before", "after")}
    found: dict[str, Any] = {
        "single_ms": _median(single),
        "a_a_noise": aa_noise(single, row["single_again_ms"]),
        "greedy": {when: _rewards(single, ms) for when, ms in greedy.items()},
        "greedy_rise": _rewards(greedy["before"], greedy["after"]),
        "sampled": {when: _of_samples(single, row[when][1:]) for when in ("before", "after")},
    }
    real = [e["reward"] for e in row["episodes"] if e["source"] == "measured"]
    rise = reward_rise(real) if len(real) > 1 else None
    updates = [row["episodes"][i : i + _UPDATE] for i in range(0, len(row["episodes"]), _UPDATE)]
    found["training"] = {
        "episodes": len(row["episodes"]),
        "episodes_run": len(real),
        "rise": None if rise is None else asdict(rise),
        "curve": [_mean([e["reward"] for e in update if e["source"] == "measured"]) for update in updates],
    }
    return found


def _rewards(base: Sequence[float], ms: Sequence[float]) -> dict[str, Any] | None:
    """Return the median over rounds of ln(base / ms), its interval, and the ratio; None where nothing ran."""
    from autoplace.measure.protocol import median_interval

    if not ms:
        return None
    logs = [math.log(b / x) for b, x in zip(base, ms, strict=True)]
    low, high = median_interval(logs)
    middle = _median(logs)
    return {"reward": middle, "interval": [low, high], "ratio": math.exp(middle),
            "ratio_interval": [math.exp(low), math.exp(high)]}  # fmt: skip


def _of_samples(single: Sequence[float], plans: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean reward of sampled plans, those that cannot run counted as training counts them."""
    import numpy as np

    from autoplace.envs.cache import INFEASIBLE_REWARD

    found = [_rewards(single, plan["samples_ms"]) for plan in plans]
    rewards = np.asarray([INFEASIBLE_REWARD if f is None else f["reward"] for f in found])
    draws = rewards[np.random.default_rng(0).integers(0, len(rewards), (_DRAWS, len(rewards)))].mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    different = len({json.dumps({k: v for k, v in p.items() if k not in ("samples_ms", "reason")}) for p in plans})
    return {"plans": len(plans), "cuts": different, "reward": float(rewards.mean()),
            "interval": [float(low), float(high)], "ratio": math.exp(float(rewards.mean()))}  # fmt: skip


def _median(values: Sequence[float]) -> float:
    import statistics

    return statistics.median(values)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def report(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the figures and keep them."""
    kept = []
    for row in rows:
        found = figures(row)
        print(f"{row['bed']} {row['model']}: {row['real_runs']} real runs, {row['refine_s']:.0f} s; "
              f"A/A {found['a_a_noise']:.1%}")  # fmt: skip
        for when in ("before", "after"):
            greedy, sampled = found["greedy"][when], found["sampled"][when]
            told = "cannot run" if greedy is None else _shown(greedy)
            how = row[when][0].get("shares") or f"{row[when][0]['groups']} x{row[when][0]['microbatches']}"
            print(f"  {when:<7} greedy {told} {how}; "
                  f"mean of {sampled['plans']} samples {_shown(sampled)}")  # fmt: skip
        if found["greedy_rise"] is not None:
            print(f"  greedy after over before {_shown(found['greedy_rise'])}")
        print(f"  in training, mean of each {_UPDATE} plans: "
              + ", ".join("-" if x is None else f"{x:+.3f}" for x in found["training"]["curve"]))  # fmt: skip
        kept.append({**{k: v for k, v in row.items() if k != "episodes"}, **found,
                     "episode_rewards": [e["reward"] for e in row["episodes"]]})  # fmt: skip
    save("refine", seed=options.seed, data={"rows": kept})


def _shown(figure: dict[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{figure['reward']:+.3f} ({low:+.3f} to {high:+.3f}), {figure['ratio']:.3f}x"


def main() -> int:
    """Run the beds that are not there yet, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="+", default=list(BEDS), help="speeds@Mbit/s, for example 1:0.5@1000")
    parser.add_argument("--model", choices=sorted(MODELS), default="vit")
    parser.add_argument("--policy", default="default", help="what is refined")
    parser.add_argument("--plans", type=int, default=50, help="plans of the refinement")
    parser.add_argument("--groups", type=int, default=12, help="most groups of the model")
    parser.add_argument("--samples", type=int, default=6, help="sampled plans of each policy that are compared")
    parser.add_argument("--rounds", type=int, default=9, help="of the comparison")
    parser.add_argument("--limit-s", type=float, default=600.0, help="seconds that a refinement may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="forget the beds that ran before")
    parser.add_argument("--summary", action="store_true", help="run nothing")
    for name in ("--worker", "--before", "--after"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _ROWS.parent.mkdir(exist_ok=True)
    if options.fresh:
        _ROWS.unlink(missing_ok=True)
    rows = [json.loads(line) for line in _ROWS.read_text().splitlines()] if _ROWS.exists() else []
    for name in [] if options.summary else options.beds:
        if any((r["bed"], r["model"]) == (name, options.model) for r in rows):
            continue
        if missing := TestBed.missing():
            print(f"no test bed here: {missing}")
            return 1
        with bed_of(name, options.model) as bed:
            rows.append(run_bed(bed, name, options))
        with _ROWS.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    report(rows, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
