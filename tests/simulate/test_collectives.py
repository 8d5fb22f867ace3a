"""All-reduces and plans over several ranks, against hand calculations and the simulator of one host."""

from __future__ import annotations

import numpy as np
import pytest

from autoplace.errors import InputError
from autoplace.graph import OpGraph
from autoplace.graph.backward import with_backward
from autoplace.hardware import Cluster, Device, Link
from autoplace.plan import Plan, Replica
from autoplace.problem import Objective, Problem
from autoplace.simulate import SimulatedEvaluator
from autoplace.simulate.cluster_factors import ClusterFactors
from autoplace.simulate.collectives import ClusterEvaluator, allreduce_ms, holders, sync_ms

NEUTRAL = ClusterFactors()


def cluster_of(count, *, links=None, memory=float("inf"), watts=None, link=None):
    return Cluster(
        devices=tuple(
            Device(
                name=f"h{i}/cpu:0",
                kind="cpu",
                memory_bytes=memory,
                idle_watts=None if watts is None else watts[0],
                busy_watts=None if watts is None else watts[1],
            )
            for i in range(count)
        ),
        links=links or {},
        default_link=link or Link(latency_ms=1.0, bytes_per_ms=10.0),
    )


def build(*, training=True, speeds=(1.0, 1.0), batch=4, objective=None, **cluster):
    """a (2 ms, 100 bytes of weights) hands 80 bytes to b (3 ms, 300 bytes); backwards take twice as long."""
    graph = OpGraph.build(
        names=["a", "b"],
        edges=[(0, [1], 80.0)],
        weight_bytes=[100, 300],
        activation_bytes=[16, 8],
        flops=[1.0, 1.0],
    )
    latency = [2.0, 3.0]
    if training:
        graph, latency = with_backward(graph), [2.0, 3.0, 0.0, 6.0, 4.0]
    return Problem(
        graph=graph,
        cluster=cluster_of(len(speeds), **cluster),
        latency_ms=np.outer(latency, speeds),
        batch_size=batch,
        objective=objective or Objective(),
    )


def replicas(problem, shares):
    names = problem.graph.names
    return Plan(
        replicas=tuple(
            Replica(assignment=dict.fromkeys(names, f"h{i}/cpu:0"), share=share) for i, share in enumerate(shares)
        ),
        strategy="test",
    )


def stages(problem, microbatches=1, row=(0, 1)):
    whole = [row[0], row[1], row[1], row[1], row[0]][: problem.num_ops]
    return Plan.from_assignment(problem, whole, strategy="test", microbatches=microbatches)


def latency(problem, plan, **options):
    (outcome,) = ClusterEvaluator(problem, **{"factors": NEUTRAL, **options}).evaluate([plan])
    assert outcome.feasible, outcome.reason
    return outcome.latency_ms


def test_a_ring_by_hand():
    cluster = cluster_of(3)
    assert allreduce_ms(400, [0, 1], cluster) == 2 * 1.0 + 2 * 0.5 * 400 / 10
    assert allreduce_ms(400, [0, 1, 2], cluster) == pytest.approx(4 * 1.0 + 4 / 3 * 400 / 10)
    assert allreduce_ms(400, [1], cluster) == allreduce_ms(0, [0, 1], cluster) == 0.0


def test_the_slowest_link_of_the_ring_decides():
    slow = {("h2/cpu:0", "h0/cpu:0"): Link(latency_ms=3.0, bytes_per_ms=2.0)}
    cluster = cluster_of(3, links=slow)
    assert allreduce_ms(60, [2, 0, 1], cluster) == pytest.approx(4 * 3.0 + 4 / 3 * 60 / 2)
    # The ring goes in the cluster's order: the slow way from 1 back to 0 is not taken from 2.
    assert allreduce_ms(60, [0, 1], cluster) == 2.0 + 60 / 10


def test_ranks_that_cannot_talk_cannot_reduce():
    cluster = Cluster(devices=cluster_of(2).devices)
    assert allreduce_ms(8, [0, 1], cluster) == float("inf")
    problem = build().with_(cluster=cluster)
    (outcome,) = ClusterEvaluator(problem).evaluate([replicas(problem, [0.5, 0.5])])
    assert not outcome.feasible and "no link to sum gradients" in outcome.reason
    (outcome,) = ClusterEvaluator(problem).evaluate([stages(problem)])
    assert not outcome.feasible and "no link joins" in outcome.reason


