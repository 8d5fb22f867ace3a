"""The moves of every search by local moves, compiled into its loop: how they are drawn, and what they change.

A walk stands on one placement of K co-location classes on D devices. What a placement costs is not known here, nor when
a move is accepted: → `_engine`. What is likely to be good is the prior's knowledge (→ `Prior`). Moves, all within what
each class may use and, as far as it can be known without a schedule, within memory:

1. a class to another device: one drawn from the prior, or that of a neighbour, or any;
2. a run of classes in topological order to one device;
3. a connected group of classes that are together to another device;
4. two classes exchange their devices;
5. a border, where the device changes along the topological order, moves by some classes;
6. a graft, where there are donors: a run or a connected group becomes what it is in another placement.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.jit import inline, new_random, uniform
from autoplace.strategies._support import View

__all__ = [
    "BEST",
    "EVALUATIONS",
    "GRAFTS",
    "GUIDED",
    "VALUE",
    "Prior",
    "Space",
    "Walk",
    "accept",
    "draw",
    "draw_class",
    "fits",
    "new_walk",
    "reach",
    "remember",
    "spread",
    "take_back",
    "turn",
    "uniform_prior",
    "window_move",
]

VALUE, BEST, EVALUATIONS, GUIDED, GRAFTS = range(5)
"""Places in `Walk.numbers`."""


class Space(NamedTuple):
    """What moves read. N ops, K classes, D devices."""

    allowed: NDArray[np.bool_]
    """bool[K, D]."""
    member_offsets: NDArray[np.int64]
    """int64[K + 1] into `members`."""
    members: NDArray[np.int32]
    """int32[N], ops by class."""
    near_offsets: NDArray[np.int64]
    """int64[K + 1] into `near`."""
    near: NDArray[np.int32]
    """Classes that a class exchanges a tensor with."""
    free: NDArray[np.int32]
    """int32[F], classes with more than one choice."""
    class_bytes: NDArray[np.float64]
    """float64[K], the lower bound of memory, bytes."""
    capacity: NDArray[np.float64]
    """float64[D], bytes."""

    @staticmethod
    def of(view: View, op_class: NDArray[np.int32] | None = None) -> Space:
        """Lay out a view; memory by its lower bound, for the simulator knows what is freed.

        Args:
            view: Classes, devices, memory.
            op_class: int32[N], class of every op that the simulator knows; None = those of the view.
        """
        op_class = view.op_class if op_class is None else op_class
        view = view.relaxed() or view
        edges = view.problem.graph.edge_list
        pairs = view.op_class[edges[:, :2]].astype(np.int64)
        pairs = np.concatenate([pairs, pairs[:, ::-1]])
        count = view.num_classes
        keys = np.unique(pairs[:, 0] * count + pairs[:, 1])
        one, other = keys // count, keys % count
        apart = one != other
        one, other = one[apart], other[apart]
        return Space(
            allowed=np.ascontiguousarray(view.allowed),
            member_offsets=_offsets(op_class, count),
            members=np.argsort(op_class, kind="stable").astype(np.int32),
            near_offsets=_offsets(one, count),
            near=other.astype(np.int32),
            free=np.flatnonzero(view.allowed.sum(axis=1) > 1).astype(np.int32),
            class_bytes=np.ascontiguousarray(view.class_bytes),
            capacity=np.ascontiguousarray(view.capacity),
        )


class Prior(NamedTuple):
    """Which class to move, and where to."""

    pick: NDArray[np.float64]
    """float64[F], running sum of the weights of `Space.free`."""
    wish: NDArray[np.float64]
    """float64[K, D], running sum of the weights of a class's devices."""
    donors: NDArray[np.int32]
    """int32[M, K], whole placements of which a move may copy a part; M may be 0."""


class Walk(NamedTuple):
    """Where a walk is, and the best that it has seen."""

    now: NDArray[np.int32]
    """int32[K]."""
    best: NDArray[np.int32]
    """int32[K]."""
    used: NDArray[np.float64]
    """float64[D], memory of `now`, bytes."""
    numbers: NDArray[np.float64]
    """J of `now`, J of `best`, evaluations spent, chance that a class is moved by the prior, chance of a graft."""
    random: NDArray[np.uint64]
    """uint64[1]."""
    classes: NDArray[np.int32]
    """int32[K] scratch: the classes of a move."""
    targets: NDArray[np.int32]
    """int32[K] scratch: their devices."""
    ops: NDArray[np.int32]
    """int32[N] scratch: the ops of a move."""
    devices: NDArray[np.int32]
    """int32[N] scratch: their devices."""
    reached: NDArray[np.int32]
    """int32[K] scratch: classes of a connected group."""
    digits: NDArray[np.int32]
    """int32[2, K] scratch: devices of a window's classes, on trial and best."""
    marks: NDArray[np.int64]
    """int64[K + 1] scratch: the last group move that touched a class; then the number of group moves."""


