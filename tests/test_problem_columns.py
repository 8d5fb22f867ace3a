"""Columns read at once say what rows read one by one say, or say nothing."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoplace.problem_columns import read_ops, read_tensors
from autoplace.problem_reader import ProblemReader

NUMBER = st.one_of(st.none(), st.integers(0, 9), st.floats(0, 5))


@st.composite
def op_rows(draw):
    rows = []
    for i in range(draw(st.integers(1, 6))):
        latency = draw(st.lists(NUMBER, min_size=2, max_size=2))
        row = {"name": f"öp{i}", "latency_ms": latency}
        for key, values in {
            "kind": st.just("linear"),
            "weight_bytes": st.one_of(st.none(), st.integers(0, 2**53), st.just(4.0)),
            "activation_bytes": st.integers(0, 9),
            "colocate": st.sampled_from([None, "a", "b"]),
            "frees": st.sampled_from([None, True, False]),
            "overhead_ms": st.just([None if v is None else v / 2 for v in latency]),
        }.items():
            if draw(st.booleans()):
                row[key] = draw(values)
        rows.append(row)
    return rows


class Devices:
    num_devices = 2


@settings(max_examples=100, deadline=None)
@given(op_rows())
def test_ops_are_the_same_either_way(rows):
    fast, slow = read_ops(rows, 2), ProblemReader("file").ops(rows, Devices)
    assert fast is not None and fast[0] == slow[0]
    for key in ("kinds", "weight_bytes", "activation_bytes", "frees", "colocate"):
        assert list(fast[1][key]) == list(slow[1][key])
    assert np.array_equal(fast[2], slow[2])
    assert (fast[3] is None) == (slow[3] is None)
    if fast[3] is not None:
        assert np.array_equal(fast[3], slow[3])


GOOD = {"name": "b", "latency_ms": [1, 2.0], "weight_bytes": 4, "colocate": "x", "frees": True, "kind": "op"}
ODD = [
    3, {"name": "b"}, {**GOOD, "more": 1}, {**GOOD, "name": "a"}, {**GOOD, "name": ""}, {**GOOD, "name": "\ud800"},
    {**GOOD, "kind": None}, {**GOOD, "kind": 3}, {**GOOD, "colocate": ""}, {**GOOD, "frees": 1},
    {**GOOD, "latency_ms": [1]}, {**GOOD, "latency_ms": [1, True]}, {**GOOD, "latency_ms": [1, -1]},
    {**GOOD, "latency_ms": [1, math.nan]}, {**GOOD, "latency_ms": [1, math.inf]}, {**GOOD, "latency_ms": [1, 10**400]},
    {**GOOD, "latency_ms": 4}, {**GOOD, "weight_bytes": 1.5}, {**GOOD, "weight_bytes": 2**53 + 2},
    {**GOOD, "overhead_ms": [2, 2]},
]  # fmt: skip


@pytest.mark.parametrize("row", ODD, ids=repr)
def test_what_is_odd_gets_a_second_look(row):
    rows = [{"name": "a", "latency_ms": [1, None]}, copy.deepcopy(row)]
    assert read_ops([rows[0], GOOD], 2) is not None
    assert read_ops(rows, 2) is None


@pytest.mark.parametrize(
    "row",
    [3, {"producer": "a"}, {"producer": "c", "consumers": []}, {"producer": 1, "consumers": []},
     {"producer": "a", "consumers": ["c"]}, {"producer": "a", "consumers": [["b"]]}, {"producer": "a", "consumers": {}},
     {"producer": "a", "consumers": ["b"], "bytes": -1}, {"producer": "a", "consumers": ["b"], "extra": 1}],
    ids=repr,
)  # fmt: skip
def test_odd_tensors_get_a_second_look(row):
    good = {"producer": "a", "consumers": ["b", "b"], "bytes": 4}
    names = {"a": 0, "b": 1}
    assert read_tensors([good, {"producer": "b", "consumers": []}], names) == [(0, [1, 1], 4.0), (1, [], 0.0)]
    assert read_tensors([good, row], names) is None
    assert read_tensors([], names) == []
