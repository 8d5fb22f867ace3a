import threading
import time

import pytest

from autoplace.runtime.schedule import ReadyQueues, Schedule, Task
from autoplace.runtime.worker import Ledger, TaskThread


@pytest.fixture
def workers():
    pair = [TaskThread("a", threads=1), TaskThread("b", threads=1)]
    yield pair
    for worker in pair:
        worker.close()


def test_tasks_wait_for_those_before_them_and_the_smallest_key_goes_first(workers):
    a, b = workers
    done, gate = [], threading.Event()

    def work(name):
        return lambda: done.append(name)

    first = Task((0,), a, "first", lambda: gate.wait(5))
    late = Task((9,), b, "late", work("late"), [first])
    early = Task((1,), b, "early", work("early"), [first])
    other = Task((5,), b, "other", work("other"))
    last = Task((0, 1), a, "last", work("last"), [late, early, other])
    ledger = Ledger()
    schedule = Schedule([first, other, late, early, last], ledger, finish=lambda: "result")
    future = schedule.start()
    deadline = time.monotonic() + 5
    while done != ["other"] and time.monotonic() < deadline:
        time.sleep(0.001)
    gate.set()
    assert future.result(5) == "result"
    assert done[0] == "other" and done[-1] == "last" and set(done[1:3]) == {"early", "late"}
    assert sorted(span.label for span in ledger.take_spans()) == ["early", "first", "last", "late", "other"]


def test_keys_order_what_is_ready(workers):
    a, _ = workers
    done, gate = [], threading.Event()
    queues = ReadyQueues()
    block = a.submit(lambda: gate.wait(5))
    tasks = [Task((k,), a, str(k), lambda k=k: done.append(k)) for k in (3, 1, 2, 0)]
    future = Schedule(tasks, Ledger(), queues).start()
    other = Schedule([Task((-1,), a, "x", lambda: done.append(-1))], Ledger(), queues).start()
    gate.set()
    block.result(5), future.result(5), other.result(5)
    assert done == [-1, 0, 1, 2, 3]


def test_the_first_exception_is_the_schedules_and_what_runs_is_waited_for(workers):
    a, b = workers
    started, ended, after = threading.Event(), [], []

    def slow():
        started.set()
        time.sleep(0.1)
        ended.append(True)

    def fails():
        started.wait(5)
        raise LookupError("from a task")

    one, two = Task((0,), a, "slow", slow), Task((1,), b, "fails", fails)
    three = Task((2,), b, "after", lambda: after.append(True), [one, two])
    with pytest.raises(LookupError, match="from a task") as caught:
        Schedule([one, two, three], Ledger()).start().result(5)
    assert caught.traceback[-1].name == "fails"
    assert ended and not after


def test_the_smallest_key_wins_among_exceptions(workers):
    a, b = workers
    both = threading.Barrier(2, timeout=5)

    def fails(error):
        def run():
            both.wait()
            raise error

        return run

    for _ in range(5):
        tasks = [Task((1,), a, "a", fails(ValueError())), Task((0,), b, "b", fails(KeyError()))]
        with pytest.raises(KeyError):
            Schedule(tasks, Ledger()).start().result(5)


def test_cancelling_starts_nothing_more(workers):
    a, b = workers
    gate, after = threading.Event(), []
    one = Task((0,), a, "one", lambda: gate.wait(5))
    two = Task((1,), b, "two", lambda: after.append(True), [one])
    schedule = Schedule([one, two], Ledger())
    future = schedule.start()
    schedule.cancel()
    gate.set()
    with pytest.raises(Exception, match="interrupted"):
        future.result(5)
    assert not after


def test_closed_workers_end_a_schedule_with_an_error_or_run_it_here(workers):
    a, b = workers
    done = []
    b.close()
    tasks = [Task((0,), a, "a", lambda: done.append("a"))]
    tasks.append(Task((1,), b, "b", lambda: done.append("b"), [tasks[0]]))
    with pytest.raises(Exception, match="closed"):
        Schedule(tasks, Ledger()).start().result(5)
    tasks = [Task((0,), a, "a", lambda: done.append("c"))]
    tasks.append(Task((1,), b, "b", lambda: done.append("d"), [tasks[0]]))
    assert Schedule(tasks, Ledger(), finish=lambda: 3).run_here().result(0) == 3
    assert done == ["a", "c", "d"]


def test_no_tasks_at_all():
    assert Schedule([], Ledger(), finish=lambda: 1).start().result(0) == 1


def test_many_random_schedules_end(workers):
    import random

    rng = random.Random(0)
    for _ in range(200):
        order, tasks = [], []
        for i in range(12):
            before = rng.sample(tasks, rng.randint(0, min(3, len(tasks))))
            tasks.append(Task((i,), rng.choice(workers), str(i), lambda i=i, o=order: o.append(i), before))
        wanted = [[tasks.index(b) for b in t.before] for t in tasks]
        Schedule(tasks, Ledger()).start().result(10)
        assert sorted(order) == list(range(12))
        assert all(order.index(b) < order.index(i) for i, some in enumerate(wanted) for b in some)