def _offsets(keys: NDArray[np.integer], count: int) -> NDArray[np.int64]:
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(keys, minlength=count), out=offsets[1:])
    return offsets


def new_walk(space: Space, *, seed: int) -> Walk:
    """Return a walk that stands nowhere yet; → `set_out`."""
    classes, ops, devices = len(space.class_bytes), len(space.members), len(space.capacity)
    return Walk(
        now=np.zeros(classes, np.int32),
        best=np.zeros(classes, np.int32),
        used=np.zeros(devices),
        numbers=np.zeros(5),
        random=new_random(seed),
        classes=np.zeros(classes, np.int32),
        targets=np.zeros(classes, np.int32),
        ops=np.zeros(ops, np.int32),
        devices=np.zeros(ops, np.int32),
        reached=np.zeros(classes, np.int32),
        digits=np.zeros((2, classes), np.int32),
        marks=np.zeros(classes + 1, np.int64),
    )


def uniform_prior(space: Space) -> Prior:
    """Return the prior that prefers nothing."""
    return Prior(
        pick=np.cumsum(np.ones(len(space.free))),
        wish=np.cumsum(space.allowed.astype(np.float64), axis=1),
        donors=np.zeros((0, len(space.class_bytes)), np.int32),
    )


@inline
def _below(random, count):
    """Return an integer in [0, count)."""
    return int(uniform(random) * count)


@inline
def _find(sums, size, point):
    """Return the first index whose running sum is above a point."""
    low = 0
    high = size - 1
    while low < high:
        middle = (low + high) // 2
        if sums[middle] > point:
            high = middle
        else:
            low = middle + 1
    return low


@inline
def _length(random, count):
    """Draw a length with as much chance between 1 and 2 as between K/2 and K."""
    return int(2.0 ** (uniform(random) * math.log2(max(2.0, float(count)))))


@inline
def _put(space, walk, size, index, device):
    """Add a class to the move where it may go and is not yet; return the move's new size."""
    if space.allowed[index, device] and walk.now[index] != device:
        walk.classes[size] = index
        walk.targets[size] = device
        return size + 1
    return size


@inline
def draw_class(space, prior, walk, guided):
    free = len(space.free)
    if guided:
        return space.free[_find(prior.pick, free, uniform(walk.random) * prior.pick[free - 1])]
    return space.free[_below(walk.random, free)]


@inline
def _draw_device(space, prior, walk, index, guided):
    """Draw where a class goes: by the prior, to a neighbour, or anywhere."""
    devices = space.allowed.shape[1]
    if guided:
        return _find(prior.wish[index], devices, uniform(walk.random) * prior.wish[index, devices - 1])
    first, last = space.near_offsets[index], space.near_offsets[index + 1]
    if last > first and uniform(walk.random) < 0.5:
        return walk.now[space.near[first + _below(walk.random, last - first)]]
    return _below(walk.random, devices)


@inline
def _fill(space, walk, first, last, device):
    size = 0
    for index in range(first, last):
        size = _put(space, walk, size, index, device)
    return size


@inline
def _group(space, walk, index, device, wanted):
    """Move up to `wanted` connected classes, from one on, that are on its device."""
    here, stamp = walk.now[index], walk.marks[len(walk.now)] + 1
    walk.marks[len(walk.now)] = stamp
    walk.marks[index] = stamp
    size = _put(space, walk, 0, index, device)
    at = 0
    while at < size and size < wanted:
        one = walk.classes[at]
        at += 1
        for k in range(space.near_offsets[one], space.near_offsets[one + 1]):
            other = space.near[k]
            if walk.now[other] == here and walk.marks[other] != stamp and size < wanted:
                walk.marks[other] = stamp
                size = _put(space, walk, size, other, device)
    return size


@inline
def reach(space, walk, index, wanted):
    """Write up to `wanted` connected classes, from one on, into `reached`; return how many."""
    count = len(walk.now)
    stamp = walk.marks[count] + 1
    walk.marks[count] = stamp
    walk.marks[index] = stamp
    walk.reached[0] = index
    at, reached = 0, 1
    while at < reached:
        one = walk.reached[at]
        at += 1
        for k in range(space.near_offsets[one], space.near_offsets[one + 1]):
            other = space.near[k]
            if walk.marks[other] != stamp and reached < wanted:
                walk.marks[other] = stamp
                walk.reached[reached] = other
                reached += 1
    return reached


