"""Families of synthetic op graphs: the shapes that models have, with random sizes and costs. No devices here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

__all__ = ["FAMILIES", "Shape"]


class Shape(NamedTuple):
    """A graph without units."""

    work: list[float]
    """N relative costs."""
    kinds: list[str]
    """N kinds; ops of a kind suit the same devices."""
    edges: list[tuple[int, list[int], float]]
    """(producer, consumers, relative size) of every tensor; every op's output is one tensor."""


class _Builder:
    """Grows a shape op by op."""

    def __init__(self, random: Generator) -> None:
        self.random = random
        self.work: list[float] = []
        self.kinds: list[str] = []
        self.size: list[float] = []
        self.consumers: list[list[int]] = []

    def add(self, inputs: list[int], kind: str = "linear", work: float = 1.0, size: float = 1.0) -> int:
        """Add an op that reads the outputs of others and return its index."""
        index = len(self.work)
        self.work.append(work * float(np.exp(self.random.normal(0.0, 0.3))))
        self.kinds.append(kind)
        self.size.append(size)
        self.consumers.append([])
        for producer in dict.fromkeys(inputs):
            self.consumers[producer].append(index)
        return index

    def shape(self) -> Shape:
        """Return what was built."""
        edges = [(i, c, self.size[i]) for i, c in enumerate(self.consumers) if c]
        return Shape(self.work, self.kinds, edges)


_KINDS = ("linear", "norm", "attention", "activation", "embedding")


def _chain(random: Generator, size: int) -> Shape:
    """A chain with occasional skips, costs varying along it."""
    build, last, skips = _Builder(random), -1, random.random() < 0.5
    for index in range(size):
        inputs = [last] if last >= 0 else []
        if skips and index > 3 and random.random() < 0.2:
            inputs.append(index - int(random.integers(2, 4)))
        last = build.add(inputs, str(random.choice(_KINDS)), float(random.lognormal(0.0, 0.8)))
    return build.shape()


