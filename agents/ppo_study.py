"""The border to Optuna: the study in a journal file, its pruner, and its quiet. Knows nothing of what is tuned."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoplace.errors import InputError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.trial import FrozenTrial

__all__ = ["ended_trials", "open_study", "quiet_optuna"]

P_PRUNE = 0.05
"""One-sided p value of the signed-rank test below which a trial is stopped."""
STUDY = "tune-agent"


def open_study(journal: Path, identity: Mapping[str, Any]) -> Study:
    """Open the study of a journal file, created unless it is there.

    Args:
        journal: Optuna's journal.
        identity: JSON-ready facts that must be the same for a study to go on; kept as its attribute `identity`.

    Raises:
        InputError: If the file holds a study of other facts, or cannot be read.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    try:
        storage = JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(
            storage=storage, study_name=STUDY, direction="maximize", pruner=_pruner(), load_if_exists=True
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{journal} is no journal of Optuna's ({error}); move it away to begin anew") from None
    mine = json.loads(json.dumps(dict(identity)))
    theirs = study.user_attrs.get("identity")
    if theirs is None:
        study.set_user_attr("identity", mine)
    elif theirs != mine:
        wrong = next(name for name in mine if mine[name] != theirs.get(name))
        raise InputError(
            f"{journal} holds a study with {wrong} {theirs.get(wrong)!r}, not {mine[wrong]!r}; use the same "
            "settings to go on with it, or name another folder"
        )
    return study


def _pruner() -> BasePruner:
    from optuna.pruners import WilcoxonPruner

    return WilcoxonPruner(p_threshold=P_PRUNE)


def ended_trials(study: Study) -> list[FrozenTrial]:
    """Return the trials that ran to an end or were pruned, in their order."""
    return [t for t in study.get_trials(deepcopy=False) if t.state.name in ("COMPLETE", "PRUNED")]


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Hold Optuna's own messages back, and give the user's level back after."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
