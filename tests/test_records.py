"""The append-only record: what was appended is on disk and comes back, whatever happened to the last line."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest

from autoplace import records
from autoplace.errors import TrackingError
from autoplace.records import RecordLog, data_directory, plain_json, read_records, start_run_log


def test_records_come_back_in_order(tmp_path):
    with RecordLog(tmp_path / "deep" / "run.jsonl") as log:
        log.append({"n": 1})
        log.append({"n": 2}, {"n": 3, "text": "zwei\nZeilen – ü"})
    found, notes = read_records(log.path)
    assert [r["n"] for r in found] == [1, 2, 3]
    assert found[2]["text"] == "zwei\nZeilen – ü"
    assert notes == []


def test_every_append_is_synced_before_it_returns(tmp_path, monkeypatch):
    log = RecordLog(tmp_path / "run.jsonl")
    synced = []
    monkeypatch.setattr(records.os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    log.append({"n": 1}, {"n": 2})
    log.append({"n": 3})
    assert synced == [16, 24]
    log.close()


def test_a_torn_last_line_is_skipped_with_a_note_and_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"n":1}\n{"n":2,"te')
    found, notes = read_records(path)
    assert [r["n"] for r in found] == [1]
    assert len(notes) == 1 and "line 2" in notes[0]
    with RecordLog(path) as log:
        log.append({"n": 3})
    assert [r["n"] for r in read_records(path)[0]] == [1, 3]


def test_lines_that_are_no_records_are_skipped(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'[1]\n\xff\xfe\n\n{"n":1}\n' + b"[" * 100_000 + b"\n")
    found, notes = read_records(path)
    assert found == [{"n": 1}]
    assert len(notes) == 3


def _append_forever(path):
    log = RecordLog(path)
    n = 0
    while True:
        log.append({"n": n, "padding": "x" * 200})
        n += 1


def test_a_killed_writer_loses_nothing_that_was_appended(tmp_path):
    path = tmp_path / "run.jsonl"
    process = multiprocessing.get_context("fork").Process(target=_append_forever, args=(path,))
    process.start()
    while not path.exists() or path.stat().st_size < 5000:
        assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    found, _ = read_records(path)
    assert [r["n"] for r in found] == list(range(len(found)))
    assert len(found) > 20


def test_an_open_log_is_not_opened_twice(tmp_path):
    with RecordLog(tmp_path / "run.jsonl"), pytest.raises(TrackingError, match="goes on"):
        RecordLog(tmp_path / "run.jsonl")
    RecordLog(tmp_path / "run.jsonl").close()


def test_the_header_says_what_ran(tmp_path):
    with start_run_log("tune", "bert", params={"seed": 3}, directory=tmp_path) as log:
        pass
    (header,), _ = read_records(log.path)
    assert header["type"] == "run" and header["format"] == "autoplace.record/1"
    assert (header["kind"], header["name"], header["params"]) == ("tune", "bert", {"seed": 3})
    assert header["run"] == log.path.stem
    assert header["versions"]["torch"] != "unknown"


def test_two_runs_get_two_files(tmp_path):
    for _ in range(2):
        start_run_log("tune", "bert", directory=tmp_path).close()
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_plain_json_keeps_numbers_and_drops_what_json_cannot_say():
    value = {"a": np.float32(0.5), "b": float("inf"), "c": np.arange(2), 4: (1, None), "p": os.curdir, "n": np.nan}
    plain = plain_json(value)
    assert plain == {"a": 0.5, "b": None, "c": [0, 1], "4": [1, None], "p": ".", "n": None}
    json.dumps(plain, allow_nan=False)


def test_an_unwritable_place_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="AUTOPLACE_DATA_DIR"):
        RecordLog(tmp_path / "file" / "run.jsonl")


def test_data_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOPLACE_DATA_DIR", str(tmp_path / "own"))
    assert data_directory() == tmp_path / "own"
    monkeypatch.delenv("AUTOPLACE_DATA_DIR")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert data_directory() == tmp_path / "autoplace"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_directory() == tmp_path / ".local/share/autoplace"
