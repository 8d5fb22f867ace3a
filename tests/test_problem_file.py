"""The problem file: every rule, and one sentence that names the place for whatever breaks one."""

from __future__ import annotations

import copy
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoplace.errors import AutoplaceError, InfeasibleError, InputError, ProblemFileError
from autoplace.plan import Plan
from autoplace.problem_file import (
    check_feasible,
    load_problem,
    placement_to_json,
    problem_from_json,
    problem_to_json,
    save_problem,
)
from autoplace.simulate import SimulatedEvaluator

EXAMPLE = Path(__file__).parents[1] / "examples" / "three_layers.json"


@pytest.fixture
def data():
    return json.loads(EXAMPLE.read_text(encoding="utf-8"))


def test_the_example_reads_as_it_says():
    problem = load_problem(EXAMPLE)
    assert problem.name == "three-layer-example"
    assert [d.name for d in problem.cluster.devices] == ["host0/cuda:0", "host0/cpu:0"]
    assert problem.cluster.devices[0].memory_bytes == 17179869184 and problem.cluster.devices[1].busy_watts == 90
    assert problem.graph.names == ("embed", "head") and problem.graph.kinds == ("embedding", "linear")
    assert problem.latency_ms.tolist() == [[0.1, 0.4], [1.5, math.inf]]
    assert problem.graph.weight_bytes.tolist() == [1000, 4000] and problem.graph.colocate.tolist() == [0, -1]
    assert problem.graph.edge_list.tolist() == [[0, 1, 0]] and problem.graph.tensor_bytes.tolist() == [4096]
    assert problem.cluster.link_latency_ms.tolist() == [[0, 0.02], [0.05, 0]]
    assert problem.cluster.link_bytes_per_ms.tolist() == [[math.inf, 12e6], [1e6, math.inf]]
    assert problem.semantics.contention == "link" and problem.overhead_ms is None and problem.batch_size == 1
    evaluator = SimulatedEvaluator(problem)
    assert evaluator.score([[0, 0], [1, 0]]).tolist() == [1.6, pytest.approx(0.4 + 0.05 + 4096 / 1e6 + 1.5)]
    assert evaluator.outcome([0, 0]).energy_j == pytest.approx((80 * 1.6 + 240 * 1.6) / 1000)


def test_what_is_optional_may_be_absent_or_null():
    small = {
        "format": "autoplace.problem/1",
        "devices": [{"name": "d", "kind": "npu", "memory_bytes": None}],
        "ops": [{"name": "a", "latency_ms": [1]}, {"name": "b", "latency_ms": [2], "colocate": None}],
    }
    problem = problem_from_json(small)
    assert problem.name == "problem" and math.isinf(problem.cluster.devices[0].memory_bytes)
    assert problem.cluster.devices[0].idle_watts is None and problem.cluster.default_link is None
    assert problem.graph.num_tensors == 0 and problem.graph.weight_bytes.tolist() == [0, 0]
    assert problem.objective.goal == "latency" and problem.semantics.route == "direct"
    assert SimulatedEvaluator(problem).score([0, 0]).tolist() == [3.0]


def test_extensions(data):
    data["batch_size"] = 8
    data["semantics"]["microbatches"] = 2
    data["ops"][0] |= {"overhead_ms": [0.05, 0.1], "frees": True}
    data["ops"][1] |= {"overhead_ms": [0.5, None]}
    problem = problem_from_json(data)
    assert problem.batch_size == 8 and problem.semantics.microbatches == 2
    assert problem.overhead_ms.tolist() == [[0.05, 0.1], [0.5, 0.0]]
    assert problem.graph.frees.tolist() == [True, False]
    again = problem_to_json(problem)
    assert again["batch_size"] == 8 and again["ops"][1]["overhead_ms"] == [0.5, None] and again["ops"][0]["frees"]


def test_round_trip(data, tmp_path):
    problem = problem_from_json(data)
    save_problem(problem, tmp_path / "again.json")
    text = (tmp_path / "again.json").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 30
    again = load_problem(tmp_path / "again.json")
    assert problem_to_json(again) == problem_to_json(problem)
    assert again.fingerprint == problem.fingerprint
    wanted = copy.deepcopy(data)
    wanted["ops"][0]["colocate"] = "group0"
    assert problem_to_json(problem) == wanted


