"""The policy format: what is written comes back, and whatever is wrong is refused in one sentence."""

import json
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest

from autoplace.errors import PolicyError
from autoplace.policy import store
from autoplace.policy.store import read_policy, verify_policy, write_policy

TENSORS = {
    "scorer.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scorer.scale": np.asarray(0.5, np.float64),
}


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def policy(tmp_path):
    return write_policy(tmp_path / "small", TENSORS, {"hidden": 8}, "# Small\n", {"ratio": 0.97})


def resum(directory: Path) -> None:
    """Make the checksums fit whatever the files now hold."""
    lines = subprocess.run(["sha256sum", *store.DATA_FILES], cwd=directory, capture_output=True, check=True).stdout
    (directory / "SHA256SUMS").write_bytes(lines)


def test_what_is_written_is_read_back(policy):
    stored = read_policy(policy)
    assert stored.tensors.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert stored.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(stored.tensors[name], array)
    assert stored.config == {"format": "autoplace.policy/1", "hidden": 8}
    assert (stored.card, stored.evaluation, stored.num_parameters) == ("# Small\n", {"ratio": 0.97}, 7)


def test_sums_are_those_of_sha256sum(policy):
    check = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=policy, capture_output=True)
    assert check.returncode == 0, check.stderr
    assert verify_policy(policy) == [(name, True) for name in store.DATA_FILES]


def test_same_input_same_bytes(policy, tmp_path):
    again = write_policy(tmp_path / "again", TENSORS, {"hidden": 8}, "# Small\n", {"ratio": 0.97})
    assert (again / "SHA256SUMS").read_bytes() == (policy / "SHA256SUMS").read_bytes()


def test_transposed_tensors_keep_their_values(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    directory = write_policy(tmp_path / "t", {"w": array}, {}, "", {})
    np.testing.assert_array_equal(read_policy(directory).tensors["w"], array)


@pytest.mark.parametrize("name", store.DATA_FILES)
def test_a_changed_byte_is_refused(policy, name):
    content = bytearray((policy / name).read_bytes())
    content[-1] ^= 1
    (policy / name).write_bytes(content)
    with pytest.raises(PolicyError, match=f"{name} does not match its checksum"):
        read_policy(policy)
    assert [n for n, ok in verify_policy(policy) if not ok] == [name]


@pytest.mark.parametrize("name", [*store.DATA_FILES, "SHA256SUMS"])
def test_a_missing_file_is_named(policy, name):
    (policy / name).unlink()
    with pytest.raises(PolicyError, match=f"has no file {name}"):
        read_policy(policy)


def test_truncated_tensors_are_refused_even_with_a_fitting_checksum(policy):
    path = policy / "policy.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    resum(policy)
    with pytest.raises(PolicyError, match="is not a safetensors file"):
        read_policy(policy)


def test_a_pickle_is_never_run(policy, tmp_path):
    trap = tmp_path / "sprung"
    (policy / "policy.safetensors").write_bytes(pickle.dumps(Trap(trap)))
    resum(policy)
    with pytest.raises(PolicyError, match="never unpickled"):
        read_policy(policy)
    assert not trap.exists()


def test_a_file_instead_of_a_directory(tmp_path):
    (tmp_path / "model.zip").write_bytes(b"PK")
    with pytest.raises(PolicyError, match="is a file; a policy is a directory"):
        read_policy(tmp_path / "model.zip")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b'{"format": "autoplace.policy/9"}', "autoplace.policy/9"),
        ("config.json", b"[1]", "must hold a JSON object"),
        ("config.json", b"{", "is not JSON"),
        ("eval.json", b'{"ratio": NaN}', "NaN"),
        ("eval.json", b"[" * 100_000, "is not JSON"),
        ("card.md", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_bad_schema_is_refused(policy, name, content, message):
    (policy / name).write_bytes(content)
    resum(policy)
    with pytest.raises(PolicyError, match=message):
        read_policy(policy)


def test_a_foreign_line_in_the_sums_is_refused(policy):
    sums = policy / "SHA256SUMS"
    sums.write_text(sums.read_text() + "0" * 64 + "  ../../etc/passwd\n")
    with pytest.raises(PolicyError, match="line 5"):
        read_policy(policy)


def test_an_oversized_file_is_refused_before_it_is_read_whole(policy, monkeypatch):
    monkeypatch.setitem(store.SIZE_LIMIT_BYTES, "policy.safetensors", 16)
    with pytest.raises(PolicyError, match="larger than 16 bytes"):
        read_policy(policy)


@pytest.mark.parametrize(
    ("tensors", "config", "evaluation", "message"),
    [
        ({"w": np.asarray([np.nan], np.float32)}, {}, {}, "NaN or infinity"),
        ({"w": np.asarray([1, 2])}, {}, {}, "floats only"),
        ({}, {}, {}, "no tensors"),
        (TENSORS, {"format": "other/1"}, {}, "other/1"),
        (TENSORS, {}, {"ratio": float("inf")}, "eval.json cannot be written"),
        (TENSORS, {"layer": object()}, {}, "config.json cannot be written"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(tmp_path, tensors, config, evaluation, message):
    with pytest.raises(PolicyError, match=message):
        write_policy(tmp_path / "bad", tensors, config, "", evaluation)
    assert list(tmp_path.iterdir()) == []


def test_a_policy_is_replaced_whole(policy):
    write_policy(policy, {"w": np.ones(2, np.float32)}, {"hidden": 9}, "", {})
    assert read_policy(policy).config["hidden"] == 9
    assert [p.name for p in policy.parent.iterdir()] == ["small"]


def test_other_peoples_files_are_not_replaced(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("x")
    with pytest.raises(PolicyError, match=r"thesis\.tex"):
        write_policy(tmp_path / "work", TENSORS, {}, "", {})
    assert (tmp_path / "work" / "thesis.tex").read_text() == "x"


def test_a_failed_write_leaves_the_previous_policy(policy, monkeypatch):
    def fail(path, data):
        raise OSError("disk full")

    monkeypatch.setattr(store, "_write_synced", fail)
    with pytest.raises(PolicyError, match="disk full"):
        write_policy(policy, TENSORS, {"hidden": 1}, "", {})
    assert json.loads((policy / "config.json").read_text())["hidden"] == 8
    assert [p.name for p in policy.parent.iterdir()] == ["small"]
