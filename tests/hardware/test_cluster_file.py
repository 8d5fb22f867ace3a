import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from autoplace.errors import ClusterFileError
from autoplace.hardware.cluster import Cluster, Device, Host, Link
from autoplace.hardware.cluster_file import load_cluster, save_cluster

EXAMPLE = Path(__file__).parents[2] / "examples" / "cluster.yaml"
GOOD = """\
format: autoplace.cluster/1
devices:
- {name: host0/cuda:0, kind: cuda, memory_bytes: 16e9, idle_watts: 60, busy_watts: 300, watts_source: nvml, model: X}
- {name: host0/cpu:0, kind: cpu, cores: [0, 1]}
links:
- {source: host0/cuda:0, target: host0/cpu:0, latency_ms: 0.02, bytes_per_ms: 12e6}
default_link: {latency_ms: 0, bytes_per_ms: 1000000}
"""


@pytest.fixture
def load(tmp_path):
    def write_and_load(text):
        path = tmp_path / "cluster.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_cluster(path)

    return write_and_load


def test_a_good_file_says_what_it_says(load):
    cluster = load(GOOD)
    gpu, cpu = cluster.devices
    assert gpu == Device(
        name="host0/cuda:0",
        kind="cuda",
        memory_bytes=16e9,
        idle_watts=60.0,
        busy_watts=300.0,
        watts_source="nvml",
        model="X",
    )
    assert cpu.cores == (0, 1) and math.isinf(cpu.memory_bytes) and cpu.idle_watts is None
    assert cluster.links == {("host0/cuda:0", "host0/cpu:0"): Link(latency_ms=0.02, bytes_per_ms=12e6)}
    assert cluster.default_link == Link(latency_ms=0.0, bytes_per_ms=1e6)


HOSTS = "hosts:\n- {name: host0}\n- {name: b, address: 10.0.0.2, launch: [ssh, u@b], interface: eth0}\n"


def test_hosts_are_read_and_are_no_part_of_the_fingerprint(load):
    cluster = load(GOOD + HOSTS)
    assert cluster.hosts == (
        Host(name="host0"),
        Host(name="b", address="10.0.0.2", launch=("ssh", "u@b"), interface="eth0"),
    )
    assert cluster.fingerprint == load(GOOD).fingerprint


