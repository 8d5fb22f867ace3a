"""The policy format `autoplace.policy/1`: a directory of data that is checked before it is used and never unpickled.

    policy.safetensors   the network's tensors: finite floats, by name
    config.json          what rebuilds the network, with "format": "autoplace.policy/1"
    card.md              what it was trained on and how, for people
    eval.json            how well it places, with the conditions
    SHA256SUMS           one line per file above, as `sha256sum` writes and checks them

Knows files and arrays only: no torch, no RL library, no MLflow, and nothing of what the network looks like inside.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import PolicyError

__all__ = ["POLICY_FORMAT", "StoredPolicy", "read_policy", "verify_policy", "write_policy"]

POLICY_FORMAT = "autoplace.policy/1"
TENSORS, CONFIG, CARD, EVALUATION, SUMS = "policy.safetensors", "config.json", "card.md", "eval.json", "SHA256SUMS"
DATA_FILES = (TENSORS, CONFIG, CARD, EVALUATION)
SIZE_LIMIT_BYTES = {TENSORS: 256 << 20, CONFIG: 1 << 20, CARD: 1 << 20, EVALUATION: 16 << 20, SUMS: 1 << 16}
"""Largest size of each file that is read, bytes; a policy is small, so anything larger is a mistake or an attack."""


@dataclass(frozen=True, kw_only=True)
class StoredPolicy:
    """A policy as read from its directory, after all checks."""

    tensors: Mapping[str, NDArray[np.floating]]
    """Name to float16, float32 or float64 array, all finite."""
    config: Mapping[str, Any]
    """What rebuilds the network, with its "format"."""
    card: str
    """Markdown for people."""
    evaluation: Mapping[str, Any]
    """How well it places."""
    directory: Path
    """Where it was read from."""

    @property
    def num_parameters(self) -> int:
        """Number of scalars in all tensors."""
        return sum(int(t.size) for t in self.tensors.values())


def write_policy(
    directory: str | Path,
    tensors: Mapping[str, NDArray[np.floating]],
    config: Mapping[str, Any],
    card: str,
    evaluation: Mapping[str, Any],
) -> Path:
    """Write a policy directory; it appears whole or not at all.

    Args:
        directory: Where to write; a policy that is already there is replaced, anything else is refused.
        tensors: Name to finite float array.
        config: JSON-ready data that rebuilds the network; "format" is filled in.
        card: Markdown for people.
        evaluation: JSON-ready data.

    Returns:
        The directory, absolute.

    Raises:
        PolicyError: If something could not be read back by `read_policy`, or the directory holds something else.
    """
    target = Path(directory).absolute()
    if config.get("format", POLICY_FORMAT) != POLICY_FORMAT:
        raise PolicyError(f'the config says "format": {config["format"]!r}; this version writes {POLICY_FORMAT!r}')
    _refuse_other_content(target)
    contents = _encode(target, tensors, {"format": POLICY_FORMAT, **config}, card, evaluation)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.writing-"))
    except OSError as error:
        raise PolicyError(f"{target} cannot be written: {error}; choose another directory") from None
    try:
        for name, data in contents.items():
            _write_synced(staging / name, data)
        staging.chmod(0o755)
        _swap_in(staging, target)
    except OSError as error:
        raise PolicyError(f"{target} cannot be written: {error}; choose another directory") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def read_policy(directory: str | Path) -> StoredPolicy:
    """Read a policy directory: presence, sizes, checksums and schema are checked before anything is used.

    Raises:
        PolicyError: With one sentence that names the file and what to do.
    """
    root = _existing_directory(directory)
    contents = {name: _read_limited(root, name) for name in (*DATA_FILES, SUMS)}
    sums = _parse_sums(root, contents[SUMS])
    for name in DATA_FILES:
        if hashlib.sha256(contents[name]).hexdigest() != sums[name]:
            raise PolicyError(
                f"{root / name} does not match its checksum in {SUMS}; it was damaged or changed, so fetch or train "
                "the policy again"
            )
    config = _parse_object(root / CONFIG, contents[CONFIG])
    if config.get("format") != POLICY_FORMAT:
        raise PolicyError(
            f'{root / CONFIG} says "format": {config.get("format")!r}, and this version reads {POLICY_FORMAT!r}; '
            "use a policy of that format, or another version of autoplace"
        )
    try:
        card = contents[CARD].decode("utf-8")
    except UnicodeDecodeError:
        raise PolicyError(f"{root / CARD} is not UTF-8 text; write the policy again") from None
    return StoredPolicy(
        tensors=_parse_tensors(root / TENSORS, contents[TENSORS]),
        config=config,
        card=card,
        evaluation=_parse_object(root / EVALUATION, contents[EVALUATION]),
        directory=root,
    )


def verify_policy(directory: str | Path) -> list[tuple[str, bool]]:
    """Return (file, whether its checksum fits) for every file of a policy; a missing file does not fit.

    Raises:
        PolicyError: If the directory or its `SHA256SUMS` is missing or malformed.
    """
    root = _existing_directory(directory)
    sums = _parse_sums(root, _read_limited(root, SUMS))
    results = []
    for name in DATA_FILES:
        try:
            found = hashlib.sha256(_read_limited(root, name)).hexdigest()
        except PolicyError:
            found = ""
        results.append((name, found == sums[name]))
    return results


def _encode(
    target: Path,
    tensors: Mapping[str, NDArray[np.floating]],
    config: Mapping[str, Any],
    card: str,
    evaluation: Mapping[str, Any],
) -> dict[str, bytes]:
    """Return every file's content by name, checked as strictly as a reader would."""
    from safetensors.numpy import save

    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    _check_tensors(target / TENSORS, arrays)
    contents = {TENSORS: save(arrays), CARD: card.encode("utf-8")}
    for name, data in ((CONFIG, config), (EVALUATION, evaluation)):
        try:
            contents[name] = (json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("utf-8")
        except (TypeError, ValueError) as error:
            raise PolicyError(f"{target / name} cannot be written as JSON: {error}; pass finite plain data") from None
    for name, content in contents.items():
        if len(content) > SIZE_LIMIT_BYTES[name]:
            raise PolicyError(f"{target / name} would be {len(content)} bytes; at most {SIZE_LIMIT_BYTES[name]} can be")
    lines = [f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n" for name in DATA_FILES]
    contents[SUMS] = "".join(lines).encode("ascii")
    return contents


def _refuse_other_content(target: Path) -> None:
    """Refuse to replace anything but a policy or an empty directory."""
    if target.is_dir() and not target.is_symlink():
        others = sorted({entry.name for entry in target.iterdir()} - {*DATA_FILES, SUMS})
        if others:
            raise PolicyError(f"{target} holds {others[0]!r}, which is no part of a policy; choose another directory")
    elif target.exists() or target.is_symlink():
        raise PolicyError(f"{target} exists and is not a directory; choose another name for the policy")


def _swap_in(staging: Path, target: Path) -> None:
    """Rename the finished directory into place; a policy that was there goes only once the new one is."""
    if not target.exists():
        staging.rename(target)
        return
    previous = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.previous-"))
    try:
        target.rename(previous / target.name)
        try:
            staging.rename(target)
        except OSError:
            (previous / target.name).rename(target)
            raise
    finally:
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _existing_directory(directory: str | Path) -> Path:
    root = Path(directory)
    if root.is_file():
        raise PolicyError(
            f"{root} is a file; a policy is a directory with {TENSORS}, and pickled or zipped models are never loaded"
        )
    if not root.is_dir():
        raise PolicyError(f"{root} does not exist; name a policy directory, or see `autoplace zoo list`")
    return root.absolute()


def _read_limited(root: Path, name: str) -> bytes:
    path, limit = root / name, SIZE_LIMIT_BYTES[name]
    try:
        if not path.is_file():
            raise PolicyError(f"{root} has no file {name}, so it is not a whole policy; fetch or train it again")
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise PolicyError(f"{path} cannot be read: {error}; check its permissions") from None
    if len(data) > limit:
        raise PolicyError(f"{path} is larger than {limit} bytes, the most a policy may have; this is no policy of ours")
    return data


def _parse_sums(root: Path, data: bytes) -> dict[str, str]:
    sums: dict[str, str] = {}
    for number, line in enumerate(data.decode("ascii", errors="replace").splitlines(), start=1):
        digest, _, name = line.partition("  ")
        if name not in DATA_FILES or name in sums or len(digest) != 64:
            raise PolicyError(
                f"{root / SUMS} line {number} is not the checksum of a policy file; fetch or train the policy again"
            )
        sums[name] = digest.lower()
    if missing := [name for name in DATA_FILES if name not in sums]:
        raise PolicyError(f"{root / SUMS} has no checksum for {missing[0]}; fetch or train the policy again")
    return sums


def _parse_object(path: Path, data: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        parsed = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{path} is not JSON: {error}; write the policy again") from None
    if not isinstance(parsed, dict):
        raise PolicyError(f"{path} must hold a JSON object; write the policy again")
    return parsed


def _parse_tensors(path: Path, data: bytes) -> dict[str, NDArray[np.floating]]:
    from safetensors.numpy import load

    try:
        tensors = load(data)
    except Exception as error:  # safetensors raises its own, Key- and ValueErrors, depending on what is wrong
        raise PolicyError(
            f"{path} is not a safetensors file ({error}); policies are never unpickled, so fetch or train it again"
        ) from None
    _check_tensors(path, tensors)
    return tensors


def _check_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    if not tensors:
        raise PolicyError(f"{path} holds no tensors; train the policy first")
    for name, array in tensors.items():
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise PolicyError(f"{path}: tensor {name!r} is {array.dtype}; a policy holds floats only, so convert it")
        if not np.isfinite(array).all():
            raise PolicyError(f"{path}: tensor {name!r} holds NaN or infinity; train the policy again")
