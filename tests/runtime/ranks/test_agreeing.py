"""What one rank finds wrong, all say."""

from __future__ import annotations


def test_facts_that_differ_are_named_on_all_ranks(two_ranks, jobs):
    assert two_ranks.run(jobs.agree, "same") == ["", ""]
    first, second = two_ranks.run(jobs.agree, "of {rank}")
    assert (
        first
        == second
        == ("the ranks disagree: thing is 'of 0' on rank 0 and 'of 1' on rank 1; make them the same and start again")
    )


def test_an_error_on_one_rank_is_raised_on_all(two_ranks, jobs):
    first, second = two_ranks.run(jobs.fail_on, 1)
    assert first == second and first.startswith("rank 1 (host0/cpu:1): ValueError: only here")
    assert two_ranks.run(jobs.fail_on, 7) == [0, 1]
