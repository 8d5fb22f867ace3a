import io

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from autoplace.cli.profile import devices_table, links_table, profile
from autoplace.errors import ClusterFileError
from autoplace.hardware.cluster import Cluster, Device, Link

app = typer.Typer()
app.command()(profile)


@pytest.fixture
def cluster():
    devices = (
        Device(name="host0/cuda:0", kind="cuda", model="Card"),
        Device(
            name="host0/cpu:0", kind="cpu", cores=(0, 1, 2, 8), memory_bytes=2 << 30, idle_watts=3.0, busy_watts=14.0
        ),
    )
    return Cluster(devices=devices, links={("host0/cuda:0", "host0/cpu:0"): Link(latency_ms=0.02, bytes_per_ms=12e6)})


def shown(table):
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def test_writes_the_cluster_of_this_machine(tmp_path):
    path = tmp_path / "out" / "cluster.yaml"
    result = CliRunner().invoke(app, ["-o", str(path)])
    assert result.exit_code == 0, result.output
    cluster = Cluster.load(path)
    assert cluster.num_devices >= 1
    assert len(cluster.links) == cluster.num_devices * (cluster.num_devices - 1)
    assert "Devices" in result.output and f"Wrote {path}" in result.output


def test_hosts_are_profiled_by_processes_of_their_own(tmp_path):
    hosts, path = tmp_path / "hosts.yaml", tmp_path / "cluster.yaml"
    hosts.write_text("format: autoplace.hosts/1\nhosts: [{name: a, address: 127.0.0.1}, {name: b, launch: [env]}]")
    result = CliRunner().invoke(app, ["--cluster", str(hosts), "-o", str(path)])
    assert result.exit_code == 0, result.output
    cluster = Cluster.load(path)
    assert [d.host for d in cluster.devices] == ["a", "b"] and cluster.default_link is None
    assert [(host.name, host.launch) for host in cluster.hosts] == [("a", ()), ("b", ("env",))]
    assert set(cluster.links) == {(s.name, t.name) for s in cluster.devices for t in cluster.devices if s is not t}
    for link in cluster.links.values():
        assert 0 < link.latency_ms < 1e3 and link.bytes_per_ms > 1e3
    for device in cluster.devices:
        if device.kind == "cpu":
            assert device.cores and device.memory_bytes > 0 and device.busy_watts
    assert "Links (row sends to column)" in result.output and f"Wrote {path}" in result.output


def test_hosts_that_cannot_be_reached_are_our_error(tmp_path):
    hosts = tmp_path / "hosts.yaml"
    hosts.write_text("format: autoplace.hosts/1\nhosts: [{name: a, launch: ['false']}]")
    result = CliRunner().invoke(app, ["--cluster", str(hosts), "-o", str(tmp_path / "cluster.yaml")])
    assert isinstance(result.exception, ClusterFileError) and "cannot be reached by `false`" in str(result.exception)
    assert not (tmp_path / "cluster.yaml").exists()


def test_without_links_says_that_they_are_assumed(tmp_path):
    path = tmp_path / "cluster.yaml"
    result = CliRunner().invoke(app, ["--no-links", "--output", str(path)])
    assert result.exit_code == 0, result.output
    cluster = Cluster.load(path)
    assert not cluster.links and cluster.default_link is not None
    assert ("assumed" in result.output) == (cluster.num_devices > 1)


def test_a_path_that_cannot_be_written_is_our_error(tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["--no-links", "-o", str(tmp_path / "file" / "cluster.yaml")])
    assert isinstance(result.exception, ClusterFileError)


def test_the_tables_hold_the_figures(cluster):
    devices, links = shown(devices_table(cluster)), shown(links_table(cluster))
    assert "0-2,8" in devices and "2.0 GiB" in devices and "14.0" in devices
    assert "unlimited" in devices and "unknown" in devices
    assert "12.00 GB/s, 20.0 µs" in links
    assert links.count("GB/s") == 1, "the diagonal and pairs that cannot talk have no figure"


def test_a_slow_link_has_figures_too(cluster):
    link = Link(latency_ms=2.0, bytes_per_ms=12_345.0)
    slow = Cluster(devices=cluster.devices, links={("host0/cuda:0", "host0/cpu:0"): link})
    assert "12.3 MB/s, 2000.0 µs" in shown(links_table(slow))
