"""Special methods, representation and overridden methods are the model's."""

from __future__ import annotations

import pytest
import torch

from autoplace import OptimizedParallel, Plan
from autoplace.disguise import disguised


def _wrap(model):
    return OptimizedParallel(model, plan=Plan.plain())


def test_a_sequential_stays_a_sequence():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    wrapper = _wrap(model)
    assert len(wrapper) == 3 and wrapper[0] is model[0] and wrapper[-1] is model[2]
    assert list(wrapper) == list(model) and type(wrapper[:2]) is torch.nn.Sequential
    wrapper[1] = torch.nn.Tanh()
    del wrapper[2]
    assert isinstance(model[1], torch.nn.Tanh) and len(model) == 2
    assert wrapper.extend([torch.nn.Linear(3, 2)]) is wrapper and len(model) == 3
    assert bool(wrapper)


def test_containers_answer_as_themselves():
    modules = torch.nn.ModuleDict({"a": torch.nn.Linear(1, 1), "b": torch.nn.ReLU()})
    wrapper = _wrap(modules)
    assert "a" in wrapper and "c" not in wrapper and list(wrapper.keys()) == ["a", "b"] and wrapper["b"] is modules["b"]
    listed = _wrap(torch.nn.ModuleList([torch.nn.ReLU()]))
    listed += [torch.nn.Tanh()]
    assert isinstance(listed, OptimizedParallel) and len(listed) == 2


class Special(torch.nn.Module):
    kind = "class attribute"

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.left = True

    def __contains__(self, item):
        return item == "thing"

    def __eq__(self, other):
        return other == "equal"

    def __hash__(self):
        return 17

    def __str__(self):
        return "special"

    @classmethod
    def make(cls):
        return cls()

    @staticmethod
    def helper():
        return "static"

    def state_dict(self, *args, **kwargs):
        return {"mine": 1}

    def train(self, mode=True):
        self.asked = mode
        return super().train(mode)


def test_user_classes_keep_their_special_and_overridden_methods():
    model = Special()
    wrapper = _wrap(model)
    with wrapper as entered:
        assert entered is wrapper
    assert model.left and "thing" in wrapper and "other" not in wrapper
    assert wrapper == "equal" and hash(wrapper) == 17 and str(wrapper) == "special"
    assert wrapper.kind == "class attribute" and type(wrapper.make()) is Special and wrapper.helper() == "static"
    assert wrapper.state_dict() == {"mine": 1}
    assert wrapper.eval() is wrapper and model.asked is False


def test_it_reads_well(wrap, net):
    wrapper = wrap(net, "stages")
    assert repr(wrapper).startswith("OptimizedParallel(plan=not planned yet, model=Net(\n  (first): Linear(")
    wrapper(torch.randn(4, 8))
    assert "plan=stages" in repr(wrapper)
    assert type(wrapper).__name__ == "OptimizedParallel" and type(wrapper).__qualname__ == "OptimizedParallel[Net]"


def test_one_class_a_model_class():
    assert type(_wrap(Special())) is type(_wrap(Special())) is disguised(OptimizedParallel, Special)
    assert type(_wrap(torch.nn.ReLU())) is not type(_wrap(Special()))
    assert not hasattr(_wrap(torch.nn.ReLU()), "__len__")
    with pytest.raises(TypeError, match="len"):
        len(_wrap(torch.nn.ReLU()))


def test_a_subclass_of_the_wrapper_works():
    class Mine(OptimizedParallel):
        def greet(self):
            return "hello"

    wrapper = Mine(torch.nn.Linear(2, 2), plan=Plan.plain())
    assert wrapper.greet() == "hello" and wrapper(torch.ones(1, 2)).shape == (1, 2)


def test_extra_state_and_versions_of_layers_are_the_models():
    class Extra(torch.nn.Module):
        def get_extra_state(self):
            return "extra"

        def set_extra_state(self, state):
            self.got = state

    model = torch.nn.Sequential(_wrap(Extra()), _wrap(torch.nn.BatchNorm1d(2)))
    state = model.state_dict()
    assert state["0._extra_state"] == "extra" and state._metadata["1"]["version"] == torch.nn.BatchNorm1d._version
    model.load_state_dict(state)
    assert model[0].got == "extra"


def test_explain_says_what_runs(wrap, net, shape):
    wrapper = wrap(net, shape)
    assert "call the model once" in wrapper.explain()
    wrapper(torch.randn(8, 8))
    text = wrapper.explain()
    assert "Net, training" in text and ("plain PyTorch" if shape == "plain" else "host0/cpu:0") in text
