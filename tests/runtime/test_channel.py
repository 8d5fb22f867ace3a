import os
import socket
import threading
import time

import pytest

from autoplace.runtime.channel import Channel


@pytest.fixture
def ends():
    return tuple(Channel(end) for end in socket.socketpair())


def test_messages_of_any_size_arrive_whole_and_in_order(ends):
    here, there = ends
    messages = [b"", b"a", os.urandom(3_000_000), b"b" * 70_000, b"last"]
    sender = threading.Thread(target=lambda: [here.send(m) for m in messages])
    sender.start()
    assert [there.receive(10) for _ in messages] == messages
    sender.join()


def test_a_late_message_is_waited_for(ends):
    here, there = ends
    threading.Timer(0.05, here.send, (b"late",)).start()
    assert there.receive() == b"late"


def test_what_came_before_a_time_out_is_kept(ends):
    here, there = ends
    here._socket.sendall(b"\x03\0\0\0\0\0\0\0ab")
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        there.receive(0.02)
    assert time.monotonic() - start < 5
    here._socket.sendall(b"c")
    assert there.receive(1) == b"abc"


def test_both_ends_learn_that_it_is_shut(ends):
    here, there = ends
    found = []

    def wait():
        try:
            here.receive()
        except EOFError:
            found.append("here")

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.02)
    here.shut()
    waiting.join(10)
    assert found == ["here"]
    with pytest.raises(EOFError):
        there.receive()
    with pytest.raises(OSError):
        here.send(b"x")


def test_forgetting_leaves_the_connection_to_the_other_holder():
    first, second = socket.socketpair()
    twin = socket.socket(fileno=os.dup(first.fileno()))
    Channel(first).forget()
    Channel(twin).send(b"still here")
    assert Channel(second).receive(1) == b"still here"
