"""A run is on disk before MLflow hears of it; a server that is down costs a warning and nothing else."""

import logging
import socket
import threading
import time

import pytest
from matplotlib.figure import Figure

from autoplace.outcome import Outcome
from autoplace.records import read_records
from autoplace.zoo import _delivery, tracking
from autoplace.zoo._client import open_client
from autoplace.zoo._delivery import read_delivered
from autoplace.zoo.sync import replay
from autoplace.zoo.tracking import track_run

FAST = Outcome(source="measured", latency_ms=3.5, period_ms=3.0, energy_j=1.2, energy_source="model", objective=3.5)
BROKEN = Outcome(source="measured", feasible=False, reason="out of memory")


@pytest.fixture
def closed_uri():
    """A port of this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def log_all(run, folder):
    """Use every kind of entry once, and metrics often."""
    for step in range(150):
        run.log_metrics({"reward": step / 10, "loss": float("nan")}, step)
    run.log_params({"seed": 9, "devices": "cpu:0 cpu:1"})
    run.log_outcome("heft x4", FAST, 1)
    run.log_outcome("annealing", BROKEN, 2)
    plan = folder / "plan.json"
    plan.write_text("{}")
    run.log_artifact(plan)
    figure = Figure()
    figure.subplots().plot([1, 2])
    run.log_figure(figure, "reward")


def stored_run(uri, record):
    """Return MLflow's one run of a record, with its client."""
    client = open_client(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.`autoplace.run` = '{record.stem}'")
    return client, run


def check_stored(uri, record):
    client, run = stored_run(uri, record)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "3", "lr": "0.001", "devices": "cpu:0 cpu:1"}
    assert run.data.metrics["reward"] == 14.9
    assert "loss" not in run.data.metrics
    assert run.data.metrics["measured/latency_ms"] == 3.5
    assert run.data.metrics["measured/energy_model_j"] == 1.2
    assert [m.value for m in client.get_metric_history(run.info.run_id, "measured/feasible")] == [1.0, 0.0]
    assert len(client.get_metric_history(run.info.run_id, "reward")) == 150
    paths = [a.path for folder in (None, "plots") for a in client.list_artifacts(run.info.run_id, folder)]
    assert {"plan.json", "plots/reward.png", "record"} <= set(paths)
    return run


def test_a_run_reaches_mlflow_whole(store_uri, tmp_path):
    with track_run("tune", "bert", tracking_uri=store_uri, params={"seed": 3, "lr": 1e-3}, tags={"a": "b"}) as run:
        log_all(run, tmp_path)
        assert run.online and run.run_id
    stored = check_stored(store_uri, run.record_path)
    assert stored.info.run_id == run.run_id
    assert stored.info.run_name == "bert"
    assert stored.data.tags["a"] == "b" and "version.torch" in stored.data.tags
    assert read_delivered(run.record_path).complete
    assert not run.record_path.with_suffix(".files").exists()


def test_the_record_is_on_disk_before_mlflow_hears_of_it(store_uri, tmp_path, monkeypatch):
    seen = []
    deliver = _delivery.Delivery.deliver

    def watch(self, records):
        on_disk, _ = read_records(self.record)
        seen.append([r in on_disk for r in records])
        deliver(self, records)

    monkeypatch.setattr(_delivery.Delivery, "deliver", watch)
    with track_run("tune", "bert", tracking_uri=store_uri) as run:
        run.log_metrics({"reward": 1.0}, 0)
        run.log_outcome("heft", FAST)
    assert all(all(batch) for batch in seen)
    assert sum(len(batch) for batch in seen) == 4


def test_metrics_go_in_batches(store_uri, monkeypatch):
    calls = []
    monkeypatch.setattr(tracking, "SECONDS_PER_FLUSH", 1e9)
    deliver = _delivery.Delivery.deliver
    monkeypatch.setattr(_delivery.Delivery, "deliver", lambda s, r: (calls.append(len(r)), deliver(s, r)))
    with track_run("train", "small", tracking_uri=store_uri) as run:
        for step in range(250):
            run.log_metrics({"reward": 0.0}, step)
    assert calls == [1, 100, 100, 51]


