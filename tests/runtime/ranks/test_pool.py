"""Real runs of plans on a group of ranks that stays."""

from __future__ import annotations


def test_every_shape_is_measured_and_found_right(two_ranks, jobs):
    shapes = ["single", "replicas", "stages", "alternating"]
    for outcomes in two_ranks.run(jobs.measured, shapes):
        for shape, (feasible, reason, latency_ms, rounds) in zip(shapes, outcomes, strict=True):
            assert feasible, (shape, reason)
            assert 0 < latency_ms < 10_000 and rounds == 5


def test_plans_without_room_beside_each_other_are_measured_in_lots(two_ranks, jobs):
    shapes = ["single", "replicas", "stages"]
    for asked, outcomes in two_ranks.run(jobs.in_lots, shapes):
        assert asked == [shapes]
        assert outcomes == [(True, "", 3)] * 3


def test_rank_0_leads_and_the_others_follow(two_ranks, jobs):
    assert two_ranks.run(jobs.led, ["replicas", "stages"]) == [3, 3]


def test_plans_are_taken_out_alike_on_all_ranks(two_ranks, jobs):
    shapes = ["single", "replicas", "stages"]
    assert two_ranks.run(jobs.dropping, shapes, False) == [[4, 2, 4]] * 2
    assert two_ranks.run(jobs.dropping, shapes, True) == [[4, 2, 4], None], "rank 1 is told"


def test_a_plan_that_computes_something_else_is_thrown_out(two_ranks, jobs):
    for replicas, single in two_ranks.run(jobs.wrong_loss):
        assert "the loss is" in replicas and not single


def test_a_plan_is_compared_with_plain_pytorch_once(two_ranks, jobs):
    for seen, outcomes in two_ranks.run(jobs.checks):
        assert seen == ["replicas", "single"]
        assert outcomes == [(True, 2), (True, 2)]
