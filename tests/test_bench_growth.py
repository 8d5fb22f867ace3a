"""The growth benchmark's problems are what they say, and its parts and table come out."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from autoplace.problem_file import load_problem, save_problem

SCRIPTS = Path(__file__).parents[1] / "scripts"
if not SCRIPTS.exists():
    pytest.skip("needs the repository's scripts", allow_module_level=True)


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("bench_growth")
    finally:
        sys.path.remove(str(SCRIPTS))


def test_problems_have_the_ops_asked_for_and_bind_memory(bench):
    for ops in (57, 200):
        problem = bench.transformer(ops, goal="throughput")
        assert problem.num_ops == ops and problem.num_devices == 4 and problem.objective.goal == "throughput"
        held = float((problem.graph.weight_bytes + problem.graph.activation_bytes).sum())
        assert all(device.memory_bytes == pytest.approx(0.4 * held) for device in problem.cluster.devices)
        assert np.array_equal(problem.latency_ms, bench.transformer(ops).latency_ms)
    heads = [i for i, kind in enumerate(problem.graph.kinds) if kind == "softmax"]
    assert len(heads) >= 2 * bench.HEADS


def test_parts_are_timed_and_shown(bench, tmp_path, capsys):
    path = tmp_path / "small.json"
    save_problem(bench.transformer(200), path)
    parts = bench.part_seconds(path)
    assert set(bench.PARTS) - {"place"} <= set(parts) and all(v > 0 for v in parts.values())
    assert load_problem(path).num_ops == 200 and (tmp_path / "small.out").exists()
    row = {"ops": bench.TARGET_OPS, "goal": "latency", "whole_s": 12.0, "objective": 1.0}
    bench.show([{**row, "best_heuristic_objective": 2.0, "parts_s": dict.fromkeys(bench.PARTS, 0.5)}])
    assert "beyond the 10 s wanted" in capsys.readouterr().out