def test_an_exception_marks_the_run_failed_and_goes_on(store_uri):
    with pytest.raises(ZeroDivisionError), track_run("tune", "bert", tracking_uri=store_uri) as run:
        raise ZeroDivisionError("no")
    _, stored = stored_run(store_uri, run.record_path)
    assert stored.info.status == "FAILED"
    end = read_records(run.record_path)[0][-1]
    assert (end["type"], end["status"], end["reason"]) == ("end", "FAILED", "ZeroDivisionError: no")


def test_a_server_that_is_down_costs_one_warning_and_no_time(closed_uri, store_uri, tmp_path, caplog):
    start = time.monotonic()
    with (
        caplog.at_level(logging.WARNING, "autoplace"),
        track_run("tune", "bert", tracking_uri=closed_uri, params={"seed": 3, "lr": 1e-3}) as run,
    ):
        log_all(run, tmp_path)
    assert time.monotonic() - start < 15
    assert not run.online and run.run_id is None
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "autoplace"]
    assert f"autoplace sync --tracking-uri {closed_uri}" in warning

    (tmp_path / "plan.json").unlink()  # what was logged is kept beside the record
    counts = replay(None, store_uri)
    assert (counts.delivered, counts.failed, counts.notes) == (1, 0, [])
    check_stored(store_uri, run.record_path)

    again = replay(None, store_uri)
    assert (again.delivered, again.already) == (0, 1)
    check_stored(store_uri, run.record_path)


def test_a_server_that_goes_down_halfway_costs_no_result(store_uri, tmp_path, monkeypatch, caplog):
    deliver = _delivery.Delivery.deliver

    def fail(self, records):
        raise ConnectionError("gone")

    with track_run("tune", "bert", tracking_uri=store_uri, params={"seed": 3, "lr": 1e-3}) as run:
        run.log_metrics({"early": 1.0})
        run.flush()
        monkeypatch.setattr(_delivery.Delivery, "deliver", fail)
        log_all(run, tmp_path)
    assert not run.online and "gone" in caplog.text
    monkeypatch.setattr(_delivery.Delivery, "deliver", deliver)
    assert replay(None, store_uri).delivered == 1
    assert check_stored(store_uri, run.record_path).info.run_id == run.run_id


def test_params_keep_their_first_value_and_odd_names_are_cleaned(store_uri):
    with track_run("tune", "bert", tracking_uri=store_uri) as run:
        run.log_params({"seed": 1})
        run.flush()
        run.log_params({"seed": 2, "other": 3, "a=b; c": "x" * 9000})
        run.log_metrics({"../../x": 1.0, "50%/ü": 2.0, "": 3.0})
    assert run.online
    _, stored = stored_run(store_uri, run.record_path)
    assert stored.data.params["seed"] == "1" and stored.data.params["other"] == "3"
    assert len(stored.data.params["a_b_ c"]) == 6000
    assert sorted(stored.data.metrics.values()) == [1.0, 2.0, 3.0]


def test_several_threads_may_log(store_uri):
    with track_run("tune", "bert", tracking_uri=store_uri) as run:
        threads = [
            threading.Thread(target=lambda i=i: [run.log_metrics({f"m{i}": s}, s) for s in range(20)]) for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    client, stored = stored_run(store_uri, run.record_path)
    assert [len(client.get_metric_history(stored.info.run_id, f"m{i}")) for i in range(4)] == [20] * 4


def test_url_names_the_run_on_a_server_and_the_store_otherwise(store_uri, closed_uri):
    with track_run("tune", "bert", tracking_uri=store_uri) as run:
        assert run.url == store_uri
        run.tracking_uri = "http://me:secret@host:5000"
        assert run.url.startswith("http://host:5000/#/experiments/") and run.url.endswith(f"/runs/{run.run_id}")
