"""The space of the knobs, and the search over it with a made-up machine: certain and fast."""

from __future__ import annotations

import pytest
import torch

from autoplace import Workload
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.knob_bases import knob_bases, lock_bound
from autoplace.knob_search import search_knobs
from autoplace.knobs import Base, KnobSpace, has_images, in_line_threads, knob_label, with_threads
from autoplace.measure.pool import plan_key
from autoplace.outcome import Outcome
from autoplace.plan import Plan, Replica
from autoplace.problem import Problem
from autoplace.result import Candidate

A, B = "host0/cpu:0", "host0/cpu:1"
CLUSTER = Cluster(
    devices=tuple(Device(name=name, kind="cpu", cores=(i,)) for i, name in enumerate((A, B))),
    default_link=Link(latency_ms=0.0, bytes_per_ms=1e9),
)


def make(*replicas, shares=None, **knobs):
    shares = shares or [1.0 / len(replicas)] * len(replicas)
    made = tuple(
        Replica(assignment={".": r} if isinstance(r, str) else r, share=s)
        for r, s in zip(replicas, shares, strict=True)
    )
    return Plan(replicas=made, strategy="test", **knobs)


SINGLE, REPLICAS, STAGES = make(A), make(A, B), make({"0": A, "1": B}, microbatches=2)


def space(*bases, **allowed):
    bases = bases or (
        Base(name="plain", plan=Plan.plain()),
        Base(name="single", plan=SINGLE, threads=(1, 2)),
        Base(name="replicas", plan=REPLICAS, engines=("threads", "processes"), shares=True),
        Base(name="stages", plan=STAGES, microbatches=(2, 1, 4), engines=("threads", "graph")),
    )
    return KnobSpace(bases=bases, cluster=CLUSTER, batch_size=16, **allowed)


class Machine:
    """Answers as a real machine would that knows the gain of every plan."""

    def __init__(self, gain, pairs=5):
        self.gain, self.pairs = gain, pairs
        self.plans, self.labels, self.seen = [], [], []

    def __call__(self, plan, label, report):
        self.plans.append(plan)
        self.labels.append(label)
        gain = self.gain(plan)
        if gain is None:
            return None
        for count in range(1, self.pairs + 1):
            if report([gain] * count):
                break
        self.seen.append(count)
        return gain


def search(found, gain, trials=40, seed=0, known=None, **rest):
    machine = Machine(gain)
    ran = search_knobs(found, machine, trials=trials, seed=seed, known=known or {plan_key(Plan.plain()): 1.0}, **rest)
    assert ran == len(machine.plans)
    return machine


def test_points_become_plans():
    whole = space(compiled=True, channels_last=True, precisions=("float32", "bfloat16"))
    assert [whole.plan(whole.start(b)) for b in whole.bases] == [Plan.plain(), SINGLE, REPLICAS, STAGES]
    point = {"base": "stages", "stages microbatches": 4, "stages engine": "graph", "compiled": "default"}
    assert whole.plan(point) == STAGES.with_(microbatches=4, engine="graph", compiled=True)
    point = {"base": "single", "single threads": 2, "channels_last": True, "precision": "bfloat16"}
    assert whole.plan(point) == SINGLE.with_(threads={A: 2}, channels_last=True, precision="bfloat16")
    assert whole.plan({"base": "single", "single threads": 1}) == SINGLE, "one per core is the default"
    uneven = whole.plan({"base": "replicas", "replicas weight 1": 1.7})
    assert [r.share for r in uneven.replicas] == [6 / 16, 10 / 16]
    tiny = KnobSpace(bases=whole.bases, cluster=CLUSTER, batch_size=2)
    assert tiny.plan({"base": "replicas", "replicas weight 1": 2.0}).replicas[1].share == 0.5
    one = KnobSpace(bases=whole.bases, cluster=CLUSTER, batch_size=1)
    assert one.plan({"base": "replicas", "replicas weight 1": 2.0}) is None, "a part without a sample"


def test_what_is_not_allowed_is_no_knob():
    assert space().shared_knobs() == {}
    assert set(space(compiled=True).shared_knobs()) == {"compiled"}
    assert [change for name, change in space().moves() if name == "plain"] == []


