"""The `autoplace` command: registers the verbs and turns our errors into one sentence and exit code 2.

Each verb is a plain function in its own file. Only the verbs that the command line names are imported, so that
`autoplace --help` and `autoplace place` do not wait for what they do not use.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from autoplace.errors import AutoplaceError

__all__ = ["run"]

VERBS = {
    "tune": ("autoplace.cli.tune", "tune", "Find the fastest plan for a model on these devices, by real runs."),
    "place": ("autoplace.cli.place", "place", "Place a problem file's ops on its devices; no model needed."),
    "profile": ("autoplace.cli.profile", "profile", "Discover and measure the devices of this machine, or of several."),
    "run": ("autoplace.cli.run", "run", "Run a script on all devices of a cluster, one process each."),
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


PASSES_ON = ("run",)
"""Verbs whose first argument ends their options: what follows belongs to the script."""


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 when done, 2 on a user's error, 130 on Ctrl-C; `run` as its script does.

    Args:
        arguments: What follows `autoplace`; None = the process's own. `--debug` may stand anywhere but behind a script.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    own, passed_on = _split(words)
    debug = "--debug" in own or bool(os.environ.get("AUTOPLACE_DEBUG"))
    own = [word for word in own if word != "--debug"]
    try:
        _app(own)(args=[*own, *passed_on], prog_name="autoplace")
    except AutoplaceError as error:
        # A verb that passes words on takes --debug itself, and sets the variable for what it starts too.
        if debug or os.environ.get("AUTOPLACE_DEBUG"):
            raise
        print(f"autoplace: {error}", file=sys.stderr)
        sys.exit(2)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words up to and with a verb that passes on what follows, and the rest; all of them for other verbs."""
    for i, word in enumerate(words):
        if word in PASSES_ON:
            return list(words[: i + 1]), list(words[i + 1 :])
        if not word.startswith("-"):
            break
    return list(words), []


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
            settings: dict[str, Any] = {"allow_interspersed_args": name not in PASSES_ON}
            command = getattr(importlib.import_module(module), function)
            app.command(name=name, context_settings=settings)(command)
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
