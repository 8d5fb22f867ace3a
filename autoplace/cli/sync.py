"""`autoplace sync`: replay to MLflow what a tracking server missed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoplace.errors import InputError

__all__ = ["sync"]


def sync(
    tracking_uri: Annotated[str | None, typer.Option("--tracking-uri", help="MLflow store to deliver to.")] = None,
    records: Annotated[
        Path | None, typer.Option("--records", help="Folder of the run records.", show_default="the data directory's")
    ] = None,
) -> None:
    """Replay to MLflow every recorded run that no store has in full; running it twice delivers nothing twice."""
    from autoplace.zoo.sync import replay

    if records is not None and not records.is_dir():
        raise InputError(f"{records} is no folder; name the one that holds the run records")
    counts = replay(records, tracking_uri)
    for note in counts.notes:
        print(f"Note: {note}.")
    print(
        f"Runs delivered: {counts.delivered}; there already: {counts.already}; still running: {counts.running}; "
        f"failed: {counts.failed}."
    )
    if counts.failed:
        raise typer.Exit(1)
