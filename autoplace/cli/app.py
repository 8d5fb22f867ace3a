"""The `autoplace` command: registers the verbs and turns our errors into one sentence and exit code 2.

Each verb is a plain function in its own file and is imported only when it is called, so that `autoplace --help` and
`autoplace place` do not wait for what they do not use.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import click
import typer
import typer.main

from autoplace.errors import AutoplaceError

__all__ = ["run"]

VERBS: dict[str, tuple[str, str, str]] = {
    "tune": ("autoplace.cli.tune", "tune", "Find the fastest plan for a model on these devices, by real runs."),
    "place": ("autoplace.cli.place", "place", "Place a problem file's ops on its devices; no model needed."),
    "profile": ("autoplace.cli.profile", "profile", "Discover and measure this machine's devices."),
    "train": ("autoplace.cli.train", "train", "Train a placement policy for a cluster."),
    "ui": ("autoplace.cli.ui", "ui", "Open the MLflow UI on autoplace's runs."),
    "sync": ("autoplace.cli.sync", "sync", "Replay to MLflow what a tracking server missed."),
}
"""Verb to (module, function, help)."""

ZOO_VERBS: dict[str, tuple[str, str, str]] = {
    "list": ("autoplace.cli.zoo", "zoo_list", "List the policies that ship with autoplace."),
    "show": ("autoplace.cli.zoo", "zoo_show", "Show a policy's card and evaluation."),
    "verify": ("autoplace.cli.zoo", "zoo_verify", "Verify the checksums of policies."),
    "register": ("autoplace.cli.zoo", "zoo_register", "Register a policy in the MLflow model registry."),
}


class _LazyGroup(click.Group):
    """A click group whose verbs are imported when asked for."""

    def __init__(self, verbs: dict[str, tuple[str, str, str]], **attributes: Any) -> None:
        super().__init__(**attributes)
        self._verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self._verbs, *self.commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        if cmd_name not in self._verbs:
            return None
        module, function, summary = self._verbs[cmd_name]
        return _command(cmd_name, getattr(importlib.import_module(module), function), summary)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, summary) for name, (_, _, summary) in self._verbs.items()]
        rows += [(name, command.get_short_help_str()) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _command(name: str, function: Callable[..., Any], summary: str) -> click.Command:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name=name, help=function.__doc__ or summary)(function)
    return typer.main.get_command(app)


def _group() -> click.Group:
    group = _LazyGroup(
        VERBS,
        name="autoplace",
        help="Places PyTorch models on the devices you have, for less time and less energy.",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    group.params.append(
        click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error.")
    )
    group.params.append(
        click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
    )
    group.add_command(_LazyGroup(ZOO_VERBS, name="zoo", help="Look at, verify and register policies."))
    return group


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        import autoplace

        click.echo(f"autoplace {autoplace.__version__}")
        ctx.exit()


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 when done, 2 on a user's error, 130 on Ctrl-C.

    Args:
        arguments: What follows `autoplace`; None = the process's own. `--debug` may stand anywhere.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or bool(os.environ.get("AUTOPLACE_DEBUG"))
    arguments = [a for a in arguments if a != "--debug"]
    try:
        _group().main(args=arguments, prog_name="autoplace", standalone_mode=True)
    except AutoplaceError as error:
        if debug:
            raise
        click.echo(f"autoplace: {error}", err=True)
        sys.exit(2)
