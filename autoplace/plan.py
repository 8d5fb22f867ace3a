"""`Plan`: a device for every op group, plus the knobs. Plain data with a JSON file format, `autoplace.plan/1`.

A plan is a list of replicas. Each has its own assignment and its share of the batch, and is split into the same number
of microbatches. One replica on one device is a single-device plan; one replica over several devices a stage graph;
several replicas, data parallelism; the combinations follow.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import PlanFileError
from autoplace.files import read_json, write_text_atomically
from autoplace.problem import Problem

__all__ = ["Plan", "Replica"]

FORMAT = "autoplace.plan/1"
ENGINES = ("threads", "processes", "graph")
"""Values of `Plan.engine`."""
PLAIN = "plain"
"""Name of the strategy and the one device of the identity plan: the model as PyTorch runs it."""


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One copy of the model: where each op group runs, and its share of the batch."""

    assignment: Mapping[str, str]
    """Op group name to device name."""
    share: float = 1.0
    """Fraction of the batch in (0, 1]; the replicas' shares sum to 1."""

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices used, in order of first use."""
        return tuple(dict.fromkeys(self.assignment.values()))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A device for every op group of every replica, and the knobs."""

    replicas: tuple[Replica, ...]
    """Empty for the identity plan (plain PyTorch)."""
    strategy: str
    """Name of the strategy that proposed it."""
    microbatches: int = 1
    """Parts into which each replica splits its share."""
    threads: Mapping[str, int] = field(default_factory=dict)
    """Intra-op threads per CPU device; a device left out uses one per core.

    More threads than the group has cores lets the device use all cores of its host.
    """
    engine: str = "threads"
    """What runs the parts: `threads` of this process, which call the original modules; `processes` that share the
    parameters' memory, for replicas; or stage functions cut from the exported `graph`, for stages."""
    compiled: bool = False
    """Whether modules run through `torch.compile`."""
    cpp_wrapper: bool = False
    """Whether C++ calls the kernels that `torch.compile` makes (Inductor's `cpp_wrapper`), without Python and its lock
    between them; for compiled plans alone."""
    channels_last: bool = False
    """Whether image inputs of four dimensions are laid out channels last before the model sees them."""
    sharded: float = 0.0
    """Part of the parameters' bytes, 0 to 1, that data parallelism over ranks leaves to owners: one rank has such a
    parameter's gradient, updates it, and sends its new values out in the next forward. Those that the forward uses
    first; all ranks update the others. See `runtime.distributed.sharded`."""
    precision: str = "float32"
    """Computation precision; lowered only where the user allows it."""
    graph_fingerprint: str = ""
    cluster_fingerprint: str = ""

    def __post_init__(self) -> None:
        total = math.fsum(r.share for r in self.replicas)
        if self.replicas and (abs(total - 1.0) > 1e-6 or any(r.share <= 0 for r in self.replicas)):
            raise PlanFileError(f"the replicas' shares must be positive and sum to 1; they sum to {total:g}")
        if self.microbatches < 1:
            raise PlanFileError(f"microbatches is {self.microbatches}; use 1 or more")
        if self.engine not in ENGINES:
            raise PlanFileError(f"engine is {self.engine!r}; use one of {', '.join(ENGINES)}")
        if self.cpp_wrapper and not self.compiled:
            raise PlanFileError("cpp_wrapper is set and compiled is not; set both, or neither")
        if not 0.0 <= self.sharded <= 1.0:
            raise PlanFileError(f"sharded is {self.sharded:g}; use a part of the parameters, from 0 to 1")
        if self.sharded and self.shape != "replicas":
            raise PlanFileError("sharded is set and the plan has no whole models on several devices; take it out")

    @staticmethod
    def plain() -> Plan:
        """Return the identity plan: the model exactly as PyTorch runs it."""
        return Plan(replicas=(), strategy=PLAIN)

    @staticmethod
    def from_assignment(
        problem: Problem, assignment: Sequence[int] | NDArray[np.integer], *, strategy: str, **knobs: Any
    ) -> Plan:
        """Build a one-replica plan from a device index per op.

        Args:
            problem: Gives names, fingerprints and the number of microbatches.
            assignment: int[N], device index of every op.
            strategy: Who proposed it.
            **knobs: Other fields of the plan.
        """
        names = [d.name for d in problem.cluster.devices]
        mapping = {op: names[int(d)] for op, d in zip(problem.graph.names, assignment, strict=True)}
        knobs.setdefault("microbatches", problem.semantics.microbatches)
        return Plan(
            replicas=(Replica(assignment=mapping),),
            strategy=strategy,
            graph_fingerprint=problem.graph.fingerprint,
            cluster_fingerprint=problem.cluster.fingerprint,
            **knobs,
        )

    def assignment_array(self, problem: Problem, replica: int = 0) -> NDArray[np.int32]:
        """Return the device index of every op of one replica, int32[N].

        Raises:
            PlanFileError: If the plan lacks an op of the problem or names a device that the cluster lacks.
        """
        mapping, index = self.replicas[replica].assignment, problem.cluster.index
        try:
            return np.asarray([index[mapping[name]] for name in problem.graph.names], np.int32)
        except KeyError as error:
            raise PlanFileError(
                f"the plan does not fit this model and cluster: {error.args[0]!r} is missing; tune again"
            ) from None

    @property
    def is_plain(self) -> bool:
        """Whether this is the identity plan."""
        return not self.replicas

    @property
    def devices(self) -> tuple[str, ...]:
        """All devices used, in order of first use."""
        return tuple(dict.fromkeys(d for r in self.replicas for d in r.devices))

    @property
    def shape(self) -> str:
        """`plain`, `single`, `replicas`, `stages` or `hybrid`: the executor family that runs it."""
        if self.is_plain:
            return "plain"
        staged = any(len(r.devices) > 1 for r in self.replicas)
        if len(self.replicas) > 1:
            return "hybrid" if staged else "replicas"
        return "stages" if staged else "single"

    def with_(self, **changes: Any) -> Plan:
        """Return a copy with some fields replaced."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready data."""
        return {
            "format": FORMAT,
            "strategy": self.strategy,
            "replicas": [{"share": r.share, "assignment": dict(r.assignment)} for r in self.replicas],
            "microbatches": self.microbatches,
            "threads": dict(self.threads),
            "engine": self.engine,
            "compiled": self.compiled,
            "cpp_wrapper": self.cpp_wrapper,
            "channels_last": self.channels_last,
            "sharded": self.sharded,
            "precision": self.precision,
            "graph_fingerprint": self.graph_fingerprint,
            "cluster_fingerprint": self.cluster_fingerprint,
        }

    @staticmethod
    def from_json(data: Any, *, where: str = "plan") -> Plan:
        """Read a plan from JSON data.

        Raises:
            PlanFileError: With one sentence that names the place.
        """
        known = set(Plan.plain().to_json())
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanFileError(f'{where} is not a plan file: its "format" must be {FORMAT!r}')
        if unknown := sorted(set(data) - known):
            raise PlanFileError(
                f"{where} has the unknown key {unknown[0]!r}; known keys are {', '.join(sorted(known))}"
            )
        try:
            replicas = tuple(
                Replica(assignment={str(k): str(v) for k, v in r["assignment"].items()}, share=float(r["share"]))
                for r in data.get("replicas", [])
            )
            return Plan(
                replicas=replicas,
                strategy=str(data["strategy"]),
                microbatches=int(data.get("microbatches", 1)),
                threads={str(k): int(v) for k, v in data.get("threads", {}).items()},
                engine=str(data.get("engine", "threads")),
                compiled=bool(data.get("compiled", False)),
                cpp_wrapper=bool(data.get("cpp_wrapper", False)),
                channels_last=bool(data.get("channels_last", False)),
                sharded=float(data.get("sharded", 0.0)),
                precision=str(data.get("precision", "float32")),
                graph_fingerprint=str(data.get("graph_fingerprint", "")),
                cluster_fingerprint=str(data.get("cluster_fingerprint", "")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanFileError(f"{where} is malformed near {error}; write it again with `autoplace tune`") from None

    def save(self, path: str | Path) -> None:
        """Write the plan file; nothing half-written is ever left."""
        write_text_atomically(path, json.dumps(self.to_json(), indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            PlanFileError: If the file is missing, is not JSON or is malformed.
        """
        return Plan.from_json(read_json(path, PlanFileError), where=str(path))
