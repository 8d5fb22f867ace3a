"""Marked threads leave generators, warnings and logs of the process alone, and end before the interpreter does."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import warnings

import pytest
import torch

from autoplace.graph.preserve import preserve_random
from autoplace.hands_off import hands_off, is_hands_off, silent
from autoplace.measure.preserve import RandomState
from autoplace.runtime.worker import TaskThread


def _in_thread(fn):
    """Run in a thread of its own and return the result."""
    box = []
    thread = threading.Thread(target=lambda: box.append(fn()))
    thread.start()
    thread.join()
    return box[0]


def test_a_mark_belongs_to_its_thread_and_to_the_tasks_that_it_hands_out():
    worker = TaskThread("worker", threads=1)
    with hands_off():
        assert is_hands_off() and not _in_thread(is_hands_off)
        assert worker.run(is_hands_off)
        with hands_off():
            pass
        assert is_hands_off()
    assert not is_hands_off() and not worker.run(is_hands_off)
    worker.close()


def _rewind_by_random_state():
    state = RandomState()
    torch.rand(3)
    state.restore()


def _rewind_by_preserve_random():
    with preserve_random():
        torch.rand(3)


@pytest.mark.parametrize("rewind", [_rewind_by_random_state, _rewind_by_preserve_random])
def test_the_users_random_numbers_are_put_back_in_the_foreground_and_only_advance_beside_marked_threads(rewind):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    rewind()
    assert torch.equal(torch.get_rng_state(), state)
    with hands_off():
        rewind()
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["compile", "fork_rng", "checkpoint"])
def test_pytorch_does_not_rewind_what_the_user_draws_meanwhile(name):
    drawn = []

    def draw(x):
        drawn.append(_in_thread(lambda: torch.rand(2).tolist()))  # the user's thread
        return x * x  # saved for backward, so that checkpointing computes it again

    def work():
        x = torch.ones(2, requires_grad=True)
        if name == "compile":
            torch._dynamo.reset()

            def backend(graph, _inputs):
                draw(x)
                return graph.forward

            torch.compile(lambda t: t + 1, backend=backend)(x)
        elif name == "fork_rng":
            with torch.random.fork_rng(devices=[]):
                draw(x)
        else:
            torch.utils.checkpoint.checkpoint(draw, x, use_reentrant=False).sum().backward()

    work()
    drawn.append(torch.rand(2).tolist())
    assert len({tuple(d) for d in drawn}) < len(drawn), "in the foreground PyTorch rewinds: the test can fail"
    drawn.clear()
    with hands_off():
        work()
    drawn.append(torch.rand(2).tolist())
    assert len(drawn) > 1
    assert len({tuple(d) for d in drawn}) == len(drawn)


def test_other_threads_set_their_generators_meanwhile_and_pytorch_gets_its_functions_back():
    before = torch.set_rng_state, torch.random.set_rng_state, torch.cuda.set_rng_state
    state = torch.get_rng_state()
    with hands_off():
        torch.rand(1)
        torch.set_rng_state(state)
        assert not torch.equal(torch.get_rng_state(), state)
        _in_thread(lambda: torch.set_rng_state(state))
        assert torch.equal(torch.get_rng_state(), state)
    assert (torch.set_rng_state, torch.random.set_rng_state, torch.cuda.set_rng_state) == before


def test_silence_is_of_one_thread(caplog):
    logger = logging.getLogger("torch.export")

    def speak():
        warnings.warn("spoken", stacklevel=1)
        logger.warning("logged")

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with silent():
            speak()
            assert [str(w.message) for w in seen] == [] and caplog.messages == []
            _in_thread(speak)
        assert [str(w.message) for w in seen] == ["spoken"] and caplog.messages == ["logged"]
        speak()
        assert len(seen) == 2 and len(caplog.messages) == 2


EXITING = """
import sys, threading, time, torch
from autoplace.hands_off import hands_off
from autoplace.runtime.worker import TaskThread
torch.set_num_threads(1)
model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
def work():
    while True:
        model(torch.ones(8, 64)).sum().backward()
def tune():
    with hands_off():
        TaskThread("worker", threads=1).run(work)
threading.Thread(target=tune, daemon=True).start()
time.sleep(0.3)
sys.exit({code})
"""


@pytest.mark.parametrize("code", [0, 3])
def test_a_program_that_ends_meanwhile_ends_as_it_would_have(code):
    done = subprocess.run(
        [sys.executable, "-c", EXITING.format(code=code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (code, "")


def test_a_thread_that_was_left_behind_does_not_abort_the_exit():
    code = """
import time, torch
from autoplace.errors import ExecutionError
from autoplace.measure import protocol
from autoplace.runtime.worker import TaskThread

def work():
    x, end = torch.randn(300, 300), time.time() + 30
    while time.time() < end:
        x = torch.tanh(x @ x)

guard, worker = protocol.Guard(), TaskThread("busy")
try:
    guard.run(lambda: worker.run(work), 0.2)
except ExecutionError as error:
    print(error)
worker.close()
guard.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "did not finish" in done.stdout
    assert done.returncode == 0 and done.stderr == "", done.stderr
