import os
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from autoplace.errors import ExecutionError
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.runtime import InlineDevice, SingleDevice, build_executor
from autoplace.runtime.inline import runs_inline

A, B = "host0/cpu:0", "host0/cpu:1"


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 4))


class Watch(torch.autograd.Function):
    """Identity that tells about its backward; may be differentiated again."""

    @staticmethod
    def forward(ctx, x, tell):
        ctx.tell = tell
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.tell()
        return grad.clone(), None


class Spy(nn.Module):
    """Keeps the thread counts of its forward and backward; may break in either."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.counts = []
        self.breaks = ""

    def tell(self, where="backward"):
        self.counts.append(torch.get_num_threads())
        if self.breaks == where:
            raise LookupError(f"in the {where}")

    def forward(self, x):
        self.tell("forward")
        return Watch.apply(x * self.scale, self.tell)


@pytest.fixture
def spy():
    return Spy()


@pytest.fixture
def executor(spy, cluster, make_plan):
    torch.set_num_threads(2)
    with build_executor(spy, make_plan(A, threads={A: 3}), cluster) as executor:
        assert type(executor) is InlineDevice
        yield executor


def test_which_plans_run_inline(make_plan):
    cores = tuple(sorted(os.sched_getaffinity(0)))
    link = Link(latency_ms=0.0, bytes_per_ms=1e9)
    groups = (Device(name=A, kind="cpu", cores=(cores[0],)), Device(name=B, kind="cpu", cores=cores[1:] or cores))
    two = Cluster(devices=groups, default_link=link)
    whole = Cluster(devices=(Device(name=A, kind="cpu", cores=cores),), default_link=link)
    net = mlp()
    for plan, cluster, expected in [
        (make_plan(A), two, True),
        (make_plan(A, threads={A: 1}), whole, True),
        (make_plan(A), whole, True),
        (make_plan(A, threads={A: len(cores) + 1}), two, True),
        (make_plan({"0": A, "1": A, "2": A, "3": A}), whole, True),
        (make_plan({"0": A}), whole, True),
        (make_plan(A, microbatches=2), whole, False),
        (make_plan(A, B), two, False),
        (make_plan(A).with_(engine="graph"), two, False),
    ]:
        assert runs_inline(net, plan, cluster) is expected, plan
    with pytest.raises(ExecutionError, match="thread of its own"):
        InlineDevice(net, make_plan(A, microbatches=2), two)


def test_a_group_that_is_a_part_of_the_machine_keeps_its_worker(make_plan, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    groups = (Device(name=A, kind="cpu", cores=(0, 1, 2, 3)), Device(name=B, kind="cpu", cores=(4, 5, 6, 7)))
    cluster = Cluster(devices=groups, default_link=Link(latency_ms=0.0, bytes_per_ms=1e9))
    for threads, expected in [(1, True), (2, False), (4, False), (8, True)]:
        assert runs_inline(mlp(), make_plan(B, threads={B: threads}), cluster) is expected


def test_the_model_runs_in_the_callers_thread_with_the_plans_count(executor, spy):
    x = torch.ones(4, requires_grad=True)
    y = executor(x)
    assert torch.get_num_threads() == 2
    y.sum().backward()
    assert spy.counts == [3, 3]
    assert torch.get_num_threads() == 2
    assert torch.equal(x.grad, torch.full((4,), 2.0)) and spy.scale.grad == 4


def test_results_are_the_models_own(cluster, make_plan):
    net, x = mlp(), torch.randn(6, 8)
    x.note = "mine"
    seen = []
    net[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with build_executor(net, make_plan(A), cluster) as executor:
        torch.manual_seed(7)
        y = executor(x)
        y.square().mean().backward()
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    torch.manual_seed(7)
    expected = net(x)
    expected.square().mean().backward()
    assert seen[0] is x and seen[0].note == "mine"
    assert torch.equal(y, expected), "dropout is bit-equal under one seed"
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, net.parameters(), strict=True))
    assert type(y.grad_fn) is type(expected.grad_fn), "no node stands before the model's own"


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_exceptions_put_the_count_back(executor, spy, where):
    spy.breaks = where
    with pytest.raises(LookupError, match=f"in the {where}") as caught:
        executor(torch.ones(4)).sum().backward()
    assert torch.get_num_threads() == 2
    assert caught.traceback[-1].path.name == "test_inline.py"
    spy.breaks = ""
    executor(torch.ones(4)).sum().backward()
    assert torch.get_num_threads() == 2


def test_backward_twice_by_grad_and_of_gradients(executor, spy):
    x = torch.ones(4, requires_grad=True)
    loss = executor(x).square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(second, torch.full((4,), 8.0)) and torch.equal(x.grad, torch.full((4,), 16.0))
    assert set(spy.counts) == {3} and torch.get_num_threads() == 2


def test_several_outputs_and_two_executors_in_one_backward(cluster, make_plan):
    class Two(Spy):
        def forward(self, x):
            y = super().forward(x)
            return {"a": (y, y * 2), "b": [y + 1]}

    torch.set_num_threads(2)
    first, second = Spy(), Two()
    with (
        build_executor(first, make_plan(A, threads={A: 3}), cluster) as one,
        build_executor(second, make_plan(A, threads={A: 4}), cluster) as two,
    ):
        out = two(one(torch.ones(4)))
        (out["a"][0] + out["a"][1] + out["b"][0]).sum().backward()
    assert (first.counts, second.counts) == ([3, 3], [4, 4])
    assert torch.get_num_threads() == 2
    assert first.scale.grad == 4 * 4 * 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_backward_inside_a_backward(executor, spy, reentrant):
    x = torch.ones(4, requires_grad=True)
    y = checkpoint(executor, x, use_reentrant=reentrant)
    before = torch.get_num_threads()
    executor(y).sum().backward()
    assert (before, torch.get_num_threads()) == (2, 2)
    assert torch.equal(x.grad, torch.full((4,), 4.0)) and spy.scale.grad == 16
    assert set(spy.counts) == {3}


def test_the_hooks_hold_no_graph(executor, spy):
    import gc
    import weakref

    y = executor(torch.ones(4))
    gone = weakref.ref(y)
    gc.disable()
    try:
        del y
        assert gone() is None
    finally:
        gc.enable()


def test_busy_time_counts_forward_and_backward(cluster, make_plan):
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            time.sleep(0.02)
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            time.sleep(0.03)
            return g

    class Net(nn.Module):
        def forward(self, x):
            return Slow.apply(x)

    x = torch.ones(2, requires_grad=True)
    with build_executor(Net(), make_plan(A), cluster) as executor:
        loss = executor(x).sum()
        assert 20 <= executor.busy_ms()[A] < 1000
        loss.backward()
        assert 30 <= executor.busy_ms()[A] < 1000
        assert executor.busy_ms() == {A: 0.0}
        assert [(s.resource, s.label) for s in executor.timeline()] == [(A, "model"), (A, "model backward")]
    with build_executor(Net(), make_plan(A, threads={A: 2}), cluster) as executor:
        executor(x)
        busy = executor.busy_ms()
        assert busy[A] == busy[B] >= 20, "threads on all cores keep every group busy"


def test_several_threads_may_call_at_once(cluster, make_plan):
    net = mlp().eval()
    inputs = [torch.randn(4, 8) for _ in range(4)]
    results, counts = [None] * 4, [None] * 4
    with build_executor(net, make_plan(A, threads={A: 3}), cluster) as executor:

        def call(i):
            torch.set_num_threads(1)
            for _ in range(20):
                results[i] = executor(inputs[i])
                results[i].sum().backward(inputs=[net[0].weight])
            counts[i] = torch.get_num_threads()

        threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert counts == [1] * 4
    for x, y in zip(inputs, results, strict=True):
        torch.testing.assert_close(y, net(x))


def test_precision_and_closing(cluster, make_plan):
    net, x = mlp(), torch.randn(4, 8)
    executor = build_executor(net, make_plan(A, precision="bfloat16"), cluster)
    y = executor(x)
    assert y.dtype == torch.bfloat16 and not torch.is_autocast_enabled("cpu")
    executor.close()
    y.float().sum().backward()
    assert net[0].weight.grad is not None
    with pytest.raises(ExecutionError, match="closed"):
        executor(x)


def test_a_model_that_lives_elsewhere_has_a_worker(cluster, make_plan):
    with build_executor(nn.Linear(2, 2, device="meta"), make_plan(A), cluster) as executor:
        assert type(executor) is SingleDevice
