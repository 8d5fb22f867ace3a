"""`autoplace ui`: serve MLflow's own UI on autoplace's runs, and say where the charts are."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from typing import Annotated, Any

import typer

from autoplace.errors import InputError, TrackingError

__all__ = ["chart_link", "ui"]

EXPERIMENTS = ("autoplace-tune", "autoplace-train", "autoplace-tune-agent")
START_SECONDS = 90.0
"""Longest wait for the server's first answer, s; a cold start takes 5 to 30 s."""


def ui(
    port: Annotated[int, typer.Option("--port", help="Port of the UI.", min=1, max=65535)] = 5000,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    tracking_uri: Annotated[str | None, typer.Option("--tracking-uri", help="MLflow store to show.")] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser on the charts.")] = True,
    print_only: Annotated[bool, typer.Option("--print-only", help="Print the links and stop.")] = False,
) -> None:
    """Serve the MLflow UI on autoplace's runs and print the links to the chart views; Ctrl-C ends it."""
    from autoplace.zoo.tracking import is_server, public_uri, resolve_tracking_uri

    uri = resolve_tracking_uri(tracking_uri)
    served = is_server(uri)
    if not served and not print_only:
        _check_port(host, port)
    experiments = _experiments(uri)
    base = public_uri(uri) if served else f"http://{_reachable(host)}:{port}"
    links = [(name, chart_link(base, number)) for name, number in experiments]
    if served or print_only:
        _show(links)
        if served and browser and not print_only:
            webbrowser.open(links[0][1])
        return
    _serve(uri, host, port, links, browser)


def chart_link(base: str, experiment_id: str) -> str:
    """Return the address of an experiment's charts.

    The query stands behind the `#`, because MLflow's UI routes there, and `workflowType` stands first in it: without
    it MLflow 3 opens its view for language-model traces.
    """
    return f"{base}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&compareRunsMode=CHART"


def _experiments(uri: str) -> list[tuple[str, str]]:
    """Return (name, id) of our experiments, the most recently used first; both exist afterwards."""
    from autoplace.zoo.tracking import experiments, public_uri

    try:
        return experiments(uri, EXPERIMENTS)
    except TrackingError:
        raise
    except Exception as error:  # MLflow and its HTTP client each raise their own
        reason = str(error).splitlines()[0][:200]
        raise TrackingError(
            f"{public_uri(uri)} cannot be reached ({reason}); start the server, or name another with --tracking-uri"
        ) from None


def _serve(uri: str, host: str, port: int, links: list[tuple[str, str]], browser: bool) -> None:
    """Run the server until it ends or we are told to stop; its workers end with it."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
    command += ["--host", host, "--port", str(port)]
    print(f"Starting the MLflow UI on {uri}", flush=True)
    # A process group of its own, so that all of it can be ended: MLflow's server leaves workers behind otherwise.
    server = subprocess.Popen(command, env=_environment(), start_new_session=True, stdout=subprocess.DEVNULL)
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        _wait_until_up(server, f"http://{_reachable(host)}:{port}/health")
        _show(links)
        print("Press Ctrl-C to stop.", flush=True)
        if browser:
            webbrowser.open(links[0][1])
        code = server.wait()
        if code != 0:
            raise TrackingError(f"the MLflow server ended with code {code}; its last lines above say why")
    except KeyboardInterrupt:
        print("\nStopped.")
    finally:
        signal.signal(signal.SIGTERM, previous)
        _end_group(server)


def _environment() -> dict[str, str]:
    """Return the server's environment: no telemetry, no job runners, few words; the user's own settings win."""
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
        "PYTHONSAFEPATH": "1",  # `-m` would import modules of the folder in which we were started
    }
    return {**quiet, **os.environ}


def _wait_until_up(server: subprocess.Popen[Any], address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never ask a proxy for this machine
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise TrackingError(f"the MLflow server ended with code {server.returncode}; its lines above say why")
        try:
            with opener.open(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise TrackingError(f"the MLflow server did not answer at {address} for {START_SECONDS:.0f} s; try again")


def _end_group(server: subprocess.Popen[Any]) -> None:
    """End the server and all it started: politely, then not."""
    for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        try:
            server.wait(seconds)
        except subprocess.TimeoutExpired:
            continue


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"{host}:{port} cannot be listened on ({error.strerror}); choose another --port") from None


def _reachable(host: str) -> str:
    """Return the address at which this machine reaches a server that listens on `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{reachable}]" if ":" in reachable else reachable


def _show(links: list[tuple[str, str]]) -> None:
    for name, link in links:
        print(f"  {name:<18} {link}", flush=True)


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
