"""Starting hosts: most of it with interpreters that are shell scripts; three launches are real."""

import _thread
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from autoplace.errors import ClusterFileError, InputError
from autoplace.hardware.cluster import Cluster, Device, Host
from autoplace.hardware.hosts_file import HostProcesses
from autoplace.runtime.distributed import launch as launching
from autoplace.runtime.distributed.launch import addresses, launch, run_script


def started(*hosts, **options):
    return launch([HostProcesses(host=host, processes=1) for host in hosts], ["script.py", "--x"], **options)


# -- with shell scripts for interpreters -------------------------------------------------------------------------------


def test_output_comes_line_by_line_with_the_hosts_name(fake_python, capfd):
    one = fake_python("one", "echo out; echo; echo err >&2; printf unfinished")
    two = fake_python("two", r"printf 'first\rsecond\n'; printf '\377\n'")
    assert started(Host(name="one", python=one), Host(name="two", launch=("env",), python=two)) == 0
    captured = capfd.readouterr()
    assert sorted(captured.out.splitlines()) == sorted(
        ["one | out", "one | ", "one | unfinished", "two | first", "two | second", "two | �"]
    )
    assert captured.err == "one | err\n"


def test_torchrun_gets_its_options_and_the_ranks_their_settings(fake_python, capfd, tmp_path, monkeypatch):
    body = 'echo "$@"; env | grep -E "^(AUTOPLACE|GLOO|NCCL)_" | sort'
    python = fake_python("python", body)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("AUTOPLACE_CLUSTER", "of another run")
    cluster = tmp_path / "cluster.yaml"
    Cluster(devices=(Device(name="a/cpu:0", kind="cpu"),)).save(cluster)
    here = Host(name="a", address="10.0.0.1", python=python, interface="eth7")
    there = Host(name="b", launch=("env", "-i"), python=python, directory="/elsewhere")
    assert started(here, there, cluster=cluster, max_restarts=3, timeout_s=20) == 0
    lines = capfd.readouterr().out.splitlines()
    a, b = ([line[4:] for line in lines if line.startswith(f"{name} | ")] for name in "ab")
    for rank, words in enumerate((a[0], b[0])):
        assert words.startswith("-m autoplace.runtime.distributed.agent --nnodes 2 ")
        assert f"--node-rank {rank} --nproc-per-node 1 --master-addr 10.0.0.1 --master-port 12345 " in words
        assert "--max-restarts 3 " in words
        assert "--nnodes 2 " in words and f"--rdzv-conf is_host={1 - rank},join_timeout=" in words
        assert words.count("--rdzv-endpoint 10.0.0.1:12345 --local-addr " + ("~00001 " if rank else "10.0.0.1 ")) == 1
        assert words.endswith(" -m autoplace.runtime.distributed.main script.py --x")
    assert {"AUTOPLACE_HOST=a", f"AUTOPLACE_CLUSTER={cluster}", "GLOO_SOCKET_IFNAME=eth7"} <= set(a)
    assert "AUTOPLACE_MIN_HOSTS=" in a and "AUTOPLACE_MIN_HOSTS=" in b
    assert {"NCCL_SOCKET_IFNAME=eth7", "AUTOPLACE_TIMEOUT_S=20", f"AUTOPLACE_DIRECTORY={Path.cwd()}"} <= set(a)
    assert "AUTOPLACE_PEER=b" in a and "AUTOPLACE_PEER=10.0.0.1" in b
    assert {"AUTOPLACE_HOST=b", "AUTOPLACE_CLUSTER=", "AUTOPLACE_DIRECTORY=/elsewhere", "NCCL_DEBUG=WARN"} <= set(b)
    assert any(line.startswith("AUTOPLACE_CLUSTER_TEXT=") for line in b)
    assert not any(line.startswith("GLOO_SOCKET_IFNAME") for line in b)


def test_ssh_gets_one_word_that_a_shell_takes_apart(tmp_path, fake_python, capfd, monkeypatch):
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nshift\ntest $# = 1 || exit 9\nexec sh -c "$1"\n')
    ssh.chmod(0o755)
    python = fake_python("a python", 'for word in "$@"; do echo "$word"; done; echo "$AUTOPLACE_NOTE"')
    monkeypatch.setenv("AUTOPLACE_NOTE", "it's $HOME")
    host = Host(name="far", launch=(str(ssh), "user@far"), python=python)
    assert launch([HostProcesses(host=host)], ["a script.py", "; exit 3"]) == 0
    shown = [line.removeprefix("far | ") for line in capfd.readouterr().out.splitlines()]
    assert shown[-3:] == ["a script.py", "; exit 3", "it's $HOME"]
    assert shown[shown.index("--nproc-per-node") + 1] == "devices", "the host counts its own"


