"""The ranks' entry point, in this process: torchrun is played by environment variables."""

import os
import sys

import pytest

from autoplace.errors import ClusterFileError
from autoplace.hardware.cluster import Cluster, Device
from autoplace.runtime.distributed import main as entry
from autoplace.runtime.distributed.member import CLUSTER_VARIABLE


@pytest.fixture(autouse=True)
def a_rank(monkeypatch):
    for name in (CLUSTER_VARIABLE, "AUTOPLACE_REPORTS", "AUTOPLACE_DEBUG", "AUTOPLACE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["main"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / "script.py"
        path.write_text(text)
        return str(path)

    return write


def exit_code(*words):
    with pytest.raises(SystemExit) as caught:
        entry.main(words)
    return caught.value.code


def test_the_script_is_main_and_has_its_arguments(script, capsys):
    path = script("import sys\nprint(__name__, sys.argv, sys.path[0])")
    entry.main([path, "--epochs", "3", "-m"])
    assert capsys.readouterr().out == f"__main__ {[path, '--epochs', '3', '-m']} {os.path.dirname(path)}\n"  # noqa: PTH120


def test_a_module_is_main_too(tmp_path, monkeypatch, capsys):
    (tmp_path / "some_module.py").write_text("import sys\nprint(__name__, sys.argv[1:])")
    monkeypatch.chdir(tmp_path)
    entry.main(["-m", "some_module", "--x"])
    assert capsys.readouterr().out == "__main__ ['--x']\n"


def test_an_error_of_ours_is_one_sentence(script, capsys, monkeypatch):
    path = script("from autoplace.errors import ExecutionError\nraise ExecutionError('nothing\\nworks; give up')")
    assert exit_code(path) == 2
    assert capsys.readouterr().err == "autoplace: nothing works; give up\n"
    monkeypatch.setenv("RANK", "1")
    assert exit_code(path) == 2
    assert capsys.readouterr().err == "autoplace, rank 1: nothing works; give up\n"


def test_the_launcher_is_told_instead(script, capfd, monkeypatch):
    monkeypatch.setattr(entry, "die_with_parent", lambda: None)
    monkeypatch.setenv("AUTOPLACE_REPORTS", "1")
    assert exit_code(script("from autoplace.errors import InputError\nraise InputError('no')")) == 2
    assert capfd.readouterr().err == '\x1eautoplace {"kind": "error", "sentence": "no", "rank": 0}\n'


def test_any_other_end_is_the_scripts_own(script, monkeypatch):
    with pytest.raises(ZeroDivisionError):
        entry.main([script("1 / 0")])
    assert exit_code(script("raise SystemExit(7)")) == 7
    assert exit_code(script("raise KeyboardInterrupt")) == 130
    monkeypatch.setenv("AUTOPLACE_DEBUG", "1")
    with pytest.raises(ClusterFileError):
        entry.main([script("from autoplace.errors import ClusterFileError\nraise ClusterFileError('no')")])


def test_a_script_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("AUTOPLACE_HOST", "b")
    assert exit_code(str(tmp_path / "none.py")) == 2
    assert "none.py is not on host 'b'" in capsys.readouterr().err


def test_cores_are_taken_before_the_script_runs(script, tmp_path, monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(entry, "take_cores", lambda device, *, local_ranks: taken.append((device.name, local_ranks)))
    devices = tuple(Device(name=f"a/cpu:{i}", kind="cpu", cores=(i,)) for i in range(2))
    Cluster(devices=devices).save(tmp_path / "cluster.yaml")
    monkeypatch.setenv(CLUSTER_VARIABLE, str(tmp_path / "cluster.yaml"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    entry.main([script("print('ran')")])
    assert taken == [("a/cpu:1", 2)] and capsys.readouterr().out == "ran\n"
    # What is wrong with the file is for those who join to say, on all ranks alike.
    (tmp_path / "cluster.yaml").write_text("rubbish")
    entry.main([script("print('ran')")])
    assert len(taken) == 1 and capsys.readouterr().out == "ran\n"
