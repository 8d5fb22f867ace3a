"""The scalar knobs around the planner's placements: what may be turned, by how much, and in which order to try it.

A `Base` is a placement that the planner found good: plain PyTorch, one device, replicas, stages. A *point* is a base
and the value of every knob that it has; `KnobSpace.plan` makes it a plan. Shared knobs (compiled, channels last,
precision) have one name for all bases, so that a search learns of them across bases; the others carry their base's
name.

It measures nothing and knows no search → `knob_search`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from autoplace.hardware.cluster import Cluster
from autoplace.plan import Plan
from autoplace.runtime.batch import largest_remainder
from autoplace.workload import Workload

if TYPE_CHECKING:
    from optuna import Trial

__all__ = ["Base", "KnobSpace", "Point", "has_images", "in_line_threads", "knob_label", "with_threads"]

Point = Mapping[str, Any]
"""Knob name to value; `base` names the base."""

ALONE, ADOPT = "alone", "adopt"
_MOST_TUNED_SHARES = 4
"""Replicas of a plan whose shares are tuned; each has one more knob."""
_FEW_CORES = 8
"""Up to here every number of threads is a choice; above, powers of two and all."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A placement, and the values that its own knobs may take; the first value is the planner's."""

    name: str
    """Unique among the bases of a search."""
    plan: Plan
    threads: tuple[int, ...] = ()
    """Intra-op threads of a CPU device; empty = not tuned."""
    microbatches: tuple[int, ...] = ()
    engines: tuple[str, ...] = ()
    shares: bool = False
    """Whether the replicas' shares of the batch are tuned."""

    def own_knobs(self) -> dict[str, Sequence[Any]]:
        """Return name to values of the knobs that this base alone has, those with a choice."""
        knobs = {"threads": self.threads, "microbatches": self.microbatches, "engine": self.engines}
        return {f"{self.name} {name}": values for name, values in knobs.items() if len(values) > 1}

    def weights(self) -> list[str]:
        """Return the names of the knobs by which the shares are tuned: a factor for every replica but the first."""
        count = len(self.plan.replicas)
        if not self.shares or not 2 <= count <= _MOST_TUNED_SHARES:
            return []
        return [f"{self.name} weight {i}" for i in range(1, count)]


