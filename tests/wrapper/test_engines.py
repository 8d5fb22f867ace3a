"""The other engines under the wrapper: stages of the exported graph, replicas in processes."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch


@pytest.fixture(params=["graph", "processes"])
def engine(request):
    return request.param


def test_training_is_the_models(wrap, net, same_step, strict, engine):
    wrapper = wrap(net, engine)
    before = [id(p) for p in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for batch in (8, 8, 5):
        same_step(wrapper, torch.randn(batch, 8))
        wrapper(torch.randn(batch, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert wrapper.plan.engine == engine and wrapper._state.mode().first.executor is not None
    assert [id(p) for p in wrapper.parameters()] == before and list(wrapper.state_dict()) == list(net.state_dict())
    with torch.no_grad():
        x = torch.randn(8, 8)
        torch.testing.assert_close(wrapper.eval()(x), net(x))


def test_the_models_own_error_arrives_and_does_no_harm(wrap, net, same_step, strict, engine):
    wrapper = wrap(net, engine)
    same_step(wrapper, torch.randn(8, 8))
    with pytest.raises(TypeError, match="surprise"):
        wrapper(torch.randn(8, 8), surprise=1)
    with pytest.raises(RuntimeError, match="shape"):
        wrapper(torch.randn(8, 9))
    same_step(wrapper, torch.randn(8, 8))
    assert wrapper.plan.engine == engine


def test_hooks_and_changed_attributes_are_respected(wrap, net, engine):
    wrapper, x, seen = wrap(net, engine), torch.randn(8, 8), []
    wrapper(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        wrapper.scale = 3.0
        torch.testing.assert_close(wrapper(x), net(x))
        handle = net.second.register_forward_hook(lambda *_: seen.append(1))
        wrapper(x)
        handle.remove()
        assert seen == [1]
        net.scale = 1.0
        torch.testing.assert_close(wrapper(x), net(x))
    assert wrapper.plan.engine == engine and wrapper.plan.shape != "plain"


def test_copies_and_ends(wrap, net, engine):
    wrapper, x = wrap(net, engine), torch.randn(8, 8)
    expected = wrapper(x)
    twin = copy.deepcopy(wrapper)
    torch.testing.assert_close(twin(x), expected)
    before = threading.active_count()
    twin.close()
    wrapper.close()
    assert threading.active_count() <= before
    torch.testing.assert_close(net(x), expected)