SET = object()


def change(data, place, value):
    """Set (or with SET leave out) what stands at a place."""
    target = data
    for key in place[:-1]:
        target = target[key]
    if value is SET:
        del target[place[-1]]
    else:
        target[place[-1]] = value
    return data


OP = ("ops", 1)
BAD = [
    (("format",), "autoplace.problem/2", '"format" must be'),
    (("format",), SET, '"format" must be'),
    (("ops",), SET, "the file lacks the key 'ops'"),
    (("extra",), 1, 'the file has the unknown key "extra"'),
    (("name",), "", 'name is ""; it must be a string'),
    (("name",), 3, "name is 3; it must be a string"),
    (("batch_size",), 0, "batch_size is 0"),
    (("batch_size",), 1.5, "batch_size is 1.5; it must be a whole number"),
    (("devices",), [], "devices is empty"),
    (("devices",), {}, "devices is an object; it must be a list"),
    (("devices", 1), 7, "devices[1] is 7; it must be an object"),
    (("devices", 1, "name"), "host0/cuda:0", 'devices[1].name is "host0/cuda:0", as is devices[0].name'),
    (("devices", 0, "kind"), SET, "devices[0] lacks the key 'kind'"),
    (("devices", 0, "watts"), 3, 'devices[0] has the unknown key "watts"'),
    (("devices", 0, "memory_bytes"), -1, "devices[0].memory_bytes is -1"),
    (("devices", 0, "busy_watts"), True, "devices[0].busy_watts is true; it must be a number"),
    (("devices", 0, "busy_watts"), "300", 'devices[0].busy_watts is "300"; it must be a number'),
    (("links", 0, "target"), "host9", 'links[0].target is "host9", which names no device'),
    (("links", 0, "target"), ["host9"], "links[0].target is a list, which names no device"),
    (("links", 0, "target"), "host0/cuda:0", 'links[0] joins "host0/cuda:0" to itself'),
    (("links", 0, "bytes_per_ms"), 0, "links[0].bytes_per_ms is 0; leave the link out"),
    (("links", 0, "latency_ms"), math.nan, "links[0].latency_ms is NaN"),
    (("default_link", "bytes_per_ms"), SET, "default_link lacks the key 'bytes_per_ms'"),
    (("default_link",), [1], "default_link is a list; it must be an object"),
    (("ops",), [], "ops is empty"),
    ((*OP, "name"), "embed", 'ops[1].name is "embed", as is ops[0].name'),
    ((*OP, "name"), "\ud800", "half a surrogate pair"),
    ((*OP, "latency_ms"), [1.0], "ops[1].latency_ms has 1 entries; give one per device, that is 2"),
    ((*OP, "latency_ms"), 1.0, "ops[1].latency_ms is 1.0; it must be a list"),
    ((*OP, "latency_ms", 0), -0.5, "ops[1].latency_ms[0] is -0.5; it must be a finite number, 0 or more"),
    ((*OP, "latency_ms", 1), math.inf, "ops[1].latency_ms[1] is Infinity"),
    ((*OP, "latency_ms", 1), False, "ops[1].latency_ms[1] is false; it must be a number"),
    ((*OP, "latency_ms", 0), 10**400, "ops[1].latency_ms[0] is a number of more than 30 digits"),
    ((*OP, "weight_bytes"), 0.5, "ops[1].weight_bytes is 0.5; it must be a whole number"),
    ((*OP, "weight_bytes"), 2**60, "ops[1].weight_bytes is 1152921504606846976"),
    ((*OP, "activation_bytes"), "x" * 500, "ops[1].activation_bytes is \"xxx"),
    ((*OP, "colocate"), 4, "ops[1].colocate is 4; it must be a string"),
    ((*OP, "frees"), 1, "ops[1].frees is 1; it must be true or false"),
    ((*OP, "overhead_ms"), [0.1], "ops[1].overhead_ms has 1 entries"),
    ((*OP, "overhead_ms"), [9, 0], "ops[1].overhead_ms[0] is 9, more than the op's latency of 1.5"),
    ((*OP, "flops"), 1, 'ops[1] has the unknown key "flops"'),
    (("tensors", 0, "producer"), "nobody", 'tensors[0].producer is "nobody", which names no op'),
    (("tensors", 0, "consumers"), ["head", None], "tensors[0].consumers[1] is null, which names no op"),
    (("tensors", 0, "consumers"), "head", 'tensors[0].consumers is "head"; it must be a list'),
    (("tensors", 0, "consumers"), ["embed"], 'tensors form a cycle: "embed" -> "embed"'),
    (("tensors", 0, "bytes"), -1, "tensors[0].bytes is -1"),
    (("objective", "goal"), "speed", "objective is wrong: objective goal 'speed' is unknown"),
    (("objective", "goal"), ["latency"], "objective is wrong"),
    (("objective", "energy_weight"), 1.5, "objective is wrong: energy_weight 1.5 is outside"),
    (("objective", "weight"), 1, 'objective has the unknown key "weight"'),
    (("semantics", "queue"), "lifo", "semantics is wrong: semantics queue is 'lifo'"),
    (("semantics", "microbatches"), 0, "semantics.microbatches is 0"),
    (("semantics", "microbatches"), 10**9, "semantics.microbatches is 1000000000; 4096 is the most"),
    (("semantics",), "fast", 'semantics is "fast"; it must be an object'),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value", "words"), BAD, ids=lambda v: "left out" if v is SET else str(v)[:40])
def test_what_is_wrong_gets_a_sentence_that_names_the_place(data, place, value, words):
    with pytest.raises(ProblemFileError) as caught:
        problem_from_json(change(data, place, value), where="mine.json")
    message = str(caught.value)
    assert words in message and message.startswith("mine.json") and "\n" not in message
    assert len(message) < 250 and message.encode("utf-8")


def test_a_repeated_link_is_refused(data):
    data["links"].append(dict(data["links"][0]))
    with pytest.raises(ProblemFileError, match=r"links\[1\] repeats"):
        problem_from_json(data)


def test_energy_needs_watts(data):
    data["objective"]["energy_weight"] = 0.5
    assert problem_from_json(data).objective.energy_weight == 0.5
    del data["devices"][1]["idle_watts"]
    with pytest.raises(ProblemFileError, match=r"devices\[1\] needs idle_watts and busy_watts"):
        problem_from_json(data)


def test_a_cycle_is_shown():
    names = [f"op{i}" for i in range(20)]
    data = {
        "format": "autoplace.problem/1",
        "devices": [{"name": "d", "kind": "cpu"}],
        "ops": [{"name": n, "latency_ms": [1]} for n in names],
        "tensors": [{"producer": a, "consumers": [b]} for a, b in itertools.pairwise(names)],
    }
    data["tensors"].append({"producer": "op9", "consumers": ["op7"]})
    with pytest.raises(ProblemFileError, match="form a cycle") as caught:
        problem_from_json(data)
    shown = str(caught.value).split("cycle: ")[1].split(";")[0].split(" -> ")
    assert shown[0] == shown[-1] and sorted(shown[:-1]) == ['"op7"', '"op8"', '"op9"']


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([((*OP, "latency_ms"), [None, None])], "op 'head' can run on no device"),
        ([((*OP, "colocate"), "tied"), (("ops", 0, "latency_ms"), [None, 0.4])],
         "op 'embed' (with the 1 co-located with it) can run on no device"),
        ([(("devices", 0, "memory_bytes"), 4063)], "op 'head' needs 4064 bytes of memory"),
        ([((*OP, "colocate"), "tied"), (("devices", 0, "memory_bytes"), 5000)], "needs 5128 bytes"),
        ([(("devices", 0, "memory_bytes"), 4100), (("devices", 1, "memory_bytes"), 1000)], "'embed' needs 1064"),
        ([(("devices", 0, "memory_bytes"), 4064), (("devices", 1, "memory_bytes"), 1063)], "at most 1063"),
        ([((*OP, "latency_ms"), [1, 1]), (("ops", 0, "weight_bytes"), 4000), (("devices", 0, "memory_bytes"), 5000),
          (("devices", 1, "memory_bytes"), 3000)], "all ops together hold 8128 bytes"),
    ],
)  # fmt: skip
def test_what_can_be_placed_nowhere_is_named(data, changes, words):
    for place, value in changes:
        change(data, place, value)
    with pytest.raises(InfeasibleError) as caught:
        problem_from_json(data, where="mine.json")
    assert words in str(caught.value) and str(caught.value).startswith("mine.json")


