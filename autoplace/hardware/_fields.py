"""Fields of a YAML file that nobody has checked: right types, known keys, finite numbers, or a sentence with the place.

Plain YAML without aliases and doubled keys. Knows nothing of what the fields mean.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from autoplace.errors import ClusterFileError
from autoplace.files import read_text

__all__ = ["dump", "items", "mapping", "number", "optional_text", "parse", "read", "short", "text"]

_MAX_CHARACTERS = 4 << 20  # some 40,000 links; more is no cluster file, and YAML is slow to read


def read(path: str | Path) -> str:
    """Return the text of a file.

    Raises:
        ClusterFileError: If it is missing, unreadable or far too long.
    """
    found = read_text(path, ClusterFileError)
    if len(found) > _MAX_CHARACTERS:
        raise ClusterFileError(f"{path} holds {len(found):,} characters, too many for a cluster file; check the path")
    return found


class _Loader(yaml.SafeLoader):
    """Plain YAML: no aliases (a few hundred bytes can stand for gigabytes), no doubled keys, 1e6 is a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark
            raise ClusterFileError(f"line {mark.line + 1} uses an alias (*name); write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in getattr(node, "value", ()):
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ClusterFileError(f"line {key.start_mark.line + 1} gives {key.value!r} a second time; keep one")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that `_Loader` would take for a number."""


# YAML 1.1 takes 1e6 for text, since it wants a dot and a signed exponent; people write 1e6.
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def dump(data: Any) -> str:
    """Return data as YAML that `parse` reads as the same."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def parse(content: str) -> Any:
    """Return the data of a YAML text.

    Raises:
        ClusterFileError: If it is no plain YAML.
    """
    try:
        return yaml.load(content, Loader=_Loader)
    except yaml.MarkedYAMLError as cause:
        mark = cause.problem_mark or cause.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ClusterFileError(f"this is not YAML: {cause.problem or 'it cannot be parsed'}{place}") from None
    except (yaml.YAMLError, ValueError, TypeError) as cause:
        raise ClusterFileError(f"this is not YAML: {' '.join(str(cause).split())[:200]}") from None
    except RecursionError:
        raise ClusterFileError("this is nested too deeply to be a cluster file") from None


def mapping(value: Any, place: str, known: Sequence[str], required: Sequence[str]) -> dict[str, Any]:
    """Return a mapping with known keys, the required ones among them."""
    if not isinstance(value, dict):
        raise ClusterFileError(f"{place} is {short(value)}; expected keys and values: {', '.join(known)}")
    for key in value:
        if key not in known:
            raise ClusterFileError(f"{place} has an unknown key {short(key)}; known are {', '.join(known)}")
    for key in required:
        if key not in value:
            raise ClusterFileError(f"{place} lacks {key!r}; add it")
    return value


def items(value: Any, place: str) -> list[Any]:
    """Return a list."""
    if not isinstance(value, list):
        raise ClusterFileError(f"{place} is {short(value)}; expected a list")
    return value


def text(fields: Mapping[str, Any], key: str, place: str) -> str:
    """Return a text that is not empty."""
    value = fields[key]
    if not isinstance(value, str) or not value.strip():
        raise ClusterFileError(f"{place}.{key} is {short(value)}; expected a text that is not empty")
    return value


def optional_text(fields: Mapping[str, Any], key: str, place: str) -> str:
    """Return a text; empty when absent or null."""
    return "" if fields.get(key) is None else text(fields, key, place)


def number(fields: Mapping[str, Any], key: str, place: str) -> float | None:
    """Return a finite number of 0 or more; None when absent or null."""
    value = fields.get(key)
    if value is None:
        return None
    # An int of hundreds of digits compares well but does not convert.
    good = not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value < 1e300
    if not good:
        raise ClusterFileError(f"{place}.{key} is {short(value)}; use a finite number, 0 or more")
    return float(value)


def short(value: Any) -> str:
    """Return a scalar as it is and anything deeper by its type, so that no message grows with the file."""
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    shown = repr(value) if not isinstance(value, int) or abs(value) < 10**18 else "a huge number"
    return shown if len(shown) <= 60 else shown[:57] + "..."
