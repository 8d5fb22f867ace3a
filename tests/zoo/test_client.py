"""The border to MLflow: which store is meant, and that opening it is safe and quiet."""

import logging
import os
import shutil
import sqlite3
import subprocess
import sys

import pytest

from autoplace.errors import TrackingError
from autoplace.zoo._client import ensure_experiment, ensure_store, open_client, public_uri, quiet_mlflow
from autoplace.zoo.tracking import resolve_tracking_uri, sync_command, ui_command


def test_the_flag_goes_before_the_environment_before_the_data_directory(monkeypatch, data_dir):
    assert resolve_tracking_uri() == f"sqlite:///{data_dir}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000/")
    assert resolve_tracking_uri() == "http://tracking:5000"
    assert resolve_tracking_uri("https://other") == "https://other"


def test_local_stores_are_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert resolve_tracking_uri("sqlite:///runs.db") == f"sqlite:///{tmp_path}/runs.db"
    assert resolve_tracking_uri("runs.db") == f"sqlite:///{tmp_path}/runs.db"
    assert resolve_tracking_uri(f"sqlite:///{tmp_path}/runs.db") == f"sqlite:///{tmp_path}/runs.db"


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "sqlite:"])
def test_a_database_in_memory_is_refused(uri):
    with pytest.raises(TrackingError, match="in memory"):
        resolve_tracking_uri(uri)


def test_commands_name_the_store_only_where_it_is_not_the_usual(monkeypatch):
    assert (ui_command(), sync_command(None)) == ("autoplace ui", "autoplace sync")
    assert ui_command("http://me:secret@host:5000") == "autoplace ui --tracking-uri http://host:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert ui_command("http://host:5000") == "autoplace ui"


def test_passwords_are_not_shown():
    assert public_uri("https://me:secret@host:5000/path") == "https://host:5000/path"
    assert public_uri("sqlite:////a/b@c.db") == "sqlite:////a/b@c.db"


def test_importing_the_zoo_does_not_import_mlflow():
    code = "import sys, autoplace.zoo, autoplace.zoo.registry; print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_environment_and_the_loggers_come_back(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    with quiet_mlflow():
        pass  # the first import sets MLflow's own levels
    level = logging.getLogger("alembic").level
    with quiet_mlflow():
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
    assert logging.getLogger("alembic").level == level


_OPEN_AND_WRITE = """
import sys
from autoplace.zoo._client import ensure_experiment, open_client
uri, name = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
client = open_client(uri)
client.create_run(ensure_experiment(client, uri, "together"), tags={"mlflow.runName": name})
"""


def test_two_processes_open_a_fresh_store_at_once(tmp_path):
    uri = f"sqlite:///{tmp_path / 'fresh' / 'mlflow.db'}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([sys.executable, "-c", _OPEN_AND_WRITE, uri, name], **pipes) for name in ("one", "two")]
    assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 2
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        worker.communicate(timeout=120)
    assert [worker.returncode for worker in workers] == [0, 0]
    with sqlite3.connect(tmp_path / "fresh" / "mlflow.db") as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
        assert database.execute("select count(*) from experiments where name = 'together'").fetchone() == (1,)
        assert database.execute("select count(*) from runs").fetchone() == (2,)


def test_artifacts_lie_beside_the_database(store_uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    client = open_client(store_uri)
    experiment = client.get_experiment(ensure_experiment(client, store_uri, "beside"))
    folder = store_uri.removeprefix("sqlite:///").rpartition("/")[0].replace(" ", "%20")
    assert experiment.artifact_location == f"file://{folder}/artifacts/beside"
    assert list(tmp_path.iterdir()) == []


def test_a_deleted_experiment_is_used_again(store_uri):
    client = open_client(store_uri)
    number = ensure_experiment(client, store_uri, "deleted")
    client.delete_experiment(number)
    assert ensure_experiment(client, store_uri, "deleted") == number
    assert client.get_experiment(number).lifecycle_stage == "active"


def test_a_file_that_is_no_database_is_one_sentence(tmp_path):
    (tmp_path / "text.db").write_text("this is a text and no database, which sqlite will notice\n" * 20)
    with pytest.raises(TrackingError, match="cannot be opened as an MLflow store"):
        ensure_store(f"sqlite:///{tmp_path / 'text.db'}")


@pytest.mark.parametrize(("usual", "message"), [(True, "cannot be opened"), (False, "mlflow db upgrade")])
def test_a_database_of_another_mlflow_is_not_broken(store_uri, tmp_path, data_dir, usual, message):
    path = (data_dir if usual else tmp_path) / "mlflow.db"
    path.parent.mkdir(exist_ok=True)
    shutil.copy(store_uri.removeprefix("sqlite:///"), path)
    with sqlite3.connect(path) as database:
        database.execute("update alembic_version set version_num = 'ffffffffffff'")
    before = path.read_bytes()
    with pytest.raises(TrackingError, match=message):
        ensure_store(f"sqlite:///{path}")
    assert path.read_bytes() == before
    assert {p.name for p in path.parent.glob("mlflow.db*")} == {"mlflow.db", "mlflow.db.lock"}
