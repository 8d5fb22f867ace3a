"""Interpreters that are no Python, and clusters of this machine, for what starts processes."""

import os

import pytest

from autoplace.hardware.cluster import Cluster, Device, Host

STARTED = r"""printf '\036autoplace {"kind": "started"}\n' >&2"""


@pytest.fixture(autouse=True)
def no_group(monkeypatch):
    for name in ("AUTOPLACE_CLUSTER", "AUTOPLACE_HOST", "AUTOPLACE_DEBUG", "AUTOPLACE_TIMEOUT_S", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake_python(tmp_path):
    """Write a shell script that gives a free port when asked, and else says that it started and does as told."""

    def write(name, body, *, port="12345", started=STARTED):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then echo {port}; exit 0; fi\n{started}\n{body}\n')
        path.chmod(0o755)
        return str(path)

    return write


@pytest.fixture
def two_hosts():
    """Two hosts on this machine, one of them behind a prefix, with a core each (or the only one)."""
    cores = sorted(os.sched_getaffinity(0))
    devices = (
        Device(name="one/cpu:0", kind="cpu", cores=(cores[0],)),
        Device(name="two/cpu:0", kind="cpu", cores=(cores[-1],)),
    )
    hosts = (Host(name="one", address="127.0.0.1"), Host(name="two", launch=("env",), address="127.0.0.1"))
    return Cluster(devices=devices, hosts=hosts)


@pytest.fixture
def one_host():
    """Two devices on this machine, which name no cores: they run on any."""
    return Cluster(devices=tuple(Device(name=f"here/cpu:{i}", kind="cpu") for i in range(2)))
