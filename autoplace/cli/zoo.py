"""`autoplace zoo`: look at, verify and register policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from autoplace.errors import PolicyError

__all__ = ["zoo_list", "zoo_register", "zoo_show", "zoo_verify"]


def zoo_list() -> None:
    """List the policies that ship with autoplace."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from autoplace.zoo.store import list_policies

    policies = list_policies()
    if not policies:
        print("No policies ship with this installation; train one with `autoplace train`.")
        return
    table = Table("policy", "parameters", "what it is", title="Shipped policies", title_justify="left")
    for policy in policies:
        what = Text(f"cannot be used: {policy.problem}", style="red") if policy.problem else Text(policy.summary)
        table.add_row(Text(policy.name), f"{policy.num_parameters:,}" if not policy.problem else "–", what)
    Console().print(table)


def zoo_show(
    name: Annotated[str, typer.Argument(help="A shipped policy's name, a directory, or models:/name@alias.")],
    tracking_uri: Annotated[
        str | None, typer.Option("--tracking-uri", help="MLflow store of a models:/ policy.")
    ] = None,
) -> None:
    """Show a policy's card, configuration and evaluation, after checking it."""
    from rich.console import Console
    from rich.markdown import Markdown

    from autoplace.policy.store import read_policy
    from autoplace.zoo.store import find_policy

    stored = read_policy(find_policy(name, tracking_uri=tracking_uri))
    console = Console()
    if stored.card.strip():
        console.print(Markdown(stored.card))
        console.print()
    for label, value in (("directory", str(stored.directory)), ("parameters", f"{stored.num_parameters:,}")):
        console.print(f"{label}: {value}", soft_wrap=True, markup=False, highlight=False)
    for label, data in (("config", stored.config), ("evaluation", stored.evaluation)):
        console.print(f"\n{label}:")
        console.print_json(json.dumps(data))


def zoo_verify(
    name: Annotated[
        str | None, typer.Argument(help="A shipped policy's name or a directory.", show_default="all that ship")
    ] = None,
) -> None:
    """Verify the checksums and the schema of one policy, or of all that ship; exit code 2 when one fails."""
    from autoplace.policy.store import read_policy, verify_policy
    from autoplace.zoo.store import find_policy, list_policies

    directories = [find_policy(name)] if name is not None else [p.directory for p in list_policies()]
    if not directories:
        print("No policies ship with this installation; there is nothing to verify.")
    failures = []
    for directory in directories:
        print(directory)
        try:
            for file, fits in verify_policy(directory):
                print(f"  {'ok' if fits else 'FAILED':<8}{file}")
            read_policy(directory)
        except PolicyError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def zoo_register(
    directory: Annotated[Path, typer.Argument(help="A policy directory, for example from `autoplace train`.")],
    name: Annotated[str, typer.Option("--name", help="Name in the registry.")],
    alias: Annotated[str | None, typer.Option("--alias", help="Alias that points to this version from now on.")] = None,
    tracking_uri: Annotated[str | None, typer.Option("--tracking-uri", help="MLflow store.")] = None,
) -> None:
    """Register a policy in the MLflow model registry, as a new version."""
    from autoplace.zoo.registry import register_policy

    version = register_policy(directory, name, alias, tracking_uri)
    uri = f"models:/{name}@{alias}" if alias else f"models:/{name}/{version}"
    print(f"Registered version {version} of {name}; use it as {uri}")
