"""`ClusterEvaluator`: plans over several ranks in, Outcomes out: the stages' schedule, then gradient synchronisation.

On one host all replicas share the parameters' memory; ranks do not. Every parameter's gradient is all-reduced over
the ranks that hold it (→ `holdings`): over all of them under data parallelism, over the copies of a stage in hybrids,
over both ends of a tie between stages.

    replica r:  makespan T_r of its stages                                                 → `stage_schedule.play`
    ring of n:  2(n-1) · latency + 2(n-1)/n · bytes / bandwidth, times `sync_scale`        → `allreduce_ms`
                latency and bandwidth of the slowest link of the ring in the cluster's order
    bucket b:   starts when its bytes are ready on all its holders and they have no other to reduce
                                                                                           → `finish_ms`
    exposed  =  o · (end of the last bucket - max T_r)  +  (1 - o) · (the same with nothing hidden)
                with o = `overlap_share`                                                   → `sync_ms`
    latency  =  max T_r + exposed                                                          → `ClusterEvaluator`

What sharded plans leave to owners goes half in the backward and half in the forward (→ `runtime.distributed.sharded`):

    bucket b:   latency + (n-1)/n · bytes / bandwidth, times `sync_scale`, each way        → `scatter_ms`
    forward:    an op waits until the last bucket with weights of its own has come         → `_stall_ms`

Replicas on one device each run under DistributedDataParallel: the gradients of an op become ready evenly while its
backward runs, ops in reverse order, and go off in buckets (→ `bucket_bytes_of`). All other plans reduce after their
ranks' last backward, set of holders by set, so that a last stage, done early, may reduce while the first ones still
work.

Departures from `SimulatedEvaluator`: no barrier joins the replicas' losses, receives wait to be asked for, a tensor
that jumps stages is handed along, and ops that share a parameter may be on several ranks.

It does not know replicas that share a network card, the optimizer's step, nor the all-reduce of the loss itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import InputError, PlanFileError
from autoplace.hardware.buckets import BUCKET_BYTES, bucket_bytes_of
from autoplace.outcome import Outcome, Span
from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.simulate.cluster_factors import ClusterFactors
from autoplace.simulate.holdings import activation_bytes, border_buffers, held_by, holder_sets, holders
from autoplace.simulate.reductions import Reduction, allreduce_ms, buckets_of, finish_ms, scatter_ms
from autoplace.simulate.stage_line import StageLine, forward_ops, stage_line
from autoplace.simulate.stage_schedule import Played, StageTimes, play, schedule_of

__all__ = ["ClusterEvaluator", "Job", "allreduce_ms", "holders", "sync_ms"]


def sync_ms(
    plan: Plan,
    problem: Problem,
    *,
    factors: ClusterFactors | None = None,
    bucket_bytes: float | None = None,
    overlap: bool | None = None,
) -> float:
    """Return the synchronisation of gradients that a plan cannot hide, ms; 0 for inference.

    Args:
        plan: With a placement.
        problem: What it places.
        factors: Corrections; None = the neutral ones.
        bucket_bytes: See `ClusterEvaluator`.
        overlap: Whether buckets go off during the backward; None = where the runtime does so, in data parallelism.

    Raises:
        PlanFileError: If the plan does not fit the problem.
    """
    evaluator = ClusterEvaluator(problem, factors=factors or ClusterFactors(), bucket_bytes=bucket_bytes)
    jobs = evaluator.jobs(plan)
    if overlap is None:
        overlap = plan.shape == "replicas"
    return evaluator.exposed_ms(jobs, overlap=overlap, sharded=plan.sharded)[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One replica and when its ranks run what."""

    assignment: NDArray[np.int32]
    """int32[N]."""
    line: StageLine
    share: float
    """Of the batch."""
    microbatches: int
    """That are run."""
    schedule: str
    played: Played


