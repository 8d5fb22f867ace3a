"""The shelf: shipped policies are found by name and are good; unknown ones name those that there are."""

import shutil

import pytest

from autoplace.errors import PolicyError
from autoplace.policy.store import read_policy
from autoplace.zoo import store


@pytest.fixture
def shelf(tmp_path, monkeypatch, policy_dir):
    shutil.copytree(policy_dir, tmp_path / "shelf" / "default")
    monkeypatch.setattr(store, "pretrained_directory", lambda: tmp_path / "shelf")
    return tmp_path / "shelf"


def test_a_shipped_policy_is_found_by_name(shelf):
    assert store.find_policy("default") == shelf / "default"
    (info,) = store.list_policies()
    assert (info.name, info.num_parameters, info.summary, info.problem) == ("default", 6, "Places small things", "")
    assert info.evaluation == {"ratio": 0.97}


def test_a_directory_is_a_policy_too(shelf, policy_dir, monkeypatch):
    monkeypatch.chdir(policy_dir.parent)
    assert store.find_policy("small") == policy_dir
    assert store.find_policy(policy_dir) == policy_dir


def test_an_unknown_policy_names_the_known(shelf):
    with pytest.raises(PolicyError, match=r"'nonsense' is neither a shipped policy \(default\) nor a directory"):
        store.find_policy("nonsense")


def test_a_broken_policy_is_listed_with_what_is_wrong(shelf):
    (shelf / "default" / "config.json").write_text("{}")
    (info,) = store.list_policies()
    assert "does not match its checksum" in info.problem


def test_every_policy_that_ships_is_good():
    for info in store.list_policies():
        assert info.problem == ""
        assert info.summary and info.evaluation
        assert read_policy(info.directory).num_parameters == info.num_parameters


def test_loading_checks_before_it_builds(policy_dir):
    (policy_dir / "policy.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(PolicyError, match="checksum"):
        store.load_policy(policy_dir)
