"""What started processes tell `launch` beside their output: marked lines of JSON on standard error.

The launcher may be on another machine and has nothing but the streams. A line goes out by one write of less than a
pipe's atomic 4,096 bytes, so that lines of several processes do not mix. → `report`, `parse`
"""

from __future__ import annotations

import json
import os
from typing import Any

__all__ = ["REPORTS_VARIABLE", "Texts", "heard", "parse", "report", "report_text"]

REPORTS_VARIABLE = "AUTOPLACE_REPORTS"
"""Environment variable that is set where somebody reads the reports."""
_MARK = "\x1eautoplace "
_PART_CHARACTERS = 600  # six bytes each at the worst


def heard() -> bool:
    """Return whether somebody reads the reports."""
    return bool(os.environ.get(REPORTS_VARIABLE))


def report(kind: str, **facts: Any) -> None:
    """Tell the launcher something."""
    line = f"{_MARK}{json.dumps({'kind': kind, **facts})}\n"
    os.write(2, line.encode("ascii"))


def report_text(kind: str, text: str) -> None:
    """Tell the launcher a text of any length, in parts → `Texts`."""
    parts = [text[i : i + _PART_CHARACTERS] for i in range(0, len(text), _PART_CHARACTERS)] or [""]
    for i, part in enumerate(parts):
        report(kind, part=part, last=i == len(parts) - 1)


class Texts:
    """Puts the parts of texts together again."""

    def __init__(self) -> None:
        self._parts: dict[str, list[str]] = {}

    def add(self, kind: str, facts: dict[str, Any]) -> str | None:
        """Take a report; return the text when it was its last part."""
        parts = self._parts.setdefault(kind, [])
        parts.append(str(facts["part"]))
        return "".join(self._parts.pop(kind)) if facts["last"] else None


def parse(line: str) -> tuple[str, dict[str, Any] | None]:
    """Return what of a line is for the user, and the report in it, if any."""
    shown, mark, told = line.partition(_MARK)
    if not mark:
        return line, None
    try:
        facts = json.loads(told)
    except json.JSONDecodeError:
        return line, None
    return (shown, facts) if isinstance(facts, dict) and isinstance(facts.get("kind"), str) else (line, None)
