"""Reading the kernel's small text files; a file that is missing or may not be read is empty, never an error."""

from __future__ import annotations

from pathlib import Path

__all__ = ["read_number", "read_words"]


def read_words(path: Path) -> str:
    """Return the stripped text of a file, or an empty string when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def read_number(path: Path) -> int | None:
    """Return the non-negative integer that a file holds, or None when it holds none or cannot be read."""
    text = read_words(path)
    return int(text) if text.isdigit() else None
