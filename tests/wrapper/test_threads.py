"""Several Python threads, forked children, and the end of the process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch


def test_concurrent_calls_give_right_results(wrap, net, strict, shape):
    wrapper = wrap(net, shape)
    batches = [torch.randn(4 + i % 5, 8) for i in range(40)]
    expected = [net(x).detach() for x in batches]
    wrapper(batches[0])
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(wrapper, batches))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.detach(), b)


def test_concurrent_backwards_give_right_gradients(wrap, net, strict, shape):
    wrapper = wrap(net, shape)
    batches = [torch.randn(8, 8) for _ in range(12)]
    wrapper(batches[0])
    parameters = list(net.parameters())

    def gradients(call, x):
        return torch.autograd.grad(call(x).square().sum(), parameters)

    expected = [gradients(net, x) for x in batches]
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(lambda x: gradients(wrapper, x), batches))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.second = torch.nn.Linear(8, 8)

    def forward(self, x):
        time.sleep(0.002)
        return self.second(self.first(x))


@pytest.mark.parametrize("train", [False, True])
def test_first_calls_of_two_threads_plan_once(tunes, monkeypatch, train):
    import autoplace.planning as planning

    model = Slow().train(train)
    wrapper, x = tunes(model, budget_s=0.5), torch.randn(8, 8)
    entered, plans, times = threading.Event(), [], {}
    original = planning.tune_now

    def counted(*args, **kwargs):
        plans.append(threading.get_ident())
        entered.set()
        return original(*args, **kwargs)

    monkeypatch.setattr(planning, "tune_now", counted)

    def other():
        entered.wait(20)
        start = time.perf_counter()
        output = wrapper(x)
        times["other"] = time.perf_counter() - start
        return output

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(wrapper, x), pool.submit(other)
        torch.testing.assert_close(first.result(), model(x))
        torch.testing.assert_close(second.result(), model(x))
    assert len(plans) == 1
    if train:
        assert times["other"] > 0.1, f"training waits, since tuning works on gradients and flags:\n{wrapper.explain()}"
    else:
        assert times["other"] < 0.5, "inference runs plain PyTorch at once"


def _child_says(work):
    """Run a function in a forked child and return the text it gives back."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = work()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    deadline = time.time() + 30
    while time.time() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        raise AssertionError("the child hangs")
    with os.fdopen(read) as pipe:
        return f"{status} {pipe.read()}"


def test_a_forked_child_runs_plain_pytorch_and_says_so_once(wrap, net, shape):
    wrapper, x = wrap(net, shape), torch.randn(8, 8)
    with torch.no_grad():
        expected = wrapper(x)

    def work():
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            same = all(torch.allclose(wrapper(x), expected) for _ in range(3))
        return f"{same} {len(caught)} {'forked' in str(caught[0].message)}"

    assert _child_says(work) == "0 True 1 True"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        torch.testing.assert_close(wrapper(x), expected)
    assert wrapper.plan is not None


def test_a_child_forked_while_another_thread_tunes_does_not_wait_for_it(wrap, net):
    wrapper = wrap(net)
    state = wrapper._state
    with state.planning(exclusive=True):
        assert _child_says(lambda: str(tuple(wrapper(torch.randn(2, 8)).shape))) == "0 (2, 4)"


@pytest.mark.parametrize("shape", ["single", "replicas", "pipeline"])
def test_the_process_ends_promptly_with_0(shape, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, time, torch
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from conftest import Net, plan_of
            from autoplace import Cluster, OptimizedParallel
            from autoplace.hardware.cluster import Device
            cores = sorted(__import__("os").sched_getaffinity(0))
            devices = [Device(name=f"host0/cpu:{{i}}", kind="cpu", cores=(cores[-i],)) for i in (0, 1)]
            net = Net()
            wrapper = OptimizedParallel(net, plan=plan_of({shape!r}, net), cluster=Cluster(devices=tuple(devices)))
            wrapper(torch.randn(8, 8)).sum().backward()
            assert wrapper.plan.shape != "plain", wrapper.plan
            print(time.time(), flush=True)
            """
        )
    )
    command = [sys.executable, "-X", "faulthandler", str(script)]  # an abort shows where every thread is
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert time.time() - float(done.stdout) < 20
    assert "terminate" not in done.stderr and "Traceback" not in done.stderr
