import types

import pytest
import torch
from torch import nn

from autoplace.graph.caches import caches_off, capture_kwargs
from autoplace.graph.capture import capture
from autoplace.workload import Workload


class Inner(nn.Module):
    """Makes a cache, an object that graphs cannot return, where its configuration says so."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(use_cache=True, other=1)
        self.linear = nn.Linear(3, 3)

    def forward(self, x, **kwargs):
        made = kwargs.get("use_cache", self.config.use_cache)
        y = self.linear(x)
        return {"y": y, "cache": types.SimpleNamespace(keys=y) if made else None}


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x, **kwargs):
        return self.inner(x, **kwargs)


def test_a_cache_that_only_a_part_of_the_model_knows_of_is_switched_off():
    model = Outer()
    captured = capture(Workload(model=model, args=(torch.ones(2, 3),)))
    assert (captured.rung, captured.dynamic_batch) == ("export", True)
    assert model.inner.config.use_cache is True
    assert model(torch.ones(2, 3))["cache"] is not None


def test_what_the_user_asked_for_counts():
    model = Outer()
    with caches_off(model, {"use_cache": True}):
        assert model.inner.config.use_cache is True
    with caches_off(model, {}):
        assert model.inner.config.use_cache is False and model.inner.config.other == 1
    assert model.inner.config.use_cache is True
    with pytest.raises(TypeError), caches_off(model, {}):
        model("no tensor")
    assert model.inner.config.use_cache is True


def test_only_arguments_of_the_signature_are_answered():
    class Named(nn.Linear):
        def forward(self, x, use_cache=None):
            return super().forward(x)

    x = (torch.ones(1, 2),)
    assert capture_kwargs(Workload(model=Named(2, 2), args=x)) == {"use_cache": False}
    assert capture_kwargs(Workload(model=Named(2, 2), args=(*x, True))) == {}
    assert capture_kwargs(Workload(model=Named(2, 2), args=x, kwargs={"use_cache": True})) == {"use_cache": True}
    assert capture_kwargs(Workload(model=Outer(), args=x)) == {}
