import gc
import weakref

import pytest
import torch
from torch import nn

from autoplace.errors import ExecutionError
from autoplace.runtime import InlineDevice, SingleDevice, build_executor

A, B = "host0/cpu:0", "host0/cpu:1"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4, bias=False)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.middle(self.embed(x))))


PLANS = {
    "inline": ([A], {}),
    "single": ([A], {}),
    "replicas": ([A, B], {}),
    "stages": ([{"embed": A, "middle": B, "head": A}], {}),
    "pipeline": ([{"embed": A, "middle": B, "head": B}], {"microbatches": 2}),
    "hybrid": ([{"embed": A, "middle": B, "head": A}, B], {"shares": [0.75, 0.25]}),
}


@pytest.fixture(params=PLANS)
def executor(request, cluster, make_plan):
    replicas, knobs = PLANS[request.param]
    build = SingleDevice if request.param == "single" else build_executor
    with build(Tied(), make_plan(*replicas, **knobs), cluster) as executor:
        yield executor


def plain_grads(net, x, times=1):
    net.zero_grad()
    for _ in range(times):
        net(x).square().mean().backward()
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    return grads


X = torch.linspace(-1, 1, 16).reshape(4, 4)


def test_gradients_accumulate(executor):
    net = executor.model
    expected = plain_grads(net, X, times=2)
    for _ in range(2):
        executor(X).square().mean().backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], expected)


def test_two_forwards_before_their_backwards(executor):
    net = executor.model
    expected = plain_grads(net, X, times=2)
    losses = [executor(X).square().mean() for _ in range(2)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], expected)


def test_autograd_grad_and_part_of_the_inputs(executor):
    net = executor.model
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(net(x).square().mean(), [x, net.middle.bias])
    got = torch.autograd.grad(executor(x).square().mean(), [x, net.middle.bias])
    torch.testing.assert_close(got, expected)
    assert net.middle.bias.grad is None


def test_hooks_of_parameters_see_the_whole_gradient_once(executor):
    net = executor.model
    expected = plain_grads(net, X)[0]
    seen, after = [], []
    handles = [
        net.embed.weight.register_hook(lambda g: seen.append(g.clone()) or 2 * g),
        net.embed.weight.register_post_accumulate_grad_hook(lambda p: after.append(p)),
    ]
    executor(X).square().mean().backward()
    assert len(seen) == 1 and len(after) == 1
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(net.embed.weight.grad, 2 * expected)
    net.zero_grad()
    for handle in handles:
        handle.remove()
    executor(X).square().mean().backward()
    assert len(seen) == 1


def test_retained_graphs_and_freed_ones(executor):
    net = executor.model
    expected = plain_grads(net, X, times=2)
    loss = executor(X).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], expected)
    with pytest.raises((ExecutionError, RuntimeError), match="retain_graph=True"):
        loss.backward()


def test_gradients_of_gradients_are_refused_by_workers(executor):
    x = X.clone().requires_grad_()
    if isinstance(executor, InlineDevice):
        (grad,) = torch.autograd.grad(executor(x).sum(), x, create_graph=True)
        (plain,) = torch.autograd.grad(executor.model(x).sum(), x, create_graph=True)
        found = [torch.autograd.grad(g.square().sum(), x)[0] for g in (grad, plain)]
        assert torch.equal(*found) and found[0].abs().sum() > 0
        return
    with pytest.raises(ExecutionError, match="create_graph"):
        torch.autograd.grad(executor(x).sum(), x, create_graph=True)


def test_graphs_are_freed(executor):
    activations = []
    handle = executor.model.middle.register_forward_hook(lambda m, i, o: activations.append(weakref.ref(o)))
    executor(X).square().mean().backward()
    handle.remove()
    gc.collect()
    assert activations and all(ref() is None for ref in activations)
    executor(X)
    gc.collect()
    assert all(ref() is None for ref in activations)


def test_frozen_parameters_get_none(executor):
    net = executor.model
    net.middle.weight.requires_grad_(False)
    executor(X).sum().backward()
    assert net.middle.weight.grad is None
    assert net.middle.bias.grad is not None
    for p in net.parameters():
        p.requires_grad_(False)
    assert not executor(X).requires_grad


def test_backward_works_after_close(executor):
    net = executor.model
    expected = plain_grads(net, X)
    loss = executor(X).square().mean()
    executor.close()
    loss.backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], expected)


def test_training_steps_follow_plain_pytorch(executor):
    net, twin = executor.model, Tied()
    twin.load_state_dict(net.state_dict())
    assert twin.head.weight is twin.embed.weight
    for model, call in ((net, executor), (twin, twin)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            (call(X) - 1).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(list(net.parameters()), list(twin.parameters()), rtol=1e-4, atol=1e-5)


def test_a_changed_parameter_before_backward_is_an_error_as_in_plain_pytorch(executor):
    loss = executor(X).square().mean()
    with torch.no_grad():
        executor.model.middle.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_runs_on_the_devices(cluster, make_plan):
    import threading

    class Where(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            seen.append(threading.current_thread().name)
            return g

    class Spy(nn.Linear):
        def forward(self, x):
            return Where.apply(super().forward(x))

    seen = []
    net = nn.Sequential(Spy(4, 4), Spy(4, 4))
    for replicas, knobs, expected in [
        ([B], {}, [B, B]),
        ([A, B], {}, [A, A, B, B]),
        ([{"0": A, "1": B}], {}, [A, B]),
        ([{"0": A, "1": B}], {"microbatches": 2}, [A, A, B, B]),
    ]:
        seen.clear()
        build = SingleDevice if replicas == [B] else build_executor
        with build(net, make_plan(*replicas, **knobs), cluster) as executor:
            executor(X).sum().backward()
        assert sorted(seen) == expected


def test_an_input_changed_in_place_carries_the_gradient(cluster, make_plan):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x.add_(self.bias).mul_(2)

    net = nn.Sequential(nn.Linear(4, 4), Adds(), nn.Linear(4, 4))

    def loss(call):
        net.zero_grad()
        call(X).square().mean().backward()
        return [p.grad for p in net.parameters()]

    expected = loss(net)
    with build_executor(net, make_plan({"0": A, "1": B, "2": A}), cluster) as executor:
        torch.testing.assert_close(loss(executor), expected)
    x, y = X.clone(), X.clone()
    adds = net[1]
    adds.zero_grad()
    (adds(x) * x).sum().backward()
    expected = adds.bias.grad.clone()
    adds.zero_grad()
    with build_executor(adds, make_plan(A), cluster) as executor:
        (executor(y) * y).sum().backward()
    torch.testing.assert_close(adds.bias.grad, expected)
    assert torch.equal(x, y)
    with build_executor(adds, make_plan(A, B), cluster) as executor:
        z = X.clone().requires_grad_() * 1.0
        with pytest.raises(ExecutionError, match="modifies an input in place"):
            executor(z)