def test_what_frees_need_not_be_held(data):
    for op in data["ops"]:
        op |= {"frees": True, "weight_bytes": 0, "activation_bytes": 100}
    data["devices"] = [dict(d, memory_bytes=100) for d in data["devices"]]
    check_feasible(problem_from_json(data))
    data["devices"] = [dict(d, memory_bytes=99) for d in data["devices"]]
    with pytest.raises(InfeasibleError, match="needs 100 bytes"):
        problem_from_json(data)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a problem file"),
        ('{"format": NaN}', "NaN"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": ' + "9" * 5000 + "}", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_file_that_is_none_gets_a_sentence(tmp_path, text, words):
    path = tmp_path / "bad.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ProblemFileError, match=words):
        load_problem(path)
    with pytest.raises(ProblemFileError, match="does not exist"):
        load_problem(tmp_path / "missing.json")
    with pytest.raises(ProblemFileError, match="cannot be read"):
        load_problem(tmp_path)


def test_a_million_ops_of_garbage_get_their_sentence_soon(tmp_path):
    path = tmp_path / "garbage.json"
    rows = ", ".join('{"garbage": 1}' for _ in range(1_000_000))
    path.write_text(
        f'{{"format": "autoplace.problem/1", "devices": [{{"name": "d", "kind": "cpu"}}], "ops": [{rows}]}}'
    )
    begin = time.perf_counter()
    with pytest.raises(ProblemFileError, match=r"ops\[0\] lacks the key 'name'"):
        load_problem(path)
    assert time.perf_counter() - begin < 30  # generous: machines are shared


