"""One architecture in one mode of the acceptance benchmark: what the graph is, and what every executor makes of it.

Every plan is looked at twice. `measure.check_plan` compares the bare executor with plain PyTorch. Then the model is
wrapped with the plan, called twice, and outputs, loss, every parameter's gradient and every buffer are compared with
plain PyTorch's by this file's own few lines. → `compare`

A plan is `ok` when it ran and all of that is equal. It is `refused` when the executor, or the check, says that the plan
cannot keep this model's results and the wrapper ran plain PyTorch instead, with equal results: an executor's own words
(`ExecutionError`, `unfit`), samples of a batch that depend on each other, or random numbers besides dropout. Different
numbers without such a reason, and any other exception, are a failure.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from acceptance_models import ARCHITECTURES

from autoplace import OptimizedParallel
from autoplace.errors import AutoplaceError, ExecutionError
from autoplace.graph.capture import Capture, capture
from autoplace.graph.coarsen import coarsen
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.measure import CheckConfig, Reference, check_plan
from autoplace.measure.preserve import no_dropout, preserved
from autoplace.plan import Plan, Replica
from autoplace.runtime import build_executor
from autoplace.runtime.batch import CAT, MEAN, join_kinds
from autoplace.runtime.fitness import unfit
from autoplace.runtime.tree import Tree
from autoplace.workload import Workload, default_loss

__all__ = ["EXECUTORS", "FREE", "cluster_of_two", "compare", "forced_plan", "halves", "run_case"]

EXECUTORS = ("single", "replicas", "stages", "graph", "processes")
"""The executors that are forced in turn."""
FREE = "free"
"""The column of the planner's own choice."""
BATCH = 4
TOLERANCES = CheckConfig()
_DEVICES = ("host0/cpu:0", "host0/cpu:1")
_MOST_GROUPS = 32
_HANDS_OFF: dict[str, Any] = {"track": False, "replan": False, "cache": False, "progress": False}
_CALLS = 2
"""The first call checks and installs the plan, the second only runs it."""


def cluster_of_two() -> Cluster:
    """Return two groups of one core each; on a machine with one core both are that core."""
    cores = sorted(os.sched_getaffinity(0))
    return Cluster(
        devices=tuple(
            Device(name=name, kind="cpu", cores=(core,))
            for name, core in zip(_DEVICES, (cores[0], cores[-1]), strict=True)
        ),
        default_link=Link(latency_ms=0.0, bytes_per_ms=1e7),
    )


def halves(graph: OpGraph) -> dict[str, str]:
    """Return a device per group: the first half of the cost, in execution order, and the rest.

    Groups that must share a device go where the first of them goes.
    """
    cost = graph.flops + graph.bytes_moved
    passed, total = 0.0, float(cost.sum())
    homes: dict[int, str] = {}
    assignment: dict[str, str] = {}
    for group, name in enumerate(graph.names):
        device = _DEVICES[0] if passed + cost[group] / 2 <= total / 2 else _DEVICES[1]
        passed += float(cost[group])
        key = int(graph.colocate[group])
        assignment[name] = homes.setdefault(key, device) if key >= 0 else device
    return assignment


def forced_plan(executor: str, groups: OpGraph, microbatches: int = 2) -> Plan:
    """Return the plan that forces an executor.

    Args:
        executor: One of `EXECUTORS`.
        groups: The model's op groups; stages are made of them.
        microbatches: Parts of the batch that stages work on.
    """
    whole = [Replica(assignment={".": device}, share=0.5) for device in _DEVICES]
    if executor == "single":
        return Plan(replicas=(Replica(assignment={".": _DEVICES[1]}),), strategy="forced")
    if executor in ("replicas", "processes"):
        engine = "processes" if executor == "processes" else "threads"
        return Plan(replicas=tuple(whole), strategy="forced", engine=engine)
    engine = "graph" if executor == "graph" else "threads"
    staged = Replica(assignment=halves(groups))
    return Plan(replicas=(staged,), strategy="forced", microbatches=microbatches, engine=engine)


