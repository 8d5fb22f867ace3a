import os
import threading

import pytest
import torch

from autoplace.errors import ExecutionError
from autoplace.hardware._pinned import PinnedThread


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_stays_on_its_cores_and_leaves_the_caller_alone():
    mine = os.sched_getaffinity(0)
    core = max(mine)
    with PinnedThread("host0/cpu:0", (core,)) as thread:
        assert thread.run(lambda: os.sched_getaffinity(0)) == {core}
        assert thread.run(torch.get_num_threads) == 1
    assert os.sched_getaffinity(0) == mine


def test_raises_what_the_call_raises_and_goes_on():
    def fail():
        raise KeyError("here")

    with PinnedThread("host0/cpu:0", ()) as thread:
        with pytest.raises(KeyError, match="here"):
            thread.run(fail)
        assert thread.run(lambda: 7) == 7


def test_cores_that_are_not_there():
    before = threading.active_count()
    with pytest.raises(ExecutionError, match=r"host0/cpu:9.*profile"):
        PinnedThread("host0/cpu:9", (100_000,))
    assert threading.active_count() <= before + 1


def test_closing_twice_is_harmless():
    thread = PinnedThread("host0/cpu:0", ())
    thread.close()
    thread.close()
    assert "autoplace host0/cpu:0" not in {t.name for t in threading.enumerate()}
