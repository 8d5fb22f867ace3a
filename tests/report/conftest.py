"""A tuning's result of a size that people meet: a six-layer encoder on two core groups."""

import math

import pytest

from autoplace.hardware.cluster import Cluster, Device
from autoplace.outcome import Outcome, Span
from autoplace.plan import Plan, Replica
from autoplace.problem import Objective
from autoplace.result import Candidate, TuneResult

CPU0, CPU1 = "host0/cpu:0", "host0/cpu:1"
GROUPS = ["embeddings", *(f"encoder.layer.{i}.{part}" for i in range(6) for part in ("attention", "mlp")), "head"]


def outcome(latency_ms, *, source="measured", spread=0.05, **changes):
    samples = tuple(latency_ms * (1 + spread * math.sin(1.7 * i)) for i in range(15)) if source == "measured" else ()
    fields = {
        "source": source,
        "latency_ms": latency_ms,
        "period_ms": latency_ms,
        "throughput_sps": 8000 / latency_ms,
        "energy_j": 0.09 * latency_ms,
        "energy_source": "model",
        "objective": latency_ms,
        "busy_ms": {CPU0: latency_ms, CPU1: latency_ms / 2},
        "samples_ms": samples,
    }
    return Outcome(**{**fields, **changes})


def pipeline_timeline(microbatches=4):
    spans, free = [], {CPU0: 0.0, CPU1: 0.0, f"{CPU0} -> {CPU1}": 0.0}

    def run(resource, label, ready, length_ms):
        start = max(ready, free[resource])
        free[resource] = start + length_ms
        spans.append(Span(resource=resource, label=label, start_ms=start, end_ms=start + length_ms))
        return start + length_ms

    for _ in range(microbatches):
        ready = 0.0
        for index, group in enumerate(GROUPS):
            if index == 7:
                ready = run(f"{CPU0} -> {CPU1}", "hidden states", ready, 0.15)
            ready = run(CPU0 if index < 7 else CPU1, group, ready, 0.2 if "mlp" not in group else 0.35)
    return tuple(spans)


def staged(strategy, **knobs):
    assignment = {g: CPU0 if i < 7 else CPU1 for i, g in enumerate(GROUPS)}
    return Plan(replicas=(Replica(assignment=assignment),), strategy=strategy, **knobs)


def single(device, strategy="single", **knobs):
    return Plan(replicas=(Replica(assignment=dict.fromkeys(GROUPS, device)),), strategy=strategy, **knobs)


def replicated(strategy="replicas"):
    halves = tuple(Replica(assignment=dict.fromkeys(GROUPS, d), share=0.5) for d in (CPU0, CPU1))
    return Plan(replicas=halves, strategy=strategy)


def candidates():
    timeline = pipeline_timeline()
    length = max(s.end_ms for s in timeline)
    failed = Outcome(source="measured", feasible=False, reason="out of memory on host0/cpu:1")
    return (
        Candidate(label="plain", plan=Plan.plain(), measured=outcome(21.4), verdict="reference"),
        Candidate(
            label="heft x4",
            plan=staged("heft", microbatches=4, threads={CPU0: 1, CPU1: 1}),
            predicted=outcome(length, source="simulated", timeline=timeline),
            measured=outcome(15.1),
            speedup=1.42,
            speedup_interval=(1.35, 1.49),
            gain=1.42,
            check="same output, loss and 101 gradients",
            kept=True,
            verdict="kept",
        ),
        Candidate(
            label="replicas 0.50/0.50",
            plan=replicated(),
            predicted=outcome(13.0, source="simulated"),
            measured=outcome(15.9, spread=0.12),
            speedup=1.35,
            speedup_interval=(1.20, 1.44),
            check="same output, loss and 101 gradients",
            verdict="slower than heft x4",
        ),
        Candidate(
            label="single cpu:0",
            plan=single(CPU0, threads={CPU0: 2}),
            predicted=outcome(20.2, source="simulated"),
            measured=outcome(21.1),
            speedup=1.01,
            speedup_interval=(0.98, 1.05),
            verdict="not better than plain PyTorch beyond the noise of 3.0%",
        ),
        Candidate(
            label="annealing", plan=staged("annealing"), predicted=outcome(14.0, source="simulated"), measured=failed,
        ),
        Candidate(
            label="random 3", plan=staged("random"), predicted=outcome(24.7, source="simulated"),
            verdict="not measured: predicted slower",
        ),
    )  # fmt: skip


@pytest.fixture
def result():
    devices = (
        Device(name=CPU0, kind="cpu", memory_bytes=16 * 2**30, idle_watts=10, busy_watts=45, cores=(0,), model="Xeon",
               watts_source="typical figures"),
        Device(name=CPU1, kind="cpu", cores=(1,), model="Xeon"),
    )  # fmt: skip
    return TuneResult(
        model_name="BertModel",
        mode="inference",
        batch_size=8,
        objective=Objective(),
        cluster=Cluster(devices=devices),
        candidates=candidates(),
        noise=0.03,
        capture_rung="export",
        num_ops=412,
        num_groups=len(GROUPS),
        cost_labels={"measured": 26, "estimated": 2},
        seconds={"capture": 3.1, "profile": 12.4, "propose": 2.0, "measure": 41.7},
        notes=("Energy comes from a model of idle and busy watts.",),
        environment={"torch": "2.13.0", "python": "3.11.7", "machine": "2 cores"},
    )