def test_cheap_moves_come_first():
    moves = list(space(compiled=True, channels_last=True).moves())
    names = [list(change)[-1] for _, change in moves]
    assert names.index("channels_last") < names.index("compiled") < names.index("adopt")
    assert {name for name, _ in moves[: names.index("adopt")]} == {"plain", "single"}
    assert moves[names.index("compiled")] == ("plain", {"alone": True, "compiled": "default"})


def test_in_line_threads():
    assert in_line_threads(1) == (1,)
    assert in_line_threads(4) == (1, 4, 2, 3)
    assert in_line_threads(48) == (1, 48, 2, 4, 8, 16, 32)
    assert with_threads(SINGLE, CLUSTER, 2).threads == {A: 2} and with_threads(SINGLE, CLUSTER, 1).threads == {}


def test_labels():
    assert knob_label(Plan.plain().with_(compiled=True)) == "plain torch.compile"
    assert knob_label(REPLICAS.with_(compiled=True)) == "replicas 0.50/0.50 + compile"
    assert knob_label(Plan.plain().with_(compiled=True, cpp_wrapper=True)) == "plain + compile (C++ wrapper)"
    assert knob_label(SINGLE.with_(threads={A: 2}, channels_last=True)) == "single cpu:0 (2 threads) + channels last"
    assert knob_label(STAGES.with_(engine="graph", precision="bfloat16")) == "test x2 + bfloat16 + graph"


def test_images_are_told_from_other_inputs():
    conv, linear = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 4)
    assert has_images(Workload(model=conv, args=(torch.randn(1, 3, 8, 8),)))
    assert not has_images(Workload(model=linear, args=(torch.randn(1, 3, 8, 4),)))
    assert not has_images(Workload(model=conv, args=(torch.randn(3, 8, 8),)))


def test_the_search_finds_a_combination_and_runs_no_plan_twice():
    def gain(plan):
        value = 1.3 if plan.shape == "replicas" else 1.0
        value *= 1.2 if plan.compiled else 1.0
        return value * (1.5 if plan.engine == "processes" else 1.0)

    machine = search(space(compiled=True, channels_last=True), gain)
    keys = [plan_key(p) for p in machine.plans]
    assert len(set(keys)) == len(keys)
    assert plan_key(Plan.plain()) not in keys, "known already"
    best = max(machine.plans, key=gain)
    assert best.shape == "replicas" and best.compiled and best.engine == "processes"


def test_multi_device_plans_adopt_what_helped_the_whole_model():
    machine = search(space(channels_last=True), lambda plan: 1.4 if plan.channels_last else 0.95, trials=9)
    spread = [p for p in machine.plans if p.shape == "replicas" and p != REPLICAS]
    assert spread[0].channels_last and spread[0].engine == "threads"


def test_cpp_wrapper_is_tried_before_the_plain_compile_that_it_has_to_beat():
    machine = search(space(compiled=True, cpp_wrapper=True), lambda plan: 1.0 + 0.1 * plan.compiled)
    compiled = [p for p in machine.plans if p.compiled]
    assert compiled[:2] == [Plan.plain().with_(compiled=True, cpp_wrapper=cpp) for cpp in (True, False)]
    assert any(p.cpp_wrapper and p.shape == "single" for p in compiled)


def test_plain_pytorch_is_compiled_before_anything_else_is():
    machine = search(space(compiled=True, channels_last=True), lambda plan: 1.2 if plan.channels_last else 1.0)
    compiled = [p for p in machine.plans if p.compiled]
    assert compiled[0] == Plan.plain().with_(compiled=True)
    assert compiled[1] == Plan.plain().with_(compiled=True, channels_last=True), "a move from the best point so far"


