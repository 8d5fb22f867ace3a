"""Which differences between models and values count, and which do not."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import json

import pytest
import torch
from torch import nn

from autoplace.likeness import describe, describe_model


class Net(nn.Module):
    def __init__(self, *, tied=False, scale=2.0, extra=None):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.scale, self.extra = scale, extra
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x):
        return self.norm(self.b(self.a(x))) * self.scale


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Settings:
    rate: float = 0.1
    sizes: tuple = (1, 2)


class Config:
    def __init__(self, **values):
        self.values = values

    def to_dict(self):
        return self.values


def _frozen(model):
    model.a.weight.requires_grad_(False)
    return model


def _deeper(model):
    model.c = nn.Identity()
    return model


def _hooked(model):
    model.a.register_forward_hook(lambda *_: None)
    return model


def _evaluated(model):
    model.norm.eval()
    return model


def _otherwise(self, x):
    return self.norm(self.a(self.b(x))) * self.scale


CHANGES = {
    "tie": lambda: Net(tied=True),
    "scalar": lambda: Net(scale=3.0),
    "dtype": lambda: Net().double(),
    "frozen": lambda: _frozen(Net()),
    "child": lambda: _deeper(Net()),
    "hook": lambda: _hooked(Net()),
    "part in eval": lambda: _evaluated(Net()),
    "config": lambda: Net(extra=Config(layers=3)),
    "enum": lambda: Net(extra=Color.RED),
    "tensor": lambda: Net(extra=torch.zeros(3)),
    "code": lambda: type("Net", (Net,), {"forward": _otherwise, "__module__": Net.__module__})(),
}


def test_values_of_parameters_do_not_count_and_descriptions_are_json():
    torch.manual_seed(0)
    first = describe_model(Net())
    torch.manual_seed(1)
    model = Net()
    assert describe_model(model) == first == describe_model(copy.deepcopy(model)) == json.loads(json.dumps(first))
    model(torch.randn(4, 4)).sum().backward()
    assert describe_model(model) == first, "nor do gradients and running statistics"


def test_every_change_of_structure_counts():
    described = {name: json.dumps(describe_model(make())) for name, make in CHANGES.items()}
    described["as it was"] = json.dumps(describe_model(Net()))
    assert len(set(described.values())) == len(described)


def test_a_lazy_model_can_be_described():
    assert json.dumps(describe_model(nn.LazyLinear(3)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1.0, 1),
        (float("nan"), 0.0),
        ("a", b"a"),
        ([1, 2], (1, 2)),
        ({"a": 1}, {"a": 2}),
        ({"a", "b"}, {"a"}),
        (Color.RED, Color.BLUE),
        (Settings(), Settings(rate=0.2)),
        (Config(a=1), Config(a=2)),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (lambda x: x + 1, lambda x: x + 2),
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(4, 3), torch.zeros(3, 4).T),
        (torch.float32, torch.float16),
        (Net, Config),
        (list(range(2000)), list(range(2001))),
    ],
)
def test_values_that_differ(one, other):
    assert describe(one) == describe(one)
    assert json.dumps(describe(one)) != json.dumps(describe(other))


def test_what_closures_hold_counts():
    def make(power):
        return lambda x: x**power

    assert describe(make(2)) == describe(make(2)) != describe(make(3))


def test_objects_count_by_class_and_cycles_end():
    assert describe(object()) == describe(object()) != describe(Net())
    ring: list = [1]
    ring.append(ring)
    assert json.dumps(describe(ring))
    assert describe({2, 1, 3}) == describe({3, 2, 1})
