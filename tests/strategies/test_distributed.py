"""Plans for several ranks: shares by speed, fewer ranks on slow links, stages where memory asks for them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoplace.errors import InfeasibleError
from autoplace.graph.backward import with_backward
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.measure.pool import plan_key
from autoplace.policy.network import PolicyNetwork
from autoplace.policy.policy import Policy
from autoplace.problem import Problem
from autoplace.simulate.cluster_factors import ClusterFactors
from autoplace.simulate.collectives import ClusterEvaluator
from autoplace.simulate.stage_line import stage_line
from autoplace.strategies._shares import refine_counts, whole_units
from autoplace.strategies.distributed import propose_distributed
from autoplace.strategies.hybrids import partitions
from autoplace.strategies.pipelines import in_line, pipeline_plans

FAST = Link(latency_ms=0.01, bytes_per_ms=1e8)
SLOW = Link(latency_ms=0.2, bytes_per_ms=2e4)


def build(speeds, *, ops=8, batch=24, link=FAST, memory=float("inf"), overhead=0.0, colocate=None, weight=100_000):
    """A chain of equal layers: 1 ms forward and 2 ms backward each, times the device's number."""
    graph = OpGraph.build(
        names=[f"layer{i}" for i in range(ops)],
        edges=[(i, [i + 1], 1000.0) for i in range(ops - 1)],
        weight_bytes=[weight] * ops,
        activation_bytes=[1000] * ops,
        flops=[1e6] * ops,
        colocate=colocate,
    )
    memory = memory if isinstance(memory, (list, tuple)) else [memory] * len(speeds)
    cluster = Cluster(
        devices=tuple(Device(name=f"h{i}/cpu:0", kind="cpu", memory_bytes=m) for i, m in enumerate(memory)),
        default_link=link,
    )
    times = np.asarray([1.0] * ops + [0.0] + [2.0] * ops)
    latency = np.outer(times, speeds)
    return Problem(
        graph=with_backward(graph),
        cluster=cluster,
        latency_ms=latency,
        overhead_ms=overhead * latency,
        batch_size=batch,
    )


def samples(candidate, batch):
    return [round(r.share * batch, 6) for r in candidate.plan.replicas]


def of_kind(candidates, word):
    return [c for c in candidates if word in c.label]


def shapes(candidates):
    return {c.plan.shape for c in candidates}


def test_equal_devices_get_equal_shares_and_even_is_the_best_of_its_kind():
    found = propose_distributed(build([1.0] * 4))
    (even,) = of_kind(found, "even")
    assert even.label.startswith("even data parallel, weighted") and samples(even, 24) == [6.0] * 4
    assert next(c for c in found if not c.plan.sharded) is even


def test_owners_halve_what_a_slow_link_leaves_exposed():
    # 8 MB: 200 ms on the link, beside 160 of work.
    problem = build([10.0, 20.0], weight=1_000_000, link=Link(latency_ms=0.1, bytes_per_ms=4e4))
    found = propose_distributed(problem, factors=ClusterFactors())
    best = {sharded: next(c for c in found if c.plan.shape == "replicas" and bool(c.plan.sharded) is sharded)
            for sharded in (True, False)}  # fmt: skip
    assert best[True].label.startswith("sharded ")
    assert best[True].predicted.latency_ms < 0.9 * best[False].predicted.latency_ms


def test_gpus_and_inference_know_no_owners():
    problem = build([1.0, 2.0])
    gpu = replace(problem.cluster.devices[0], kind="cuda")
    mixed = problem.with_(cluster=replace(problem.cluster, devices=(gpu, *problem.cluster.devices[1:])))
    assert not any(c.plan.sharded for c in propose_distributed(mixed))
    inference = OpGraph.build(
        names=["a", "b"], edges=[(0, [1], 8.0)], weight_bytes=[8, 8], activation_bytes=[8, 8], flops=[1.0, 1.0]
    )
    forward = Problem(graph=inference, cluster=problem.cluster, latency_ms=np.ones((2, 2)), batch_size=4)
    assert not any(c.plan.sharded for c in propose_distributed(forward))