@inline
def _graft(space, prior, walk, index):
    """Copy a run or a connected group of classes, from one on, from a donor."""
    count, donor = len(walk.now), prior.donors[_below(walk.random, len(prior.donors))]
    wanted, size = _length(walk.random, count), 0
    if uniform(walk.random) < 0.5:
        for one in range(index, min(count, index + wanted)):
            size = _put(space, walk, size, one, donor[one])
        return size
    for k in range(reach(space, walk, index, wanted)):
        size = _put(space, walk, size, walk.reached[k], donor[walk.reached[k]])
    return size


@inline
def _border(space, walk, wanted):
    """Shift the first border at or after a random place."""
    count = len(walk.now)
    if count < 2:
        return 0
    start = _below(walk.random, count - 1)
    for step in range(count - 1):
        border = 1 + (start + step) % (count - 1)
        if walk.now[border] != walk.now[border - 1]:
            if uniform(walk.random) < 0.5:
                return _fill(space, walk, border, min(count, border + wanted), walk.now[border - 1])
            return _fill(space, walk, max(0, border - wanted), border, walk.now[border])
    return 0


@inline
def draw(space, prior, walk):
    """Draw a move into `classes` and `targets`; return its size, 0 when the draw gave none."""
    count = len(walk.now)
    kind = uniform(walk.random)
    guided = uniform(walk.random) < walk.numbers[GUIDED]
    if len(prior.donors) > 0 and uniform(walk.random) < walk.numbers[GRAFTS]:
        return _graft(space, prior, walk, draw_class(space, prior, walk, guided))
    if kind < 0.2:
        first = _below(walk.random, count)
        last = min(count, first + _length(walk.random, count))
        return _fill(space, walk, first, last, _below(walk.random, space.allowed.shape[1]))
    if kind < 0.35:
        return _border(space, walk, _length(walk.random, count))
    index = draw_class(space, prior, walk, guided)
    if kind < 0.5:
        other = draw_class(space, prior, walk, False)
        here, there = walk.now[index], walk.now[other]
        size = _put(space, walk, 0, index, there)
        if size == 0:
            return 0
        return 2 if _put(space, walk, 1, other, here) == 2 else 0
    device = _draw_device(space, prior, walk, index, guided)
    if kind < 0.65:
        return _group(space, walk, index, device, _length(walk.random, count))
    return _put(space, walk, 0, index, device)


@inline
def fits(space, walk, size):
    """Add a move to the memory used; return whether it fits. Where not, it is taken back."""
    fits = True
    for k in range(size):
        index = walk.classes[k]
        walk.used[walk.now[index]] -= space.class_bytes[index]
        walk.used[walk.targets[k]] += space.class_bytes[index]
    for k in range(size):
        d = walk.targets[k]
        fits = fits and walk.used[d] <= space.capacity[d]
    if not fits:
        take_back(space, walk, size)
    return fits


@inline
def turn(space, walk, size):
    """Go on to the next placement of a window; return whether there is one."""
    devices = space.allowed.shape[1]
    for k in range(size):
        index = walk.reached[k]
        device = walk.digits[0, k] + 1
        while device < devices and not space.allowed[index, device]:
            device += 1
        if device < devices:
            walk.digits[0, k] = device
            return True
        device = 0
        while not space.allowed[index, device]:
            device += 1
        walk.digits[0, k] = device
    return False


@inline
def window_move(space, walk, size, row):
    """Write the placement of a window as a move; return its size."""
    moved = 0
    for k in range(size):
        moved = _put(space, walk, moved, walk.reached[k], walk.digits[row, k])
    return moved


@inline
def accept(walk, size, value):
    """Take the move that was tried and kept."""
    for k in range(size):
        walk.now[walk.classes[k]] = walk.targets[k]
    walk.numbers[VALUE] = value
    if value < walk.numbers[BEST]:
        remember(walk)


@inline
def take_back(space, walk, size):
    for k in range(size):
        index = walk.classes[k]
        walk.used[walk.now[index]] += space.class_bytes[index]
        walk.used[walk.targets[k]] -= space.class_bytes[index]


@inline
def spread(space, walk, size):
    """Write the ops of a move; return how many."""
    count = 0
    for k in range(size):
        index = walk.classes[k]
        for m in range(space.member_offsets[index], space.member_offsets[index + 1]):
            walk.ops[count] = space.members[m]
            walk.devices[count] = walk.targets[k]
            count += 1
    return count


@inline
def remember(walk):
    """Make `now` the best."""
    walk.numbers[BEST] = walk.numbers[VALUE]
    for index in range(len(walk.now)):
        walk.best[index] = walk.now[index]
