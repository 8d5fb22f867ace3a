"""Files are written whole or not at all, and bad ones get one sentence."""

from __future__ import annotations

import pytest

from autoplace.errors import PlanFileError
from autoplace.files import make_directory, read_json, write_text_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write_text_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("autoplace.files.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ('{"a": NaN}', "holds NaN"), ("[" * 100_000, "nested too deeply"), (None, "does not exist")],
)
def test_bad_json_gets_one_sentence(tmp_path, text, message):
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PlanFileError, match=message) as caught:
        read_json(path, PlanFileError)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_used_gets_one_sentence(tmp_path):
    make_directory(tmp_path / "a" / "b", PlanFileError)
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanFileError, match="name another one"):
        make_directory(tmp_path / "file", PlanFileError)