def test_many_ops_are_read_in_linear_time(data):
    data["ops"] = [dict(data["ops"][0], name=f"op{i}", colocate=f"pair{i // 2}") for i in range(100_000)]
    data["tensors"] = []
    begin = time.perf_counter()
    assert problem_from_json(data).can_run.all()
    data["ops"][-1]["latency_ms"] = [1.0, "soon"]
    with pytest.raises(ProblemFileError, match=r"ops\[99999\].latency_ms\[1\] is \"soon\""):
        problem_from_json(data)
    assert time.perf_counter() - begin < 60  # generous: machines are shared


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(garbage=JSON, choice=st.integers(0, 10**6))
def test_garbage_anywhere_is_read_or_refused_in_one_sentence(garbage, choice):
    data = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    places = []

    def walk(value, place):
        if place:
            places.append(place)
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in pairs:
            walk(inner, (*place, key))

    walk(data, ())
    message = ""
    try:
        problem = problem_from_json(change(data, places[choice % len(places)], garbage))
    except AutoplaceError as error:
        message = str(error)
    assert message or problem_to_json(problem)["format"] == "autoplace.problem/1"
    assert "\n" not in message and message.encode("utf-8").decode("utf-8") == message


def test_the_answer(data):
    problem = problem_from_json(data)
    plan = Plan.from_assignment(problem, [1, 0], strategy="heft")
    outcome = SimulatedEvaluator(problem).outcome([1, 0])
    answer = placement_to_json(problem, plan, outcome, evaluations=np.int64(7), seconds=0.5, seed=3)
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    assert list(answer) == [
        "format", "problem", "strategy", "assignment", "outcome", "evaluations", "seconds", "seed",
    ]  # fmt: skip
    assert answer["format"] == "autoplace.placement/1" and answer["problem"] == "three-layer-example"
    assert answer["assignment"] == {"embed": "host0/cpu:0", "head": "host0/cuda:0"}
    assert answer["outcome"]["latency_ms"] == outcome.latency_ms
    with pytest.raises(InputError, match="one replica"):
        placement_to_json(problem, Plan.plain(), outcome, evaluations=1, seconds=1, seed=0)
