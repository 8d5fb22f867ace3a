"""Two CPU devices on whatever cores there are, plans over them, and a comparison with plain PyTorch."""

import os

import pytest
import torch

from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.plan import Plan, Replica
from autoplace.runtime import build_executor

A, B = "host0/cpu:0", "host0/cpu:1"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cluster():
    cores = sorted(os.sched_getaffinity(0))
    return Cluster(
        devices=(
            Device(name=A, kind="cpu", cores=(cores[0],)),
            Device(name=B, kind="cpu", cores=(cores[-1],)),
        ),
        default_link=Link(latency_ms=0.0, bytes_per_ms=1e9),
    )


@pytest.fixture
def make_plan():
    def make(*replicas, shares=None, **knobs):
        """A plan of assignments; a device name alone stands for the whole model on it."""
        shares = shares or [1.0 / len(replicas)] * len(replicas)
        assignments = [{".": r} if isinstance(r, str) else r for r in replicas]
        return Plan(
            replicas=tuple(Replica(assignment=a, share=s) for a, s in zip(assignments, shares, strict=True)),
            strategy="test",
            **knobs,
        )

    return make


@pytest.fixture
def compare(cluster):
    def run(model, call, args, kwargs, pick):
        model.zero_grad(set_to_none=True)
        args = [a.clone().requires_grad_() if a.is_floating_point() else a for a in args]
        output = call(*args, **kwargs)
        pick(output).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        return output, [a.grad for a in args], grads

    def check(model, plan, args=(), kwargs=None, pick=lambda y: y.square().mean(), rtol=1e-4, atol=1e-6):
        """Assert that outputs and every gradient equal plain PyTorch's; return the executor's output."""
        kwargs = kwargs or {}
        expected, expected_inputs, expected_grads = run(model, model, args, kwargs, pick)
        with build_executor(model, plan, cluster) as executor:
            output, inputs, grads = run(model, executor, args, kwargs, pick)
            with torch.no_grad():
                quiet = executor(*args, **kwargs)
        assert type(output) is type(expected)
        for got in (output, quiet):
            torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
        torch.testing.assert_close(inputs, expected_inputs, rtol=rtol, atol=atol)
        assert grads.keys() == expected_grads.keys()
        for name, grad in expected_grads.items():
            torch.testing.assert_close(grads[name], grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        return output

    return check