BAD = {
    "empty": ("", "the file is empty"),
    "a list": ("- 1", "the file is a list"),
    "no yaml": ("{a: [", "not YAML"),
    "a tab": ("a:\n\t- b", "not YAML"),
    "python tag": ("format: !!python/object/apply:os.getcwd []", "not YAML"),
    "not utf-8": (b"\xff\xfe\x00", "cannot be read"),
    "control character": ("format: \x07", "not YAML"),
    "bad date": ("format: 2020-99-99", "not YAML"),
    "two documents": (GOOD + "---\n" + GOOD, "not YAML"),
    "other format": (GOOD.replace("cluster/1", "cluster/2"), "format is 'autoplace.cluster/2'"),
    "no devices": ("format: autoplace.cluster/1", "lacks 'devices'"),
    "empty devices": ("format: autoplace.cluster/1\ndevices: []", "no devices"),
    "unknown top key": (GOOD + "extra: 1", "unknown key 'extra'"),
    "unknown device key": (GOOD.replace("model: X", "modle: X"), r"devices\[0\] has an unknown key 'modle'"),
    "no kind": (GOOD.replace("kind: cpu, ", ""), r"devices\[1\] lacks 'kind'"),
    "name is a number": (GOOD.replace("name: host0/cpu:0", "name: 7"), r"devices\[1\].name is 7"),
    "empty name": (GOOD.replace("name: host0/cpu:0", "name: ''"), r"devices\[1\].name is ''"),
    "twice the same device": (GOOD.replace("name: host0/cpu:0", "name: host0/cuda:0"), "listed twice"),
    "NaN": (GOOD.replace("16e9", ".nan"), r"devices\[0\].memory_bytes is nan"),
    "infinite": (GOOD.replace("16e9", ".inf"), r"devices\[0\].memory_bytes is inf"),
    "huge integer": (GOOD.replace("16e9", "9" * 4000), r"devices\[0\].memory_bytes is a huge number"),
    "integer beyond conversion": (GOOD.replace("16e9", "9" * 5000), "not YAML"),
    "negative": (GOOD.replace("idle_watts: 60", "idle_watts: -60"), r"devices\[0\].idle_watts is -60"),
    "text for a number": (GOOD.replace("16e9", "16 GB"), r"devices\[0\].memory_bytes is '16 GB'"),
    "bool for a number": (GOOD.replace("16e9", "true"), r"devices\[0\].memory_bytes is True"),
    "busy below idle": (GOOD.replace("busy_watts: 300", "busy_watts: 3"), "busy must not be less"),
    "cores no list": (GOOD.replace("[0, 1]", "2"), r"devices\[1\].cores is 2"),
    "bad core": (GOOD.replace("[0, 1]", "[0, -1]"), r"devices\[1\].cores\[1\] is -1"),
    "core twice": (GOOD.replace("[0, 1]", "[1, 1]"), "a core twice"),
    "shared core": (GOOD.replace("kind: cuda,", "kind: cpu, cores: [1],"), "core 1 belongs to"),
    "device no mapping": (GOOD.replace("- {name: host0/cpu:0, kind: cpu, cores: [0, 1]}", "- 5"), r"devices\[1\] is 5"),
    "unknown link end": (GOOD.replace("target: host0/cpu:0", "target: host0/cpu:9"), "'host0/cpu:9', which is not"),
    "link to itself": (GOOD.replace("target: host0/cpu:0", "target: host0/cuda:0"), "to itself"),
    "no bandwidth": (GOOD.replace("12e6", "0"), r"links\[0\] needs"),
    "links no list": (GOOD.replace("links:\n- {", "links:\n  {"), "links is a mapping"),
    "default link lacks": (GOOD.replace("latency_ms: 0, ", ""), "default_link lacks 'latency_ms'"),
    "hosts no list": (GOOD + "hosts: {name: a}", "hosts is a mapping"),
    "host no mapping": (GOOD + "hosts: [a]", r"hosts\[0\] is 'a'"),
    "unknown host key": (GOOD + HOSTS.replace("interface", "device"), r"hosts\[1\] has an unknown key 'device'"),
    "nameless host": (GOOD + "hosts: [{address: a}]", r"hosts\[0\] lacks 'name'"),
    "host with a slash": (GOOD + "hosts: [{name: a/b}]", r"hosts\[0\].name is 'a/b'"),
    "launch is a text": (GOOD + "hosts: [{name: a, launch: ssh a}]", r"hosts\[0\].launch is 'ssh a'; expected a list"),
    "launch of numbers": (GOOD + "hosts: [{name: a, launch: [ssh, 7]}]", r"hosts\[0\].launch\[1\] is 7"),
    "address is a number": (GOOD + "hosts: [{name: a, address: 10.1}]", r"hosts\[0\].address is 10.1"),
    "NUL in a word": (GOOD + 'hosts: [{name: a, launch: ["s\\0h"]}]', r"hosts\[0\].launch\[0\] has characters"),
    "same host twice": (GOOD + "hosts: [{name: a}, {name: a}]", "host 'a' is listed twice"),
    "hosts alone": ("format: autoplace.hosts/1\nhosts: [{name: a}]", "autoplace profile --cluster"),
    "doubled key": (GOOD + "format: autoplace.cluster/1", "line 8 gives 'format' a second time"),
    "alias": ("format: &a x\ndevices: *a", "line 2 uses an alias"),
    "list as key": ("? [1]\n: 2", "not YAML"),
    "deep": ("[" * 5000, "nested too deeply"),
    "large": ("#" * (5 << 20), "too many for a cluster file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_gets_one_sentence(case, load):
    text, sentence = BAD[case]
    with pytest.raises(ClusterFileError, match=sentence) as caught:
        load(text)
    message = str(caught.value)
    assert "cluster.yaml" in message
    assert "\n" not in message and len(message) < 500


def test_a_bomb_of_aliases_goes_off_nowhere(load):
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(ClusterFileError, match="alias"):
        load("\n".join(layers))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ClusterFileError, match="does not exist"):
        load_cluster(tmp_path / "none.yaml")
    with pytest.raises(ClusterFileError, match="cannot be read"):
        load_cluster(tmp_path)


names = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(lambda t: t.strip())
amounts = st.floats(0, 1e15, allow_subnormal=False)


@st.composite
def clusters(draw):
    devices = []
    for i, name in enumerate(draw(st.lists(names, min_size=1, max_size=4, unique=True))):
        idle = draw(st.none() | st.floats(0, 100))
        devices.append(
            Device(
                name=name,
                kind=draw(names),
                memory_bytes=draw(st.just(math.inf) | st.integers(0, 1 << 50).map(float)),
                idle_watts=idle,
                busy_watts=None if idle is None else idle + draw(amounts),
                watts_source=draw(st.none() | names),
                cores=tuple(range(10 * i, 10 * i + draw(st.integers(0, 3)))),
                model=draw(st.just("") | names),
            )
        )
    link = st.builds(Link, latency_ms=amounts, bytes_per_ms=st.floats(1e-3, 1e15))
    word = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=8).filter(lambda w: "/" not in w)
    hosts = st.lists(
        st.builds(
            Host,
            name=word,
            address=st.just("") | word,
            launch=st.lists(word, max_size=3).map(tuple),
            interface=st.just("") | word,
            directory=st.just("") | word,
            python=st.just("") | word,
        ),
        max_size=3,
        unique_by=lambda host: host.name,
    )
    pairs = [(a.name, b.name) for a in devices for b in devices if a is not b]
    links = {pair: draw(link) for pair in pairs if draw(st.booleans())}
    default = draw(st.none() | link)
    return Cluster(devices=tuple(devices), links=links, default_link=default, hosts=tuple(draw(hosts)))


