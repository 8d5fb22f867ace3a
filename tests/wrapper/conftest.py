"""Wrappers under every shape of plan, two CPU devices, and a comparison with the plain model."""

from __future__ import annotations

import copy
import os
import warnings

import pytest
import torch

from autoplace import OptimizedParallel, Plan
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.plan import Replica

A, B = "host0/cpu:0", "host0/cpu:1"
SHAPES = ("plain", "single", "replicas", "stages", "pipeline")
ENGINES = {"graph": "graph", "processes": "processes"}
"""Further shapes: stages of the exported graph, and replicas in processes."""


def plan_of(shape: str, model: torch.nn.Module) -> Plan:
    """A plan of a shape; stages are the first and the second half of the model's children."""
    if shape == "plain":
        return Plan.plain()
    if shape == "single":
        replicas = (Replica(assignment={".": A}),)
    elif shape in ("replicas", "processes"):
        replicas = (Replica(assignment={".": A}, share=0.75), Replica(assignment={".": B}, share=0.25))
    else:
        names = [name for name, _ in model.named_children()]
        replicas = (Replica(assignment={n: A if 2 * i < len(names) else B for i, n in enumerate(names)}),)
    return Plan(
        replicas=replicas,
        strategy="test",
        microbatches=2 if shape == "pipeline" else 1,
        engine=ENGINES.get(shape, "threads"),
    )


@pytest.fixture
def cluster():
    cores = sorted(os.sched_getaffinity(0))
    devices = tuple(Device(name=n, kind="cpu", cores=(c,)) for n, c in zip((A, B), (cores[0], cores[-1]), strict=True))
    return Cluster(devices=devices, default_link=Link(latency_ms=0.0, bytes_per_ms=1e9))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


@pytest.fixture
def wrap(cluster):
    """Wrap a model under a plan of a shape; ended after the test."""
    made = []

    def make(model, shape="single", **options):
        made.append(OptimizedParallel(model, plan=plan_of(shape, model), cluster=cluster, track=False, **options))
        return made[-1]

    yield make
    for wrapper in made:
        wrapper.close()


@pytest.fixture
def tunes(cluster):
    """Wrap a model that tunes for itself, briefly, keeping nothing."""
    made = []

    def make(model, **options):
        options = {"budget_s": 1.0, "policy": None, "track": False, "cache": False, "compile": False, **options}
        made.append(OptimizedParallel(model, cluster=cluster, **options))
        return made[-1]

    yield make
    for wrapper in made:
        wrapper.close()


@pytest.fixture
def strict():
    """Warnings are errors: the plan must run, and nothing may be refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


class Net(torch.nn.Module):
    """Two stages, a scalar option and a flag."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 16)
        self.act = torch.nn.Tanh()
        self.second = torch.nn.Linear(16, 4)
        self.scale = 1.0

    def forward(self, x, bias=None, *, twice=False):
        y = self.second(self.act(self.first(x))) * self.scale
        y = y if bias is None else y + bias
        return y * 2 if twice else y

    @property
    def width(self):
        return self.first.out_features

    @width.setter
    def width(self, value):
        raise ValueError(f"cannot become {value} wide")


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def same_step():
    """Assert that one training step of a wrapper gives the output and all gradients of a plain twin of its model."""

    def check(wrapper, *args, pick=lambda y: y, rtol=1e-5, atol=1e-6, **kwargs):
        model = wrapper._state.model
        model.zero_grad(set_to_none=True)
        twin = copy.deepcopy(model)
        expected, got = pick(twin(*args, **kwargs)), pick(wrapper(*args, **kwargs))
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
        expected.square().mean().backward()
        got.square().mean().backward()
        for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        model.zero_grad(set_to_none=True)
        return twin

    return check
