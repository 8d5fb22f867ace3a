"""The inner loops of the pipeline dynamic programme, compiled by numba: over a line of nodes, and over order ideals.

Both fill the same table: F[i, s] is the least cost with which the nodes of ideal i can be cut into pieces that use the
devices of state s. A piece is the difference of two ideals. What goes in and out of it is kept up as it grows by one
node at a time, so a pair of ideals costs the tensors of one node and one look at every move.

They know nodes, tensors and moves between states; not what a device is, nor where the numbers come from (→ `_ideals`).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.jit import compiled

__all__ = ["FROM_BEFORE", "Charges", "Lattice", "Moves", "Nodes", "run_lattice", "run_line"]

FROM_BEFORE, FROM_AFTER, TO_AFTER, TO_BEFORE = 0, 1, 2, 3
"""Columns of traffic: what a piece receives from earlier and later pieces, and what it sends to later and earlier."""


class Nodes(NamedTuple):
    """What is cut: K nodes, numbered so that most tensors go from lower to higher, T tensors that leave their node."""

    producer: NDArray[np.int32]
    """int32[T]."""
    size: NDArray[np.float64]
    """float64[T], bytes."""
    first: NDArray[np.int64]
    """int64[T + 1] into `consumers`."""
    consumers: NDArray[np.int32]
    """int32[C], nodes that read the tensor, the producer never among them, each once."""
    out_first: NDArray[np.int64]
    """int64[K + 1] into `out`."""
    out: NDArray[np.int32]
    """int32[T], tensors by producer."""
    in_first: NDArray[np.int64]
    """int64[K + 1] into `into`."""
    into: NDArray[np.int32]
    """int32[C], tensors by consumer."""


class Lattice(NamedTuple):
    """n order ideals, by size; the first is empty, the last is everything."""

    member: NDArray[np.bool_]
    """bool[n, K]."""
    below_first: NDArray[np.int64]
    """int64[n + 1] into the two next."""
    below: NDArray[np.int32]
    """The ideal without one node …"""
    without: NDArray[np.int32]
    """… and that node."""


class Charges(NamedTuple):
    """What pieces cost. n ideals, D devices, R profiles: a device with what it knows of its neighbours."""

    total_ms: NDArray[np.float64]
    """float64[n, D], latencies of the ideal's nodes, where they are finite."""
    fastest_ms: NDArray[np.float64]
    """float64[n], latencies of the ideal's nodes, each on the device that is fastest for it."""
    barred: NDArray[np.int32]
    """int32[n, D], nodes of the ideal that may not go on the device."""
    held: NDArray[np.float64]
    """float64[n], bytes of the ideal's nodes."""
    capacity: NDArray[np.float64]
    """float64[D], bytes."""
    limit_ms: float
    """Pieces that cost more are of no interest."""
    device: NDArray[np.int64]
    """int64[R]."""
    start_ms: NDArray[np.float64]
    """float64[R, 4], per tensor, by column of traffic; inf where it cannot pass."""
    ms_per_byte: NDArray[np.float64]
    """float64[R, 4], by column of traffic."""
    on_receiver: bool
    """Whether what a piece receives is load of its device."""
    on_sender: bool
    """Whether what it sends is."""
    on_links: bool
    """Whether links have loads of their own."""
    host: bool
    """Whether a piece sends a tensor once however many read it, over one link for all."""


class Moves(NamedTuple):
    """S states, of which 0 is the first; Q moves between them, each of which lays a piece on a device."""

    source: NDArray[np.int64]
    """int64[Q]."""
    target: NDArray[np.int64]
    """int64[Q]."""
    profile: NDArray[np.int64]
    """int64[Q]."""
    states: int


_compile = partial(compiled, allocates=True)


@_compile
def _count(traffic, column, size, sign):
    traffic[column, 0] += sign
    traffic[column, 1] += sign * size


