"""`ShortRuns`: short PPO runs from one start, each looked at problem by problem, to compare hyperparameters.

A run trains in `CHECKS` equal parts. The instances are dealt into as many hands, and hand k is played after part k + 1.
So every instance is reported once in a run, two runs are compared on an instance after the same number of decisions,
and a run that is clearly worse can be stopped before all of its training is spent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from autoplace.envs import ProblemCache
from autoplace.errors import InputError
from autoplace.policy.policy import Policy
from autoplace.problem import Problem

from .evaluate import Bench
from .ppo import PpoConfig, PpoTrainer, single_thread

__all__ = ["CHECKS", "ShortRuns", "compare_paired"]

CHECKS = 4
"""Parts of a run's training."""
Check = Callable[[Sequence[tuple[int, float]]], bool]
Report = Callable[[dict[str, float]], None]


class ShortRuns:
    """Trains the same policy on the same problems with any hyperparameters.

    Args:
        start: The policy that every run starts from.
        problems: What to train on.
        instances: What to look at; those for which no heuristic is feasible are left out.
        steps: Decisions of one run, rounded to whole updates in each part.
        max_devices: Largest number of devices of the problems.

    Raises:
        InputError: If there is no instance left to look at.
    """

    def __init__(
        self,
        start: Policy,
        problems: Sequence[Problem],
        instances: Sequence[Problem],
        *,
        steps: int,
        max_devices: int,
    ) -> None:
        self._start = start
        self._problems = list(problems)
        self._instances = [bench for bench in (Bench([p]) for p in instances) if len(bench)]
        if not self._instances:
            raise InputError("no instance can be placed by any heuristic; use more instances")
        # Drawn problems go round their families; dealt in that order, a hand would hold a few of them.
        self._order = np.random.default_rng(0).permutation(len(self._instances)).tolist()
        self._steps = steps
        self._max_devices = max_devices
        self._cache = ProblemCache()

    def __len__(self) -> int:
        return len(self._instances)

    def run(
        self, ppo: PpoConfig, key: Sequence[int], *, check: Check | None = None, report: Report | None = None
    ) -> list[float] | None:
        """Train, and look at every instance.

        Args:
            ppo: Hyperparameters.
            key: Whole numbers; the same ones draw the same.
            check: Called after each part with (instance, log(J_best_heuristic / J_greedy)) of one hand of instances;
                True stops the run.
            report: Called after every update with metrics.

        Returns:
            log(J_best_heuristic / J_greedy) of every instance after all of the training, the reward: above 0 the
            policy is better. None when `check` stopped the run.
        """
        single_thread()
        network = self._start.network()
        config = replace(ppo, updates_per_chunk=max(1, round(self._steps / CHECKS / (ppo.envs * ppo.steps))))
        trainer = PpoTrainer(
            network, self._problems, config, max_devices=self._max_devices, cache=self._cache, report=report
        )
        try:
            for part in range(CHECKS):
                # The fall of the learning rate is that of → `train`.
                rate = ppo.learning_rate * (1.0 - 0.9 * part / CHECKS)
                trainer.run_chunk(_seed(*key, part), learning_rate=rate)
                if check is not None and check(self._look(Policy.of(network), self._order[part::CHECKS])):
                    return None
        finally:
            trainer.close()
        return [value for _, value in self._look(Policy.of(network), range(len(self)))]

    def _look(self, policy: Policy, instances: Sequence[int]) -> list[tuple[int, float]]:
        return [(index, self._instances[index].log_ratio(policy)) for index in instances]


def compare_paired(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> dict[str, float]:
    """Compare two sets of hyperparameters instance by instance.

    Args:
        one: log(J_best_heuristic / J_greedy), one row per seed, one column per instance.
        other: The same of what it is compared with.

    Returns:
        `log_ratio` and `other_log_ratio`, the means; `gain`, the geometric mean of J_other / J_one (above 1 the first
        is better); `p`, of the one-sided Wilcoxon signed-rank test that it is no better, over the instances' means
        over seeds; `instances` and `seeds`.
    """
    from scipy.stats import wilcoxon

    mine, theirs = np.mean(np.asarray(one, float), axis=0), np.mean(np.asarray(other, float), axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy says that it approximates where there are ties
        p = float(wilcoxon(mine - theirs, alternative="greater", zero_method="zsplit").pvalue)
    return {
        "log_ratio": float(mine.mean()),
        "other_log_ratio": float(theirs.mean()),
        "gain": float(np.exp((mine - theirs).mean())),
        "p": p,
        "instances": len(mine),
        "seeds": len(one),
    }


def _seed(*key: int) -> int:
    """Return a 31-bit seed of the numbers."""
    return int(np.random.SeedSequence(key).generate_state(1)[0]) >> 1
