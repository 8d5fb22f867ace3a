"""Inputs that are elsewhere than the model, and conversions, on a machine with a GPU."""

from __future__ import annotations

import pytest
import torch

from autoplace import OptimizedParallel, Plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_inputs_go_to_the_model_and_outputs_to_where_the_inputs_were(net):
    wrapper = OptimizedParallel(net.cuda(), plan=Plan.plain())
    x, bias = torch.randn(8, 8), torch.randn(4)
    got = wrapper(x, bias=bias)
    assert got.device == x.device
    torch.testing.assert_close(got, net(x.cuda(), bias.cuda()).cpu())
    torch.nn.functional.mse_loss(got, torch.zeros(8, 4)).backward()
    assert net.first.weight.grad.device.type == "cuda"
    assert wrapper(x.cuda(), bias=bias.cuda()).device.type == "cuda"


def test_cuda_and_cpu_plan_again(net):
    wrapper = OptimizedParallel(net, plan=Plan.plain())
    x = torch.randn(8, 8)
    expected = wrapper(x)
    assert wrapper.cuda() is wrapper and wrapper.plan is None
    torch.testing.assert_close(wrapper(x), expected, rtol=1e-3, atol=1e-4)
    assert next(wrapper.parameters()).is_cuda
    torch.testing.assert_close(wrapper.cpu()(x), expected)


def test_tuning_on_a_gpu_model_with_inputs_on_the_cpu(net):
    wrapper = OptimizedParallel(
        net.cuda().eval(), policy=None, track=False, cache=False, budget_s=2.0, compile=False, progress=False
    )
    x = torch.randn(8, 8)
    with torch.no_grad():
        torch.testing.assert_close(wrapper(x), net(x.cuda()).cpu(), rtol=1e-3, atol=1e-4)
    assert wrapper.plan is not None


def test_autocast_of_the_gpu_is_honoured(net):
    wrapper = OptimizedParallel(net.cuda(), plan=Plan.plain())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert wrapper(torch.randn(8, 8, device="cuda")).dtype == torch.bfloat16