def test_one_bucket_is_ready_at_the_end():
    problem = build()
    plan = replicas(problem, [0.5, 0.5])
    assert holders(plan, problem) == {("h0/cpu:0", "h1/cpu:0"): 400.0}
    assert sync_ms(plan, problem, bucket_bytes=400) == 42.0


def test_buckets_are_small_where_links_are_slow():
    # 20 ms of 10 bytes a ms, which is more than an eighth of 400: two buckets.
    problem = build()
    plan = replicas(problem, [0.5, 0.5])
    assert sync_ms(plan, problem) == sync_ms(plan, problem, bucket_bytes=200) == pytest.approx(41.0)
    assert latency(problem, plan) == pytest.approx(7.5 + 41.0)


def test_buckets_go_off_during_the_backward():
    # b's 300 bytes become ready from 2.5 to 5.5 ms, a's 100 from 5.5 to 7.5: two buckets of 22 ms, the first at 4.5.
    problem = build()
    plan = replicas(problem, [0.5, 0.5])
    assert sync_ms(plan, problem, bucket_bytes=200) == pytest.approx(4.5 + 22 + 22 - 7.5)
    assert sync_ms(plan, problem, bucket_bytes=200, factors=ClusterFactors(overlap_share=0.5)) == pytest.approx(42.5)
    assert sync_ms(plan, problem, bucket_bytes=200, factors=ClusterFactors(overlap_share=0.0)) == pytest.approx(44.0)
    assert sync_ms(plan, problem, bucket_bytes=200, overlap=False) == pytest.approx(44.0)
    assert sync_ms(plan, problem, factors=ClusterFactors(sync_scale=0.5)) == pytest.approx(4.5 + 11 + 11 - 7.5)


def test_a_fast_link_hides_all_but_the_last_bucket():
    problem = build(link=Link(latency_ms=0.0, bytes_per_ms=1e3))
    plan = replicas(problem, [0.5, 0.5])
    assert sync_ms(plan, problem, bucket_bytes=100) == pytest.approx(100 / 1e3)


def test_a_bucket_waits_for_the_slowest_rank():
    problem = build(speeds=(1.0, 3.0), link=Link(latency_ms=0.0, bytes_per_ms=400.0))
    assert latency(problem, replicas(problem, [0.75, 0.25])) == pytest.approx(0.25 * 45 + 1.0)
    assert latency(problem, replicas(problem, [0.25, 0.75])) == pytest.approx(0.75 * 45 + 1.0)


def test_replicas_do_not_wait_for_each_other_s_loss():
    """One is quick forwards, the other backwards: the simulator of one host lets them meet in the middle."""
    problem = build(link=Link(latency_ms=0.0, bytes_per_ms=1e12))
    uneven = problem.latency_ms.copy()
    uneven[:, 1] = [8.0, 4.0, 0.0, 1.0, 2.0]
    problem = problem.with_(latency_ms=uneven)
    plan = replicas(problem, [0.5, 0.5])
    assert latency(problem, plan) == pytest.approx(7.5)
    assert SimulatedEvaluator(problem).evaluate([plan])[0].latency_ms == pytest.approx(6.0 + 5.0)


def test_a_single_device_takes_what_it_takes_alone():
    for training in (True, False):
        problem = build(training=training)
        plan = Plan.from_assignment(problem, [0] * problem.num_ops, strategy="test")
        alone = SimulatedEvaluator(problem).evaluate([plan])[0]
        assert latency(problem, plan) == alone.latency_ms == problem.latency_ms[:, 0].sum()
        assert sync_ms(plan, problem) == 0.0