@_compile
def _produce(nodes, traffic, tensor, inside, before, host):
    """Note that the producer of a tensor joins the piece, which holds `inside` of its consumers; `before` have earlier
    pieces."""
    size = nodes.size[tensor]
    if inside > 0:
        _count(traffic, FROM_AFTER, size, -1.0)
    if before > 0:
        _count(traffic, TO_BEFORE, size, 1.0)
    if inside + before < nodes.first[tensor + 1] - nodes.first[tensor] and not (host and before > 0):
        _count(traffic, TO_AFTER, size, 1.0)


@_compile
def _consume(nodes, traffic, tensor, inside, before, made_before, made_inside, host):
    """Note that one more consumer of a tensor joins the piece, which held `inside` of them."""
    size = nodes.size[tensor]
    if made_inside:
        if inside + before + 1 == nodes.first[tensor + 1] - nodes.first[tensor] and not (host and before > 0):
            _count(traffic, TO_AFTER, size, -1.0)
    elif inside == 0:
        _count(traffic, FROM_BEFORE if made_before else FROM_AFTER, size, 1.0)


@_compile
def _price(charges, traffic, start, end, device_ms, worst_ms):
    """Fill what a piece costs with every profile: load of the device, and the most of that and its links, ms."""
    for r in range(len(charges.device)):
        d = charges.device[r]
        device_ms[r] = worst_ms[r] = np.inf
        if charges.barred[end, d] != charges.barred[start, d]:
            continue
        if charges.held[end] - charges.held[start] > charges.capacity[d]:
            continue
        load = charges.total_ms[end, d] - charges.total_ms[start, d]
        receive, send, link = 0.0, 0.0, 0.0
        for column in range(4):
            if traffic[column, 0] > 0.5:
                cost = traffic[column, 0] * charges.start_ms[r, column]
                cost += traffic[column, 1] * charges.ms_per_byte[r, column]
                if column in (FROM_BEFORE, FROM_AFTER):
                    receive += cost
                else:
                    send += cost
                # On a link of its own to each neighbour, a border is counted by the piece behind it.
                if column in (FROM_BEFORE, TO_BEFORE):
                    link = max(link, cost)
        if receive == np.inf or send == np.inf:
            continue
        if charges.on_receiver:
            load += receive
        if charges.on_sender:
            load += send
        device_ms[r] = worst_ms[r] = load
        if charges.on_links:
            worst_ms[r] = max(load, max(receive, send) if charges.host else link)


@_compile
def _advance(moves, least, back, start, end, price, summed):
    """Try every move with a piece from ideal `start` to ideal `end`."""
    for q in range(len(moves.source)):
        so_far = least[start, moves.source[q]]
        cost = price[moves.profile[q]]
        if so_far == np.inf or cost == np.inf:
            continue
        cost = so_far + cost if summed else max(so_far, cost)
        if cost < least[end, moves.target[q]]:
            least[end, moves.target[q]] = cost
            back[end, moves.target[q], 0] = start
            back[end, moves.target[q], 1] = q


@_compile
def _too_large(charges, start, end):
    """Return whether a piece, and whatever holds it, is more than any device should or could take."""
    if charges.fastest_ms[end] - charges.fastest_ms[start] > charges.limit_ms:
        return True
    return charges.held[end] - charges.held[start] > charges.capacity.max()


@_compile
def _tables(ideals, states):
    least = np.full((ideals, states), np.inf)
    least[0, 0] = 0.0
    return least, np.full((ideals, states, 2), -1, np.int32)


@_compile
def _possible(least, row):
    return least[row].min() < np.inf


