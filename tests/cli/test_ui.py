"""`autoplace ui` and `autoplace sync`: links that lead to charts, a server that ends with us, plain words."""

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from autoplace.cli.app import run
from autoplace.cli.ui import chart_link
from autoplace.zoo.tracking import ensure_store, track_run


@pytest.fixture(scope="module")
def store_uri(tmp_path_factory):
    uri = f"sqlite:///{tmp_path_factory.mktemp('ui') / 'mlflow.db'}"
    ensure_store(uri)
    return uri


def autoplace(capsys, *words):
    with pytest.raises(SystemExit) as exit_:
        run(list(map(str, words)))
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_link_asks_for_model_training_first_and_for_charts():
    link = chart_link("http://127.0.0.1:5000", "7")
    query = link.partition("?")[2]
    assert link.startswith("http://127.0.0.1:5000/#/experiments/7/runs?")
    assert query.split("&") == ["workflowType=machine_learning", "compareRunsMode=CHART"]


def test_print_only_lists_the_latest_experiment_first(store_uri, tmp_path, capsys):
    with track_run("train", "small", tracking_uri=store_uri, records_dir=tmp_path):
        pass
    code, out, _ = autoplace(capsys, "ui", "--print-only", "--port", 5005, "--tracking-uri", store_uri)
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert names == ["autoplace-train", "autoplace-tune", "autoplace-tune-agent"]
    assert re.search(r"http://127\.0\.0\.1:5005/#/experiments/\d+/runs\?workflowType", out)


def test_a_port_in_use_is_one_sentence(store_uri, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = autoplace(capsys, "ui", "--port", taken.getsockname()[1], "--tracking-uri", store_uri)
    assert code == 2 and "choose another --port" in err and err.count("\n") == 1


def test_a_server_that_is_down_is_one_sentence(capsys):
    code, _, err = autoplace(capsys, "ui", "--print-only", "--tracking-uri", f"http://127.0.0.1:{free_port()}")
    assert code == 2 and "cannot be reached" in err and "Traceback" not in err


@pytest.mark.slow
def test_the_server_answers_and_ends_with_us(store_uri, tmp_path):
    port = free_port()
    command = [sys.executable, "-c", "from autoplace.cli import main; main()", "ui", "--no-browser"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--tracking-uri", store_uri], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        for line in process.stdout:
            if "Ctrl-C" in line:
                break
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as page:
            assert b"<title>MLflow</title>" in page.read()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    deadline = time.monotonic() + 10
    while _listening(port) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _listening(port)
    assert list(tmp_path.iterdir()) == []


def _listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_sync_counts_in_words(store_uri, tmp_path, capsys):
    with track_run("tune", "bert", tracking_uri=f"http://127.0.0.1:{free_port()}", records_dir=tmp_path):
        pass
    words = ("sync", "--records", tmp_path, "--tracking-uri", store_uri)
    assert autoplace(capsys, *words)[:2] == (0, "Runs delivered: 1; there already: 0; still running: 0; failed: 0.\n")
    assert autoplace(capsys, *words)[:2] == (0, "Runs delivered: 0; there already: 1; still running: 0; failed: 0.\n")


def test_sync_of_no_folder_is_one_sentence(tmp_path, capsys):
    code, _, err = autoplace(capsys, "sync", "--records", tmp_path / "nowhere")
    assert code == 2 and "is no folder" in err