def test_the_first_failure_ends_all_and_gives_the_code(fake_python, capfd, tmp_path):
    bad = fake_python("bad", "sleep 0.3; echo boom >&2; exit 7")
    good = fake_python("good", f"trap 'echo told > {tmp_path}/told; exit 1' TERM; while :; do sleep 0.1; done")
    start = time.monotonic()
    assert started(Host(name="good", python=good), Host(name="bad", launch=("env",), python=bad)) == 7
    assert time.monotonic() - start < 4
    assert (tmp_path / "told").read_text() == "told\n"
    assert "bad | boom\n" in capfd.readouterr().err


def test_who_does_not_listen_is_killed(fake_python, monkeypatch):
    monkeypatch.setattr(launching, "_END_S", 0.3)
    deaf = fake_python("deaf", "trap '' TERM; while :; do sleep 0.1; done")
    bad = fake_python("bad", "sleep 0.3; exit 1")
    start = time.monotonic()
    assert started(Host(name="deaf", python=deaf), Host(name="bad", python=bad)) == 1
    assert time.monotonic() - start < 8


def tell(**facts):
    return f"printf '\\036autoplace %s\\n' {shlex.quote(json.dumps(facts))} >&2"


def test_an_error_of_ours_is_printed_once_and_is_code_2(fake_python, capfd):
    error = tell(kind="error", sentence="it's no good; change it", rank=0)
    python = fake_python("python", f"{error}\n{error}\n{tell(kind='failed', rank=0, code=2)}\nexit 1")
    assert started(Host(name="one", python=python), Host(name="two", python=python)) == 2
    captured = capfd.readouterr()
    assert captured.err == "autoplace: it's no good; change it\n" and captured.out == ""


def test_an_error_that_a_restart_mended_is_mentioned(fake_python, capfd):
    python = fake_python("python", tell(kind="error", sentence="rank 1 was lost", rank=0))
    assert started(Host(name="one", python=python)) == 0
    assert capfd.readouterr().err == "autoplace: ranks were started again after: rank 1 was lost\n"


@pytest.mark.parametrize(("code", "words"), [(3, "ended with code 3"), (-9, "was ended by SIGKILL")])
def test_the_rank_that_failed_is_named(fake_python, capfd, code, words):
    last = code if code > 0 else 128 - code
    python = fake_python("python", f"{tell(kind='failed', rank=4, code=code)}; exit {last}")
    assert started(Host(name="one", python=python)) == last
    assert capfd.readouterr().err == f"autoplace: rank 4 on host 'one' {words}\n"


def trio(fake_python, one="exit 0", two="exit 0", three="exit 0"):
    bodies = {"one": one, "two": two, "three": three}
    return [Host(name=name, launch=("env",), python=fake_python(name, body)) for name, body in bodies.items()]


def test_enough_hosts_go_on_without_one(fake_python, capfd):
    hosts = trio(fake_python, "sleep 1; echo $AUTOPLACE_MIN_HOSTS $*", "sleep 1", "echo cut off >&2; exit 255")
    assert started(*hosts, max_restarts=1, min_hosts=2) == 0
    captured = capfd.readouterr()
    assert captured.out.startswith("one | 2 ") and " --nnodes 2:3 " in captured.out
    assert "autoplace: host 'three' is gone (cut off); the others go on\n" in captured.err


def test_who_hangs_is_not_waited_for_when_the_first_host_is_done(fake_python, monkeypatch):
    monkeypatch.setattr(launching, "_END_S", 0.3)
    start = time.monotonic()
    assert started(*trio(fake_python, three="sleep 60"), max_restarts=1, min_hosts=2) == 0
    assert time.monotonic() - start < 20


GONE = {
    "the first": ("one", "exit 255", 1, 255),
    "too many": ("three", "exit 255", 3, 255),
    "ranks that failed": ("three", f"{tell(kind='failed', rank=2, code=9)}; exit 9", 1, 9),
}


@pytest.mark.parametrize("case", GONE)
def test_some_losses_end_the_run(case, fake_python, capfd):
    name, body, least, code = GONE[case]
    bodies = dict.fromkeys(("one", "two", "three"), "sleep 60") | {name: body}
    assert started(*trio(fake_python, **bodies), max_restarts=1, min_hosts=least) == code
    said = f"host '{name}' is gone (code 255); start again when it is up"
    assert ("rank 2 on host 'three' ended with code 9" if "failed" in case else said) in capfd.readouterr().err


