import socket
import threading

import pytest

from autoplace.errors import ClusterFileError
from autoplace.runtime.distributed.agent import interface_to, pack, unpack, wait_for_meeting_point


def test_a_cluster_file_travels_in_a_variable():
    text = "name: Zwölf\n" * 5000
    assert unpack(pack(text)) == text
    assert len(pack(text)) < 1000 and pack(text).isascii()


@pytest.mark.parametrize("rubbish", ["rubbish", "", "cnViYmlzaA==", "ü"])
def test_anything_else_is_refused(rubbish):
    with pytest.raises(ClusterFileError, match="does not hold a cluster file"):
        unpack(rubbish)


def test_a_meeting_point_that_listens_is_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        wait_for_meeting_point("127.0.0.1", port, first=False)
    wait_for_meeting_point("127.0.0.1", port, first=True)


def test_a_meeting_point_may_come_later():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def listen():
        with socket.create_server(("127.0.0.1", port)) as late:
            late.settimeout(10)
            late.accept()

    timer = threading.Timer(0.3, listen)
    timer.start()
    wait_for_meeting_point("127.0.0.1", port, first=False, s=10)
    timer.join()


def test_a_meeting_point_that_is_not_there(monkeypatch):
    monkeypatch.setenv("AUTOPLACE_HOST", "b")
    with pytest.raises(ClusterFileError, match=r"host 'b' cannot reach no-such-host.invalid:7, where the ranks meet"):
        wait_for_meeting_point("no-such-host.invalid", 7, first=True)

    def fail_with(error):
        def connect(address, timeout):
            raise error

        monkeypatch.setattr(socket, "create_connection", connect)

    fail_with(TimeoutError("timed out"))
    with pytest.raises(ClusterFileError, match=r"cannot reach 10.1.2.3:7, where the ranks meet \(timed out\); check"):
        wait_for_meeting_point("10.1.2.3", 7, first=False, silence_s=0.0)
    fail_with(ConnectionRefusedError(111, "Connection refused"))
    with pytest.raises(ClusterFileError, match=r"\(Connection refused\)"):
        wait_for_meeting_point("10.1.2.3", 7, first=False, s=0.0)


def test_an_interface_is_found_by_the_route():
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("no-such-host.invalid") == ""