@_compile
def run_line(
    nodes: Nodes, charges: Charges, moves: Moves, summed: bool
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Cut a line: ideal i is the first i nodes.

    Args:
        nodes: What is cut.
        charges: What pieces cost, n = K + 1.
        moves: States and what leads from one to another.
        summed: Whether pieces add up; else the costliest counts.

    Returns:
        float64[n, S] least cost, inf where there is none; and int32[n, S, 2], the ideal before the last piece and the
        move that laid it, -1 where there is none.
    """
    count = len(charges.held)
    least, back = _tables(count, moves.states)
    before = np.zeros(len(nodes.producer), np.int32)
    inside = np.zeros(len(nodes.producer), np.int32)
    traffic = np.zeros((4, 2))
    device_ms, worst_ms = np.empty(len(charges.device)), np.empty(len(charges.device))
    for start in range(count - 1):
        if start > 0:
            for k in range(nodes.in_first[start - 1], nodes.in_first[start]):
                before[nodes.into[k]] += 1
        if not _possible(least, start):
            continue
        inside[:] = 0
        traffic[:] = 0.0
        for v in range(start, count - 1):
            for k in range(nodes.out_first[v], nodes.out_first[v + 1]):
                tensor = nodes.out[k]
                _produce(nodes, traffic, tensor, inside[tensor], before[tensor], charges.host)
            for k in range(nodes.in_first[v], nodes.in_first[v + 1]):
                tensor = nodes.into[k]
                p = nodes.producer[tensor]
                _consume(
                    nodes, traffic, tensor, inside[tensor], before[tensor], p < start, start <= p <= v, charges.host
                )
                inside[tensor] += 1
            if _too_large(charges, start, v + 1):
                break
            _price(charges, traffic, start, v + 1, device_ms, worst_ms)
            _advance(moves, least, back, start, v + 1, device_ms if summed else worst_ms, summed)
    return least, back


@_compile
def _inside(nodes, start, piece, tensor):
    """Count the consumers of a tensor in an ideal and not in the one that it starts from."""
    found = 0
    for k in range(nodes.first[tensor], nodes.first[tensor + 1]):
        c = nodes.consumers[k]
        if piece[c] and not start[c]:
            found += 1
    return found


@_compile
def _grow(nodes, lattice, row, smaller, v, before, traffic, host):
    """Add node v to the piece between the ideals `row` and `smaller`."""
    start, piece = lattice.member[row], lattice.member[smaller]
    for k in range(nodes.out_first[v], nodes.out_first[v + 1]):
        tensor = nodes.out[k]
        _produce(nodes, traffic, tensor, _inside(nodes, start, piece, tensor), before[tensor], host)
    for k in range(nodes.in_first[v], nodes.in_first[v + 1]):
        tensor = nodes.into[k]
        p = nodes.producer[tensor]
        inside = _inside(nodes, start, piece, tensor)
        _consume(nodes, traffic, tensor, inside, before[tensor], start[p], piece[p] and not start[p], host)


@_compile
def run_lattice(
    nodes: Nodes, lattice: Lattice, charges: Charges, moves: Moves, summed: bool
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Cut along every chain of order ideals; see `run_line`."""
    count = len(charges.held)
    least, back = _tables(count, moves.states)
    traffic = np.zeros((count, 4, 2))
    reached = np.zeros(count, np.bool_)
    before = np.zeros(len(nodes.producer), np.int32)
    device_ms, worst_ms = np.empty(len(charges.device)), np.empty(len(charges.device))
    for row in range(count - 1):
        if not _possible(least, row):
            continue
        for tensor in range(len(before)):
            before[tensor] = 0
            for k in range(nodes.first[tensor], nodes.first[tensor + 1]):
                before[tensor] += lattice.member[row, nodes.consumers[k]]
        reached[row] = True
        traffic[row] = 0.0
        for end in range(row + 1, count):
            reached[end] = False
            for k in range(lattice.below_first[end], lattice.below_first[end + 1]):
                smaller, v = lattice.below[k], lattice.without[k]
                if smaller >= row and reached[smaller] and not lattice.member[row, v]:
                    reached[end] = True
                    traffic[end] = traffic[smaller]
                    _grow(nodes, lattice, row, smaller, v, before, traffic[end], charges.host)
                    break
            reached[end] = reached[end] and not _too_large(charges, row, end)
            if reached[end]:
                _price(charges, traffic[end], row, end, device_ms, worst_ms)
                _advance(moves, least, back, row, end, device_ms if summed else worst_ms, summed)
    return least, back