class _Case:
    """A model, its inputs and plain PyTorch's results on them."""

    def __init__(self, name: str, *, training: bool) -> None:
        architecture = ARCHITECTURES[name]
        self.model = architecture.build().train(training)
        self.inputs = architecture.inputs(BATCH, training=training)
        self.training = training
        self.workload = Workload(model=self.model, kwargs=self.inputs, training=training, name=name)
        self.cluster = cluster_of_two()
        self.keys = list(self.model.state_dict())
        self.parameters = [id(p) for p in self.model.parameters()]
        self.reference = Reference(self.workload)
        self.expected = self.pass_(self.model)

    def pass_(self, call: Callable[..., Any]) -> dict[str, Any]:
        """Run one pass from the same state and return output, loss, gradients and buffers."""
        torch.manual_seed(0)
        with preserved(self.model):
            output = self.workload.forward(call)
            loss = None
            if self.training:
                loss = default_loss(output)
                loss.backward()
            grads = {name: p.grad for name, p in self.model.named_parameters()}
            buffers = {name: b.detach().clone() for name, b in self.model.named_buffers()}
        return {"output": output, "loss": loss, "grads": grads, "buffers": buffers}

    def mixes_samples(self) -> str:
        """Return why plain PyTorch itself gives other results on halves of the batch; empty when it does not."""
        runs = [self._half(0), self._half(1)]
        try:
            merged = _merge([run["output"] for run in runs])
        except ExecutionError as error:
            return str(error)
        why = compare({"output": self.expected["output"]}, {"output": merged})[0]
        for name in [] if why else self.expected["buffers"]:
            if not torch.equal(runs[0]["buffers"][name], self.expected["buffers"][name]):
                why = f"buffer {name!r} depends on how the batch is split"
                break
        return f"plain PyTorch on halves of the batch differs as well: {why}" if why else ""

    def _half(self, part: int) -> dict[str, Any]:
        whole = self.workload
        half = {k: v.narrow(0, part * BATCH // 2, BATCH // 2) for k, v in self.inputs.items()}
        try:
            self.workload = Workload(model=self.model, kwargs=half, training=self.training)
            return self.pass_(self.model)
        finally:
            self.workload = whole


def _merge(outputs: Sequence[Any]) -> Any:
    """Join the outputs of halves as executors do."""
    parts = [Tree(output) for output in outputs]
    merged: list[Any] = []
    kinds = join_kinds(parts, [BATCH // 2] * 2)
    for kind, values in zip(kinds, zip(*(part.leaves for part in parts), strict=True), strict=True):
        if kind == CAT:
            merged.append(torch.cat(values))
        else:
            merged.append(sum(values) / 2 if kind == MEAN else values[0])
    return parts[0].build(merged)


def compare(expected: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, float, float]:
    """Compare the results of two passes, `CheckConfig`'s tolerances, code of its own.

    Returns:
        The first difference in one phrase or nothing, the largest error of outputs and buffers relative to their
        largest entry, and the largest error of gradients as a multiple of what is allowed.
    """
    why: list[str] = []
    worst = 0.0
    for key in ("output", "loss", "buffers"):
        for where, a, b in _pairs(key, expected.get(key), found.get(key)):
            if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
                why += [] if a is None and b is None else [f"{where} is {b!r:.60}, not {a!r:.60}"]
            elif a.shape != b.shape or a.dtype != b.dtype:
                why.append(f"{where} is {b.dtype}{list(b.shape)}, not {a.dtype}{list(a.shape)}")
            else:
                error = _gap(a, b) / max(_peak(a), TOLERANCES.floor)
                worst = max(worst, error)
                why += [] if error <= TOLERANCES.rtol_float32 else [f"{where} differs by {error:.2g} of its size"]
    grads, others = expected.get("grads") or {}, found.get("grads") or {}
    why += ["other parameters have gradients"] if grads.keys() != others.keys() else []
    peak = max((_peak(g) for g in grads.values() if g is not None), default=0.0)
    strain = 0.0
    for name in grads.keys() & others.keys():
        a, b = grads[name], others[name]
        if a is None or b is None:
            why += [] if a is b else [f"the gradient of {name!r} is {'missing' if b is None else 'too many'}"]
            continue
        allowed = TOLERANCES.rtol_float32 * _peak(a) + TOLERANCES.gradient_floor * peak
        error = _gap(a, b) / allowed if allowed else float(_gap(a, b) > 0)
        strain = max(strain, error)
        why += [] if error <= 1 else [f"the gradient of {name!r} differs by {error:.2g} times what is allowed"]
    return (why[0] if why else ""), worst, strain


def _pairs(where: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    """Walk two nested values side by side; yields tensors, and whatever differs in kind, by pairs."""
    if type(a) is not type(b):
        yield f"{where} ({type(b).__name__} for {type(a).__name__})", repr(type(a)), repr(type(b))
    elif isinstance(a, torch.Tensor):
        yield where, a, b
    elif isinstance(a, Mapping):
        if list(a) != list(b):
            yield f"the keys of {where}", list(a), list(b)
        for key in a.keys() & b.keys():
            yield from _pairs(f"{where}[{key!r}]", a[key], b[key])
    elif isinstance(a, (tuple, list)):
        if len(a) != len(b):
            yield f"the length of {where}", len(a), len(b)
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from _pairs(f"{where}[{i}]", x, y)
    elif isinstance(a, (bool, int, float, str)):
        if a != b:
            yield where, a, b
    elif hasattr(a, "__dict__") and not isinstance(a, type):
        yield from _pairs(f"{where}.{type(a).__name__}", vars(a), vars(b))


def _peak(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().nan_to_num(0, 0, 0).abs().max()) if tensor.numel() else 0.0


def _gap(a: torch.Tensor, b: torch.Tensor) -> float:
    if not a.numel():
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    gap = torch.where(a == b, 0.0, (a - b).abs())
    return float("inf") if bool(gap.isnan().any()) else float(gap.max())


@contextmanager
def _told() -> Iterator[list[str]]:
    """Collect what the wrapper warns of."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield said
        finally:
            said += [str(w.message) for w in caught if str(w.message).startswith("autoplace")]


def _refusal(case: _Case, plan: Plan) -> tuple[str, str]:
    """Ask the bare executor: why it must refuse the plan, and what is wrong with it; both empty when it is right."""
    try:
        executor = build_executor(case.model, plan, case.cluster)
    except ExecutionError as error:
        return str(error), ""
    try:
        report = check_plan(case.workload, executor, reference=case.reference)
    except ExecutionError as error:
        return str(error), ""
    finally:
        executor.close()
    parts = len(plan.replicas) * plan.microbatches
    if report.ok or parts == 1:
        return "", report.reason
    if case.reference.noisy:
        return "random numbers besides dropout differ between parts of a batch", ""
    mixes = case.mixes_samples()
    return (mixes, "") if mixes else ("", report.reason)


def _wrapped(case: _Case, wrapper: OptimizedParallel) -> dict[str, Any]:
    """Call the wrapper and compare; returns the cell of the table without its status."""
    cell: dict[str, Any] = {"why": ""}
    for _ in range(_CALLS):
        why, output_error, gradient_strain = compare(case.expected, case.pass_(wrapper))
        cell["why"] = cell["why"] or why
        cell["output_error"] = max(cell.get("output_error", 0.0), output_error)
        cell["gradient_strain"] = max(cell.get("gradient_strain", 0.0), gradient_strain)
    if list(wrapper.state_dict()) != case.keys or list(case.model.state_dict()) != case.keys:
        cell["why"] = cell["why"] or "the keys of state_dict changed"
    if [id(p) for p in wrapper.parameters()] != case.parameters:
        cell["why"] = cell["why"] or "the parameters are other objects"
    return cell


def _forced(case: _Case, executor: str, groups: OpGraph) -> dict[str, Any]:
    """Fill a cell; stages that must not see parts of a batch are tried on the whole batch then."""
    if executor in ("stages", "graph") and len(set(halves(groups).values())) < 2:
        return {"status": "refused", "reason": "the model's groups do not divide into two halves"}
    cell = _under(case, forced_plan(executor, groups))
    if cell["status"] == "refused" and executor in ("stages", "graph"):
        whole = _under(case, forced_plan(executor, groups, microbatches=1))
        return {**whole, "parts_refused": cell["reason"]} if whole["status"] != "refused" else cell
    return cell


def _under(case: _Case, plan: Plan) -> dict[str, Any]:
    """Return the cell of a plan."""
    refused, wrong = unfit(case.model, plan, training=case.training), ""
    if not refused:
        refused, wrong = _refusal(case, plan)
    wrapper = OptimizedParallel(case.model, plan=plan, cluster=case.cluster, **_HANDS_OFF)
    try:
        with _told() as said:
            cell = _wrapped(case, wrapper)
        ran = wrapper.plan is not None and not wrapper.plan.is_plain and not said
    finally:
        wrapper.close()
    wrong = wrong or cell.pop("why")
    if not wrong and not refused and not ran:
        wrong = f"the wrapper fell back without need: {'; '.join(said)}"
    cell |= {"told": said, "microbatches": plan.microbatches, "engine": plan.engine}
    return {**cell, "status": "FAIL" if wrong else "refused" if refused else "ok", "reason": wrong or refused}


def _free(case: _Case, budget_s: float) -> dict[str, Any]:
    wrapper = OptimizedParallel(case.model, cluster=case.cluster, budget_s=budget_s, compile=False, **_HANDS_OFF)
    try:
        with _told() as said:
            cell = _wrapped(case, wrapper)
        plan = wrapper.plan
    finally:
        wrapper.close()
    wrong = cell.pop("why")
    described = "none" if plan is None else plan.shape if plan.is_plain else f"{plan.shape} ({plan.engine})"
    return {**cell, "status": "FAIL" if wrong else "ok", "reason": wrong, "plan": described, "told": said}


def run_case(
    name: str, *, training: bool, executors: Sequence[str] = EXECUTORS, budget_s: float | None = 3.0
) -> dict[str, Any]:
    """Run one architecture in one mode under every executor and the planner's choice; never raises.

    Args:
        name: One of `ARCHITECTURES`.
        training: Whether gradients are compared, in training mode without dropout.
        executors: Which executors are forced.
        budget_s: Seconds for the planner's choice; None leaves it out.

    Returns:
        The row of the table, JSON-ready.
    """
    start = time.perf_counter()
    row: dict[str, Any] = {
        "name": name,
        "family": ARCHITECTURES[name].family,
        "mode": "training" if training else "eval",
        "cells": {},
    }
    try:
        case = _Case(name, training=training)
        with no_dropout(case.model):
            case.reference, case.expected = Reference(case.workload), case.pass_(case.model)
            captured = capture(case.workload)
            groups = coarsen(captured.graph, max_groups=_MOST_GROUPS, called=captured.called).graph
            row |= _captured(captured, groups)
            for executor in executors:
                row["cells"][executor] = _guarded(lambda executor=executor: _forced(case, executor, groups))
            if budget_s is not None:
                row["cells"][FREE] = _guarded(lambda: _free(case, budget_s))
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    row["seconds"] = time.perf_counter() - start
    return row


def _captured(captured: Capture, groups: OpGraph) -> dict[str, Any]:
    return {
        "rung": captured.rung,
        "rung_reason": captured.reason,
        "dynamic_batch": captured.dynamic_batch,
        "ops": captured.graph.num_ops,
        "groups": groups.num_ops,
    }


def _guarded(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return run()
    except AutoplaceError as error:
        return {"status": "FAIL", "reason": f"{type(error).__name__}: {error}"[:300]}
    except Exception as error:
        return {"status": "FAIL", "reason": f"the wrapper raised {type(error).__name__}: {error}"[:300]}