def test_sharded_plans_sum_in_the_backward_and_wait_in_the_forward():
    problem = build()
    plan = replicas(problem, [0.5, 0.5]).with_(sharded=1.0)
    # One bucket: to its owner after the backward, 1 + 400/2/10 ms, and back before the forward begins.
    assert sync_ms(plan, problem, bucket_bytes=400) == pytest.approx(2 * 21.0)
    # b's 300 bytes take 16 ms from 5.5 ms on, a's 100 then 6: 20 ms after the end at 7.5. In the forward, a's come at 6
    # and b's at 22 ms, where b would begin at 1.
    assert sync_ms(plan, problem, bucket_bytes=300) == pytest.approx(20.0 + 21.0)
    apart = ClusterFactors(overlap_share=0.0)
    assert sync_ms(plan, problem, bucket_bytes=300, factors=apart) == pytest.approx(2 * (16.0 + 6.0))
    assert latency(problem, plan, bucket_bytes=300) == pytest.approx(7.5 + 41.0)
    # A quarter with owners, a's: b's are summed for all, 32 ms from 5.5 ms on, then a's to their owner, 6 ms, and back.
    quarter = plan.with_(sharded=0.25)
    assert sync_ms(quarter, problem, bucket_bytes=300) == pytest.approx((5.5 + 32.0 + 6.0 - 7.5) + 6.0)


def test_sharded_plans_hold_a_part_of_the_optimizers_state_and_no_buckets_between_steps():
    problem = build()
    evaluator = ClusterEvaluator(problem, optimizer_bytes_per_weight_byte=2.0)
    plan = replicas(problem, [0.5, 0.5])
    (held, kept), (sharded, none) = evaluator.memory_bytes(plan), evaluator.memory_bytes(plan.with_(sharded=1.0))
    assert kept.tolist() == [400.0, 400.0] and none.tolist() == [0.0, 0.0]
    # 400 less of state, 400 less of buckets, and 1.5 times 400 on the way.
    assert (sharded - held).tolist() == pytest.approx([-400.0 - 400.0 + 600.0] * 2)


def test_overheads_do_not_shrink_with_the_share():
    problem = build(link=Link(latency_ms=0.0, bytes_per_ms=1e12))
    problem = problem.with_(overhead_ms=np.full((5, 2), 1.0) * (problem.latency_ms > 0))
    assert latency(problem, replicas(problem, [0.5, 0.5])) == pytest.approx(4 + 0.5 * (15 - 4))


@pytest.mark.parametrize(("microbatches", "gpipe", "expected"), [(2, True, 31.0), (2, False, 27.0), (1, False, 33.0)])
def test_pipelines_by_hand(microbatches, gpipe, expected):
    # See `test_stage_schedule`; a whole batch: 2 + (1 + 8) + 3 + 6 + (1 + 8) + 4.
    problem = build()
    assert latency(problem, stages(problem, microbatches), gpipe=gpipe) == pytest.approx(expected)


def test_microbatches_that_do_not_divide_the_batch_are_fewer():
    problem = build(batch=4)
    assert latency(problem, stages(problem, 3)) == latency(problem, stages(problem, 2))


def test_gpipe_without_transfers_is_what_the_simulator_of_one_host_says():
    random = np.random.default_rng(1)
    graph = OpGraph.build(names=[f"op{i}" for i in range(9)], edges=[(i, [i + 1], 0.0) for i in range(8)])
    cluster = cluster_of(3, link=Link(latency_ms=0.0, bytes_per_ms=1.0))
    times = random.random((9, 3)) + 0.1
    whole = np.concatenate([times, np.zeros((1, 3)), 2 * times[::-1]])
    problem = Problem(graph=with_backward(graph), cluster=cluster, latency_ms=whole, batch_size=8)
    for cuts in ((3, 6), (1, 7), (4, 5)):
        row = np.repeat([0, 1, 2], np.diff([0, *cuts, 9]))
        plan = Plan.from_assignment(problem, [*row, 2, *row[::-1]], strategy="test", microbatches=4)
        expected = SimulatedEvaluator(problem).evaluate([plan])[0].latency_ms
        assert latency(problem, plan, gpipe=True) == pytest.approx(expected)


def test_factors_do_what_they_say():
    problem = build()
    plan = stages(problem)  # 15 ms of work, two transfers of 9 ms
    fast = ClusterFactors(speed={"h0/cpu:0": 0.5, "h1/cpu:0": 0.5}, link_scale=2.0)
    assert latency(problem, plan, factors=fast) == pytest.approx(7.5 + 36.0)
    assert latency(problem, plan, factors=ClusterFactors(dispatch_ms=0.25)) == pytest.approx(33.0 + 4 * 0.25)
    copying = ClusterFactors(copy_bytes_per_ms=80.0)
    assert latency(problem, plan, factors=copying) == pytest.approx(33.0 + 2 * 1.0)
    single = Plan.from_assignment(problem, [0] * 5, strategy="test")
    assert latency(problem, single, factors=ClusterFactors(dispatch_ms=9.0)) == 15.0