@settings(max_examples=60, deadline=None)
@given(clusters())
def test_what_is_saved_is_loaded(tmp_path_factory, cluster):
    path = tmp_path_factory.mktemp("clusters") / "cluster.yaml"
    save_cluster(cluster, path)
    again = load_cluster(path)
    assert again == cluster
    assert again.fingerprint == cluster.fingerprint


def test_a_name_that_looks_like_a_number_stays_a_name(tmp_path):
    cluster = Cluster(devices=(Device(name="1e6", kind="0E0"),), hosts=(Host(name="7", python="-1.5e3"),))
    cluster.save(tmp_path / "c.yaml")
    assert load_cluster(tmp_path / "c.yaml") == cluster


def test_a_saved_file_is_plain_yaml_and_nothing_is_left_beside_it(load, tmp_path):
    load(GOOD).save(tmp_path / "new" / "c.yaml")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["c.yaml"]
    assert yaml.safe_load((tmp_path / "new" / "c.yaml").read_text())["format"] == "autoplace.cluster/1"


def test_a_path_that_cannot_be_written(load, tmp_path):
    cluster = load(GOOD)
    with pytest.raises(ClusterFileError, match="cannot be written"):
        cluster.save(tmp_path / "cluster.yaml" / "inside.yaml")


def test_the_example_can_be_planned_on():
    cluster = Cluster.load(EXAMPLE)
    assert {d.host for d in cluster.devices} == {"host0", "host1"}
    assert (cluster.link_bytes_per_ms > 0).all()
    assert all(d.idle_watts and d.busy_watts for d in cluster.devices)
