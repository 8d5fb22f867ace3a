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
