import json

import pytest

from autoplace.costs import cache


def entry(key):
    return cache.cache_dir() / "costs" / f"{key}.json"


def test_what_is_stored_is_loaded():
    key = cache.cache_key({"a": 1})
    assert cache.load(key) is None
    cache.store(key, {"total_ms": 2.5})
    assert cache.load(key) == {"total_ms": 2.5}
    assert [p.name for p in entry(key).parent.iterdir()] == [f"{key}.json"]


def test_keys_tell_facts_apart_and_ignore_their_order():
    assert cache.cache_key({"a": 1, "b": [2, "x"]}) == cache.cache_key({"b": [2, "x"], "a": 1})
    assert cache.cache_key({"a": 1}) != cache.cache_key({"a": 2})


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": "autoplace.costs/1"}', '{"format": "other", "key": "k", "data": {}}', "NaN"],
)
def test_damaged_entries_are_ignored(text):
    entry("k").parent.mkdir(parents=True)
    entry("k").write_text(text)
    assert cache.load("k") is None
    cache.store("k", {"x": 1})
    assert cache.load("k") == {"x": 1}


def test_an_entry_under_a_wrong_name_is_ignored():
    cache.store("right", {"x": 1})
    entry("wrong").write_text(entry("right").read_text())
    assert cache.load("wrong") is None
    assert json.loads(entry("right").read_text())["key"] == "right"


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOPLACE_CACHE_DIR", str(tmp_path / "file" / "below"))
    cache.store("k", {"x": 1})
    assert cache.load("k") is None


def test_directory_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("AUTOPLACE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / "autoplace"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_dir() == tmp_path / "home" / ".cache" / "autoplace"
