import pytest

from autoplace.errors import ClusterFileError
from autoplace.hardware.cluster import Cluster, Device, Host
from autoplace.hardware.hosts_file import HostProcesses, load_hosts, processes_of

GOOD = """\
format: autoplace.hosts/1
hosts:
- {name: node0}
- {name: node1, address: 10.0.0.2, launch: [ssh, user@node1], interface: eth0, processes: 2,
   directory: /work, python: /opt/python}
"""


@pytest.fixture
def load(tmp_path):
    def write_and_load(text):
        path = tmp_path / "hosts.yaml"
        path.write_text(text)
        return load_hosts(path)

    return write_and_load


def test_a_good_file_says_what_it_says(load):
    first, second = load(GOOD)
    assert first == HostProcesses(host=Host(name="node0"), processes=None)
    assert second.processes == 2
    assert second.host == Host(
        name="node1",
        address="10.0.0.2",
        launch=("ssh", "user@node1"),
        interface="eth0",
        directory="/work",
        python="/opt/python",
    )
    assert first.host.is_local and not second.host.is_local


BAD = {
    "empty": ("", "the file is empty"),
    "other format": (GOOD.replace("hosts/1", "hosts/2"), "format is 'autoplace.hosts/2'"),
    "no hosts": ("format: autoplace.hosts/1", "lacks 'hosts'"),
    "empty hosts": ("format: autoplace.hosts/1\nhosts: []", "no hosts"),
    "a mapping": ("format: autoplace.hosts/1\nhosts: {}", "hosts is a mapping"),
    "devices": (GOOD + "devices: []", "unknown key 'devices'"),
    "unknown key": (GOOD.replace("launch", "command"), r"hosts\[1\] has an unknown key 'command'"),
    "same name": (GOOD.replace("name: node1", "name: node0"), "host 'node0' is listed twice"),
    "no processes": (GOOD.replace("processes: 2", "processes: 0"), r"hosts\[1\].processes is 0"),
    "half a process": (GOOD.replace("processes: 2", "processes: 0.5"), r"hosts\[1\].processes is 0.5"),
    "true processes": (GOOD.replace("processes: 2", "processes: true"), r"hosts\[1\].processes is True"),
    "a million": (GOOD.replace("processes: 2", "processes: 1000000"), "more than a host can run"),
    "launch is a text": (GOOD.replace("[ssh, user@node1]", "ssh user@node1"), r"hosts\[1\].launch is 'ssh user@node1'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_gets_one_sentence(case, load):
    text, sentence = BAD[case]
    with pytest.raises(ClusterFileError, match=sentence) as caught:
        load(text)
    message = str(caught.value)
    assert "hosts.yaml" in message and "\n" not in message and len(message) < 500


def test_a_missing_file(tmp_path):
    with pytest.raises(ClusterFileError, match="does not exist"):
        load_hosts(tmp_path / "none.yaml")


def devices(*names):
    return tuple(Device(name=name, kind="cpu") for name in names)


def test_a_cluster_file_serves_too(tmp_path):
    path = tmp_path / "cluster.yaml"
    hosts = (Host(name="a"), Host(name="b", launch=("ssh", "b")), Host(name="idle"))
    Cluster(devices=devices("b/cpu:0", "a/cpu:0", "b/cpu:1"), hosts=hosts).save(path)
    assert [(one.host, one.processes) for one in load_hosts(path)] == [(hosts[0], 1), (hosts[1], 2)]


def test_a_cluster_without_hosts_is_this_machine_if_it_is_one():
    (one,) = processes_of(Cluster(devices=devices("host0/cpu:0", "host0/cpu:1")))
    assert one == HostProcesses(host=Host(name="host0"), processes=2)
    with pytest.raises(ClusterFileError, match="on host 'a' and `hosts` does not say how"):
        processes_of(Cluster(devices=devices("a/cpu:0", "b/cpu:0")))
    with pytest.raises(ClusterFileError, match="on host 'b' and `hosts` does not say how"):
        processes_of(Cluster(devices=devices("a/cpu:0", "b/cpu:0"), hosts=(Host(name="a"),)))