def test_runs_that_cannot_win_end_after_two_pairs():
    machine = search(space(channels_last=True), lambda plan: 1.5 if plan.channels_last else 0.95, trials=8)
    first = next(i for i, plan in enumerate(machine.plans) if plan.channels_last)
    assert machine.seen[first] == 5, "the leader runs to its end"
    lost = [count for plan, count in zip(machine.plans, machine.seen, strict=True) if not plan.channels_last]
    assert lost and set(lost) == {2}
    far = search(space(), lambda plan: 0.85, trials=4, known={"nothing": 0.5})
    assert set(far.seen) == {2}, "far below plain PyTorch, though better than what is known"
    lenient = search(space(), lambda plan: 0.95, trials=4, bar=lambda: 0.94)
    assert set(lenient.seen) == {5}, "what is safely reached is less than the best gain"
    near = search(space(), lambda plan: 0.95, trials=1, known={"nothing": 0.5})
    assert near.seen == [5]


def test_plans_that_fail_are_not_tried_again_and_do_not_stop_the_search():
    machine = search(space(compiled=True), lambda plan: None if plan.compiled else 1.1)
    keys = [plan_key(p) for p in machine.plans]
    assert any(p.compiled for p in machine.plans) and len(set(keys)) == len(keys)
    assert any(p.shape == "stages" and not p.compiled for p in machine.plans)


def test_refused_plans_are_not_run():
    machine = search(space(compiled=True), lambda plan: 1.1, refuse=lambda plan: "no" if plan.compiled else "")
    assert machine.plans and not any(p.compiled for p in machine.plans)


def test_the_search_ends_by_trials_by_time_and_when_nothing_is_new():
    assert len(search(space(compiled=True), lambda plan: 1.0, trials=3).plans) == 3
    left = iter([False, False, True])
    assert len(search(space(compiled=True), lambda plan: 1.0, spent=lambda: next(left)).plans) <= 2
    small = space(Base(name="plain", plan=Plan.plain()), channels_last=True)
    machine = search(small, lambda plan: 1.0, trials=1000)
    assert machine.plans == [Plan.plain().with_(channels_last=True)]


def test_the_same_seed_runs_the_same_plans():
    def gain(plan):
        return 1.0 + 0.1 * plan.microbatches + (plan.replicas[0].share if plan.replicas else 0.0)

    runs = [search(space(compiled=True), gain, seed=3).plans for _ in range(2)]
    assert runs[0] == runs[1]


def _row(plan, latency_ms, gain):
    outcome = Outcome(source="measured", latency_ms=latency_ms, samples_ms=(latency_ms,))
    return Candidate(label=str(id(plan)), plan=plan, measured=outcome, gain=gain)


def _problem():
    import numpy as np

    from autoplace.graph.opgraph import OpGraph

    return Problem(
        graph=OpGraph.build(names=["."], edges=[]), cluster=CLUSTER, latency_ms=np.ones((1, 2)), batch_size=16
    )


@pytest.mark.parametrize(("replicas_ms", "bound"), [(5.5, False), (9.0, True)])
def test_replicas_that_wait_for_the_interpreter_lock(replicas_ms, bound):
    replicas = _row(REPLICAS, replicas_ms, 1.0)
    rows = [_row(Plan.plain(), 8.0, 1.0), _row(SINGLE, 10.0, 0.8), replicas]
    assert lock_bound(replicas, rows, _problem()) is bound
    assert not lock_bound(replicas, [replicas], _problem()), "nothing to compare with"


def test_bases_are_the_best_measured_of_each_shape():
    workload = Workload(model=torch.nn.Linear(4, 4), args=(torch.randn(16, 4),))
    better = make(A, B, shares=[0.25, 0.75])
    rows = [
        _row(Plan.plain(), 10.0, 1.0),
        _row(SINGLE, 11.0, 0.9),
        _row(SINGLE.with_(threads={A: 2}), 9.0, 1.1),
        _row(REPLICAS, 9.0, 1.1),
        _row(better, 8.0, 1.2),
        _row(STAGES, 40.0, 0.25),
    ]
    bases = {b.name: b for b in knob_bases(rows, workload, _problem(), exported=True)}
    assert set(bases) == {"plain", "single", "replicas"}, "the stages are hopeless"
    assert bases["single"].threads == (2, 1) and bases["replicas"].plan == better
    rows.append(_row(STAGES.with_(microbatches=1), 12.0, 0.8))
    for exported in (True, False):
        stages = knob_bases(rows, workload, _problem(), exported=exported)[-1]
        assert stages.microbatches == (1, 2, 4, 8) and stages.engines == (("threads", "graph") if exported else ())
