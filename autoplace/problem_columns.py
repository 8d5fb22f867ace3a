"""Ops and tensors of a problem file, read by whole columns: quick, and without a word on what is wrong.

Each reader returns None where anything is unusual; → `problem_reader` then goes over the same rows one by one and finds
out whether something is wrong, and where. What comes back is the same either way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_BYTES", "Edges", "Ops", "read_ops", "read_tensors"]

MOST_BYTES = 2**53
"""Beyond it a float64 no longer counts single bytes."""

Ops = tuple[dict[str, int], dict[str, Any], NDArray[np.float64], NDArray[np.float64] | None]
"""Numbers by name, columns as `OpGraph.build` takes them, latency_ms and overhead_ms."""
Edges = list[tuple[int, list[int], float]]
"""(producer, consumers, bytes) of every tensor."""

_LARGE = 1e300
"""Numbers beyond it get a second look."""
_OP_KEYS = {"name", "latency_ms", "kind", "weight_bytes", "activation_bytes", "colocate", "overhead_ms", "frees"}
_TENSOR_KEYS = {"producer", "consumers", "bytes"}


def read_ops(rows: Sequence[Any], devices: int) -> Ops | None:
    """Read the rows of `ops` for a number of devices; None where something needs a second look."""
    if not _only(rows, dict) or not set().union(*rows) <= _OP_KEYS:
        return None
    names = _texts([row.get("name") for row in rows])
    kinds = _texts([row.get("kind", "op") for row in rows])
    keys = [row.get("colocate") for row in rows]
    frees = [row.get("frees") for row in rows]
    weights = _numbers([row.get("weight_bytes") for row in rows], whole=True)
    activations = _numbers([row.get("activation_bytes") for row in rows], whole=True)
    latency = _table([row.get("latency_ms") for row in rows], devices)
    if names is None or kinds is None or weights is None or activations is None or latency is None:
        return None
    if not _only(frees, bool, type(None)) or _texts([k for k in keys if k is not None]) is None:
        return None
    latency = np.where(np.isnan(latency), np.inf, latency)
    given = [row.get("overhead_ms") for row in rows]
    overhead = None
    if any(row is not None for row in given):
        nothing = [None] * devices
        overhead = _table([nothing if row is None else row for row in given], devices)
        if overhead is None or (overhead > latency).any():
            return None
        overhead = np.where(np.isnan(overhead), 0.0, overhead)
    numbers = dict(zip(names, range(len(names)), strict=True))
    if len(numbers) < len(names):
        return None
    groups: dict[str, int] = {}
    columns = {
        "kinds": kinds,
        "weight_bytes": np.nan_to_num(weights).astype(np.int64),
        "activation_bytes": np.nan_to_num(activations).astype(np.int64),
        "frees": np.asarray([f is True for f in frees]),
        "colocate": [-1 if k is None else groups.setdefault(k, len(groups)) for k in keys],
    }
    return numbers, columns, latency, overhead


def read_tensors(rows: Any, names: dict[str, int]) -> Edges | None:
    """Read the rows of `tensors`, with the ops' numbers by name; None where something needs a second look."""
    if type(rows) is not list or not _only(rows, dict) or not set().union(*rows) <= _TENSOR_KEYS:
        return None
    producers = [row.get("producer") for row in rows]
    consumers = [row.get("consumers") for row in rows]
    sizes = _numbers([row.get("bytes") for row in rows])
    if sizes is None or not _only(producers, str) or not _only(consumers, list):
        return None
    if not _only(itertools.chain.from_iterable(consumers), str):
        return None
    number = names.__getitem__
    try:
        ends = [list(map(number, row)) for row in consumers]
        starts = list(map(number, producers))
    except KeyError:
        return None
    return list(zip(starts, ends, np.nan_to_num(sizes).tolist(), strict=True))


def _only(values: Iterable[Any], *kinds: type) -> bool:
    """Return whether values have no other type; subclasses are other types."""
    return set(map(type, values)) <= set(kinds)


def _texts(values: list[Any]) -> list[str] | None:
    """Return strings that are all text and not empty, or None."""
    if not _only(values, str) or not all(values):
        return None
    try:
        "".join(values).encode("utf-8")
    except UnicodeEncodeError:
        return None
    return values


def _numbers(values: list[Any], *, whole: bool = False) -> NDArray[np.float64] | None:
    """Return numbers of 0 or more, with NaN where a value is None, or None; `whole` ones are numbers of bytes."""
    if not _only(values, int, float, type(None)):
        return None
    try:
        array = np.asarray(values, np.float64)
    except OverflowError:
        return None
    known = array[~np.isnan(array)]
    if len(known) + values.count(None) < len(values) or (len(known) and not 0 <= known.min() <= known.max() < _LARGE):
        return None
    return None if whole and ((known != np.floor(known)) | (known > MOST_BYTES)).any() else array


def _table(rows: list[Any], width: int) -> NDArray[np.float64] | None:
    """Return rows of so many numbers each, float64[rows, width], with NaN where a value is None, or None."""
    if not _only(rows, list) or set(map(len, rows)) != {width}:
        return None
    array = _numbers(list(itertools.chain.from_iterable(rows)))
    return None if array is None else array.reshape(len(rows), width)
