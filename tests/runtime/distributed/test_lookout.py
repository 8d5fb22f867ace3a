"""What heartbeats tell of the other ranks; the ranks are lookouts of one process."""

import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from autoplace.errors import ExecutionError
from autoplace.runtime.distributed import lookout as module
from autoplace.runtime.distributed.lookout import Lookout

MEMBERS = ("a/cpu:0", "b/cpu:0", "c/cpu:0")


@pytest.fixture
def three(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.1")
    monkeypatch.setitem(os.environ, "MASTER_PORT", str(store.port))
    monkeypatch.setattr(module, "_BEAT_S", 0.05)
    every = [
        Lookout(
            SimpleNamespace(rank=rank, world_size=3, members=MEMBERS, timeout_s=9, attempt="x"),
            f"stage {rank}",
            patience_s=1.0,
        )
        for rank in range(3)
    ]
    until(lambda: all(len(one._seen) == 2 for one in every))
    yield every
    for one in every:
        one.close()


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def step(lookout, error=None):
    with lookout.watching():
        if error is not None:
            raise error


def broken():
    return RuntimeError("[gloo] Connection closed by peer")


def test_who_stands_still_was_lost_and_the_first_to_do_so_is_the_cause(three):
    three[2].close()
    time.sleep(0.5)
    three[1].close()
    with pytest.raises(ExecutionError, match=r"^rank 2 \(c/cpu:0, stage 2\) was lost: it has not answered for \d s"):
        step(three[0], broken())


def test_the_first_verdict_is_that_of_all(three):
    three[2].close()
    with pytest.raises(ExecutionError, match=r"^rank 2 ") as first:
        step(three[1], broken())
    three[1].close()
    start = time.monotonic()
    with pytest.raises(ExecutionError) as second:
        step(three[0], broken())
    assert str(second.value) == str(first.value) and time.monotonic() - start < 1.0


def test_who_fails_says_why(three):
    with pytest.raises(LookupError):
        step(three[1], LookupError("three is a crowd"))
    with pytest.raises(ExecutionError, match=r"^rank 1 \(b/cpu:0, stage 1\) failed: LookupError: three is a crowd$"):
        step(three[0], broken())


def test_what_was_caught_is_forgotten(three):
    with pytest.raises(ValueError, match="odd"):
        step(three[1], ValueError("odd"))
    step(three[1])
    until(lambda: not three[0]._seen[1][0].failure)


def test_who_answers_but_does_not_come_hangs(three):
    step(three[0])
    three[1].step, three[2].step = 1, 2
    with pytest.raises(ExecutionError, match=r"^rank 1 .* answers but did not come to step 2 within 9 s; it hangs"):
        step(three[0], broken())


def test_who_alone_misses_no_connection_hangs_in_the_step(three):
    three[2].step = 1
    told = []

    def wait():
        with pytest.raises(ExecutionError) as caught:
            step(three[1], broken())
        told.append(str(caught.value))

    other = threading.Thread(target=wait)
    other.start()
    with pytest.raises(
        ExecutionError, match=r"^rank 2 .* answers but did not come through step 1 within 9 s; it hangs"
    ):
        step(three[0], broken())
    other.join()
    assert told[0].startswith("rank 2 ")


def test_a_store_that_does_not_answer_is_the_first_hosts_loss(three):
    silence = threading.Event()
    three[1]._store = SimpleNamespace(set=lambda *_: silence.wait(10))
    start = time.monotonic()
    with pytest.raises(ExecutionError, match=r"^the host of rank 0 \(a/cpu:0, stage 0\) was lost, or the network to"):
        step(three[1], broken())
    assert time.monotonic() - start < 6
    silence.set()


def test_a_break_that_all_survive_is_the_networks(three):
    told = []

    def wait(one):
        with pytest.raises(ExecutionError) as caught:
            step(one, broken())
        told.append(str(caught.value))

    threads = [threading.Thread(target=wait, args=(one,)) for one in three]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 3 and all("broke though all of them answer" in text for text in told)
