"""Training as the plain model trains: accumulation, dropout, checkpointing, autocast, modes of gradients."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint


def test_gradients_accumulate_over_calls(wrap, net, strict, shape):
    wrapper, twin = wrap(net, shape), copy.deepcopy(net)
    batches = torch.randn(3, 8, 8).unbind()
    for call in (wrapper, twin):
        for x in batches:
            (call(x).square().mean() / 3).backward()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_two_calls_with_one_backward(wrap, net, strict, shape):
    wrapper, twin = wrap(net, shape), copy.deepcopy(net)
    x, y = torch.randn(8, 8), torch.randn(4, 8)
    for call in (wrapper, twin):
        (call(x).sum() + call(y).square().sum()).backward()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_inputs_that_need_a_gradient_get_it_and_nothing_else(wrap, net, strict, shape):
    wrapper, twin = wrap(net, shape), copy.deepcopy(net)
    x = torch.randn(8, 8, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    got = wrapper(x)
    assert x.grad is None and all(p.grad is None for p in net.parameters()), "planning leaves them alone"
    got.sum().backward()
    twin(other).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_frozen_parameters_stay_without_gradient(wrap, net, same_step, strict, shape):
    wrapper = wrap(net, shape)
    same_step(wrapper, torch.randn(8, 8))
    net.first.requires_grad_(False)
    wrapper(torch.randn(8, 8)).sum().backward()
    assert net.first.weight.grad is None and net.second.weight.grad is not None
    net.second.weight.grad = None
    net.first.requires_grad_(True)
    same_step(wrapper, torch.randn(8, 8))


class Dropping(torch.nn.Module):
    def __init__(self, p=0.5):
        super().__init__()
        self.first = torch.nn.Linear(16, 64)
        self.drop = torch.nn.Dropout(p)
        self.second = torch.nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return self.second(self.drop(self.first(x)))


@pytest.mark.parametrize("shape", ["plain", "single"])
def test_dropout_is_bit_equal_under_one_seed_on_one_device(wrap, strict, shape):
    model = Dropping()
    wrapper, twin, x = wrap(model, shape), copy.deepcopy(model), torch.randn(8, 16)
    for seed in range(3):  # the first call plans, and draws no number from the user's stream
        torch.manual_seed(seed)
        got = [wrapper(x), wrapper(x)]
        torch.manual_seed(seed)
        assert all(map(torch.equal, got, [twin(x), twin(x)]))
        assert not torch.equal(*got)


def test_dropout_is_statistically_right(wrap, strict, shape):
    model = Dropping(0.25)
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.bias.fill_(1.0)
        model.second.weight.copy_(torch.eye(64))
    wrapper, x = wrap(model, shape), torch.randn(8, 16)
    zeros = torch.stack([wrapper(x) for _ in range(40)])
    kept = zeros[zeros != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.75))
    assert abs((zeros == 0).float().mean() - 0.25) < 0.02
    assert (zeros == 0).float().mean(0).flatten().std() < 0.12, "every sample and feature is dropped as often"
    assert len({str(z.tolist()) for z in zeros}) == 40
    wrapper.eval()
    with torch.no_grad():
        assert torch.equal(wrapper(x), model(x)) and (wrapper(x) != 0).all()


class Checkpointed(torch.nn.Module):
    """Counts the forwards of its inner layer: twice a training step when checkpointed."""

    def __init__(self, reentrant):
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.second = torch.nn.Linear(8, 8)
        self.reentrant = reentrant
        self.runs = []

    def _inner(self, x):
        self.runs.append(len(x))
        return torch.tanh(self.second(x))

    def forward(self, x):
        return checkpoint(self._inner, self.first(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_kept(wrap, same_step, shape, reentrant):
    model = Checkpointed(reentrant)
    wrapper = wrap(model, shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a reentrant one may be refused
        same_step(wrapper, torch.randn(8, 8))
    model.runs.clear()
    same_step(wrapper, torch.randn(8, 8))
    assert sum(model.runs) == 8 + 8, "forward and recomputation"


def test_autocast_is_honoured_wherever_the_model_runs(wrap, net, strict, shape):
    wrapper, x = wrap(net, shape), torch.randn(8, 8)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            expected, got = net(x), wrapper(x)
        assert got.dtype == dtype == expected.dtype
        torch.testing.assert_close(got, expected)
    assert wrapper(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert wrapper(x).dtype == torch.float32


def test_no_grad_and_inference_mode_are_carried_over(wrap, net, strict, shape):
    wrapper, x = wrap(net, shape), torch.randn(8, 8)
    with torch.no_grad():
        quiet = wrapper(x)
    assert not quiet.requires_grad and not quiet.is_inference()
    with torch.inference_mode():
        inference = wrapper(x)
        torch.testing.assert_close(inference, net(x))
    assert inference.is_inference() and not inference.requires_grad
    loud = wrapper(x)
    assert loud.requires_grad and not loud.is_inference()
    torch.testing.assert_close(loud.detach(), quiet)
    loud.sum().backward()


def test_a_first_call_in_inference_mode_spoils_nothing(tunes, net):
    wrapper, x = tunes(net.eval()), torch.randn(8, 8)
    with torch.inference_mode():
        first = wrapper(x)
    assert first.is_inference() and wrapper.plan is not None
    wrapper.train()
    net(x).sum().backward()
    assert all(p.grad is not None and not p.is_inference() for p in net.parameters())


def test_tuning_leaves_gradients_buffers_flags_and_random_numbers_alone(tunes):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5))
    model[1].eval()  # frozen by the user
    twin = copy.deepcopy(model)
    wrapper, x = tunes(model), torch.randn(8, 8)
    kept = model[0].weight.grad = torch.ones_like(model[0].weight)
    torch.manual_seed(3)
    got = wrapper(x)
    torch.manual_seed(3)
    torch.testing.assert_close(got, twin(x))
    assert model[0].weight.grad is kept and torch.equal(kept, torch.ones_like(kept))
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    assert model[1].num_batches_tracked == 0 and model[2].p == 0.5