def test_more_hosts_than_there_are_cannot_be_enough(tmp_path, one_host):
    one_host.save(tmp_path / "cluster.yaml")
    with pytest.raises(InputError, match=r"--min-hosts is 2 and .*cluster.yaml names 1 hosts; use 1 to 1"):
        run_script(tmp_path / "cluster.yaml", ["script.py"], min_hosts=2)


def test_other_reports_are_handed_on(fake_python):
    told = []
    python = fake_python("python", tell(kind="progress", done=1, total=2, label="a -> b"))
    assert started(Host(name="one", python=python), heard=told.append) == 0
    assert told == [{"kind": "progress", "done": 1, "total": 2, "label": "a -> b"}]


def test_a_host_without_autoplace_says_so(fake_python, capfd):
    python = fake_python("python", "echo 'No module named autoplace' >&2; exit 1", started="")
    assert started(Host(name="one", python=python)) == 2
    assert "autoplace: host 'one' did not start (No module named autoplace); check that" in capfd.readouterr().err


def test_the_input_stays_open_as_long_as_we_live(fake_python, capfd):
    python = fake_python("python", 'read -r line; echo "$line|"; timeout 0.3 cat; echo $?')
    assert started(Host(name="one", python=python)) == 0
    assert capfd.readouterr().out.splitlines() == ["one | |", "one | 124"]


