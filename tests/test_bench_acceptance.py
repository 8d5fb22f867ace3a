"""The acceptance benchmark: three architectures under two executors, and what its table says of failures."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from autoplace.graph.opgraph import OpGraph

SCRIPTS = Path(__file__).parents[1] / "scripts"
if not SCRIPTS.exists():
    pytest.skip("needs the repository's scripts", allow_module_level=True)


@pytest.fixture(scope="module")
def scripts():
    pytest.importorskip("transformers")
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield {name: importlib.import_module(name) for name in ("acceptance_models", "acceptance_cases")} | {
            "bench": importlib.import_module("bench_acceptance")
        }
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def cases(scripts):
    return scripts["acceptance_cases"]


@pytest.fixture
def bench(scripts):
    return scripts["bench"]


def test_there_are_enough_architectures_of_every_family(scripts):
    found = scripts["acceptance_models"].ARCHITECTURES
    assert len(found) >= 45
    families = {a.family for a in found.values()}
    assert families >= {"text", "moe", "vision", "audio", "multimodal", "time series", "encoder-decoder", "state space"}


def test_models_and_inputs_are_the_same_for_a_seed(scripts):
    gpt2 = scripts["acceptance_models"].ARCHITECTURES["gpt2"]
    one, two = gpt2.build(seed=3).state_dict(), gpt2.build(seed=3).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    inputs = gpt2.inputs(4, training=True, seed=1)
    assert inputs.keys() == {"input_ids", "attention_mask", "labels"} and inputs["input_ids"].shape[0] == 4
    assert "labels" not in gpt2.inputs(4)
    assert torch.equal(inputs["input_ids"], gpt2.inputs(4, seed=1)["input_ids"])


def test_unknown_architectures_are_refused(scripts):
    assert scripts["acceptance_models"].names(["bert"]) == ["bert"]
    with pytest.raises(SystemExit, match="unknown architecture 'bort'"):
        scripts["acceptance_models"].names(["bort"])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["patchtsmixer", "gpt2"])
def test_good_executors_are_found_good(cases, name, training):
    row = cases.run_case(name, training=training, executors=("replicas", "stages"), budget_s=None)
    assert "error" not in row and row["rung"] == "export" and row["dynamic_batch"]
    for cell in row["cells"].values():
        assert (cell["status"], cell["reason"]) == ("ok", "")
        assert cell["output_error"] < 1e-4
        assert (cell["gradient_strain"] > 0) == training, "gradients were looked at, where there are any"
    json.dumps(row)


def test_what_cannot_be_split_is_refused_with_the_reason(cases):
    row = cases.run_case("resnet", training=True, executors=("replicas", "stages"), budget_s=None)
    assert row["cells"]["replicas"]["status"] == "refused"
    assert "BatchNorm2d" in row["cells"]["replicas"]["reason"]
    assert row["cells"]["stages"]["status"] == "ok", "stages on the whole batch can"
    assert "BatchNorm2d" in row["cells"]["stages"]["parts_refused"]


def test_wrong_numbers_are_a_failure(cases, monkeypatch):
    from autoplace.runtime import Replicas

    right = Replicas.__call__

    def wrong(self, *args, **kwargs):
        output = right(self, *args, **kwargs)
        output["logits"] = output["logits"] * 1.01
        return output

    monkeypatch.setattr(Replicas, "__call__", wrong)
    row = cases.run_case("distilbert", training=False, executors=("replicas",), budget_s=None)
    assert row["cells"]["replicas"]["status"] == "FAIL"
    assert "differs from plain PyTorch's by 0.01" in row["cells"]["replicas"]["reason"]


def test_comparing_says_what_differs(cases):
    x, grads = torch.tensor([1.0, -2.0]), {"w": torch.ones(2), "frozen": None}
    assert cases.compare({"output": [x, "a"], "grads": grads}, {"output": [x, "a"], "grads": grads}) == ("", 0, 0)
    for other, words in (
        ({"output": [x * 1.001, "a"], "grads": grads}, "output[0] differs by 0.001"),
        ({"output": [x * torch.nan, "a"], "grads": grads}, "differs by inf"),
        ({"output": [x, "b"], "grads": grads}, "output[1] is 'b'"),
        ({"output": [x], "grads": grads}, "the length of output"),
        ({"output": [x.double(), "a"], "grads": grads}, "float64"),
        ({"output": [x, "a"], "grads": {**grads, "frozen": torch.ones(1)}}, "'frozen' is too many"),
        ({"output": [x, "a"], "grads": {**grads, "w": torch.ones(2) * 1.1}}, "gradient of 'w' differs"),
        ({"output": [x, "a"], "grads": {"w": torch.ones(2)}}, "other parameters"),
    ):
        assert words in cases.compare({"output": [x, "a"], "grads": grads}, other)[0]


def test_halves_keep_tied_groups_together(cases):
    graph = OpGraph.build(
        names=["a", "b", "c", "head"],
        edges=[(0, [1], 1.0), (1, [2], 1.0), (2, [3], 1.0)],
        kinds=["x"] * 4,
        modules=["a", "b", "c", "head"],
        flops=[1.0, 1.0, 1.0, 1.0],
        colocate=[0, -1, -1, 0],
    )
    first, second = "host0/cpu:0", "host0/cpu:1"
    assert cases.halves(graph) == {"a": first, "b": first, "c": second, "head": first}
    plan = cases.forced_plan("graph", graph)
    assert (plan.shape, plan.engine, plan.microbatches) == ("stages", "graph", 2)
    assert cases.forced_plan("processes", graph).engine == "processes"
    assert np.isclose([r.share for r in cases.forced_plan("replicas", graph).replicas], 0.5).all()


def test_rows_are_kept_and_only_what_is_missing_or_failed_runs_again(bench, tmp_path):
    options = bench.parse(["--only", "bert", "vit", "--executors", "single", "--rows", str(tmp_path / "rows.jsonl")])
    row = {"name": "bert", "mode": "eval", "family": "text", "cells": {"single": {"status": "ok", "reason": ""}}}
    failed = {**row, "mode": "training", "cells": {"single": {"status": "FAIL", "reason": "wrong"}}}
    lines = [json.dumps(failed), json.dumps(row), '{"name": "vit", "mo']
    options.rows.write_text("\n".join(lines), encoding="utf-8")
    rows = bench.read_rows(options.rows)
    assert bench.missing(rows, options) == [("bert", ["training"]), ("vit", ["eval", "training"])]
    again = {
        **failed,
        "cells": {"single": {"status": "refused", "reason": "so"}, "free": {"status": "ok", "reason": ""}},
    }
    options.rows.write_text("\n".join([*lines, json.dumps(again)]), encoding="utf-8")
    rows = bench.read_rows(options.rows)
    assert bench.missing(rows, options) == [("vit", ["eval", "training"])]
    assert rows["bert", "training"]["cells"].keys() == {"single", "free"}


def test_the_table_counts_and_names_what_is_wrong(bench, capsys):
    good = {"status": "ok", "reason": "", "output_error": 1e-7, "gradient_strain": 0.5}
    refused = {"status": "refused", "reason": "it mixes samples"}
    base = {"name": "a", "family": "text", "mode": "eval", "rung": "export", "rung_reason": ""}
    rows = [
        {**base, "cells": {"single": good, "replicas": refused}},
        {**base, "mode": "training", "rung": "dispatch", "rung_reason": "a loop", "cells": {"single": good}},
        {**base, "name": "b", "cells": {"single": {"status": "FAIL", "reason": "off by one"}}},
        {"name": "c", "family": "text", "mode": "eval", "cells": {}, "error": "it took more than 1 s"},
    ]
    found, fine = bench.report(rows)
    assert not fine and (found["architectures"], found["rows"], found["rows_that_work"]) == (3, 4, 2)
    assert found["rungs"]["eval"]["export"] == 2 and found["rungs"]["training"]["dispatch"] == 1
    assert found["executors"]["single"] == {"ok": 2, "refused": 0, "FAIL": 1}
    assert found["largest_gradient_strain"] == 0.5
    said = capsys.readouterr().out
    for words in ("off by one", "it took more than 1 s", "dispatch: a loop", "refused: it mixes samples"):
        assert words in said


def test_a_process_that_hangs_is_ended(bench, monkeypatch, tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text(
        "import json, sys, time\n"
        "row = {'name': sys.argv[2], 'mode': 'eval', 'family': 'text', 'cells': {}}\n"
        "print('row: ' + json.dumps(row), flush=True)\n"
        "time.sleep(60)\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(bench, "__file__", str(script))
    rows = bench.run_apart("bert", ["eval", "training"], bench.parse(["--limit-s", "1"]))
    assert [(row["mode"], "error" in row) for row in rows] == [("eval", False), ("training", True)]
    assert "more than 1 s" in rows[1]["error"]
