"""How kernels are compiled: by numba, cached on disk where there is a place for it.

numba's cache notices changes of a kernel's own file alone. A kernel that calls kernels of other files is therefore an
entry that closes over a digest of all sources (→ `digest`), built by a function of that number.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.core.caching import FunctionCache
from numpy.typing import NDArray

__all__ = ["compiled", "digest", "inline", "inline_loose", "new_random", "uniform"]

_njit: Any = numba.njit
"""numba's types leave `_nrt` out."""
inline = _njit(forceinline=True, _nrt=False)
"""Compile into the caller. Such kernels allocate nothing."""
inline_loose = _njit(forceinline=True, fastmath={"contract", "reassoc", "nsz"}, _nrt=False)
"""The same, sums in any order: they then take a vector at a time."""


@inline
def uniform(random):  # type: ignore[no-untyped-def]
    """Return a float in [0, 1) and step the generator, uint64[1] (xorshift64*, Vigna 2016)."""
    x = random[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    random[0] = x
    return float((x * np.uint64(2685821657736338717)) >> np.uint64(11)) / 9007199254740992.0


def new_random(seed: int) -> NDArray[np.uint64]:
    """Return a generator for → `uniform`, uint64[1], never 0."""
    return np.random.SeedSequence(seed).generate_state(1, np.uint64) | np.uint64(1)


class _Cache(FunctionCache):
    """A cache that begins anew where its index cannot be read.

    An index names the classes of its kernel's arguments, and numba looks them up before it asks whether the file has
    changed: where an older version of autoplace left an index, a class that is gone would end the program.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled code for a signature; None where there is none."""
        try:
            return super().load_overload(sig, target_context)
        except (AttributeError, ImportError, EOFError, pickle.UnpicklingError):
            self.flush()
            return None


def compiled(function: Callable[..., Any], *, allocates: bool = False) -> Any:
    """Compile a function, with a cache on disk where there is a place for one.

    Args:
        function: What to compile.
        allocates: Whether it makes arrays. Without, reference counts are left out: with them every call counts every
            array that it passes on, and short kernels take five times as long.
    """
    options = {} if allocates else {"_nrt": False}
    try:
        dispatcher = _njit(cache=True, **options)(function)
        dispatcher._cache = _Cache(function)
    except RuntimeError:
        return _njit(**options)(function)
    return dispatcher


def digest(sources: Iterable[Path]) -> int:
    """Return a number that changes with the text of source files, and of this one."""
    found = hashlib.sha256(Path(__file__).read_bytes())
    for path in sources:
        found.update(path.read_bytes())
    return int(found.hexdigest()[:12], 16)
