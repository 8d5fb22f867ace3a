"""A cache that names a class that is gone begins anew instead of ending the program."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from autoplace.jit import digest

PROGRAM = """
    import sys
    from typing import NamedTuple
    import numpy as np
    from autoplace.jit import compiled

    class {name}(NamedTuple):
        values: np.ndarray

    @compiled
    def total(pair):
        found = 0.0
        for i in range(len(pair.values)):
            found += pair.values[i]
        return found

    print(total({name}(np.ones(3))), sum(total.stats.cache_hits.values()))
"""


def _run(folder: Path, name: str) -> str:
    module = folder / "kernels_of_a_test.py"
    module.write_text(textwrap.dedent(PROGRAM.format(name=name)), encoding="utf-8")
    os.utime(module, (1e9, 1e9))  # the same file to the cache, whatever it says
    env = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", "import kernels_of_a_test"], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1]


def test_a_class_that_is_gone_costs_a_compilation_not_the_program(tmp_path):
    assert _run(tmp_path, "Pair") == "0"
    assert _run(tmp_path, "Pair") == "1", "the second run reads the cache"
    assert _run(tmp_path, "Twin") == "0"
    assert _run(tmp_path, "Twin") == "1"


def test_a_digest_follows_the_text(tmp_path):
    source = tmp_path / "a.py"
    source.write_text("x = 1\n")
    first = digest([source])
    assert first == digest([source])
    source.write_text("x = 2\n")
    assert first != digest([source])