def hybrid_problem():
    problem = build(speeds=(1.0, 1.0, 1.0, 1.0), batch=8)
    names = problem.graph.names
    replicas = [
        Replica(assignment={n: f"h{d}/cpu:0" for n, d in zip(names, row, strict=True)}, share=0.5)
        for row in ([0, 1, 1, 1, 0], [2, 3, 3, 3, 2])
    ]
    return problem, Plan(replicas=tuple(replicas), strategy="test")


def test_hybrids_reduce_set_by_set_after_the_backward():
    # Each: a 1, link 1+4, b 1.5, b' 3, link 5, a' 2 = 17.5; b's ranks are done at 15.5 (they wait for their send).
    problem, plan = hybrid_problem()
    # a: 100 bytes, 2 + 10 = 12 ms from 17.5 on; b: 300 bytes, 2 + 30 = 32 ms from 15.5 on.
    assert sync_ms(plan, problem) == pytest.approx(15.5 + 32 - 17.5)
    assert latency(problem, plan) == pytest.approx(47.5)


def test_tied_weights_across_stages_are_reduced():
    problem = build()
    tied = OpGraph.build(
        names=["a", "b"], edges=[(0, [1], 80.0)], weight_bytes=[100, 300], activation_bytes=[16, 8], colocate=[0, 0]
    )
    problem = problem.with_(graph=with_backward(tied))
    assert latency(problem, stages(problem)) == pytest.approx(33.0 + 2 + 10)


def test_memory_counts_gradients_optimizer_and_microbatches_in_flight():
    problem = build()
    (data,) = ClusterEvaluator(problem, factors=NEUTRAL, optimizer_bytes_per_weight_byte=2.0).evaluate(
        [replicas(problem, [0.5, 0.5])]
    )
    assert data.peak_memory_bytes == {"h0/cpu:0": 400 * 5 + 12.0, "h1/cpu:0": 400 * 5 + 12.0}  # and buckets
    evaluator = ClusterEvaluator(problem, factors=NEUTRAL)
    (piped,) = evaluator.evaluate([stages(problem, 4)])  # 1F1B: three and two of four; and buffers at the border
    assert piped.peak_memory_bytes == {"h0/cpu:0": 200 + 12.0 + 80, "h1/cpu:0": 600 + 4.0 + 80}
    (piped,) = ClusterEvaluator(problem, factors=NEUTRAL, gpipe=True).evaluate([stages(problem, 4)])
    assert piped.peak_memory_bytes == {"h0/cpu:0": 200 + 16.0 + 80, "h1/cpu:0": 600 + 8.0 + 80}
    inference = build(training=False)
    plan = Plan.from_assignment(inference, [0, 1], strategy="test")
    (bare,) = ClusterEvaluator(inference, factors=NEUTRAL, optimizer_bytes_per_weight_byte=2.0).evaluate([plan])
    assert bare.peak_memory_bytes == {"h0/cpu:0": 116.0, "h1/cpu:0": 308.0 + 80}


def test_too_little_memory_is_a_reason():
    problem = build(memory=700.0)
    whole, split = ClusterEvaluator(problem, factors=NEUTRAL).evaluate([replicas(problem, [0.5, 0.5]), stages(problem)])
    assert not whole.feasible and "'h0/cpu:0' would hold 1212 bytes" in whole.reason
    assert split.feasible
    assert ClusterEvaluator(problem, factors=NEUTRAL).predict_ms(replicas(problem, [0.5, 0.5])) == 48.5


def test_what_a_rank_holds_at_rest_is_in_place_of_its_weights():
    problem = build(memory=2000.0).with_(resting_bytes={"h0/cpu:0": 900.0, "h1/cpu:0": 1000.0})
    whole, split = ClusterEvaluator(problem, factors=NEUTRAL).evaluate([replicas(problem, [0.5, 0.5]), stages(problem)])
    assert split.peak_memory_bytes == {"h0/cpu:0": 900 + 100 + 16.0 + 80, "h1/cpu:0": 1000 + 300 + 8.0 + 80}
    assert whole.peak_memory_bytes == {"h0/cpu:0": 900 + 800 + 12.0, "h1/cpu:0": 1000 + 800 + 12.0}
    assert problem.fingerprint != build(memory=2000.0).fingerprint
    tight = problem.with_(resting_bytes={"h0/cpu:0": 1300.0, "h1/cpu:0": 1300.0})
    whole, split = ClusterEvaluator(tight, factors=NEUTRAL).evaluate([replicas(tight, [0.5, 0.5]), stages(tight)])
    assert not whole.feasible and split.feasible


