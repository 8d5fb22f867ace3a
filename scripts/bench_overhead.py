"""What a call costs on top of the model: the wrapper, and every executor's dispatch, in microseconds.

The model is a chain of layers so small that their own time hardly counts; what a call of it takes more than plain
PyTorch, round by round in one interleaved run, is overhead. A sample is the mean of a few calls in a row; given are the
median and the quartiles of the differences, and as noise those of plain PyTorch against itself.

Stages and microbatches are priced by slopes: what a call costs more with more stages, or with more microbatches,
divided by how many more.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from results import save

from autoplace import OptimizedParallel, Plan
from autoplace.errors import AutoplaceError
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.plan import Replica
from autoplace.runtime import Executor, InlineDevice, SingleDevice, build_executor

A, B = "host0/cpu:0", "host0/cpu:1"
BATCH, WIDTH = 8, 8
STAGES = (2, 8)
MICROBATCHES = (1, 4)
MODES = ("forward", "forward+backward")


@dataclass(frozen=True, kw_only=True)
class Added:
    """Microseconds that one call takes more than plain PyTorch's."""

    name: str
    mode: str
    plain_us: float
    """Median of plain PyTorch."""
    median_us: float
    low_us: float
    high_us: float
    """Quartiles of the differences."""
    stages: int = 1
    microbatches: int = 1

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return {**vars(self)}


def two_groups() -> Cluster:
    """Return two CPU groups on this process's cores, half each; both on the one core where there is but one."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    groups = (tuple(cores[:half] or cores), tuple(cores[half:]))
    devices = tuple(Device(name=name, kind="cpu", cores=own) for name, own in zip((A, B), groups, strict=True))
    return Cluster(devices=devices, default_link=Link(latency_ms=0.0, bytes_per_ms=1e9))


def one_group() -> Cluster:
    """Return one CPU group of all cores of this process."""
    device = Device(name=A, kind="cpu", cores=tuple(sorted(os.sched_getaffinity(0))))
    return Cluster(devices=(device,), default_link=Link(latency_ms=0.0, bytes_per_ms=1e9))


def chain(layers: int) -> torch.nn.Module:
    """Return a chain of small layers."""
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers)))


def single_plan(threads: int) -> Plan:
    """Return the plan for the whole model on the first device."""
    return Plan(replicas=(Replica(assignment={".": A}),), strategy="overhead", threads={A: threads})


def replicas_plan(microbatches: int, **knobs: Any) -> Plan:
    """Return the plan for two equal replicas."""
    replicas = tuple(Replica(assignment={".": name}, share=0.5) for name in (A, B))
    return Plan(replicas=replicas, strategy="overhead", microbatches=microbatches, threads={A: 1, B: 1}, **knobs)


def stages_plan(layers: int, microbatches: int, **knobs: Any) -> Plan:
    """Return the plan that puts a chain's layers on the two devices in turn."""
    assignment = {str(i): (A, B)[i % 2] for i in range(layers)}
    replicas = (Replica(assignment=assignment),)
    return Plan(replicas=replicas, strategy="overhead", microbatches=microbatches, threads={A: 1, B: 1}, **knobs)


def samples_us(calls: Mapping[str, Callable[[], None]], *, rounds: int, repeats: int) -> dict[str, list[float]]:
    """Time calls against each other, in turn, the order reversed every other round.

    Args:
        calls: Name to what is timed.
        rounds: Samples of each.
        repeats: Calls of which one sample is the mean.

    Returns:
        Name to microseconds a call, one per round.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            call = calls[name]
            call()  # with the caches and threads that it leaves behind itself
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            found[name].append((time.perf_counter() - start) / repeats * 1e6)
    return found


def compare(
    model: torch.nn.Module, others: Mapping[str, Callable[..., Any]], mode: str, *, rounds: int, repeats: int
) -> list[Added]:
    """Return what calls take more than the model's own; the first is the model against itself."""
    x = torch.randn(BATCH, WIDTH)
    functions = {"plain": model, "plain again": model, **others}
    calls = {name: _step(function, x, mode) for name, function in functions.items()}
    model.train(mode != "forward")
    for function in others.values():
        if isinstance(function, torch.nn.Module):
            function.train(mode != "forward")
    found = samples_us(calls, rounds=rounds, repeats=repeats)
    plain = np.asarray(found.pop("plain"))
    rows = []
    for name, own in found.items():
        low, median, high = np.percentile(np.asarray(own) - plain, [25, 50, 75])
        rows.append(
            Added(
                name=name,
                mode=mode,
                plain_us=float(np.median(plain)),
                median_us=float(median),
                low_us=float(low),
                high_us=float(high),
            )
        )
    return rows


def _step(function: Callable[..., Any], x: torch.Tensor, mode: str) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad() if mode == "forward" else nullcontext():
            y = function(x)
        if mode != "forward":
            y.sum().backward()

    return step