@dataclass(frozen=True, kw_only=True)
class KnobSpace:
    """All points of a search."""

    bases: tuple[Base, ...]
    cluster: Cluster
    batch_size: int
    compiled: bool = False
    """Whether plans may be compiled."""
    cpp_wrapper: bool = False
    """Whether C++ may call a compiled plan's kernels."""
    channels_last: bool = False
    """Whether images may be laid out channels last."""
    precisions: tuple[str, ...] = ("float32",)

    def base(self, name: str) -> Base:
        """Return a base by name."""
        return next(b for b in self.bases if b.name == name)

    def shared_knobs(self) -> dict[str, Sequence[Any]]:
        """Return name to values of the knobs that all bases have, those with a choice."""
        knobs: dict[str, Sequence[Any]] = {
            "channels_last": (False, True) if self.channels_last else (),
            "precision": self.precisions,
            "compiled": self._compiling(),
        }
        return {name: values for name, values in knobs.items() if len(values) > 1}

    def _compiling(self) -> tuple[str, ...]:
        """Return the values of `compiled`; what is likely to be fastest comes before what it has to beat."""
        if not self.compiled:
            return ()
        return ("no", "cpp wrapper", "default") if self.cpp_wrapper else ("no", "default")

    def start(self, base: Base) -> dict[str, Any]:
        """Return the point of a base as the planner left it."""
        knobs = {**self.shared_knobs(), **base.own_knobs()}
        first = {name: values[0] for name, values in knobs.items()}
        return {"base": base.name, **first, **dict.fromkeys(base.weights(), 1.0)}

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """Ask a trial for a point."""
        names = [b.name for b in self.bases]
        base = self.base(str(trial.suggest_categorical("base", names)))
        point: dict[str, Any] = {"base": base.name}
        for name, values in {**self.shared_knobs(), **base.own_knobs()}.items():
            point[name] = trial.suggest_categorical(name, list(values))
        for name in base.weights():
            point[name] = trial.suggest_float(name, 0.5, 2.0, log=True)
        return point

    def plan(self, point: Point) -> Plan | None:
        """Return the plan of a point; None when a part of it would have no sample."""
        base = self.base(str(point["base"]))
        plan = base.plan.with_(
            compiled=point.get("compiled", "no") != "no",
            cpp_wrapper=point.get("compiled") == "cpp wrapper",
            channels_last=bool(point.get("channels_last", False)),
            precision=str(point.get("precision", "float32")),
        )
        if (threads := point.get(f"{base.name} threads")) is not None:
            plan = with_threads(plan, self.cluster, int(threads))
        plan = plan.with_(
            microbatches=int(point.get(f"{base.name} microbatches", plan.microbatches)),
            engine=str(point.get(f"{base.name} engine", plan.engine)),
        )
        return self._shared_out(plan, [1.0, *(float(point[name]) for name in base.weights())])

    def _shared_out(self, plan: Plan, weights: Sequence[float]) -> Plan | None:
        """Return the plan with its shares times the weights, in whole samples."""
        if all(weight == 1.0 for weight in weights):
            return plan
        wanted = [r.share * w for r, w in zip(plan.replicas, weights, strict=True)]
        sizes = largest_remainder(self.batch_size, [w / sum(wanted) for w in wanted])
        if min(sizes) < plan.microbatches:
            return None
        shares = [size / self.batch_size for size in sizes]
        return plan.with_(replicas=tuple(replace(r, share=s) for r, s in zip(plan.replicas, shares, strict=True)))

    def moves(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the natural changes, (base name, knobs), in the order in which they are worth a try.

        Each is made to the best point of its base so far; `ALONE` to the base as the planner left it; `ADOPT` takes the
        shared knobs of the best point of all. What costs least to try comes first: layout and precision of the whole
        model, then compiling it, then plans over several devices; those adopt what helped the whole model.
        """
        whole = [b for b in self.bases if b.plan.shape in ("plain", "single")]
        spread = [b for b in self.bases if b.plan.shape not in ("plain", "single")]
        for name, values in self.shared_knobs().items():
            if name == "compiled":
                for value in values[1:]:
                    yield from ((base.name, {ALONE: True, name: value}) for base in whole if base.plan.is_plain)
                values = values[:2]
            for base in whole:
                yield from ((base.name, {name: value}) for value in values[1:])
        for base in whole:
            yield from self._own_moves(base)
        for base in spread:
            yield base.name, {ADOPT: True}
            yield from self._own_moves(base)

    def _own_moves(self, base: Base) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, values in base.own_knobs().items():
            yield from ((base.name, {name: value}) for value in values[1:])

    def moved(self, change: Mapping[str, Any], best: Point, leader: Point) -> dict[str, Any]:
        """Return where a move of `moves` leads.

        Args:
            change: The knobs.
            best: Best point so far of its base.
            leader: Best point so far of all.
        """
        point = self.start(self.base(str(best["base"]))) if ALONE in change else dict(best)
        if ADOPT in change:
            point |= {name: leader[name] for name in self.shared_knobs() if name in leader}
        return point | {name: value for name, value in change.items() if name not in (ALONE, ADOPT)}


def in_line_threads(cores: int) -> tuple[int, ...]:
    """Return the numbers of intra-op threads worth a try on a host with so many cores, the two extremes first."""
    if cores <= _FEW_CORES:
        counts: Iterable[int] = range(1, cores + 1)
    else:
        counts = [2**i for i in range(cores.bit_length()) if 2**i < cores] + [cores]
    return tuple(sorted(counts, key=lambda n: (n not in (1, cores), n)))


def with_threads(plan: Plan, cluster: Cluster, threads: int) -> Plan:
    """Return a plan whose CPU devices use a number of threads; as many as a group has cores is its default."""
    devices = [d for d in cluster.devices if d.name in plan.devices and d.kind == "cpu"]
    return plan.with_(threads={d.name: threads for d in devices if threads != len(d.cores)})


def has_images(workload: Workload) -> bool:
    """Return whether channels last can matter: a floating-point input of four dimensions and a 2-d convolution."""
    leaves = pytree.tree_leaves((workload.args, dict(workload.kwargs)))
    images = any(isinstance(x, torch.Tensor) and x.dim() == 4 and x.is_floating_point() for x in leaves)
    kinds = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)
    return images and any(isinstance(module, kinds) for module in workload.model.modules())


def knob_label(plan: Plan) -> str:
    """Return a short name of a plan and its knobs, for example `replicas 0.50/0.50 + compile`."""
    knobs = ["channels last"] if plan.channels_last else []
    knobs += [plan.precision] if plan.precision != "float32" else []
    knobs += ["compile" + " (C++ wrapper)" * plan.cpp_wrapper] if plan.compiled else []
    knobs += [plan.engine] if plan.engine != "threads" else []
    if plan.is_plain and knobs == ["compile"]:
        return "plain torch.compile"
    return " + ".join([_where(plan), *knobs])


def _where(plan: Plan) -> str:
    if plan.is_plain:
        return "plain"
    if plan.shape == "single":
        device = plan.devices[0]
        threads = plan.threads.get(device)
        return f"single {device.split('/')[-1]}" + (f" ({threads} thread{'s' * (threads > 1)})" if threads else "")
    if plan.shape == "replicas":
        return "replicas " + "/".join(f"{r.share:.2f}" for r in plan.replicas)
    return f"{plan.strategy} x{plan.microbatches}"
