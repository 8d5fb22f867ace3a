"""Plans of earlier tunings: one key for the same work in every process; files that can be trusted, or are a miss."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from autoplace import plan_cache
from autoplace.errors import InputError
from autoplace.hardware.cluster import Cluster, Device
from autoplace.plan import Plan, Replica
from autoplace.plan_cache import CachedPlan, cache_key, clear, load_plan, store_plan
from autoplace.problem import Objective
from autoplace.workload import Workload

CLUSTER = Cluster(devices=(Device(name="host0/cpu:0", kind="cpu", cores=(0,)),))
PLAN = Plan(replicas=(Replica(assignment={".": "host0/cpu:0"}),), strategy="single", threads={"host0/cpu:0": 2})
KEY = "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOPLACE_CACHE_DIR", str(tmp_path))
    return tmp_path / "plans"


def _workload(**changes):
    fields = {"model": torch.nn.Linear(4, 2), "args": (torch.ones(3, 4),), "kwargs": {"flag": None}, "training": False}
    return Workload(**{**fields, **changes})


def _key(cluster=CLUSTER, options=(), **changes):
    return cache_key(_workload(**changes), cluster, options=dict(options))


def test_a_key_depends_on_all_that_decides_and_on_no_tensor_values():
    key = _key()
    assert key == _key() and len(key) == 32 and int(key, 16) >= 0
    other_device = Cluster(devices=(replace(CLUSTER.devices[0], cores=(1,)),))
    others = {
        "training": _key(training=True),
        "shape": _key(args=(torch.ones(4, 4),)),
        "dtype": _key(args=(torch.ones(3, 4, dtype=torch.float64),)),
        "structure": _key(args=([torch.ones(3, 4)],)),
        "keyword": _key(kwargs={"flag": True}),
        "keyword name": _key(kwargs={"mask": None}),
        "model": _key(model=torch.nn.Linear(4, 2, bias=False)),
        "devices": _key(cluster=other_device),
        "loss": _key(loss=torch.sum),
        "objective": _key(options={"objective": Objective(energy_weight=0.5)}),
        "other objective": _key(options={"objective": Objective(energy_weight=0.4)}),
        "precision": _key(options={"precision": "auto"}),
    }
    with torch.no_grad():
        others["no_grad"] = _key()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        others["autocast"] = _key()
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    others["threads"] = _key()
    torch.set_num_threads(before)
    assert len({key, *others.values()}) == len(others) + 1
    assert _key(options={"a": 1, "b": 2}) == _key(options={"b": 2, "a": 1})
    assert _key(args=(torch.zeros(3, 4),)) == key


IN_ANOTHER_PROCESS = """
import torch
from transformers import BertConfig, BertModel
from autoplace.hardware.cluster import Cluster, Device
from autoplace.plan_cache import cache_key
from autoplace.workload import Workload

def key():
    torch.set_num_threads(1)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    workload = Workload(
        model=BertModel(config).eval(),
        kwargs={"input_ids": torch.ones(2, 5, dtype=torch.long), "extras": {"a", "b", "c"}},
        loss=lambda output: output.last_hidden_state.sum(),
    )
    cluster = Cluster(devices=(Device(name="host0/cpu:0", kind="cpu", cores=(0,)),))
    return cache_key(workload, cluster, options={"precision": "auto", "budget_s": 3.0})
print(key())
"""


def test_a_key_is_the_same_in_every_process():
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", IN_ANOTHER_PROCESS],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    keys = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert len(keys[0]) == 32 and keys[0] == keys[1]


def test_what_is_stored_is_loaded(folder):
    assert load_plan(KEY) is None
    store_plan(KEY, PLAN, {"speedup": 1.2, "interval": (1.1, 1.3), "noise": float("inf"), "model": "Linear"})
    facts = {"speedup": 1.2, "interval": [1.1, 1.3], "noise": None, "model": "Linear"}
    assert load_plan(KEY) == CachedPlan(plan=PLAN, facts=facts)
    assert [p.name for p in folder.iterdir()] == [f"{KEY}.json"]
    assert json.loads((folder / f"{KEY}.json").read_text())["format"] == "autoplace.cached-plan/1"
    store_plan(KEY, Plan.plain(), {})
    cached = load_plan(KEY)
    assert cached is not None and cached.plan.is_plain


def _damage(text, how):
    data = json.loads(text)
    if how == "half":
        return text[: len(text) // 2]
    if how == "not an object":
        return "[1, 2]"
    if how == "deep":
        return "[" * 100_000
    changed = {
        "other format": {"format": "autoplace.cached-plan/2"},
        "other key": {"key": KEY[::-1]},
        "facts": {"facts": [1]},
        "no plan": {"plan": None},
        "unknown engine": {"plan": {**data["plan"], "engine": "steam"}},
        "unknown knob": {"plan": {**data["plan"], "warp": 9}},
    }[how]
    return json.dumps({**data, **changed})


@pytest.mark.parametrize(
    "how",
    ["half", "not an object", "deep", "other format", "other key", "facts", "no plan", "unknown engine", "unknown knob",
     "binary", "folder"],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_a_miss_and_one_warning(folder, caplog, how):
    store_plan(KEY, PLAN, {})
    path = folder / f"{KEY}.json"
    if how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "binary":
        path.write_bytes(b"\x80\x04\xff pickled")
    else:
        path.write_text(_damage(path.read_text(), how))
    with caplog.at_level(logging.WARNING):
        assert load_plan(KEY) is None
    assert len(caplog.records) == 1 and str(path) in caplog.messages[0]


def test_a_name_that_is_no_key_is_refused():
    for bad in ("", "../../etc/passwd", "ABCDEF0123456789", "0" * 100):
        with pytest.raises(InputError, match="no key"):
            load_plan(bad)


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch, caplog):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("AUTOPLACE_CACHE_DIR", str(file))
    with caplog.at_level(logging.WARNING):
        store_plan(KEY, PLAN, {})
        assert load_plan(KEY) is None
    assert "could not keep" in caplog.text


def test_the_least_recently_used_plans_go_first(folder, monkeypatch):
    monkeypatch.setattr(plan_cache, "MOST_FILES", 3)
    keys = [f"{i:032x}" for i in range(5)]
    for age, key in enumerate(keys[:3]):
        store_plan(key, PLAN, {})
        os.utime(folder / f"{key}.json", (1000 + age, 1000 + age))
    assert load_plan(keys[0]) is not None  # used again: now the youngest
    store_plan(keys[3], PLAN, {})
    assert [load_plan(key) is not None for key in keys] == [True, False, True, True, False]
    (folder / "notes.txt").write_text("mine")
    assert clear() == 3 and [p.name for p in folder.iterdir()] == ["notes.txt"]
    assert clear() == 0


def test_many_writers_and_readers_at_once_see_whole_files(monkeypatch, caplog):
    monkeypatch.setattr(plan_cache, "MOST_FILES", 5)

    def work(number):
        key = f"{number % 7:032x}"
        store_plan(key, PLAN.with_(microbatches=number + 1), {"number": number})
        found = load_plan(key)
        return found is None or found.plan.microbatches == found.facts["number"] + 1

    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))
    assert caplog.records == []
