import os
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from autoplace.errors import ExecutionError
from autoplace.hardware.cluster import Device
from autoplace.runtime import DeviceWorker, Ledger, TaskThread
from autoplace.runtime.worker import come_to_rest

CORES = sorted(os.sched_getaffinity(0))


def device(cores=(CORES[0],), **fields):
    return Device(name="host0/cpu:0", kind="cpu", cores=tuple(cores), **fields)


@pytest.fixture
def worker():
    worker = DeviceWorker(device())
    yield worker
    worker.close()


def test_runs_on_its_core_group_with_one_thread_per_core(worker):
    cores, threads = worker.run(lambda: (os.sched_getaffinity(0), torch.get_num_threads()))
    assert cores == {CORES[0]}
    assert threads == 1


def test_more_threads_than_cores_use_the_host(worker):
    wide = DeviceWorker(device(), threads=len(CORES) + 1, host_cores=CORES)
    assert wide.wide and not worker.wide
    assert wide.run(lambda: os.sched_getaffinity(0)) == set(CORES)
    assert wide.run(torch.get_num_threads) == len(CORES) + 1
    wide.close()


def test_leaves_the_process_thread_count_alone():
    torch.set_num_threads(2)
    worker = DeviceWorker(device(), threads=3)
    seen = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert (torch.get_num_threads(), seen, worker.run(torch.get_num_threads)) == (2, [2], 3)
    worker.close()


def test_openmp_threads_stay_in_the_group():
    worker = DeviceWorker(device(), threads=2, host_cores=CORES[:1])

    def affinities():
        before = set(Path("/proc/self/task").iterdir())
        torch.randn(400, 400) @ torch.randn(400, 400)
        torch.randn(1 << 20).add_(1)
        new = set(Path("/proc/self/task").iterdir()) - before
        return [os.sched_getaffinity(int(t.name)) for t in new]

    found = worker.run(affinities)
    assert found, "two threads make at least one OpenMP helper"
    assert all(cores == {CORES[0]} for cores in found)
    worker.close()


def test_carries_modes(worker):
    def modes():
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
        )

    for context in (
        torch.no_grad(),
        torch.enable_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.float16),
    ):
        with context:
            assert worker.run(modes) == modes()
    assert worker.run(modes) == modes()


def test_tasks_run_in_order_and_exceptions_keep_type_and_traceback(worker):
    order = []
    futures = [worker.submit(lambda i=i: order.append(i)) for i in range(20)]

    def breaks():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        worker.run(breaks)
    assert caught.traceback[-1].name == "breaks"
    assert all(f.done() for f in futures) and order == list(range(20))


def test_counts_busy_time_for_itself_and_for_a_ledger(worker):
    ledger = Ledger()
    worker.busy_ms()
    worker.run(lambda: time.sleep(0.02), ledger)
    worker.run(lambda: time.sleep(0.01))
    assert 20 <= ledger.take()["host0/cpu:0"] < 2000
    assert ledger.take() == {}
    assert worker.busy_ms() >= 30
    assert worker.busy_ms() == 0


def test_closing(worker):
    assert worker.alive
    last = worker.submit(lambda: 7)
    worker.close()
    worker.close()
    assert last.result(5) == 7
    with pytest.raises(ExecutionError, match="closed"):
        worker.submit(lambda: 0)


def test_tasks_from_its_own_thread_run_at_once(worker):
    assert worker.run(lambda: worker.run(lambda: threading.current_thread().name)) == "host0/cpu:0"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (Device(name="host0/tpu:0", kind="tpu"), "only cpu and cuda"),
        (Device(name="host0/cuda:99", kind="cuda"), "not on this machine"),
        (device(cores=(100_000,)), "none of the cores"),
    ],
)
def test_refuses_devices_that_are_not_here(bad, words):
    with pytest.raises(ExecutionError, match=words):
        DeviceWorker(bad)


def test_forgets_a_task_and_its_result(worker):
    import gc
    import weakref

    class Thing:
        pass

    thing = Thing()
    gone = weakref.ref(thing)
    worker.run(lambda t=thing: t)
    del thing
    worker.run(lambda: None)
    gc.collect()
    assert gone() is None


class Slow:
    """Takes its time to be destroyed."""

    def __init__(self, gone):
        self.gone = gone

    def __del__(self):
        time.sleep(0.2)
        self.gone.append(True)


@pytest.mark.parametrize("closed", [False, True])
def test_at_exit_threads_first_let_go_of_what_they_hold(closed):
    gone, thread = [], TaskThread("helper", threads=1)
    thread.submit(partial(id, Slow(gone))).result(5)
    if closed:
        thread.close()
    come_to_rest()
    assert gone
    thread.close()


def test_a_task_that_never_ends_does_not_keep_the_process_from_exiting():
    thread, end = TaskThread("helper", threads=1), threading.Event()
    future = thread.submit(end.wait)
    start = time.perf_counter()
    come_to_rest(0.2)
    assert 0.15 < time.perf_counter() - start < 2.0 and not future.done()
    end.set()
    thread.close()


def test_threads_without_a_device():
    thread = TaskThread("helper", threads=1)
    assert thread.run(torch.get_num_threads) == 1
    thread.close()
