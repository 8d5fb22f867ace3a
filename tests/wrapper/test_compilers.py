"""`torch.compile` around and inside, tracers, exporters and transforms of `torch.func`."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.func import functional_call, grad, vmap


@pytest.mark.parametrize("called", [False, True])
def test_compiling_the_wrapper_compiles_the_model(wrap, net, shape, called):
    wrapper, x = wrap(net, shape), torch.randn(8, 8)
    if called:
        wrapper(x)
    torch._dynamo.reset()
    compiled = torch.compile(wrapper, backend="eager", fullgraph=True)
    twin = copy.deepcopy(net)
    torch.testing.assert_close(compiled(x), net(x))
    compiled(x).sum().backward()
    twin(x).sum().backward()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert [k.removeprefix("_orig_mod.") for k in compiled.state_dict()] == list(net.state_dict())
    torch._dynamo.reset()


def test_a_compiled_model_runs_as_it_is_or_says_so(wrap, net, shape):
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    if shape in ("stages", "pipeline"):
        compiled.named_children = lambda: [(f"_orig_mod.{name}", child) for name, child in net.named_children()]
    wrapper, x = wrap(compiled, shape), torch.randn(8, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(wrapper(x), net(x))
        wrapper(x).sum().backward()
    said = [str(w.message) for w in caught if "wrap the model before compiling" in str(w.message)]
    assert len(said) == (0 if shape in ("plain", "single") else 1)
    assert list(wrapper.state_dict()) == list(compiled.state_dict())
    torch._dynamo.reset()


def test_exporters_and_tracers_see_the_model(wrap, net):
    wrapper, x = wrap(net.eval(), "stages"), torch.randn(8, 8)
    expected = net(x)
    wrapper(x)
    for strict in (False, True):
        program = torch.export.export(wrapper, (x,), strict=strict)
        assert set(program.graph_signature.parameters) == {n for n, _ in net.named_parameters()}
        torch.testing.assert_close(program.module()(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(wrapper, (x,), check_trace=False)
    torch.testing.assert_close(traced(x), expected)


def test_a_first_call_inside_a_tracer_is_not_planned(tunes, net):
    model = torch.nn.Sequential(net.first, net.act, net.second).eval()
    wrapper = tunes(model)
    graph = torch.fx.symbolic_trace(wrapper)
    assert wrapper.plan is None
    x = torch.randn(8, 8)
    torch.testing.assert_close(graph(x), model(x))


def test_transforms_of_functions_run_the_model(wrap, net, shape):
    wrapper, x = wrap(net, shape), torch.randn(8, 8)
    wrapper(x)
    state = {k: v.detach() * 2 for k, v in net.named_parameters()}
    torch.testing.assert_close(functional_call(wrapper, state, (x,)), functional_call(net, state, (x,)))

    def loss(call):
        return lambda p: functional_call(call, p, (x,)).square().mean()

    got, expected = grad(loss(wrapper))(state), grad(loss(net))(state)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])
    torch.testing.assert_close(vmap(wrapper)(x.reshape(2, 4, 8)), net(x).reshape(2, 4, 4))
    torch.testing.assert_close(wrapper(x), net(x))


def test_a_first_call_with_lent_parameters_plans_nothing(tunes, net):
    wrapper, x = tunes(net), torch.randn(8, 8)
    functional_call(wrapper, {k: v.detach() for k, v in net.named_parameters()}, (x,))
    assert wrapper.plan is None


def test_modes_that_intercept_operations_see_all_of_them(wrap, net, shape):
    from torch.utils.flop_counter import FlopCounterMode

    wrapper, x, flops = wrap(net, shape), torch.randn(8, 8), []
    wrapper(x)
    for call in (wrapper, net):
        with FlopCounterMode(display=False) as counter:
            call(x)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
