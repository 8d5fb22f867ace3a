"""Copies, pickles and conversions of the wrapper."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from autoplace import OptimizedParallel, Plan


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.second = torch.nn.Linear(8, 4)
        self.tag = "mine"

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def _loss(output):
    return output.abs().sum()


def _by_pickle(wrapper, _):
    return pickle.loads(pickle.dumps(wrapper))


def _by_torch(wrapper, folder):
    torch.save(wrapper, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


@pytest.mark.parametrize("way", [lambda w, _: copy.deepcopy(w), _by_pickle, _by_torch], ids=["copy", "pickle", "torch"])
def test_a_twin_is_a_wrapper_of_its_own(wrap, strict, shape, way, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, Small.__module__, __import__("sys").modules[__name__])
    model = Small()
    wrapper, x = wrap(model, shape, loss=_loss), torch.randn(8, 8)
    expected = wrapper(x)
    twin = way(wrapper, tmp_path)
    assert isinstance(twin, OptimizedParallel) and type(twin) is type(wrapper) and twin.tag == "mine"
    assert twin.plan is None, "it plans for itself"
    assert not set(map(id, twin.parameters())) & set(map(id, wrapper.parameters()))
    torch.testing.assert_close(twin(x), expected)
    assert twin.plan.shape == wrapper.plan.shape
    with torch.no_grad():
        twin.first.weight.zero_()
    torch.testing.assert_close(wrapper(x), expected)
    twin.close()


def test_a_loss_that_cannot_be_pickled_stays_behind(wrap, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, Small.__module__, __import__("sys").modules[__name__])
    wrapper = wrap(Small(), loss=lambda y: y.sum())
    twin = pickle.loads(pickle.dumps(wrapper))
    assert twin._state.options["loss"] is None
    assert copy.deepcopy(wrapper)._state.options["loss"] is wrapper._state.options["loss"]


def test_weights_travel_as_a_state(wrap, net, tmp_path):
    wrapper = wrap(net, "stages")
    wrapper(torch.randn(8, 8))
    torch.save(wrapper.state_dict(), tmp_path / "state.pt")
    other = type(net)()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), net.parameters(), strict=True))


def test_a_deep_copied_model_is_plain(wrap, net):
    wrapper, x = wrap(net, "stages"), torch.randn(8, 8)
    wrapper(x)
    plain = copy.deepcopy(net)
    assert type(plain) is type(net) and plain.second.forward.__self__ is plain.second
    torch.testing.assert_close(plain(x), wrapper(x))


@pytest.mark.parametrize(("convert", "dtype"), [("double", torch.float64), ("bfloat16", torch.bfloat16)])
def test_conversions_plan_again(wrap, net, same_step, strict, shape, convert, dtype):
    wrapper = wrap(net, shape)
    same_step(wrapper, torch.randn(8, 8))
    assert getattr(wrapper, convert)() is wrapper
    assert wrapper.plan is None and {p.dtype for p in net.parameters()} == {dtype}
    same_step(wrapper, torch.randn(8, 8, dtype=dtype), rtol=5e-2, atol=5e-2)
    assert wrapper.plan.shape == ("stages" if shape == "pipeline" else shape)
    wrapper.to(torch.float32)
    same_step(wrapper, torch.randn(8, 8))


def test_half_runs(wrap, net, strict, shape):
    wrapper, x = wrap(net, shape), torch.randn(8, 8)
    wrapper(x)
    wrapper.half()
    with torch.no_grad():
        torch.testing.assert_close(wrapper(x.half()), net(x.half()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_one_clear_error_and_does_no_harm(wrap, net, same_step, shape):
    wrapper = wrap(net, shape)
    same_step(wrapper, torch.randn(8, 8))
    for move in (wrapper.cuda, lambda: wrapper.to("cuda")):
        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
            move()
    same_step(wrapper, torch.randn(8, 8))


def test_a_conversion_that_the_model_overrides_is_the_models(wrap):
    class Fixed(Small):
        def half(self):
            raise ValueError("quantised models stay as they are")

        def _apply(self, fn, recurse=True):
            self.applied = True
            return super()._apply(fn, recurse)

    model = Fixed()
    wrapper = wrap(model)
    with pytest.raises(ValueError, match="stay as they are"):
        wrapper.half()
    wrapper.double()
    assert model.applied and model.first.weight.dtype == torch.float64


def test_closing_ends_the_threads_and_the_next_call_plans_again(wrap, net):
    import threading

    wrapper, x = wrap(net, "replicas"), torch.randn(8, 8)
    wrapper(x)
    workers = [t for t in threading.enumerate() if t.name.startswith("host0/cpu")]
    assert len(workers) >= 2
    wrapper.close()
    for worker in workers:
        worker.join(5)
    assert not any(w.is_alive() for w in workers) and wrapper.plan is None
    torch.testing.assert_close(wrapper(x), net(x))


def test_a_wrapper_that_is_no_longer_used_ends_its_threads(net, cluster, wrap):
    import gc
    import threading

    replicas = wrap(net, "replicas")._state.options["plan"]
    before = set(threading.enumerate())
    wrapper = OptimizedParallel(net, plan=replicas, cluster=cluster)
    wrapper(torch.randn(8, 8))
    started = set(threading.enumerate()) - before
    assert started
    del wrapper
    gc.collect()
    for thread in started:
        thread.join(5)
    assert not any(t.is_alive() for t in started)
    assert isinstance(net(torch.randn(2, 8)), torch.Tensor)


def test_a_plan_may_be_a_file(net, cluster, tmp_path):
    Plan.plain().save(tmp_path / "plan.json")
    wrapper = OptimizedParallel(net, plan=tmp_path / "plan.json", cluster=cluster)
    wrapper(torch.randn(2, 8))
    assert wrapper.plan.is_plain