UNREACHABLE = {
    "a failing prefix": (
        Host(name="x", launch=("false",)),
        "cannot be reached by `false`: it ended with code 1; check",
    ),
    "an unknown prefix": (
        Host(name="x", launch=("no-such-ssh", "a b")),
        "by `no-such-ssh 'a b'`: no-such-ssh: No such",
    ),
    "one that talks": (Host(name="x", launch=("sh", "-c", "echo refused >&2; exit 255")), "exit 255'`: refused; check"),
    "one that does nothing": (Host(name="x", launch=("true",)), "it did not run the command"),
    "no python": (Host(name="x", launch=("env",), python="/no/python"), "cannot run /no/python .*set `python`"),
    "no local python": (Host(name="x", python="/no/python"), "cannot run /no/python .*set `python`"),
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_a_host_that_cannot_be_reached(case, fake_python):
    host, sentence = UNREACHABLE[case]
    fine = Host(name="fine", python=fake_python("python", "echo must not start"))
    with pytest.raises(ClusterFileError, match=sentence) as caught:
        started(fine, host)
    assert "host 'x'" in str(caught.value) and "\n" not in str(caught.value)


def test_a_host_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(launching, "_PROBE_S", 0.2)
    with pytest.raises(ClusterFileError, match=r"no answer within 0.2 s"):
        started(Host(name="x", launch=("sh", "-c", "sleep 30")), Host(name="y", launch=("sh", "-c", "sleep 30")))


def test_a_login_may_print_before_the_port(fake_python, capfd):
    python = fake_python("python", 'echo "$@"', port="'Welcome 99'; echo 23456")
    assert started(Host(name="one", python=python)) == 0
    assert "--master-port 23456" in capfd.readouterr().out


def test_addresses():
    local, far = Host(name="a"), Host(name="b", launch=("ssh", "b"))
    assert addresses([local, Host(name="c")]) == ["127.0.0.1", "127.0.0.1"]
    assert addresses([local, far]) == ["a", "b"]
    assert addresses([Host(name="a", address="10.0.0.1"), far]) == ["10.0.0.1", "b"]


def test_a_cluster_file_that_cannot_be_handed_over(tmp_path, monkeypatch, fake_python):
    path = tmp_path / "cluster.yaml"
    Cluster(devices=(Device(name="a/cpu:0", kind="cpu"),)).save(path)
    monkeypatch.setattr(launching, "_MAX_PACKED", 10)
    with pytest.raises(ClusterFileError, match="too large to be handed to other hosts"):
        started(Host(name="a", launch=("env",), python=fake_python("python", "exit 1")), cluster=path)


def test_a_cluster_file_that_does_not_say_how_to_start(tmp_path):
    path = tmp_path / "cluster.yaml"
    Cluster(devices=tuple(Device(name=f"{host}/cpu:0", kind="cpu") for host in "ab")).save(path)
    with pytest.raises(ClusterFileError, match=r"cluster.yaml: devices are on host 'a' and `hosts` does not say how"):
        run_script(path, ["script.py"])


def test_ctrl_c_is_passed_on(fake_python, tmp_path):
    ready, told = tmp_path / "ready", tmp_path / "told"
    python = fake_python("python", f"trap 'echo > {told}; exit 130' INT; echo > {ready}; while :; do sleep 0.1; done")

    def press():
        end = time.monotonic() + 20
        while not ready.exists():
            if time.monotonic() > end:
                return
            time.sleep(0.02)
        _thread.interrupt_main()

    threading.Thread(target=press, daemon=True).start()
    assert started(Host(name="one", python=python)) == 130
    assert told.exists()


# -- for real ----------------------------------------------------------------------------------------------------------

TELLS_ALL = """\
import json, os, sys, torch
from autoplace.runtime.distributed import Session

assert __name__ == "__main__" and sys.stdin.read() == ""
session = Session.join(timeout_s=60)
total = torch.tensor([session.rank + 1.0])
torch.distributed.all_reduce(total)
print(json.dumps({
    "rank": session.rank, "device": session.device.name, "total": total.item(), "arguments": sys.argv[1:],
    "cores": sorted(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "omp": os.environ["OMP_NUM_THREADS"],
    "interface": os.environ["GLOO_SOCKET_IFNAME"], "cluster": os.environ["AUTOPLACE_CLUSTER"],
}))
session.close()
"""


def test_two_hosts_run_a_script(two_hosts, tmp_path, capfd):
    path, script = tmp_path / "cluster.yaml", tmp_path / "script.py"
    two_hosts.save(path)
    script.write_text(TELLS_ALL)
    assert run_script(path, [str(script), "--epochs", "3"]) == 0, capfd.readouterr()
    captured = capfd.readouterr()
    told = {line.split(" | ")[0]: json.loads(line.split(" | ")[1]) for line in captured.out.splitlines()}
    assert set(told) == {"one", "two"}, captured
    for rank, (device, facts) in enumerate(zip(two_hosts.devices, (told["one"], told["two"]), strict=True)):
        assert (facts["rank"], facts["device"], facts["total"]) == (rank, device.name, 3.0)
        assert facts["cores"] == list(device.cores)
        assert (facts["threads"], facts["omp"], facts["interface"]) == (1, "1", "lo")
        assert facts["arguments"] == ["--epochs", "3"]
    assert told["one"]["cluster"] == str(path)
    assert told["two"]["cluster"] != str(path) and not Path(told["two"]["cluster"]).exists()


FAILS_TWICE = """\
import os, sys
from autoplace.errors import AutoplaceError, ExecutionError
from autoplace.runtime.distributed import Session

attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
if attempt == "0" and rank == "1":
    raise RuntimeError("attempt 0 goes wrong")
session = Session.join(timeout_s=60)
sys.stdout.write(f"rank {rank} in attempt {attempt}\\n")  # in one piece, as the other rank's
session.settle(ExecutionError("no rank can go on; buy another machine") if rank == "1" else None)
"""


def test_ranks_are_started_again_and_end_with_one_sentence(one_host, tmp_path, capfd):
    path, script = tmp_path / "cluster.yaml", tmp_path / "script.py"
    one_host.save(path)
    script.write_text(FAILS_TWICE)
    assert run_script(path, [str(script)], max_restarts=1) == 2
    captured = capfd.readouterr()
    assert sorted(captured.out.splitlines()) == ["here | rank 0 in attempt 1", "here | rank 1 in attempt 1"]
    assert "here | RuntimeError: attempt 0 goes wrong" in captured.err, "what is no error of ours keeps its traceback"
    ours = [line for line in captured.err.splitlines() if "buy another machine" in line]
    assert ours == ["autoplace: no rank can go on; buy another machine"]
    assert captured.err.count("Traceback") == 1, "of the first attempt"
    assert "FAILED" not in captured.err and "torch.distributed.elastic" not in captured.err


def test_nothing_outlives_the_launcher(tmp_path):
    """What the launcher leaves behind when it is killed is a closed pipe."""
    script = tmp_path / "script.py"
    script.write_text("import os, time\nprint(os.getpid(), os.getppid(), flush=True)\ntime.sleep(120)")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    options = ["--nnodes", "1", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    package = "autoplace.runtime.distributed"
    agent = subprocess.Popen(
        [sys.executable, "-m", f"{package}.agent", *options, "-m", f"{package}.main", str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "AUTOPLACE_REPORTS": "1"},
    )
    agent.stdin.write("\n")
    agent.stdin.flush()
    rank, parent = map(int, agent.stdout.readline().split())
    assert parent == agent.pid and _runs(rank)
    agent.stdin.close()
    assert agent.wait(timeout=20) == 128 + signal.SIGTERM
    assert not _runs(rank)


def _runs(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"
