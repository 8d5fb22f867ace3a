"""Faults while training on three unequal hosts: how soon the others say who is gone, and how soon training goes on.

On a test bed (→ `testbed`) of three hosts, with 1, 0.5 and 0.5 of a processor and links of 1 Gbit/s, `autoplace run
--max-restarts --min-hosts 2` trains a small model, once as weighted replicas and once as stages, with a checkpoint
every fifth step. Ranks are killed (SIGKILL) at random moments, each of them several times; then one is stopped
(SIGSTOP), one host's link is cut until the others have noticed, and at last a host goes for good, with its agent. The
agents and the bed stay from fault to fault; ranks are started again by torchrun, as they would be anywhere.

    told        from the fault until all other ranks have said who is gone
    resumed     from the fault until all ranks have done a step again; starting Python is most of it
    named       whether the sentences name the rank and its host, and its stage or replica
    same curve  whether every loss of every attempt is within `RTOL` of plain PyTorch's at that step, in one process

    python scripts/bench_faults.py [--faults 20] [--shapes replicas stages] [--verbose]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from results import save
from testbed import BedHost, BedLink, TestBed

RTOL = 1e-3
"""Of a loss; sums over ranks come in another order than in one process."""
SHARES = {"h0": 0.5, "h1": 0.25, "h2": 0.25}
SHAPES = ("replicas", "stages")
TIMEOUT_S = 6.0
_LAYERS, _WIDTH, _BATCH = 6, 256, 64
_EVERY = 5
_LIMIT_S = 120.0
_LAST_STEPS = 60


# -- what is trained ---------------------------------------------------------------------------------------------------


def build() -> Any:
    """Return the model."""
    import torch

    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for _ in range(_LAYERS):
        layers += [torch.nn.Linear(_WIDTH, _WIDTH), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(_WIDTH, 10))


def batch_of(step: int) -> Any:
    """Return the inputs and targets of a step."""
    import torch

    own = torch.Generator().manual_seed(step)
    return torch.randn(_BATCH, _WIDTH, generator=own), torch.randint(0, 10, (_BATCH,), generator=own)


def optimizer_of(model: Any) -> Any:
    """Return the optimizer."""
    import torch

    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def plain_losses(steps: int) -> list[float]:
    """Return the losses of plain PyTorch, undisturbed."""
    import torch

    model, losses = build(), []
    optimizer = optimizer_of(model)
    for step in range(steps):
        x, y = batch_of(step)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def worker(folder: Path) -> None:
    """Train until told to stop; note every step, and what an error says."""
    import torch

    from autoplace import OptimizedParallel
    from autoplace.errors import AutoplaceError, InputError

    rank, host = int(os.environ["RANK"]), os.environ["AUTOPLACE_HOST"]

    def note(kind: str, **facts: Any) -> None:
        line = json.dumps({"kind": kind, "s": time.time(), "pid": os.getpid(), "rank": rank, "host": host, **facts})
        with (folder / "notes").open("a") as file:
            file.write(line + "\n")

    note("up")
    model = OptimizedParallel(build(), plan=folder / "plan.json", loss=torch.nn.functional.cross_entropy, budget_s=2.0)
    optimizer = optimizer_of(model)
    try:
        step = 0
        with suppress(InputError):  # there is none yet
            step = model.load_checkpoint(folder / "checkpoint", optimizer)["step"]
        while not (folder / "stop").exists() or step < int((folder / "stop").read_text()):
            optimizer.zero_grad()
            loss = float(model.train_step(*batch_of(step)))
            optimizer.step()
            note("step", step=step, loss=loss, agent=os.getppid())
            step += 1
            if step % _EVERY == 0:
                model.save_checkpoint(folder / "checkpoint", optimizer, step=step)
    except AutoplaceError as error:
        note("told", text=str(error))
        raise


# -- who disturbs ------------------------------------------------------------------------------------------------------


class Run:
    """A training on a bed, and what its ranks note."""

    def __init__(self, bed: TestBed, shape: str, folder: Path, *, verbose: bool) -> None:
        from autoplace.hardware.cluster import Host
        from autoplace.plan import Plan, Replica

        self.bed, self.shape, self.folder = bed, shape, folder
        hosts = tuple(
            Host(name=h.name, address=bed.address(h.name), launch=tuple(bed.prefix(h.name))) for h in bed.hosts
        )
        cluster = dataclasses.replace(bed.cluster(), hosts=hosts)
        cluster.save(folder / "cluster.yaml")
        names = [d.name for d in cluster.devices]
        if shape == "replicas":
            shares = zip(names, SHARES.values(), strict=True)
            replicas = tuple(Replica(assignment={".": name}, share=share) for name, share in shares)
        else:
            order = [names[0]] * 7 + [names[1]] * 3 + [names[2]] * 3
            replicas = (Replica(assignment={str(i): name for i, name in enumerate(order)}),)
        plan = Plan(
            replicas=replicas,
            microbatches=1 if shape == "replicas" else 4,
            strategy="fixed",
            cluster_fingerprint=cluster.fingerprint,
        )
        plan.save(folder / "plan.json")
        words = ["run", "--cluster", str(folder / "cluster.yaml"), "--max-restarts", "100", "--min-hosts", "2",
                 "--timeout", f"{TIMEOUT_S:g}", str(Path(__file__).resolve()), "--worker", str(folder)]  # fmt: skip
        output = None if verbose else (folder / "output").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from autoplace.cli import main; main()", *words], stdout=output, stderr=output
        )

    def notes(self, since_s: float, kind: str) -> list[dict[str, Any]]:
        """Return what ranks noted since a moment."""
        path = self.folder / "notes"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [n for n in found if n["kind"] == kind and n["s"] > since_s]

    def wait(self, ready: Callable[[], bool]) -> bool:
        """Wait for something, as long as training runs; return whether it came."""
        end = time.monotonic() + _LIMIT_S
        while time.monotonic() < end and self.process.poll() is None:
            if ready():
                return True
            time.sleep(0.05)
        return ready()

    def steps(self, since_s: float, hosts: Iterable[str], old: Iterable[int] = ()) -> dict[str, dict[str, Any]]:
        """Return each host's first step since a moment by a process that is not old; nothing unless all have one."""
        first: dict[str, dict[str, Any]] = {}
        for found in self.notes(since_s, "step"):
            if found["pid"] not in old:
                first.setdefault(found["host"], found)
        return first if set(hosts) <= set(first) else {}

    def disturb(self, kind: str, victim: str, hosts: list[str], random_: random.Random) -> dict[str, Any]:
        """Do one thing to a host of a training that is under way, and time what follows."""
        before = time.time()
        row: dict[str, Any] = {"shape": self.shape, "fault": kind, "host": victim}
        if not self.wait(lambda: bool(self.steps(before, hosts))):
            return {**row, "error": "training was not under way"}
        time.sleep(random_.uniform(0.2, 1.5))
        latest = {n["host"]: n for n in self.notes(before, "step")}
        rank, start = latest[victim]["rank"], time.time()
        with suppress(ProcessLookupError):
            if kind == "gone":
                os.kill(latest[victim]["agent"], signal.SIGKILL)
            if kind != "cut":
                os.kill(latest[victim]["pid"], signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
        if kind == "cut":
            self.bed.cut(victim)
        others = [host for host in hosts if host != victim]

        def told() -> dict[str, Any]:
            return {n["host"]: n for n in self.notes(start, "told") if n["host"] != victim}

        self.wait(lambda: set(others) <= set(told()))
        said = told()
        self.bed.heal(victim)
        left = others if kind == "gone" else hosts
        old = [n["pid"] for n in latest.values()]
        self.wait(lambda: bool(self.steps(start, left, old)))
        again = self.steps(start, left, old)
        pattern = rf"rank {rank} \({victim}/cpu:0, (stage|replica) "
        return {
            **row,
            "rank": rank,
            "step": latest[victim]["step"],
            "told_s": round(max(n["s"] for n in said.values()) - start, 2) if set(others) <= set(said) else None,
            "resumed_s": round(max(n["s"] for n in again.values()) - start, 2) if again else None,
            "up_s": round(max((n["s"] for n in self.notes(start, "up")), default=start) - start, 2),
            "resumed_at": min(n["step"] for n in again.values()) if again else None,
            "named": set(others) <= set(said) and all(re.search(pattern, n["text"]) for n in said.values()),
            "sentences": sorted({n["text"] for n in said.values()}),
        }

    def finish(self) -> dict[str, Any]:
        """Let training come to its end, and compare all losses with plain PyTorch's."""
        latest = max((n["step"] for n in self.notes(0.0, "step")), default=0)
        half = self.folder / "stop.half"
        half.write_text(str(latest + _LAST_STEPS))
        half.rename(self.folder / "stop")
        try:
            code: int | None = self.process.wait(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            code = None
        self.end()
        steps = self.notes(0.0, "step")
        wanted = plain_losses(max((n["step"] for n in steps), default=-1) + 1)
        errors = [abs(n["loss"] / wanted[n["step"]] - 1.0) for n in steps]
        return {
            "exit_code": code,
            "steps": len(wanted),
            "losses_compared": len(errors),
            "largest_error": max(errors, default=None),
            "same_curve": bool(errors) and max(errors) <= RTOL,
            "first_and_last_loss": [round(wanted[0], 4), round(wanted[-1], 4)] if wanted else [],
        }

    def end(self) -> None:
        """End what still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def faults_of(shape: str, kills: int, random_: random.Random) -> list[tuple[str, str]]:
    """Return what happens to which host: kills in turn, shuffled; then a stop, a cut, and a host that goes."""
    hosts = list(SHARES)
    turns = [("kill", hosts[i % len(hosts)]) for i in range(kills)]
    random_.shuffle(turns)
    later = ("h1", "h2") if shape == "replicas" else ("h0", "h1")
    return [*turns, ("stop", later[0]), ("cut", later[1]), ("gone", "h2")]


def run_shape(shape: str, kills: int, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train under a plan of one shape with all its faults; return a row each, and what came of the training."""
    random_ = random.Random(f"{options.seed} {shape}")
    cores = sorted(os.sched_getaffinity(0))
    hosts = [BedHost(name="h0", cpu=1.0, cores=(cores[0],))]
    hosts += [BedHost(name=name, cpu=0.5, cores=(cores[-1],)) for name in ("h1", "h2")]
    bed = TestBed(hosts=hosts, link=BedLink(bytes_per_ms=125_000), name="faults")
    with bed, tempfile.TemporaryDirectory(prefix="autoplace-faults-") as folder:
        run = Run(bed, shape, Path(folder), verbose=options.verbose)
        rows: list[dict[str, Any]] = []
        try:
            for kind, victim in faults_of(shape, kills, random_):
                row = run.disturb(kind, victim, list(SHARES), random_)
                rows.append(row)
                print(json.dumps(row), flush=True)
                if row.get("resumed_s") is None:
                    break
            return rows, run.finish()
        finally:
            run.end()


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return, per kind of fault: how many, how many were told and named and went on, and the seconds."""
    found = {}
    for kind in dict.fromkeys(row["fault"] for row in rows):
        some = [row for row in rows if row["fault"] == kind]
        seconds = {key: [row[key] for row in some if row.get(key) is not None] for key in ("told_s", "resumed_s")}
        found[kind] = {
            "faults": len(some),
            "told": len(seconds["told_s"]),
            "named": sum(bool(row.get("named")) for row in some),
            "resumed": len(seconds["resumed_s"]),
            **{
                key: {"median": round(statistics.median(values), 2), "largest": max(values)}
                for key, values in seconds.items()
                if values
            },
        }
    return found


def main() -> int:
    """Run both shapes, print a table and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20, help="kills, over both shapes")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="show what the hosts say")
    parser.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True, help="write docs/results")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return 0
    if missing := TestBed.missing():
        print(f"no test bed here: {missing}")
        return 1
    rows: list[dict[str, Any]] = []
    trainings: dict[str, Any] = {}
    for i, shape in enumerate(options.shapes):
        kills = options.faults * (i + 1) // len(options.shapes) - options.faults * i // len(options.shapes)
        own, trainings[shape] = run_shape(shape, kills, options)
        rows += own
        print(f"{shape}: {json.dumps(trainings[shape])}", flush=True)
    summary = summary_of(rows)
    for kind, found in summary.items():
        print(f"{kind:<6}{json.dumps(found)}")
    if options.keep:
        data = {"timeout_s": TIMEOUT_S, "rtol": RTOL, "summary": summary, "trainings": trainings, "rows": rows}
        save("faults", seed=options.seed, data=data)
    good = all(t["same_curve"] and t["exit_code"] == 0 for t in trainings.values())
    return 0 if good and all(row.get("named") and row.get("resumed_s") is not None for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