def test_a_device_twice_as_slow_gets_half_as_much():
    found = propose_distributed(build([1.0, 2.0]))
    best = next(c for c in of_kind(found, "weighted") if c.plan.shape == "replicas")
    assert samples(best, 24) == [16.0, 8.0]
    (even,) = of_kind(found, "even")
    assert samples(even, 24) == [12.0, 12.0]
    assert best.predicted.latency_ms < even.predicted.latency_ms


def test_overheads_move_samples_to_the_fast_device():
    plain, heavy = (
        next(c for c in of_kind(propose_distributed(build([1.0, 2.0], overhead=o)), "weighted")) for o in (0.0, 0.3)
    )
    assert samples(heavy, 24)[0] > samples(plain, 24)[0]


def test_slow_links_want_fewer_replicas():
    def best_of(link):
        found = propose_distributed(build([1.0, 1.0, 1.0, 1.0], link=link, weight=100_000))
        return max(1, len(found[0].plan.replicas))

    counts = [best_of(Link(latency_ms=0.01, bytes_per_ms=rate)) for rate in (1e8, 8e4, 1e4)]
    assert counts[0] == 4 and counts[0] >= counts[1] >= counts[2] and counts[2] == 1


def test_a_very_slow_device_is_left_out():
    found = propose_distributed(build([1.0, 1.0, 50.0], link=Link(latency_ms=0.01, bytes_per_ms=1e6), overhead=0.2))
    assert set(found[0].plan.devices) == {"h0/cpu:0", "h1/cpu:0"}


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.floats(0.5, 4.0), min_size=1, max_size=4),
    st.sampled_from([1, 3, 8, 12]),
    st.floats(0.0, 0.4),
    st.sampled_from([FAST, SLOW]),
)
def test_all_plans_are_whole_samples_unique_and_in_order(speeds, batch, overhead, link):
    problem = build(speeds, ops=4, batch=batch, overhead=overhead, link=link)
    found = propose_distributed(problem, evaluations=200)
    assert len({plan_key(c.plan) for c in found}) == len({c.label for c in found}) == len(found)
    for candidate in found:
        plan = candidate.plan
        counts = samples(candidate, batch)
        assert sum(r.share for r in plan.replicas) == pytest.approx(1.0)
        assert all(c == int(c) > 0 for c in counts) and sum(counts) == batch
        assert candidate.predicted.feasible
        assert (plan.graph_fingerprint, plan.cluster_fingerprint) == (
            problem.graph.fingerprint,
            problem.cluster.fingerprint,
        )
        assert len(plan.devices) == sum(len(r.devices) for r in plan.replicas)
        if plan.shape in ("stages", "hybrid"):
            assert all(c % plan.microbatches == 0 for c in counts)
            lines = [stage_line(problem.graph, plan.assignment_array(problem, r)) for r in range(len(plan.replicas))]
            assert all(line.alone for line in lines)
    best = [c.predicted.objective for c in found]
    assert found[0].predicted.objective == min(best)
    tail = best[6:]  # the best of each kind stand before it
    assert tail == sorted(tail)


def test_every_kind_has_its_best_in_front():
    found = propose_distributed(build([1.0, 1.5, 2.0]))
    heads = found[:6]
    assert any(c.plan.sharded for c in heads)
    assert shapes(heads) == {"single", "replicas", "stages", "hybrid"}
    assert [c.predicted.objective for c in heads] == sorted(c.predicted.objective for c in heads)
    (single,) = [c for c in found if c.plan.shape == "single"]
    assert single.label == "single h0/cpu:0"


def test_hybrids_have_unequal_shares():
    found = propose_distributed(build([1.0, 1.0, 1.0], memory=[2.6e6, 1.4e6, 1.4e6]))
    best = next(c for c in found if c.plan.shape == "hybrid")
    assert [len(r.devices) for r in best.plan.replicas] == [1, 2]
    assert best.plan.replicas[0].share < best.plan.replicas[1].share
    assert not of_kind(found, "even")


