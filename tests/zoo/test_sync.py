"""Replay: whatever is left on disk gets to the store, once."""

import json
import subprocess
import sys

import pytest

from autoplace.errors import TrackingError
from autoplace.records import start_run_log
from autoplace.zoo._client import open_client
from autoplace.zoo.sync import replay


def left_behind(directory, *, end=True, name="left"):
    """A record whose process never reached a store."""
    with start_run_log("tune", name, params={"seed": 1}, directory=directory) as log:
        log.append(*({"type": "metrics", "metrics": {"reward": s}, "step": s, "time": 1e9 + s} for s in range(5)))
        if end:
            log.append({"type": "end", "status": "FINISHED", "time": 1e9 + 10})
    return log.path


def runs_of(uri, record):
    client = open_client(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    return client, client.search_runs(experiments, f"tags.`autoplace.run` = '{record.stem}'")


def test_a_record_is_delivered_once(store_uri, tmp_path):
    record = left_behind(tmp_path)
    assert replay(tmp_path, store_uri).delivered == 1
    assert replay(tmp_path, store_uri).delivered == 0
    client, (run,) = runs_of(store_uri, record)
    assert (run.info.status, run.data.params) == ("FINISHED", {"seed": "1"})
    assert len(client.get_metric_history(run.info.run_id, "reward")) == 5


def test_a_replay_that_was_cut_off_repeats_nothing(store_uri, tmp_path):
    record = left_behind(tmp_path)
    replay(tmp_path, store_uri)
    sidecar = record.with_suffix(".delivered.json")
    state = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**state, "records": 2, "complete": False}))
    assert replay(tmp_path, store_uri).delivered == 1
    sidecar.unlink()
    assert replay(tmp_path, store_uri).delivered == 1
    client, (run,) = runs_of(store_uri, record)
    assert len(client.get_metric_history(run.info.run_id, "reward")) == 5


_DIE_IN_A_RUN = """
import os, sys
from autoplace.zoo.tracking import track_run
with track_run("train", "killed", tracking_uri="http://127.0.0.1:9", records_dir=sys.argv[1]) as run:
    run.log_metrics({"reward": 1.0}, 0)
    os._exit(9)
"""


def test_the_run_of_a_dead_process_is_delivered_as_failed(tmp_path, store_uri):
    process = subprocess.run([sys.executable, "-c", _DIE_IN_A_RUN, str(tmp_path / "records")], timeout=120)
    assert process.returncode == 9
    assert replay(tmp_path / "records", store_uri).delivered == 1
    (record,) = (tmp_path / "records").glob("*.jsonl")
    _, (run,) = runs_of(store_uri, record)
    assert (run.info.status, run.data.metrics) == ("FAILED", {"reward": 1.0})


def test_a_run_that_goes_on_is_left_alone(tmp_path, store_uri):
    with start_run_log("tune", "going on", directory=tmp_path):
        counts = replay(tmp_path, store_uri)
    assert (counts.running, counts.delivered) == (1, 0)


def test_one_bad_record_does_not_keep_the_others(tmp_path, store_uri):
    (tmp_path / "0.jsonl").write_text('{"type":"metrics"}\n')
    torn = left_behind(tmp_path)
    with torn.open("a") as stream:
        stream.write('{"type":"metr')
    counts = replay(tmp_path, store_uri)
    assert (counts.delivered, counts.failed) == (1, 1)
    assert any("no header" in n for n in counts.notes) and any("torn" in n for n in counts.notes)


def test_an_artifact_that_is_gone_is_said(tmp_path, store_uri):
    with start_run_log("tune", "gone", directory=tmp_path) as log:
        log.append({"type": "artifact", "path": str(tmp_path / "gone.txt"), "folder": ""}, {"type": "end"})
    counts = replay(tmp_path, store_uri)
    assert counts.delivered == 1
    assert any("gone.txt is gone" in note for note in counts.notes)


def test_no_server_is_one_sentence_and_no_records_need_none(tmp_path):
    assert replay(tmp_path, "http://127.0.0.1:9").delivered == 0
    left_behind(tmp_path)
    with pytest.raises(TrackingError, match="cannot be reached"):
        replay(tmp_path, "http://127.0.0.1:9")