def _tree(random: Generator, size: int) -> Shape:
    """An in-tree or out-tree with small degree."""
    build, degree = _Builder(random), int(random.integers(2, 5))
    parents = [(i - 1) // degree if random.random() < 0.7 else int(random.integers(0, max(i, 1))) for i in range(size)]
    if random.random() < 0.5:
        for index in range(size):
            build.add([parents[index]] if index else [], str(random.choice(_KINDS)), float(random.lognormal(0, 0.6)))
        return build.shape()
    children: list[list[int]] = [[] for _ in range(size)]
    for index in range(1, size):
        children[parents[index]].append(index)
    for index in range(size - 1, -1, -1):
        inputs = [size - 1 - child for child in children[index]]
        build.add(inputs, str(random.choice(_KINDS)), float(random.lognormal(0.0, 0.6)))
    return build.shape()


def _diamond(random: Generator, size: int) -> Shape:
    """A row of fork-joins of varying width."""
    build, last = _Builder(random), -1
    while len(build.work) < size:
        fork = build.add([last] if last >= 0 else [], "norm", 0.3)
        width, depth = int(random.integers(2, 7)), int(random.integers(1, 4))
        ends = []
        for _ in range(width):
            tip, work = fork, float(random.lognormal(0.0, 0.6))
            for _ in range(depth):
                tip = build.add([tip], str(random.choice(_KINDS)), work)
            ends.append(tip)
        last = build.add(ends, "activation", 0.3)
    return build.shape()


def _series_parallel(random: Generator, size: int) -> Shape:
    """A graph made by recursive series and parallel composition."""
    build = _Builder(random)

    def grow(source: int, budget: int) -> int:
        if budget <= 1:
            return build.add([source], str(random.choice(_KINDS)), float(random.lognormal(0.0, 0.6)))
        if random.random() < 0.5:
            return grow(grow(source, budget // 2), budget - budget // 2)
        width = int(random.integers(2, 5))
        ends = [grow(source, max(1, (budget - 1) // width)) for _ in range(width)]
        return build.add(ends, "activation", 0.3)

    grow(build.add([], "embedding", 0.5), size - 1)
    return build.shape()


def _layered(random: Generator, size: int) -> Shape:
    """Random layers; every op reads a few of the layer before, sometimes of an earlier one."""
    build, layers = _Builder(random), [[-1]]
    width = int(random.integers(2, 9))
    layers = [[build.add([], "embedding", 0.5)]]
    while len(build.work) < size:
        before, layer = layers[-1], []
        for _ in range(int(random.integers(1, width + 1))):
            inputs = [int(i) for i in random.choice(before, size=min(len(before), int(random.integers(1, 4))))]
            if len(layers) > 2 and random.random() < 0.15:
                inputs.append(int(random.choice(layers[int(random.integers(len(layers) - 1))])))
            layer.append(build.add(inputs, str(random.choice(_KINDS)), float(random.lognormal(0.0, 0.8))))
        layers.append(layer)
    return build.shape()


def _block(build: _Builder, last: int, heavy: float) -> int:
    """Add a transformer block at op level: eleven ops, two residuals."""
    norm = build.add([last], "norm", 0.1)
    query, key, value = (build.add([norm], "linear", heavy / 3) for _ in range(3))
    attention = build.add([query, key, value], "attention", heavy * 0.7)
    projection = build.add([attention], "linear", heavy / 3)
    middle = build.add([last, projection], "activation", 0.05)
    norm = build.add([middle], "norm", 0.1)
    up = build.add([norm], "linear", heavy * 1.3, 4.0)
    act = build.add([up], "activation", 0.2, 4.0)
    return build.add([middle, build.add([act], "linear", heavy * 1.3)], "activation", 0.05)


def _transformer(random: Generator, size: int) -> Shape:
    """A stack of blocks between an embedding and a head, at op level or one op a block."""
    build, heavy = _Builder(random), float(random.lognormal(0.5, 0.4))
    last, coarse = build.add([], "embedding", 0.5), random.random() < 0.4
    while len(build.work) < size - 1:
        last = build.add([last], "linear", 3 * heavy) if coarse else _block(build, last, heavy)
    build.add([last], "linear", heavy * 2)
    return build.shape()


def _moe(random: Generator, size: int) -> Shape:
    """Blocks in which a router feeds experts whose outputs are merged."""
    build = _Builder(random)
    last, experts = build.add([], "embedding", 0.5), int(random.integers(2, 9))
    while len(build.work) < size:
        attention = build.add([last], "attention", 1.5)
        router = build.add([attention], "norm", 0.1)
        ends = [build.add([router], "linear", float(random.lognormal(0.3, 0.4)), 0.5) for _ in range(experts)]
        last = build.add([attention, *ends], "activation", 0.2)
    return build.shape()


def _encoder_decoder(random: Generator, size: int) -> Shape:
    """An encoder whose output every decoder block reads."""
    build = _Builder(random)
    depth = max(1, size // 7)
    encoder = build.add([], "embedding", 0.5)
    for _ in range(depth):
        encoder = build.add([build.add([encoder], "attention", 1.2)], "linear", 2.0)
    decoder = build.add([], "embedding", 0.5)
    for _ in range(depth):
        own = build.add([decoder], "attention", 1.2)
        cross = build.add([own, encoder], "attention", 1.2)
        decoder = build.add([own, build.add([cross], "linear", 2.0)], "activation", 0.1)
    build.add([decoder], "linear", 3.0)
    return build.shape()


def _multi_tower(random: Generator, size: int) -> Shape:
    """Independent towers of different depth that meet in a few ops, as in CLIP or two-tower retrieval."""
    build, towers = _Builder(random), int(random.integers(2, 6))
    ends = []
    for _ in range(towers):
        tip, work = build.add([], "embedding", 0.5), float(random.lognormal(0.0, 0.5))
        for _ in range(max(1, round(size / towers * random.uniform(0.5, 1.3)) - 1)):
            tip = build.add([tip], str(random.choice(_KINDS)), work)
        ends.append(tip)
    build.add([build.add(ends, "linear", 1.0)], "linear", 0.5)
    return build.shape()


def _tensor_parallel(random: Generator, size: int) -> Shape:
    """Blocks cut into shards, every shard reading all shards of the block before (all-to-all)."""
    build, shards = _Builder(random), int(random.integers(2, 7))
    layer = [build.add([], "embedding", 0.3) for _ in range(shards)]
    while len(build.work) + 2 * shards <= max(size, 4 * shards):
        ups = [build.add(list(layer), "linear", 1.5, 1.0) for _ in range(shards)]
        layer = [build.add([up], "linear", 1.5, 1.0 / shards) for up in ups]
    build.add(list(layer), "linear", 1.0)
    return build.shape()


FAMILIES: dict[str, Callable[[Generator, int], Shape]] = {
    "chain": _chain,
    "tree": _tree,
    "diamond": _diamond,
    "series_parallel": _series_parallel,
    "layered": _layered,
    "transformer": _transformer,
    "moe": _moe,
    "encoder_decoder": _encoder_decoder,
    "multi_tower": _multi_tower,
    "tensor_parallel": _tensor_parallel,
}
"""Name to a function of (random source, number of ops, about)."""
