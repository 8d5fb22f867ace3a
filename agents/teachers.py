"""Teachers: the best placements that search knows, found in several processes and kept while a training goes on.

A teacher is the best of the heuristics and of annealing from the best of them. What is found does not depend on the
number of processes, nor on whether a training was interrupted.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import zipfile
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoplace.files import write_bytes_atomically
from autoplace.problem import Problem
from autoplace.strategies._base import Budget
from autoplace.strategies._search import Scorer
from autoplace.strategies.annealing import AnnealingStrategy

__all__ = ["TeacherFile", "best_known", "search_teachers"]

Teacher = NDArray[np.int32] | None
_TOGETHER = 4
"""Problems that a process takes at a time."""


def best_known(problem: Problem, *, evaluations: int, seed: int) -> Teacher:
    """Return the best placement that the heuristics and annealing find, int32[N]; None when none is feasible."""
    scorer = Scorer(problem, Budget(evaluations=evaluations).start())
    found = AnnealingStrategy().search(scorer, seed=seed)
    return found[0][1] if found else None


def search_teachers(
    tasks: Sequence[tuple[Problem, int]], *, evaluations: int, workers: int = 1
) -> Generator[NDArray[np.int32] | None]:
    """Yield what → `best_known` returns for every (problem, seed), in order.

    Args:
        tasks: Problems and seeds.
        evaluations: For each problem.
        workers: Processes; one stays in this process. Their number does not change what is found.
    """
    if workers == 1 or len(tasks) < 2:
        for problem, seed in tasks:
            yield best_known(problem, evaluations=evaluations, seed=seed)
        return
    # Forked, not spawned: a child needs no module of the caller's, and compiled loops are there already.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_search, [(p, evaluations, s) for p, s in tasks], chunksize=_TOGETHER)


def _search(task: tuple[Problem, int, int]) -> Teacher:
    problem, evaluations, seed = task
    return best_known(problem, evaluations=evaluations, seed=seed)


class TeacherFile:
    """Teachers of a training that is under way, so that resuming it does not search again.

    Args:
        path: Of the file, `.npz`.
        identity: JSON-ready facts; a file of others is ignored.
        problems: The problems, whose fingerprints count as facts too.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], problems: Sequence[Problem]) -> None:
        self.path = path
        facts = json.dumps([identity, [p.fingerprint for p in problems]], sort_keys=True)
        self._digest = hashlib.sha256(facts.encode()).hexdigest()

    def load(self) -> list[Teacher]:
        """Return the teachers of the first problems; an empty list where there is no file that can be used."""
        try:
            with np.load(self.path, allow_pickle=False) as data:
                if str(data["digest"]) != self._digest:
                    return []
                ends, devices = np.asarray(data["ends"], np.int64), np.asarray(data["devices"], np.int32)
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
            return []
        parts = np.split(devices, ends)[:-1]
        return [part if len(part) else None for part in parts]

    def save(self, teachers: Sequence[Teacher]) -> None:
        """Write the teachers of the first problems."""
        parts = [np.zeros(0, np.int32) if t is None else t for t in teachers]
        stream = io.BytesIO()
        np.savez(
            stream,
            digest=np.asarray(self._digest),
            ends=np.cumsum([len(part) for part in parts], dtype=np.int64),
            devices=np.concatenate([*parts, np.zeros(0, np.int32)]),
        )
        write_bytes_atomically(self.path, stream.getvalue())