class ClusterEvaluator:
    """Evaluates plans of one problem over several ranks, one rank a device. Deterministic.

    Args:
        problem: What is placed; its semantics, and the factors of → `costs.calibrate`, are those of one host and do
            not count.
        factors: Corrections; None = → `ClusterFactors.assumed`.
        gpipe: Whether pipelines run GPipe where 1F1B could run as well.
        optimizer_bytes_per_weight_byte: State that the optimizer keeps on every rank, for example 2 for Adam.
        bucket_bytes: Of a bucket of gradients under data parallelism; None = as the runtime has it.

    Raises:
        InputError: If the objective weighs energy and a device states no watts.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        factors: ClusterFactors | None = None,
        gpipe: bool = False,
        optimizer_bytes_per_weight_byte: float = 0.0,
        bucket_bytes: float | None = None,
    ) -> None:
        self.problem, self.gpipe, self.bucket_bytes = problem, gpipe, bucket_bytes
        self.optimizer = optimizer_bytes_per_weight_byte
        self.evaluations = 0
        """Plans evaluated so far."""
        self.factors = ClusterFactors.assumed(problem.cluster) if factors is None else factors
        devices = problem.cluster.devices
        self._names = [d.name for d in devices]
        self._watts = [(d.idle_watts, d.busy_watts) for d in devices]
        if problem.objective.energy_weight > 0 and any(None in pair for pair in self._watts):
            raise InputError(
                "the objective weighs energy and a device does not state its watts; add idle_watts and busy_watts"
            )
        self._count, self._training = forward_ops(problem.graph)
        speed = np.asarray([self.factors.speed.get(name, 1.0) for name in self._names])
        self.latency_ms = problem.latency_ms * speed
        """float64[N, D], corrected by the factors' speeds."""
        overhead = np.zeros_like(self.latency_ms) if problem.overhead_ms is None else problem.overhead_ms * speed
        self.overhead_ms = np.minimum(overhead, self.latency_ms)
        """float64[N, D], corrected alike."""
        self._lines: dict[bytes, StageLine] = {}
        self._sets: dict[bytes, dict[tuple[int, ...], float]] = {}

    def with_factors(self, factors: ClusterFactors) -> ClusterEvaluator:
        """Return an evaluator with other corrections, which knows the stages that this one has met."""
        other = ClusterEvaluator(
            self.problem,
            factors=factors,
            gpipe=self.gpipe,
            optimizer_bytes_per_weight_byte=self.optimizer,
            bucket_bytes=self.bucket_bytes,
        )
        other._lines, other._sets = self._lines, self._sets
        return other

    def evaluate(self, plans: Sequence[Plan], *, timeline: bool = False) -> list[Outcome]:
        """Return one Outcome per plan; one that cannot run is infeasible with a reason, never an exception."""
        outcomes = []
        for plan in plans:
            self.evaluations += 1
            try:
                outcomes.append(self._evaluate(plan, timeline=timeline))
            except PlanFileError as error:
                outcomes.append(_infeasible(str(error)))
        return outcomes

    def predict_ms(self, plan: Plan) -> float:
        """Return the latency of one pass, ms, whether it fits in memory or not; inf where it cannot run.

        Raises:
            PlanFileError: If the plan does not fit the problem.
        """
        jobs = self.jobs(plan)
        if not jobs or self._refusal(jobs):
            return float("inf")
        exposed, _ = self.exposed_ms(jobs, overlap=plan.shape == "replicas", sharded=plan.sharded)
        return max(job.played.makespan_ms for job in jobs) + exposed

    def jobs(self, plan: Plan) -> list[Job]:
        """Return when each replica's ranks run what, whether the plan may run or not.

        Raises:
            PlanFileError: If the plan does not fit the problem.
        """
        rows = [plan.assignment_array(self.problem, r) for r in range(len(plan.replicas))]
        # Replicas on one device each run their part of the batch in one go.
        wanted = 1 if plan.shape in ("single", "replicas") else plan.microbatches
        return [self.replica(row, replica.share, wanted) for row, replica in zip(rows, plan.replicas, strict=True)]

    def exposed_ms(self, jobs: Sequence[Job], *, overlap: bool, sharded: float = 0.0) -> tuple[float, list[Reduction]]:
        """Return the synchronisation that is not hidden, ms, and the reductions in their order.

        Args:
            jobs: The replicas.
            overlap: Whether buckets go off during the backward.
            sharded: Part of the weights that have owners; see `Plan`.
        """
        if not self._training or not jobs:
            return 0.0, []
        sets = self._holder_sets(jobs)
        ends = {device: end for job in jobs for device, end in job.played.end_ms.items()}
        whole = max(ends.values())
        shared = {devices: size for devices, size in sets.items() if len(devices) > 1}
        if not overlap:
            reductions = [r for devices, size in shared.items() for r in self._after(devices, size, ends)]
            return max(0.0, finish_ms(reductions) - whole), reductions
        hidden = [r for devices, size in shared.items() for r in self._during(jobs, devices, size, sharded=sharded)]
        bare = [r._replace(ready_ms=whole) for r in hidden]
        least, most = (max(0.0, finish_ms(some) - whole) for some in (hidden, bare))
        if sharded:
            stalls = [self._stall_ms(job, devices, size, sharded) for devices, size in shared.items() for job in jobs]
            least, most = (own + max(stall[i] for stall in stalls) for i, own in enumerate((least, most)))
        share = self.factors.overlap_share
        return (share * least + (1.0 - share) * most if np.isfinite(most) else most), hidden

    def replica(self, row: NDArray[np.int32], share: float, microbatches: int) -> Job:
        """Return when one replica's ranks run what.

        Args:
            row: int32[N], device of every op.
            share: Of the batch.
            microbatches: At most so many; all have one size.
        """
        key = row.tobytes()
        if key not in self._lines:
            self._lines[key] = stage_line(self.problem.graph, row)
        line = self._lines[key]
        samples = share * self.problem.batch_size
        if abs(samples - round(samples)) < 1e-6:  # microbatches have one size
            microbatches = next(n for n in range(min(microbatches, max(1, round(samples))), 0, -1)
                                if round(samples) % n == 0)  # fmt: skip
        schedule = schedule_of(line.devices, microbatches, backward=self._training, gpipe=self.gpipe)
        times = self._stage_times(row, line, share / microbatches)
        return Job(
            assignment=row,
            line=line,
            share=share,
            microbatches=microbatches,
            schedule=schedule,
            played=play(times, microbatches, schedule),
        )

    def _holder_sets(self, jobs: Sequence[Job]) -> dict[tuple[int, ...], float]:
        rows = [job.assignment for job in jobs]
        key = b"".join(row.tobytes() for row in rows)
        if key not in self._sets:
            self._sets[key] = holder_sets(self.problem, held_by(self.problem, rows))
        return self._sets[key]

    def _op_ms(self, row: NDArray[np.int32], fraction: float) -> NDArray[np.float64]:
        """Return the time of every op for a fraction of the batch, ms, float64[N]; inf where it cannot run."""
        ops = np.arange(len(row))
        latency, overhead = self.latency_ms[ops, row], self.overhead_ms[ops, row]
        with np.errstate(invalid="ignore"):
            return np.where(np.isfinite(latency), overhead + fraction * (latency - overhead), np.inf)

    def _stage_times(self, row: NDArray[np.int32], line: StageLine, fraction: float) -> StageTimes:
        count, stages, factors = self._count, len(line.devices), self.factors
        op_ms = self._op_ms(row, fraction)
        dispatch_ms = factors.dispatch_ms if stages > 1 else 0.0
        forward = np.bincount(line.stage_of, weights=op_ms[:count], minlength=stages) + dispatch_ms
        backward = None
        if self._training:
            backward = np.bincount(line.stage_of, weights=op_ms[:count:-1], minlength=stages) + dispatch_ms
            forward[-1] += op_ms[count]
        cluster, sizes = self.problem.cluster, line.border_bytes * fraction
        before, after = list(line.devices[:-1]), list(line.devices[1:])
        with np.errstate(divide="ignore", invalid="ignore"):
            onward, back = (
                factors.link_scale
                * (cluster.link_latency_ms[ends] + np.where(sizes > 0, sizes / cluster.link_bytes_per_ms[ends], 0.0))
                for ends in ((before, after), (after, before))
            )
        copies = [
            tuple(
                size / factors.copy_bytes_per_ms if cluster.devices[d].kind == "cpu" else 0.0 for d in (source, target)
            )
            for size, source, target in zip(sizes.tolist(), before, after, strict=True)
        ]
        return StageTimes(
            devices=line.devices,
            forward_ms=forward.tolist(),
            backward_ms=None if backward is None else backward.tolist(),
            onward_ms=onward.tolist(),
            back_ms=back.tolist(),
            copies_ms=copies,  # type: ignore[arg-type]
        )

    def _after(self, devices: tuple[int, ...], size: float, ends: dict[int, float]) -> list[Reduction]:
        """Return the reductions of one set of holders that begin when its last rank is done."""
        ready = max(ends.get(device, 0.0) for device in devices)
        parts = buckets_of(size, self.bucket_bytes or BUCKET_BYTES)
        return [Reduction(ready, self._took_ms(part, devices), devices) for part in parts]

    def _during(self, jobs: Sequence[Job], devices: tuple[int, ...], size: float, *, sharded: float) -> list[Reduction]:
        """Return the reductions of one set of holders that begin as the backward fills their buckets."""
        everybodys, owned = self._parts(devices, size, sharded)
        parts = everybodys + owned
        filled = np.cumsum(parts)
        ready = np.zeros(len(parts))
        for job in jobs:
            if set(job.line.devices) & set(devices):
                ready = np.maximum(ready, self._filled_ms(job, filled))
        return [
            Reduction(float(when), self._took_ms(part, devices, sharded=i >= len(everybodys)), devices)
            for i, (part, when) in enumerate(zip(parts, ready, strict=True))
        ]

    def _parts(self, devices: tuple[int, ...], size: float, sharded: float) -> tuple[list[float], list[float]]:
        """Return the buckets of everybody's gradients and of owners', bytes, in the order of the backward."""
        cluster = self.problem.cluster
        bucket = self.bucket_bytes or bucket_bytes_of(size, devices, cluster, sharded=sharded > 0.0)
        return buckets_of((1.0 - sharded) * size, bucket), buckets_of(sharded * size, bucket)

    def _stall_ms(self, job: Job, devices: tuple[int, ...], size: float, sharded: float) -> tuple[float, float]:
        """Return how long a rank's forward waits for owners' values, and how long they take, ms.

        They come bucket by bucket, the backward's last first.
        """
        parts = self._parts(devices, size, sharded)[1][::-1]
        arrives = np.cumsum([self._took_ms(part, devices, sharded=True) for part in parts])
        weights = self.problem.graph.weight_bytes[: self._count].astype(np.float64)
        took = self._op_ms(job.assignment, job.share)[: self._count]
        starts, filled = np.cumsum(took) - took, np.cumsum(weights)
        ends = np.cumsum(parts)
        using = np.flatnonzero((weights > 0) & (filled - weights < ends[-1]))
        if not len(using):
            return 0.0, float(arrives[-1])
        last = np.minimum(np.searchsorted(ends, filled[using] - 1e-6), len(parts) - 1)
        return float(max(0.0, (arrives[last] - starts[using]).max())), float(arrives[-1])

    def _filled_ms(self, job: Job, filled: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return when a rank's backward has left that many bytes of gradients; ops in reverse order, ms."""
        weights = self.problem.graph.weight_bytes[: self._count][::-1].astype(np.float64)
        took = self._op_ms(job.assignment, job.share)[self._count + 1 :]
        ends, left = np.cumsum(took), np.cumsum(weights)
        op = np.minimum(np.searchsorted(left, filled - 1e-6), len(left) - 1)
        part = np.clip((filled - (left[op] - weights[op])) / np.maximum(weights[op], 1e-12), 0.0, 1.0)
        start = job.played.makespan_ms - ends[-1]
        ready: NDArray[np.float64] = start + ends[op] - took[op] * (1.0 - part)
        return ready

    def _took_ms(self, size: float, devices: tuple[int, ...], *, sharded: bool = False) -> float:
        took_ms = scatter_ms if sharded else allreduce_ms
        return self.factors.sync_scale * took_ms(size, devices, self.problem.cluster)

    def _evaluate(self, plan: Plan, *, timeline: bool) -> Outcome:
        if plan.is_plain:
            return _infeasible("plain PyTorch has no placement to simulate; measure it")
        jobs = self.jobs(plan)
        if reason := self._refusal(jobs):
            return _infeasible(reason)
        memory = self._memory_bytes(jobs, sharded=plan.sharded)
        for device, held in zip(self.problem.cluster.devices, memory, strict=True):
            if held > device.memory_bytes:
                reason = (
                    f"device {device.name!r} would hold {held:.0f} bytes with gradients and optimizer state and has "
                    f"{device.memory_bytes:.0f}; move ops off it"
                )
                return _infeasible(reason, dict(zip(self._names, memory.tolist(), strict=True)))
        exposed, reductions = self.exposed_ms(jobs, overlap=plan.shape == "replicas", sharded=plan.sharded)
        if not np.isfinite(exposed):
            return _infeasible("two ranks that hold the same weights have no link to sum gradients over; add the link")
        latency_ms = max(job.played.makespan_ms for job in jobs) + exposed
        busy = dict.fromkeys(self._names, 0.0)
        for job in jobs:
            busy |= {self._names[device]: ms for device, ms in job.played.busy_ms.items()}
        period_ms = latency_ms
        if self.problem.objective.goal == "throughput" and not self._training:
            period_ms = max(busy.values())  # the next pass enters a pipeline as soon as the first stage is free
        energy_j = self._energy_j(period_ms, busy)
        return Outcome(
            source="simulated",
            latency_ms=latency_ms,
            period_ms=period_ms,
            throughput_sps=1000.0 * self.problem.batch_size / period_ms if period_ms > 0 else 0.0,
            energy_j=energy_j,
            energy_source=None if energy_j is None else "model",
            objective=self.problem.objective.value(period_ms, energy_j),
            peak_memory_bytes=dict(zip(self._names, memory.tolist(), strict=True)),
            busy_ms=busy,
            timeline=self._spans(jobs, reductions) if timeline else (),
        )

    def _refusal(self, jobs: Sequence[Job]) -> str:
        """Return why ranks cannot run the replicas; empty when they can."""
        graph, taken = self.problem.graph, set[int]()
        for job in jobs:
            row = job.assignment
            bad = np.flatnonzero(~np.isfinite(self.latency_ms[np.arange(len(row)), row]))
            if len(bad):
                return f"op {graph.names[bad[0]]!r} cannot run on {self._names[row[bad[0]]]!r}; place it elsewhere"
            if self._training:
                apart = np.flatnonzero(row[: self._count] != row[: self._count : -1])
                if len(apart):
                    name = graph.names[apart[0]]
                    return f"op {name!r} and its backward are on two devices; place them on one"
            for source, target in pairwise(job.line.devices):
                for s, t in ((source, target), (target, source)) if self._training else ((source, target),):
                    if not np.isfinite(self.problem.cluster.link_latency_ms[s, t]):
                        return f"a stage on {self._names[s]!r} sends to {self._names[t]!r}, and no link joins the two"
            own = set(job.line.devices)
            if own & taken:
                name = self._names[min(own & taken)]
                return f"device {name!r} is in two replicas, and a rank runs one; give each replica its own devices"
            taken |= own
        return ""

    def memory_bytes(self, plan: Plan) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return what every device holds while a plan's step runs, and what it keeps between steps, float64[D] each.

        The model and what else a rank holds at rest is in the first alone.

        Raises:
            PlanFileError: If the plan does not fit the problem.
        """
        jobs = self.jobs(plan)
        return self._memory_bytes(jobs, sharded=plan.sharded), self._kept_bytes(jobs, sharded=plan.sharded)

    def _memory_bytes(self, jobs: Sequence[Job], *, sharded: float) -> NDArray[np.float64]:
        held = held_by(self.problem, [job.assignment for job in jobs])
        own = self.problem.graph.weight_bytes[: self._count].astype(np.float64) @ held
        resting = np.asarray([self.problem.resting_bytes.get(name, np.nan) for name in self._names])
        total = np.where(np.isnan(resting), own, resting) + self._kept_bytes(jobs, sharded=sharded)
        if self._training:
            # Of what has owners, each rank keeps the optimizer's state of a part; buckets, and what others send an
            # owner, are there as long as they travel.
            others = sharded * (1.0 - 1.0 / max(1, len(jobs)))
            travelling = 1.0 + others if sharded else 0.0
            total += (1.0 + self.optimizer * (1.0 - others) + travelling) * own
        for job in jobs:
            fraction = job.share / job.microbatches
            found = activation_bytes(self.problem, job.line, fraction, job.microbatches, job.schedule)
            for device, size in found.items():
                total[device] += size
        return total

    def _kept_bytes(self, jobs: Sequence[Job], *, sharded: float) -> NDArray[np.float64]:
        """Return the buckets and buffers of every device, float64[D]."""
        kept = np.zeros(len(self._names))
        if self._training and not sharded:
            for devices, size in self._holder_sets(jobs).items():
                if len(devices) > 1:
                    kept[list(devices)] += size
        for job in jobs:
            for device, size in border_buffers(job.line, job.share, training=self._training).items():
                kept[device] += size
        return kept

    def _energy_j(self, time_ms: float, busy_ms: dict[str, float]) -> float | None:
        total = 0.0
        for (idle, full), busy in zip(self._watts, busy_ms.values(), strict=True):
            if idle is None or full is None:
                return None
            total += idle * time_ms + (full - idle) * busy
        return total / 1000.0

    def _spans(self, jobs: Sequence[Job], reductions: Sequence[Reduction]) -> tuple[Span, ...]:
        """Return what ran when: stages, transfers, then reductions, each by start."""
        name = self._names
        runs = [
            Span(
                resource=name[a.device],
                label=f"{'backward' if a.backward else 'forward'} {a.stage}#{a.microbatch}",
                start_ms=a.start_ms,
                end_ms=a.end_ms,
            )
            for job in jobs
            for a in job.played.actions
        ]
        moves = [
            Span(
                resource=f"{name[t.source]} -> {name[t.target]}",
                label=f"{'gradients' if t.backward else 'activations'}#{t.microbatch}",
                start_ms=t.start_ms,
                end_ms=t.end_ms,
            )
            for job in jobs
            for t in job.played.transfers
        ]
        sums: list[Span] = []
        finish_ms(
            reductions,
            lambda r, start, end: sums.append(
                Span(resource=" + ".join(name[d] for d in r.devices), label="all-reduce", start_ms=start, end_ms=end)
            ),
        )
        return tuple(span for some in (runs, moves, sums) for span in sorted(some, key=lambda s: s.start_ms))


def _infeasible(reason: str, memory: dict[str, float] | None = None) -> Outcome:
    return Outcome(source="simulated", feasible=False, reason=reason, peak_memory_bytes=memory or {})
