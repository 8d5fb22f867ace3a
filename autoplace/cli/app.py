"""The `autoplace` command: registers the verbs and turns our errors into one sentence and exit code 2.

Each verb is a plain function in its own file. Only the verbs that the command line names are imported, so that
`autoplace --help` and `autoplace place` do not wait for what they do not use.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from autoplace.errors import AutoplaceError

__all__ = ["run"]

VERBS = {
    "tune": ("autoplace.cli.tune", "tune", "Find the fastest plan for a model on these devices, by real runs."),
    "place": ("autoplace.cli.place", "place", "Place a problem file's ops on its devices; no model needed."),
    "profile": ("autoplace.cli.profile", "profile", "Discover and measure this machine's devices."),
    "train": ("autoplace.cli.train", "train", "Train a placement policy for a cluster."),
    "tune-agent": ("autoplace.cli.tune_agent", "tune_agent", "Search the hyperparameters that policies train with."),
    "ui": ("autoplace.cli.ui", "ui", "Open the MLflow UI on autoplace's runs."),
    "sync": ("autoplace.cli.sync", "sync", "Replay to MLflow what a tracking server missed."),
}
"""Verb to (module, function, summary)."""

ZOO_VERBS = {
    "list": ("autoplace.cli.zoo", "zoo_list", "List the policies that ship with autoplace."),
    "show": ("autoplace.cli.zoo", "zoo_show", "Show a policy's card and evaluation."),
    "verify": ("autoplace.cli.zoo", "zoo_verify", "Verify the checksums of policies."),
    "register": ("autoplace.cli.zoo", "zoo_register", "Register a policy in the MLflow model registry."),
}


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 when done, 2 on a user's error, 130 on Ctrl-C.

    Args:
        arguments: What follows `autoplace`; None = the process's own. `--debug` may stand anywhere.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or bool(os.environ.get("AUTOPLACE_DEBUG"))
    words = [word for word in words if word != "--debug"]
    try:
        _app(words)(args=words, prog_name="autoplace")
    except AutoplaceError as error:
        if debug:
            raise
        print(f"autoplace: {error}", file=sys.stderr)
        sys.exit(2)


def _app(words: Sequence[str]) -> typer.Typer:
    app = _typer(help="Places PyTorch models on the devices you have, for less time and less energy.")
    app.callback()(_root)
    _register(app, VERBS, words)
    zoo = _typer(help="Look at, verify and register policies.")
    _register(zoo, ZOO_VERBS, words if "zoo" in words else ())
    app.add_typer(zoo, name="zoo")
    return app


def _typer(help: str) -> typer.Typer:
    settings = {"help_option_names": ["-h", "--help"]}
    return typer.Typer(
        help=help, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, context_settings=settings
    )


def _register(app: typer.Typer, verbs: Mapping[str, tuple[str, str, str]], words: Sequence[str]) -> None:
    for name, (module, function, summary) in verbs.items():
        if name in words:
            app.command(name=name)(getattr(importlib.import_module(module), function))
        else:
            app.command(name=name, help=summary)(_not_named)


def _not_named() -> None:
    """Stand in the list of verbs for one that this command line does not name; never called."""


def _version(value: bool) -> None:
    if value:
        import autoplace

        print(f"autoplace {autoplace.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Places PyTorch models on the devices you have, for less time and less energy."""