def test_memory_is_respected():
    # A layer is 200 kB with its gradient, 400 kB with Adam's state.
    problem = build([1.0, 2.0, 2.0], memory=[1.3e6, 2.3e6, 1.3e6])
    found = propose_distributed(problem, optimizer_bytes_per_weight_byte=2.0)
    assert shapes(found) == {"stages"}
    limits = {d.name: d.memory_bytes for d in problem.cluster.devices}
    for candidate in found:
        assert all(held <= limits[name] for name, held in candidate.predicted.peak_memory_bytes.items())
    with pytest.raises(InfeasibleError, match="no plan over these ranks fits: device"):
        propose_distributed(build([1.0, 2.0], memory=1e6), optimizer_bytes_per_weight_byte=2.0)


def test_pipelines_give_the_fast_device_more_layers():
    problem = build([1.0, 3.0])
    evaluator = ClusterEvaluator(problem, factors=ClusterFactors())
    best = pipeline_plans(problem, evaluator, microbatches=(8,))[0]
    row = best.assignment_array(problem)[:8]
    assert np.bincount(row, minlength=2).tolist() == [6, 2]
    assert best.microbatches == 8


def test_numbers_of_microbatches_divide_the_batch():
    found = propose_distributed(build([1.0, 1.0], batch=6), microbatches=(1, 2, 4, 6, 12))
    assert {c.plan.microbatches for c in found if c.plan.shape == "stages"} == {1, 2, 6}


def test_ties_may_be_split_or_kept():
    ties = [0, *[-1] * 6, 0]
    problem = build([1.0, 1.0], colocate=ties)

    def apart(candidates):
        maps = [c.plan.replicas[0].assignment for c in candidates if c.plan.shape == "stages"]
        return [m["layer0"] != m["layer7"] for m in maps]

    assert any(apart(propose_distributed(problem)))
    assert not any(apart(propose_distributed(problem, split_ties=False)))


def test_the_policy_proposes_too():
    problem = build([1.0, 1.5], ops=4)
    policy = Policy.of(PolicyNetwork(seed=0))
    found = propose_distributed(problem, policy=policy, evaluations=40, microbatches=(2,))
    assert of_kind(found, "learned")
    again = propose_distributed(problem, policy=policy, evaluations=40, microbatches=(2,))
    assert [plan_key(c.plan) for c in found] == [plan_key(c.plan) for c in again]


def test_one_device_has_one_plan():
    (only,) = propose_distributed(build([1.0]))
    assert only.plan.shape == "single"


def test_many_devices_are_divided_by_host_size_and_speed():
    problem = build([1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0], ops=8, batch=32)
    evaluator = ClusterEvaluator(problem)
    found = partitions(problem, evaluator, range(8))
    assert ((0, 1), (2, 3), (4, 5), (6, 7)) in found and ((0, 1, 2, 3), (4, 5, 6, 7)) in found
    assert ((0, 7), (2, 5), (3, 4), (1, 6)) in found  # the fastest with the slowest
    candidates = propose_distributed(problem, evaluations=300, microbatches=(1, 4))
    assert {"single", "replicas", "stages", "hybrid"} <= shapes(candidates)


def test_three_devices_have_three_divisions():
    problem = build([1.0, 1.0, 1.0])
    found = {tuple(sorted(p)) for p in partitions(problem, ClusterEvaluator(problem), range(3))}
    assert found == {((0,), (1, 2)), ((0, 1), (2,)), ((0, 2), (1,))}


def test_a_scattered_placement_in_line_keeps_its_balance():
    problem = build([1.0, 1.0], ops=6)
    row = np.asarray([1, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 1])
    assert in_line(problem, row).tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]


def test_whole_units_follow_the_largest_remainders():
    assert whole_units([0.5, 0.3, 0.2], 8) == (4, 2, 2)
    assert whole_units([1 / 3] * 3, 8) == (3, 3, 2)
    assert sum(whole_units([0.1] * 10, 7)) == 7


def test_counts_are_refined_to_the_least_value():
    def value(counts):
        return max(counts[0] * 1.0, counts[1] * 2.0 + 3.0, counts[2] * 5.0)

    best, counts = refine_counts((10, 10, 10), value, most=500)
    exhaustive = min(value((a, b, 30 - a - b)) for a in range(31) for b in range(31 - a))
    assert best == value(counts) == exhaustive
    assert refine_counts((1,), lambda _: 3.0, most=5) == (3.0, (1,))
