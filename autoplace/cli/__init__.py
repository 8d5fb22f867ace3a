"""The command line: one file a verb."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the `autoplace` command; errors of ours are one sentence and exit code 2."""
    from autoplace.cli.app import run

    run()
