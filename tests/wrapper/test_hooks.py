"""Hooks fire as often as on the plain model, wherever and whenever they were registered."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter

import pytest
import torch

KINDS = ("forward", "forward_pre", "full_backward", "full_backward_pre")


@contextlib.contextmanager
def _hooks(holder, seen, kinds=KINDS):
    handles = [getattr(holder, f"register_{kind}_hook")(lambda *_, k=kind: seen.update([k])) for kind in kinds]
    yield
    for handle in handles:
        handle.remove()


def _train(call, x):
    call(x).square().mean().backward()


@pytest.mark.parametrize("where", ["wrapper", "model", "child"])
@pytest.mark.parametrize("when", ["before the first call", "after"])
def test_hooks_fire_as_often_as_before(wrap, net, shape, where, when):
    twin = copy.deepcopy(net)
    wrapper, x = wrap(net, shape), torch.randn(8, 8)
    if when == "after":
        _train(wrapper, x)
    holders = {"wrapper": (wrapper, twin), "model": (net, twin), "child": (net.second, twin.second)}[where]
    seen, expected = Counter(), Counter()
    with warnings.catch_warnings(), _hooks(holders[0], seen), _hooks(holders[1], expected):
        warnings.simplefilter("ignore", UserWarning)  # parts of a batch are refused; told once
        for _ in range(3):
            _train(wrapper, x)
            _train(twin, x)
    assert seen == expected == Counter(dict.fromkeys(KINDS, 3))
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        if when != "after":
            torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("shape", ["replicas", "pipeline"])
def test_a_plan_in_parts_stops_while_there_are_hooks_and_goes_on_after(wrap, net, shape):
    wrapper, x = wrap(net, shape), torch.randn(8, 8)
    wrapper(x)
    own = wrapper.plan.shape
    assert own in ("replicas", "stages")
    handle = net.act.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="hooks, which would fire 2 times a call"):
        wrapper(x)
    assert wrapper.plan.is_plain
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper(x)  # told once
        handle.remove()
        torch.testing.assert_close(wrapper(x), net(x))
        assert wrapper.plan.shape == own


def test_a_hook_may_change_inputs_and_outputs(wrap, net, strict):
    wrapper, x = wrap(net, "stages"), torch.randn(8, 8)
    expected = net(x * 2) + 1
    wrapper.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    wrapper.register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(wrapper(x), expected)


def test_hooks_with_kwargs_and_always_call(wrap, net, strict):
    wrapper, seen = wrap(net), []
    wrapper.register_forward_pre_hook(lambda m, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True)
    wrapper(torch.randn(8, 8), twice=True)
    assert seen == [["twice"]]
    wrapper.register_forward_hook(lambda m, args, out: seen.append(out), always_call=True)
    with pytest.raises(RuntimeError, match="shape"):
        wrapper(torch.randn(8, 9))
    assert seen[1:] == [["twice"], None][1:] or seen[-1] is None


def test_tuning_fires_no_hook(tunes, net):
    wrapper, seen = tunes(net), Counter()
    net.first.weight.register_hook(lambda grad: seen.update(["tensor"]))
    with _hooks(net, seen), _hooks(net.second, seen, ("forward",)):
        _train(wrapper, torch.randn(8, 8))
        assert wrapper.plan is not None
    assert seen == Counter({"forward": 2, "forward_pre": 1, "full_backward": 1, "full_backward_pre": 1, "tensor": 1})


def test_hooks_of_parameters_see_the_whole_gradient_once(wrap, net, strict, shape):
    wrapper, twin, x = wrap(net, shape), copy.deepcopy(net), torch.randn(8, 8)
    wrapper(x)
    seen, expected = [], []
    net.first.weight.register_hook(seen.append)
    twin.first.weight.register_hook(expected.append)
    _train(wrapper, x)
    _train(twin, x)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected[0])


def test_an_optimizer_in_the_backward_steps_once(wrap, net, shape):
    wrapper, twin, x = wrap(net, shape), copy.deepcopy(net), torch.randn(8, 8)
    _train(wrapper, x)
    _train(twin, x)
    steps = []
    for model in (net, twin):
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: steps.append(p.grad.clone()))
    _train(wrapper, x)
    _train(twin, x)
    half = len(steps) // 2
    assert half == len(list(net.parameters()))
    for mine, theirs in zip(sorted(steps[:half], key=_order), sorted(steps[half:], key=_order), strict=True):
        torch.testing.assert_close(mine, theirs)


def _order(grad):
    return (tuple(grad.shape), float(grad.sum()))


def test_hooks_that_are_part_of_the_model_stay_on_while_planning(tunes):
    model = torch.nn.Sequential(torch.nn.utils.spectral_norm(torch.nn.Linear(8, 8)), torch.nn.Linear(8, 4)).eval()
    wrapper, x = tunes(model), torch.randn(8, 8)
    with torch.no_grad():
        torch.testing.assert_close(wrapper(x), model(x))
    assert wrapper.plan is not None


def test_hooks_for_all_modules_count_the_models_own_calls(wrap, net, shape):
    wrapper, twin, x = wrap(net, shape), copy.deepcopy(net), torch.randn(8, 8)
    wrapper(x)
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            wrapper(x)
        mine = list(seen)
        seen.clear()
        twin(x)
    finally:
        handle.remove()
    assert mine == seen
