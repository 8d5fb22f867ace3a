"""`autoplace run`: start a script on all devices of a cluster, one process each, on every host that the file names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from autoplace.errors import InputError

__all__ = ["run"]

_RESTARTS = 3


def run(
    script: Annotated[str, typer.Argument(help="Script, or module with --module; its arguments follow.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="What the script gets.")] = None,
    cluster: Annotated[Path, typer.Option("--cluster", help="Cluster file, as `autoplace profile` writes it.")] = Path(
        "cluster.yaml"
    ),
    module: Annotated[bool, typer.Option("--module", "-m", help="SCRIPT is a module, as with python -m.")] = False,
    max_restarts: Annotated[
        int | None,
        typer.Option(
            "--max-restarts",
            min=0,
            help="How often the processes are started again after a failure.",
            show_default="0, or 3 with --min-hosts",
        ),
    ] = None,
    min_hosts: Annotated[
        int | None,
        typer.Option(
            "--min-hosts",
            min=1,
            help="Hosts, the first among them, with which the run goes on when others are gone.",
            show_default="all",
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", help="Seconds after which a process that says nothing is lost.", show_default="60"),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run a script on all devices of a cluster, one process each.

    Ends with the script's exit code: 2 for an error of autoplace, 130 on Ctrl-C, else that of the first process that
    failed.
    """
    from autoplace.runtime.distributed.launch import run_script

    if debug:
        os.environ["AUTOPLACE_DEBUG"] = "1"
    if timeout is not None and not 0 < timeout < 1e6:
        raise InputError(f"--timeout is {timeout:g}; use seconds above 0")
    command = [*(["-m"] if module else []), script, *(arguments or [])]
    if max_restarts is None:
        max_restarts = 0 if min_hosts is None else _RESTARTS
    code = run_script(cluster, command, max_restarts=max_restarts, min_hosts=min_hosts, timeout_s=timeout)
    if code:
        raise typer.Exit(code)
