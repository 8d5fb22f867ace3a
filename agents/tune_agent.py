"""`tune_agent`: PPO's hyperparameters by Optuna, compared over problems, and a last look that chance cannot flatter.

A trial is one of → `short_runs.ShortRuns`: the same start, the same decisions, other hyperparameters; its value is the
mean over the instances of log(J_best_heuristic / J_greedy). The first trial is the hyperparameters there are, the next
ones are TPE's (Bergstra et al. 2011, "Algorithms for hyper-parameter optimization"). `WilcoxonPruner` stops a trial
that is worse than the best one by a signed-rank test over the instances that both have reported (Wilcoxon 1945).

1. The pruner is asked once for each hand of instances, not after each instance: a test that is repeated as often as
   there are instances stops many trials by chance.
2. The best of many trials is flattered by chance. It and the first one are trained again with other seeds and looked at
   on other instances, and only that decides whether the tuned hyperparameters are written or those there were.
3. What trial n draws follows from the seed, n and the trials before it, where n counts those that ran to an end; so a
   study that was interrupted and goes on equals one that was not.

Knows nothing of MLflow: `open_trial` gives it something to log to.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from autoplace.errors import InputError
from autoplace.files import make_directory
from autoplace.policy.policy import Policy

from .distribution import training_problems
from .ppo import PpoConfig
from .ppo_file import save_ppo
from .ppo_space import SEARCHED, ppo_of, suggest_ppo
from .ppo_study import ended_trials, open_study, quiet_optuna
from .short_runs import CHECKS, ShortRuns, compare_paired
from .train import TrainConfig, train

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.trial import FrozenTrial

__all__ = ["TrialRow", "TuneAgentConfig", "TuneAgentResult", "tune_agent"]

P_CONFIRM = 0.05
"""One-sided p value of the signed-rank test below which the last look counts as a win."""
STARTUP = 8
"""Trials drawn evenly before TPE has enough to learn from."""
SALT_VALIDATION, SALT_CONFIRMATION = 2_000_003, 3_000_017
"""Added to the seed of the training problems, so that no instance is trained on."""


class TrialLog(Protocol):
    """What a trial logs to; `autoplace.zoo.RunTracker` is one."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers by name."""


