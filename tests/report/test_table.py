"""The candidates as rows: the right figure in the right column, in words that people read."""

import dataclasses

import pytest
from rich.console import Console

from autoplace.outcome import Outcome
from autoplace.plan import Plan, Replica
from autoplace.problem import Objective
from autoplace.report.table import COLUMNS, MOST_ROWS, candidate_rows, candidates_table, describe_plan, figure, time_ms


def render(result, width):
    console = Console(width=width, record=True, file=None, force_terminal=False, quiet=False)
    with console.capture() as capture:
        console.print(candidates_table(result))
    return capture.get()


def test_rows_are_plain_first_then_by_measured_time_and_failures_last(result):
    rows = candidate_rows(result)
    assert [r.label for r in rows] == [
        "plain",
        "heft x4",
        "replicas 0.50/0.50",
        "single cpu:0",
        "random 3",
        "annealing",
    ]
    assert [r.kept for r in rows].index(True) == 1
    assert rows[0].baseline and not any(r.baseline for r in rows[1:])


def test_cells_say_what_the_candidate_holds(result):
    kept = candidate_rows(result)[1]
    assert len(kept.cells) == len(COLUMNS)
    assert kept.cells == (
        "heft x4",
        "stages: cpu:0 → cpu:1, 1 thread each, 4 microbatches",
        "9.40",
        "15.1",
        "1.36 (model)",
        "1.42× (1.35–1.49)",
        "kept",
    )


def test_a_failed_run_gives_its_reason_and_no_time(result):
    failed = candidate_rows(result)[-1]
    assert (failed.measured_ms, failed.verdict) == ("failed", "out of memory on host0/cpu:1")
    assert failed.energy == "1.26 (model, predicted)"


def test_throughput_counts_the_period(result):
    outcome = Outcome(source="measured", latency_ms=10.0, period_ms=4.0)
    assert time_ms(outcome, "latency") == 10.0
    assert time_ms(outcome, "throughput") == 4.0
    assert time_ms(Outcome(source="measured", feasible=False, latency_ms=1.0), "latency") is None
    changed = dataclasses.replace(result, objective=Objective(goal="throughput"))
    assert "steady-state" in render(changed, 120)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_fits_the_terminal_and_loses_no_candidate(result, width):
    text = render(result, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for row in candidate_rows(result):
        assert row.label.split()[0] in text
        assert row.measured_ms in text


def test_a_long_search_shows_its_best_rows_and_counts_the_others(result):
    plain, kept, *rest = result.candidates
    trials = [
        dataclasses.replace(
            plain,
            label=f"trial{i:02}",
            plan=plain.plan.with_(channels_last=True, microbatches=i),
            measured=dataclasses.replace(plain.measured, latency_ms=1.0 + i / 100),
        )
        for i in range(1, 31)
    ]
    many = dataclasses.replace(result, candidates=(plain, *trials, kept, *rest))
    rows = candidate_rows(many, MOST_ROWS)
    assert len(rows) == MOST_ROWS and rows[0].baseline and not any(r.baseline for r in rows[1:])
    assert [r.label for r in rows[1:-1]] == [f"trial{i:02}" for i in range(1, 11)]
    assert rows[-1].label == kept.label and rows[-1].kept, "slower than thirty others, and the one that is kept"
    count = len(many.candidates) - MOST_ROWS
    assert f"{count} more candidates" in " ".join(render(many, 200).split())
    assert "more candidates" not in render(result, 200)


def test_markup_in_names_is_only_text(result):
    first, *rest = result.candidates
    odd = dataclasses.replace(result, candidates=(dataclasses.replace(first, label="[red]x[/nonsense]"), *rest))
    assert "[red]x[/nonsense]" in render(odd, 160)


def test_plans_in_words():
    halves = tuple(Replica(assignment={"a": d}, share=s) for d, s in (("h0/cpu:0", 0.75), ("h1/cpu:0", 0.25)))
    assert describe_plan(Plan.plain()) == "as PyTorch runs it"
    assert describe_plan(Plan.plain().with_(compiled=True)) == "as PyTorch runs it, compiled"
    assert describe_plan(Plan(replicas=halves, strategy="s")) == "replicas: 75% h0/cpu:0 + 25% h1/cpu:0"
    one = Plan(replicas=(Replica(assignment={"a": "host0/cuda:0", "b": "host0/cpu:0"}),), strategy="s")
    assert describe_plan(one.with_(threads={"host0/cpu:0": 3}, precision="bfloat16")) == (
        "stages: cuda:0 (all threads) → cpu:0 (3 threads), bfloat16"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("inf"), "–"), (0.0, "0"), (0.01234, "0.0123"), (3.14159, "3.14"), (31.4159, "31.4"),
     (3141.59, "3,142")],
)  # fmt: skip
def test_figures_keep_three_digits(value, text):
    assert figure(value) == text
