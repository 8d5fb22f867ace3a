"""Compiling for real, on models as small as can be; each compilation takes seconds."""

import gc
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

from autoplace.errors import ExecutionError
from autoplace.plan import Plan
from autoplace.runtime import TaskThread, build_executor, compiling
from autoplace.runtime.compiling import Compiler

A, B = "host0/cpu:0", "host0/cpu:1"


@pytest.fixture
def eager(monkeypatch):
    """`torch.compile` without a compiler behind it: what TorchDynamo traces runs as it is; gives the graphs' inputs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([tuple(x.shape) if isinstance(x, torch.Tensor) else "any" for x in inputs])
        compiling._local.compiles += 1
        return graph.forward

    monkeypatch.setattr(compiling, "_inductor", backend)
    return graphs


def grads(net, loss):
    net.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    found = [p.grad for p in net.parameters()]
    net.zero_grad(set_to_none=True)
    return found


def test_compiled_plans_compute_the_same_and_compile_once(cluster, make_plan):
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 4)
    expected = net(x)
    wanted = grads(net, expected.sum())
    seconds = []
    for plan in (
        Plan.plain().with_(compiled=True),
        make_plan(A, compiled=True),
        make_plan(A, compiled=True),
        make_plan(A, B, compiled=True),
        make_plan(A, B, compiled=True),
        make_plan({"0": A, "1": A, "2": B}, compiled=True),
        make_plan({"0": A, "1": A, "2": B}, compiled=True),
        make_plan(A, B, compiled=True, cpp_wrapper=True),
        make_plan(A, B, compiled=True, cpp_wrapper=True),
    ):
        with build_executor(net, plan, cluster) as executor:
            assert executor.compile_s() == 0.0
            y = executor(x)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(grads(net, y.sum()), wanted)
            torch.testing.assert_close(grads(net, y.sum()), wanted, msg="a graph that was retained runs again")
            torch.testing.assert_close(net(x), expected)
            seconds.append(executor.compile_s())
    assert [s > 0 for s in seconds] == [True, False, False, True, False, True, False, True, False], seconds


def test_each_of_the_first_signatures_has_code_for_its_shape(eager):
    net = nn.Linear(4, 4)
    call = Compiler().wrap(net)
    for batch in (*range(2, 10), 2, 3, 9):
        assert torch.equal(call(torch.ones(batch, 4)), net(torch.ones(batch, 4)))
    batches = [shapes[-1] for shapes in eager]
    assert batches[:4] == [(2, 4), (3, 4), (4, 4), (5, 4)]
    assert len(eager) == 5, "all further ones share code for any shape"


def test_layers_of_one_class_keep_out_of_each_others_way(eager):
    layers = [nn.Linear(width, 3) for width in range(4, 16)]
    compiler = Compiler()
    calls = [compiler.wrap(layer, layer.forward) for layer in layers]
    for _ in range(2):
        for layer, call in zip(layers, calls, strict=True):
            x = torch.ones(2, layer.in_features)
            assert torch.equal(call(x), layer(x))
    assert len(eager) == len(layers)
    assert not any("any" in shapes for shapes in eager), "another layer's width does not make a size dynamic"


def test_hooks_added_later_run(eager):
    net, x = nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2)
    call = Compiler().wrap(net)
    call(x)
    handle = net[0].register_forward_hook(lambda _m, _i, out: out * 0)
    assert call(x).abs().sum() == 0
    handle.remove()
    assert torch.equal(call(x), net(x))


def test_gates_of_other_executors_do_not_break_the_graph(cluster, make_plan, eager):
    net, x = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)), torch.ones(1, 2)
    with build_executor(net, make_plan({"0": A, "1": A, "2": B}), cluster):
        assert torch.equal(Compiler().wrap(net, whole=True)(x), net(x))
    assert len(eager) == 1


def test_several_threads_compile_and_call_at_once(eager):
    nets = [nn.Sequential(nn.Linear(width, 4), nn.Tanh()) for width in (3, 4, 5)]
    compiler = Compiler()
    calls = [compiler.wrap(net) for net in nets]
    threads = [TaskThread(f"thread {i}", threads=1) for i in range(4)]
    start = threading.Barrier(4)

    def work(thread):
        start.wait()
        for i in range(30):
            k = (thread + i) % 3
            x = torch.ones(2 + i % 2, nets[k][0].in_features)
            torch.testing.assert_close(calls[k](x), nets[k](x))

    for future in [thread.submit(lambda i=i: work(i)) for i, thread in enumerate(threads)]:
        future.result(60)
    for thread in threads:
        thread.close()
    assert len(eager) == 6, "two threads that miss the same code compile it once"


def test_a_call_that_meets_another_threads_trace_is_made_again(eager, monkeypatch):
    net, x = nn.Linear(2, 2), torch.ones(1, 2)
    call = Compiler().wrap(net)
    for _ in range(2):  # the second compiles nothing, and the next need not run alone
        call(x)
    code = compiling._known[net]["call", compiling._inductor]
    refused = []

    def refuse(*_):
        refused.append(1)
        raise RuntimeError("Detected that you are using FX to symbolically trace a dynamo-optimized function.")

    assert code._warm
    code._warm = dict.fromkeys(code._warm, refuse)
    assert torch.equal(call(x), net(x)) and refused == [1]


def test_what_was_compiled_goes_with_the_module(eager):
    net = nn.Linear(2, 2)
    call = Compiler().wrap(net)
    call(torch.ones(1, 2))
    gone = weakref.ref(net)
    del net, call
    gc.collect()
    assert gone() is None


class Stepping(nn.Module):
    """Counts its calls in an attribute, which is a constant to TorchDynamo."""

    def __init__(self):
        super().__init__()
        self.steps = 0
        self.lin = nn.Linear(2, 2)

    def forward(self, x):
        self.steps += 1
        return self.lin(x) * self.steps if self.steps % 2 else self.lin(x) + self.steps


class Disabled(nn.Module):
    @torch._dynamo.disable
    def forward(self, x):
        return x + 1


def test_no_silent_fall_back_to_eager(cluster, eager, monkeypatch):
    monkeypatch.setattr(compiling, "_RECOMPILES", 12)
    compiled = Plan.plain().with_(compiled=True)
    executor = build_executor(Stepping(), compiled, cluster)
    for _ in range(12):
        executor(torch.ones(1, 2))
    with pytest.raises(ExecutionError, match="changes from call to call"):
        executor(torch.ones(1, 2))
    with (
        build_executor(Disabled(), compiled, cluster) as executor,
        pytest.raises(ExecutionError, match="nothing in Disabled that it can compile"),
    ):
        executor(torch.ones(1, 2))


def test_errors_of_the_model_stay_its_own(cluster, eager):
    class Breaks(nn.Module):
        def forward(self, x):
            y = x * 2
            raise LookupError("from the model")
            return y

    for plan in (Plan.plain().with_(compiled=True),):
        with build_executor(Breaks(), plan, cluster) as executor, pytest.raises(LookupError, match="from the model"):
            executor(torch.ones(1, 2))


def test_a_missing_compiler_is_one_sentence(cluster, monkeypatch, tmp_path):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sys.modules["torch._inductor.cpp_builder"], "get_cpp_compiler", _no_compiler)
    net = nn.Sequential(nn.Linear(3, 7), nn.Softplus())
    executor = build_executor(net, Plan.plain().with_(compiled=True), cluster)
    with (
        config.patch(force_disable_caches=True),
        pytest.raises(ExecutionError, match=r"needs a C\+\+ compiler") as caught,
    ):
        executor(torch.ones(2, 3))
    assert "\n" not in str(caught.value)


def _no_compiler():
    from torch._inductor.exc import InvalidCxxCompiler

    raise InvalidCxxCompiler