OpenTrial = Callable[[int, dict[str, Any]], AbstractContextManager[TrialLog]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class TuneAgentConfig:
    """What to search, and for how long."""

    output: Path
    """Folder for `study.journal` and `best.json`; a study that is there already goes on."""
    start: Path | None = None
    """Policy directory that every trial starts from; None = imitation, once, kept in the folder."""
    imitate_epochs: int = 15
    """Epochs of that imitation."""
    trials: int = 24
    """Trials of the study in all, earlier runs' included."""
    steps: int = 131_072
    """Decisions of one trial."""
    problems: int = 200
    """Synthetic training problems."""
    instances: int = 48
    """Validation problems that trials are compared on, and as many others for the last look."""
    confirmations: int = 2
    """Seeds of the last look; 0 = trust the search."""
    max_ops: int = TrainConfig.max_ops
    """Largest number of ops of the problems, about."""
    max_devices: int = TrainConfig.max_devices
    seed: int = 0
    base: PpoConfig = field(default_factory=PpoConfig)
    """Hyperparameters of the first trial; the ranges lie around them."""

    def __post_init__(self) -> None:
        for name, least in (("trials", 1), ("problems", 1), ("instances", CHECKS), ("confirmations", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; use {least} or more")
        # Twice as many environments and twice as many steps still make a whole update in each part of a trial.
        least = CHECKS * 4 * self.base.envs * self.base.steps
        if self.steps < least:
            raise InputError(f"steps is {self.steps}; use {least} or more, so that all trials train equally long")


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial of the study."""

    number: int
    state: str
    """`complete`, `pruned` or `fail` (interrupted)."""
    ppo: PpoConfig
    value: float | None
    """Mean of log(J_best_heuristic / J_greedy) over the instances; None when pruned or interrupted."""
    reported: int
    """Instances looked at before the end."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TuneAgentResult:
    """What a study found."""

    path: Path
    """The file `best.json`."""
    ppo: PpoConfig
    """What it holds: the tuned hyperparameters where they won the last look beyond chance, else the first trial's."""
    tuned: bool
    """Whether these are the tuned ones."""
    trials: tuple[TrialRow, ...]
    """All trials, the best first."""
    search: Mapping[str, float]
    """→ `compare_paired` of the best trial with the first one, on the instances that chose it: flattered by chance."""
    confirmation: Mapping[str, float] | None
    """The same of the last look; None when there was none."""


def tune_agent(
    config: TuneAgentConfig, *, open_trial: OpenTrial | None = None, progress: Progress | None = None
) -> TuneAgentResult:
    """Search PPO's hyperparameters, or go on with it.

    Args:
        config: What and how long.
        open_trial: Called with a trial's number and hyperparameters; the context gives what it logs to.
        progress: Called with phase, done, total.

    Returns:
        The result; `best.json` is written.

    Raises:
        InputError: If the folder cannot be used, is in use, or holds a study of other settings.
    """
    from filelock import FileLock, Timeout

    make_directory(config.output, InputError)
    lock = FileLock(config.output / "study.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{config.output} is in use by another run; wait for it, or name another folder") from None
    try:
        with quiet_optuna():
            return _Search(config, open_trial or _no_log, progress or (lambda phase, done, total: None)).run()
    finally:
        lock.release()


class _Search:
    """One study under way."""

    def __init__(self, config: TuneAgentConfig, open_trial: OpenTrial, progress: Progress) -> None:
        self.config = config
        self.open_trial = open_trial
        self.progress = progress
        self.start = Policy.load(config.start or _imitated(config, progress))
        self.study = open_study(config.output / "study.journal", _identity(config, self.start))

    def run(self) -> TuneAgentResult:
        """Run the trials that are missing, compare, and write the file."""
        config, runs = self.config, None
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.name == "RUNNING":
                self._tell(trial.number, "FAIL")
        while (done := len(ended_trials(self.study))) < config.trials:
            self.progress("trials", done, config.trials)
            runs = runs or self._runs(SALT_VALIDATION)
            self._trial(runs, done)
        self.progress("trials", done, config.trials)
        return self._finish()

    def _runs(self, salt: int) -> ShortRuns:
        config = self.config
        sizes = {"max_ops": config.max_ops, "max_devices": config.max_devices}
        problems = training_problems(config.problems, seed=config.seed, **sizes)
        instances = training_problems(config.instances, seed=config.seed + salt, **sizes)
        return ShortRuns(self.start, problems, instances, steps=config.steps, max_devices=config.max_devices)

    def _trial(self, runs: ShortRuns, index: int) -> None:
        """Run trial number `index` of those that run to an end."""
        import optuna

        seed = int(np.random.SeedSequence((self.config.seed, 0, index)).generate_state(1)[0])
        self.study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
        waiting = any(t.state.name == "WAITING" for t in self.study.get_trials(deepcopy=False))
        if index == 0 and not waiting:
            self.study.enqueue_trial({name: getattr(self.config.base, name) for name in SEARCHED})
        trial = self.study.ask()
        ppo = suggest_ppo(trial, self.config.base)
        began = time.monotonic()
        with self.open_trial(trial.number, {f"ppo.{k}": v for k, v in asdict(ppo).items()}) as log:
            values = self._evaluate(trial, runs, ppo, index, log)
            seconds = time.monotonic() - began
            trial.set_user_attr("seconds", seconds)
            log.log_metrics({"trial/seconds": seconds, "trial/pruned": float(values is None)})
            if values is not None:
                trial.set_user_attr("log_ratios", values)
                log.log_metrics({"validation/reward": float(np.mean(values))})
        if values is None:
            self._tell(trial.number, "PRUNED")
        else:
            self.study.tell(trial, float(np.mean(values)))

    def _evaluate(self, trial: Trial, runs: ShortRuns, ppo: PpoConfig, index: int, log: TrialLog) -> list[float] | None:
        updates = parts = 0

        def check(hand: Sequence[tuple[int, float]]) -> bool:
            nonlocal parts
            parts += 1
            self.progress("this trial", parts, CHECKS)
            for instance, value in hand:
                trial.report(value, instance)
                log.log_metrics({"instance/log_ratio": value}, instance)
            return trial.should_prune()

        def report(metrics: dict[str, float]) -> None:
            nonlocal updates
            updates += 1
            log.log_metrics(metrics, updates)

        self.progress("this trial", 0, CHECKS)
        return runs.run(ppo, (self.config.seed, 1, index), check=check, report=report)

    def _tell(self, number: int, state: str) -> None:
        from optuna.trial import TrialState

        self.study.tell(number, state=TrialState[state])

    def _finish(self) -> TuneAgentResult:
        config = self.config
        first = next(t for t in ended_trials(self.study))
        best = self.study.best_trial
        search = compare_paired([best.user_attrs["log_ratios"]], [first.user_attrs["log_ratios"]])
        tuned, confirmation = best.number != first.number, None
        if tuned and config.confirmations:
            confirmation = self._confirm(best, first)
            tuned = confirmation["gain"] > 1.0 and confirmation["p"] < P_CONFIRM
        rows = tuple(_row(t, config.base) for t in self.study.get_trials(deepcopy=False))
        rows = tuple(sorted(rows, key=lambda row: (row.value is None, -(row.value or 0.0), row.number)))
        path = config.output / "best.json"
        result = TuneAgentResult(
            path=path,
            ppo=ppo_of(best.params if tuned else first.params, config.base),
            tuned=tuned,
            trials=rows,
            search=search,
            confirmation=confirmation,
        )
        save_ppo(path, result.ppo, provenance=self._provenance(result, best.number))
        return result

    def _confirm(self, best: FrozenTrial, first: FrozenTrial) -> dict[str, float]:
        """Train both again with other seeds and compare them on other instances."""
        runs, config = self._runs(SALT_CONFIRMATION), self.config
        found: dict[int, list[list[float]]] = {best.number: [], first.number: []}
        for seed in range(config.confirmations):
            for trial in (best, first):
                self.progress("last look", sum(map(len, found.values())), 2 * config.confirmations)
                found[trial.number].append(self._confirmed(runs, trial, seed))
        self.progress("last look", 2 * config.confirmations, 2 * config.confirmations)
        return compare_paired(found[best.number], found[first.number])

    def _confirmed(self, runs: ShortRuns, trial: FrozenTrial, seed: int) -> list[float]:
        """Return what a trial's hyperparameters reach with another seed, from the study where it is known."""
        name = f"confirmation/{trial.number}/{seed}"
        known = self.study.user_attrs.get(name)
        if known is None:
            known = runs.run(ppo_of(trial.params, self.config.base), (self.config.seed, 2, seed))
            assert known is not None  # nobody stops it
            self.study.set_user_attr(name, known)
        return list(known)

    def _provenance(self, result: TuneAgentResult, best: int) -> dict[str, Any]:
        from importlib.metadata import version

        states = [row.state for row in result.trials]
        return {
            "made_by": "autoplace tune-agent",
            "autoplace": version("autoplace"),
            "optuna": version("optuna"),
            "tuned": result.tuned,
            "best_trial": best,
            "trials": {state: states.count(state) for state in ("complete", "pruned", "fail")},
            "search": dict(result.search),
            "confirmation": None if result.confirmation is None else dict(result.confirmation),
            "study": self.study.user_attrs["identity"],
        }


def _imitated(config: TuneAgentConfig, progress: Progress) -> Path:
    """Return the policy directory of an imitation in the study's folder, trained unless it is there."""
    folder = config.output / "start"
    if (folder / "policy").exists():
        return folder / "policy"
    settings = TrainConfig(
        output=folder,
        stages=("imitate",),
        seed=config.seed,
        problems=config.problems,
        max_ops=config.max_ops,
        max_devices=config.max_devices,
        imitate_epochs=config.imitate_epochs,
        resume=True,
    )
    return train(settings, progress=progress)


def _row(trial: FrozenTrial, base: PpoConfig) -> TrialRow:
    return TrialRow(
        number=trial.number,
        state=trial.state.name.lower(),
        ppo=ppo_of(trial.params, base),
        value=trial.value if trial.state.name == "COMPLETE" else None,
        reported=len(trial.intermediate_values),
        seconds=float(trial.user_attrs.get("seconds", 0.0)),
    )


def _identity(config: TuneAgentConfig, start: Policy) -> dict[str, Any]:
    """Return what must be the same for a study to go on."""
    names = ("steps", "problems", "instances", "max_ops", "max_devices", "seed")
    facts: dict[str, Any] = {name: getattr(config, name) for name in names}
    digest = hashlib.sha256()
    for name in sorted(start.tensors):
        digest.update(name.encode() + start.tensors[name].tobytes())
    return {**facts, "start": digest.hexdigest()[:16], "base": asdict(config.base)}


class _NoLog:
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Do nothing."""


@contextlib.contextmanager
def _no_log(number: int, params: dict[str, Any]) -> Iterator[TrialLog]:
    yield _NoLog()
