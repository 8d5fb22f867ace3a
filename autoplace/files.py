"""Reading and writing files so that nothing half-written is ever seen, and so that a bad file gets one sentence."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from autoplace.errors import AutoplaceError

__all__ = ["make_directory", "parse_json", "read_json", "read_text", "write_bytes_atomically", "write_text_atomically"]


def read_text(path: str | Path, error: type[AutoplaceError]) -> str:
    """Return the text of a UTF-8 file, or raise `error` with one sentence."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise error(f"{path} does not exist; check the path") from None
    except (OSError, UnicodeDecodeError) as cause:
        raise error(f"{path} cannot be read: {cause}") from None


def read_json(path: str | Path, error: type[AutoplaceError]) -> Any:
    """Return the data of a JSON file (NaN and Infinity refused), or raise `error` with one sentence."""
    return parse_json(read_text(path, error), path, error)


def parse_json(text: str, path: str | Path, error: type[AutoplaceError]) -> Any:
    """Return the data of a JSON file's text, as `read_json` does."""

    def refuse(constant: str) -> None:
        raise error(f"{path} holds {constant}, which JSON does not know; use a number or null")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as cause:
        raise error(f"{path} is not JSON: {cause.msg} at line {cause.lineno}, column {cause.colno}") from None
    except ValueError as cause:  # such as a whole number of thousands of digits
        raise error(f"{path} cannot be read: {cause}") from None
    except RecursionError:
        raise error(f"{path} is nested too deeply to be read") from None


def make_directory(path: str | Path, error: type[AutoplaceError]) -> None:
    """Make a directory and those above it where they are missing, or raise `error` with one sentence."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as cause:
        raise error(f"{path} cannot be used as a folder: {cause.strerror}; name another one") from None


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write UTF-8 text to a temporary file beside `path`, sync it and rename it into place."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: str | Path, data: bytes) -> None:
    """Write bytes to a temporary file beside `path`, sync it and rename it into place."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