def test_what_ranks_cannot_run_has_a_reason():
    problem = build()
    evaluator = ClusterEvaluator(problem)
    names = problem.graph.names
    twice = Plan(
        replicas=(Replica(assignment=dict.fromkeys(names, "h0/cpu:0"), share=0.5),) * 2, strategy="test"
    )  # fmt: skip
    apart = Plan.from_assignment(problem, [0, 1, 1, 0, 0], strategy="test")
    stranger = Plan(replicas=(Replica(assignment=dict.fromkeys(names, "h9/cpu:0")),), strategy="test")
    reasons = [o.reason for o in evaluator.evaluate([twice, apart, stranger, Plan.plain()])]
    for reason, words in zip(
        reasons, ("in two replicas", "its backward are on two", "does not fit", "measure it"), strict=True
    ):
        assert words in reason
    unable = problem.latency_ms.copy()
    unable[1, 1] = np.inf
    (outcome,) = ClusterEvaluator(problem.with_(latency_ms=unable)).evaluate([stages(problem)])
    assert outcome.reason == "op 'b' cannot run on 'h1/cpu:0'; place it elsewhere"
    assert evaluator.evaluations == 4


def test_energy_throughput_and_timeline():
    problem = build(watts=(10.0, 110.0), objective=Objective(energy_weight=0.5))
    (outcome,) = ClusterEvaluator(problem, factors=NEUTRAL).evaluate([stages(problem)], timeline=True)
    assert outcome.energy_j == pytest.approx((20 * 33 + 100 * 15) / 1000)
    assert outcome.energy_source == "model"
    assert outcome.objective == pytest.approx((33 * outcome.energy_j) ** 0.5)
    assert outcome.throughput_sps == pytest.approx(4000 / 33) and outcome.period_ms == outcome.latency_ms
    assert [s.resource for s in outcome.timeline] == [
        "h0/cpu:0", "h1/cpu:0", "h1/cpu:0", "h0/cpu:0", "h0/cpu:0 -> h1/cpu:0", "h1/cpu:0 -> h0/cpu:0",
    ]  # fmt: skip
    (data,) = ClusterEvaluator(problem, factors=NEUTRAL).evaluate([replicas(problem, [0.5, 0.5])], timeline=True)
    assert (data.timeline[-1].label, data.timeline[-1].end_ms) == ("all-reduce", 48.5)
    with pytest.raises(InputError):
        ClusterEvaluator(build(objective=Objective(energy_weight=0.5)))


def test_inference_pipelines_have_a_period():
    problem = build(training=False, objective=Objective(goal="throughput"))
    plan = Plan.from_assignment(problem, [0, 1], strategy="test")
    (outcome,) = ClusterEvaluator(problem, factors=NEUTRAL).evaluate([plan])
    assert (outcome.latency_ms, outcome.period_ms) == (14.0, 3.0)


def test_factors_are_checked_and_travel_as_json():
    for bad in ({"sync_scale": 0.0}, {"overlap_share": 1.5}, {"dispatch_ms": -1.0}, {"speed": {"x": 0.0}}):
        with pytest.raises(InputError):
            ClusterFactors(**bad)
    factors = ClusterFactors(speed={"h0/cpu:0": 1.5}, sync_scale=2.0, overlap_share=0.25)
    assert ClusterFactors.from_json(factors.to_json()) == factors
    with pytest.raises(InputError):
        ClusterFactors.from_json({"speed": []})
    assert ClusterFactors().sentence == "no correction"
    assert factors.sentence == "h0/cpu:0 ×1.50, all-reduce ×2.00, 25% of the overlap"
    gpus = Cluster(devices=(Device(name="h/cuda:0", kind="cuda"),))
    assert ClusterFactors.assumed(gpus) == ClusterFactors()
    assert ClusterFactors.assumed(cluster_of(2)).overlap_share < 1.0
