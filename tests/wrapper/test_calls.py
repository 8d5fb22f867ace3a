"""Inputs and outputs of any kind; batches and sequences of other sizes never fail."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch


@dataclass
class Answer:
    value: torch.Tensor
    note: str = "fine"


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Kinds(torch.nn.Module):
    """Returns its output as whatever it is asked for."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.second = torch.nn.Linear(8, 4)

    def forward(self, x, kind="tensor"):
        y = self.second(torch.relu(self.first(x)))
        if kind == "output":
            from transformers.modeling_outputs import BaseModelOutput

            return BaseModelOutput(last_hidden_state=y, hidden_states=(x, y))
        return {
            "tensor": y,
            "tuple": (y, y + 1),
            "list": [y, None],
            "dict": {"y": y, "nested": {"z": y * 2}, "flag": True},
            "namedtuple": Pair(y, y + 1),
            "dataclass": Answer(y),
            "mixed": (y, [{"deep": (y * 3,)}], "text", 7),
        }[kind]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "dict", "namedtuple", "dataclass", "mixed", "output"])
def test_outputs_of_any_type(wrap, strict, shape, kind):
    model = Kinds()
    wrapper, x = wrap(model, shape), torch.randn(8, 8)
    expected, got = model(x, kind=kind), wrapper(x, kind=kind)
    assert type(got) is type(expected)
    if kind == "dataclass":
        assert got.note == "fine"
        expected, got = expected.value, got.value
    if kind == "mixed":
        assert got[2:] == expected[2:]
        expected, got = expected[:2], got[:2]
    torch.testing.assert_close(got, expected)


def test_keyword_optional_and_extra_inputs(wrap, net, same_step, strict, shape):
    wrapper, x = wrap(net, shape), torch.randn(8, 8)
    same_step(wrapper, x)
    same_step(wrapper, x=x)
    same_step(wrapper, x, torch.randn(8, 4))
    same_step(wrapper, x, bias=torch.randn(4), twice=True)
    with pytest.raises(TypeError, match="surprise"):
        wrapper(x, surprise=1)
    same_step(wrapper, x)


def test_every_batch_size_runs(wrap, net, same_step, strict, shape):
    wrapper = wrap(net, shape)
    for batch in (8, 32, 5, 2, 1, 8):  # a batch of one runs on one of two replicas
        same_step(wrapper, torch.randn(batch, 8))


def test_a_partial_last_batch_of_a_loader(wrap, net, strict, shape):
    wrapper = wrap(net, shape)
    loader = torch.utils.data.DataLoader(torch.randn(19, 8), batch_size=8)
    got = torch.cat([wrapper(batch) for batch in loader])
    torch.testing.assert_close(got, net(torch.cat(list(loader))))


class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(20, 8)
        self.attend = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = torch.nn.Linear(8, 20)

    def forward(self, ids, mask=None):
        x = self.embed(ids)
        x, _ = self.attend(x, x, x, key_padding_mask=mask, need_weights=False)
        return self.head(x)


def test_every_sequence_length_runs(wrap, same_step, strict, shape):
    wrapper = wrap(Words(), shape)
    for length in (7, 3, 12, 1, 7):
        same_step(wrapper, torch.randint(0, 20, (4, length)), mask=torch.zeros(4, length, dtype=torch.bool))


class Boom(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.second = torch.nn.Linear(8, 8)

    def forward(self, x, fail=False):
        y = self.first(x)
        if fail:
            raise LookupError("the model's own words")
        return self.second(y)


def test_exceptions_of_the_model_arrive_with_their_traceback_and_do_no_harm(wrap, same_step, strict, shape):
    model = Boom()
    wrapper, x = wrap(model, shape), torch.randn(8, 8)
    for _ in range(2):
        same_step(wrapper, x)
        with pytest.raises(LookupError, match="the model's own words") as caught:
            wrapper(x, fail=True)
        assert "forward" in [entry.name for entry in caught.traceback]
        assert caught.traceback[-1].path.name == "test_calls.py"
        assert caught.value.__cause__ is None
    same_step(wrapper, x)


def test_a_first_call_that_fails_in_the_model_raises_the_models_error_and_plans_later(tunes):
    model = Boom().eval()
    wrapper = tunes(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(LookupError, match="the model's own words") as caught:
            wrapper(torch.randn(8, 8), fail=True)
        assert caught.value.__context__ is None
        assert wrapper.plan is None
        wrapper(torch.randn(8, 8))
    assert wrapper.plan is not None


def test_forward_runs_without_the_models_own_hooks(wrap, net, shape):
    wrapper, x, calls = wrap(net, shape), torch.randn(8, 8), []
    torch.testing.assert_close(wrapper.forward(x, twice=True), net(x, twice=True))
    net.register_forward_hook(lambda *_: calls.append(1))
    wrapper.forward(x)
    assert calls == []
    import inspect

    assert inspect.signature(wrapper.forward) == inspect.signature(net.forward)