def cheap_calls(stack: ExitStack, model: torch.nn.Module) -> dict[str, Callable[..., Any]]:
    """Return the calls that must cost next to nothing, and the worker beside them."""
    cores = len(os.sched_getaffinity(0))
    whole, parts = one_group(), two_groups()
    options: dict[str, Any] = {"track": False, "replan": False, "cache": False, "progress": False}
    calls: dict[str, Callable[..., Any]] = {
        "identity": build_executor(model, Plan.plain(), whole),
        "in line, 1 thread": InlineDevice(model, single_plan(1), whole),
        "in line, all threads": InlineDevice(model, single_plan(cores), whole),
        "by a worker": SingleDevice(model, single_plan(1), parts),
        "wrapper, identity": OptimizedParallel(model, plan=Plan.plain(), cluster=whole, **options),
        "wrapper, in line": OptimizedParallel(model, plan=single_plan(1), cluster=whole, **options),
    }
    for call in calls.values():
        stack.callback(call.close)
    return calls


def dispatch_plans() -> list[tuple[str, int, Plan]]:
    """Return (name, layers of the chain, plan) for every executor that splits a pass."""
    plans = []
    for engine in ("threads", "processes"):
        for microbatches in MICROBATCHES:
            plans.append((f"replicas by {engine}", 2, replicas_plan(microbatches, engine=engine)))
    for engine in ("threads", "graph"):
        for layers in STAGES:
            for microbatches in MICROBATCHES:
                name = "stages by modules" if engine == "threads" else "stages by graph"
                plans.append((name, layers, stages_plan(layers, microbatches, engine=engine)))
    return plans


def measure_dispatch(
    plans: Sequence[tuple[str, int, Plan]], *, rounds: int, repeats: int
) -> tuple[list[Added], dict[str, str]]:
    """Return what passes in parts take more than plain ones, and why executors are left out, by name."""
    rows: list[Added] = []
    reasons: dict[str, str] = {}
    cluster = two_groups()
    for name, layers, plan in plans:
        model = chain(layers)
        for mode in MODES:
            executor: Executor | None = None
            try:
                executor = build_executor(model, plan, cluster)
                _, row = compare(model, {name: executor}, mode, rounds=rounds, repeats=repeats)
            except AutoplaceError as error:
                reasons[name] = str(error)
                continue
            finally:
                if executor is not None:
                    executor.close()
            staged = layers if plan.shape == "stages" else 1
            rows.append(Added(**{**row.to_json(), "stages": staged, "microbatches": plan.microbatches}))
    return rows, reasons


def slopes(rows: Sequence[Added]) -> list[dict[str, Any]]:
    """Return the microseconds that one more stage, and one more microbatch, add to a call, by executor and mode."""
    found = []
    for name, mode in dict.fromkeys((row.name, row.mode) for row in rows):
        own = {(r.stages, r.microbatches): r.median_us for r in rows if (r.name, r.mode) == (name, mode)}
        stages = sorted({s for s, _ in own})
        counts = sorted({m for _, m in own})
        least = (stages[0], counts[0])
        prices: dict[str, Any] = {"name": name, "mode": mode, "least_us": own[least], "stages": stages[0]}
        if len(stages) > 1:
            prices["per_stage_us"] = (own[stages[-1], counts[0]] - own[least]) / (stages[-1] - stages[0])
        if len(counts) > 1:
            prices["per_microbatch_us"] = (own[stages[0], counts[-1]] - own[least]) / (counts[-1] - counts[0])
        found.append(prices)
    return found


def _show(rows: Sequence[Added]) -> None:
    print(f"{'call':<24}{'mode':<18}{'stages':>7}{'micro':>6}{'plain us':>10}{'added us':>10}  quartiles")
    for r in rows:
        print(
            f"{r.name:<24}{r.mode:<18}{r.stages:>7}{r.microbatches:>6}{r.plain_us:>10.1f}{r.median_us:>10.1f}"
            f"  {r.low_us:.1f} to {r.high_us:.1f}"
        )


def main() -> None:
    """Measure, print tables and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--repeats", type=int, default=200, help="calls in one sample")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    cheap: list[Added] = []
    with ExitStack() as stack:
        model = chain(1)
        calls = cheap_calls(stack, model)
        for mode in MODES:
            cheap += compare(model, calls, mode, rounds=options.rounds, repeats=options.repeats)
    _show(cheap)
    repeats = max(1, options.repeats // 10)
    rows, reasons = measure_dispatch(dispatch_plans(), rounds=options.rounds, repeats=repeats)
    print()
    _show(rows)
    print()
    prices = slopes(rows)
    for price in prices:
        more = "".join(f", {price[key]:.0f} us {label}" for key, label in _PRICES if key in price)
        print(f"{price['name']}, {price['mode']}: {price['least_us']:.0f} us a call at least{more}")
    for name, reason in reasons.items():
        print(f"{name}: left out, {reason}")
    save(
        "overhead",
        seed=options.seed,
        data={
            "cheap": [row.to_json() for row in cheap],
            "dispatch": [row.to_json() for row in rows],
            "prices": prices,
            "left_out": reasons,
        },
    )


_PRICES = (("per_stage_us", "a stage more"), ("per_microbatch_us", "a microbatch more"))

if __name__ == "__main__":
    main()
