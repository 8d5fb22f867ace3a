"""The overhead benchmark measures what it says, with every engine, and prices stages and microbatches by slopes."""

from __future__ import annotations

import importlib
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
if not SCRIPTS.exists():
    pytest.skip("needs the repository's scripts", allow_module_level=True)


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("bench_overhead")
    finally:
        sys.path.remove(str(SCRIPTS))


def test_what_a_call_adds_is_seen(bench):
    model = bench.chain(1)

    def slow(x):
        time.sleep(0.005)
        return model(x)

    again, row = bench.compare(model, {"slow": slow}, "forward+backward", rounds=4, repeats=2)
    assert (again.name, row.name, row.mode) == ("plain again", "slow", "forward+backward")
    assert row.median_us >= 5000 and row.low_us <= row.median_us <= row.high_us
    assert abs(again.median_us) < row.median_us


def test_cheap_calls_are_of_every_kind_and_run(bench):
    model = bench.chain(1)
    with ExitStack() as stack:
        calls = bench.cheap_calls(stack, model)
        rows = bench.compare(model, calls, "forward", rounds=2, repeats=2)
    assert [r.name for r in rows] == ["plain again", *calls]
    assert "wrapper, identity" in calls and "in line, all threads" in calls


def test_dispatch_is_measured_by_engine_stage_and_microbatch(bench):
    plans = [p for p in bench.dispatch_plans() if p[2].engine == "threads"]
    rows, reasons = bench.measure_dispatch(plans, rounds=2, repeats=1)
    assert reasons == {}
    assert {(r.name, r.stages, r.microbatches, r.mode) for r in rows} == {
        (name, stages, micro, mode)
        for name, counts in (("replicas by threads", (1,)), ("stages by modules", bench.STAGES))
        for stages in counts
        for micro in bench.MICROBATCHES
        for mode in bench.MODES
    }
    engines = {plan.engine for _, _, plan in bench.dispatch_plans()}
    assert engines == {"threads", "processes", "graph"}


def test_slopes(bench):
    rows = [
        bench.Added(
            name="x",
            mode="forward",
            plain_us=1.0,
            median_us=10 + 5 * stages + 7 * micro,
            low_us=0.0,
            high_us=0.0,
            stages=stages,
            microbatches=micro,
        )
        for stages in (2, 8)
        for micro in (1, 4)
    ]
    (price,) = bench.slopes(rows)
    assert (price["per_stage_us"], price["per_microbatch_us"], price["least_us"]) == (5.0, 7.0, 27)
