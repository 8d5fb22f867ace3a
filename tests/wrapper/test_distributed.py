"""Process groups, DDP and FSDP: plain PyTorch runs, and one sentence says so."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist

from autoplace.runtime.fitness import unfit


@pytest.fixture
def group(tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_around_the_wrapper_runs_plain_pytorch_and_says_so(group, wrap, net):
    twin = copy.deepcopy(net)
    wrapper, x = wrap(net, "stages"), torch.randn(8, 8)
    parallel = torch.nn.parallel.DistributedDataParallel(wrapper)
    with pytest.warns(UserWarning, match="plain PyTorch for now: passes of its own.*collectives"):
        parallel(x).sum().backward()
    twin(x).sum().backward()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert [k.removeprefix("module.") for k in parallel.state_dict()] == list(twin.state_dict())
    assert wrapper.plan is None


def test_a_group_that_comes_later_stops_the_plan(wrap, net, tmp_path):
    wrapper, x = wrap(net, "replicas"), torch.randn(8, 8)
    wrapper(x)
    executor = wrapper._state.mode().first.executor
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        executor.busy_ms()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            torch.testing.assert_close(wrapper(x), net(x))
        assert not any(executor.busy_ms().values()), "its workers did nothing"
    finally:
        dist.destroy_process_group()
    wrapper(x)
    assert any(executor.busy_ms().values())


def test_ddp_inside_the_model_is_refused(group, wrap, net):
    inner = torch.nn.parallel.DistributedDataParallel(net)
    wrapper = wrap(inner, "single")
    assert "DistributedDataParallel inside the model" in unfit(inner, wrapper._state.options["plan"], training=True)
    x = torch.randn(8, 8)
    with pytest.warns(UserWarning, match="plain PyTorch for now"):
        torch.testing.assert_close(wrapper(x), net(x))
