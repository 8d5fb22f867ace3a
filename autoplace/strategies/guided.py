"""Search with the policy: the heuristics, the policy's placements, then improvement in which the policy is the prior.

    heuristics, greedy placement, samples
      → (large graphs) the same on coarser graphs                     `multilevel`
      → a chain from the best, or several from the best that differ   `_chains`
      → chains that copy parts of the others' placements              `_moves`, grafts
      → windows of connected classes, placed exactly                  `_engine.solve_windows`

In chains the policy says which class to move (one that it would place elsewhere, all else being as it is) and where to;
its samples are donors, of which a move may copy a connected part. Everything shares one budget and can be stopped at
any time. Never worse than the heuristics that the budget serves: they come first, and only better ones replace them.

Without a policy it is the same search from the heuristics alone. It knows nothing of how the policy was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autoplace.strategies._moves import Prior
from autoplace.strategies._search import Found, Placer, Scorer
from autoplace.strategies.heuristics import construct, draw_feasible

if TYPE_CHECKING:
    from autoplace.policy.policy import Policy
    from autoplace.policy.tables import Tables
    from autoplace.strategies._chains import Annealer

__all__ = ["GuidedConfig", "GuidedStrategy"]


@dataclass(frozen=True, kw_only=True)
class GuidedConfig:
    """How the budget is spent. Figures were chosen on problems of the training families."""

    sample_share: float = 0.25
    """Part of the evaluations left by the heuristics that samples of the policy may take."""
    sample_seconds: float = 0.1
    """Part of the time that they may take."""
    most_samples: int = 256
    """Samples at most."""
    most_cells: int = 1_000_000
    """(op, device) pairs that the policy may score for samples at most."""
    guided: float = 0.5
    """Chance that a moved class and its device come from the policy, in a short chain."""
    guided_length: float = 10.0
    """Evaluations a class from which on that chance falls, in inverse proportion: what the policy knows is used up."""
    grafts: float = 0.05
    """Chance that a move of a single chain copies a part of a donor."""
    donors: int = 16
    """Placements of which a move may copy a part at most."""
    chain_length: float = 800.0
    """Evaluations a class that a chain should have before there are several."""
    most_chains: int = 8
    """Chains from different starts at most."""
    first_share: float = 0.5
    """Part of the budget that these have; the rest goes to chains with grafts between them."""
    graft_heat: float = 3.0
    """First temperature of chains with grafts."""
    graft_chance: float = 0.2
    """Chance of a graft in them."""
    graft_length: float = 3000.0
    """Evaluations a class of one such chain at most."""
    window_share: float = 0.05
    """Last part of the budget, spent on windows placed exactly."""
    window_placements: int = 256
    """Placements of a window at most."""
    coarse_from: int = 400
    """Classes from which on coarser graphs are searched first."""
    coarse_length: float = 10.0
    """Evaluations a class of the budget from which on coarser graphs are left out."""
    coarse_share: float = 0.5
    """Part of the budget that coarser graphs have."""


class GuidedStrategy(Placer):
    """Search with the policy as the prior; the best so far comes back.

    Args:
        policy: Proposes, and guides moves; None = the same search without one.
        config: How the budget is spent.
    """

    name = "guided"

    def __init__(self, policy: Policy | None, config: GuidedConfig | None = None) -> None:
        self.policy = policy
        self.config = config or GuidedConfig()

    def search(self, scorer: Scorer, *, seed: int) -> Found:
        """Score the heuristics' placements, random ones where there is none, and improve on them."""
        starts = sorted((f for found in construct(scorer).values() for f in found), key=lambda pair: pair[0])
        return self.improve(scorer, starts or draw_feasible(scorer, seed=seed), seed=seed)

    def improve(self, scorer: Scorer, starts: Found, *, seed: int) -> Found:
        """Search from known placements until the scorer's budget is spent.

        Without any limit, 1,000 evaluations and 20 a class are spent.

        Args:
            scorer: Problem and budget.
            starts: Feasible placements; may be empty.
            seed: Seed of all randomness.

        Returns:
            The best few placements found, the starts among them, best first.
        """
        from autoplace.strategies.annealing import within_limits

        with within_limits(scorer) as limited:
            run = _Run(self, limited, seed)
            found = _best([*starts, *run.proposals()])
            if not found:
                return []
            found = _best([*found, *run.coarser(found)])
            found = _best([*found, *run.chains(found)])
        return found[: self.keep]


class _Run:
    """One search under way."""

    def __init__(self, strategy: GuidedStrategy, scorer: Scorer, seed: int) -> None:
        self.config = strategy.config
        self.policy = strategy.policy if scorer.op_class is scorer.view.op_class else None
        self.scorer = scorer
        self.seed = seed
        self._tables: Tables | None = None
        self._annealer: Annealer | None = None

    @property
    def annealer(self) -> Annealer:
        """What runs chains on the problem."""
        from autoplace.strategies._chains import Annealer

        if self._annealer is None:
            self._annealer = Annealer(self.scorer)
        return self._annealer

    @property
    def tables(self) -> Tables:
        """The policy's tables of the problem."""
        from autoplace.policy.tables import build_tables

        if self._tables is None:
            self._tables = build_tables(self.scorer.problem)
        return self._tables

    def proposals(self) -> Found:
        """Return the policy's greedy placement and its samples, scored."""
        config, clock, problem = self.config, self.scorer.clock, self.scorer.problem
        if self.policy is None or clock.spent:
            return []
        found = self.scorer.rank(list(self.policy.sample(problem, 1, temperature=0.0, tables=self.tables)))
        cells = problem.num_ops * problem.num_devices
        wanted = min(config.most_samples, config.most_cells // cells)
        if clock.limits.evaluations is not None:
            left = clock.limits.evaluations - clock.evaluations
            wanted = min(wanted, int(config.sample_share * left))
        share = config.sample_seconds if clock.limits.evaluations is None else config.sample_share
        until = clock.progress + share * (1.0 - clock.progress)
        batch = max(1, min(32, 50_000 // cells))
        drawn = 0
        while drawn < wanted and clock.progress < until:
            count = min(batch, wanted - drawn)
            draws = self.policy.sample(problem, count, seed=self.seed * 65_537 + drawn, tables=self.tables)
            found += self.scorer.rank(list(draws))
            drawn += count
        return found

    def coarser(self, found: Found) -> Found:
        """Search on coarser graphs, where the whole one is too large for the budget; return what that comes to."""
        from autoplace.strategies.multilevel import MultilevelStrategy

        policy, config, clock = self.policy, self.config, self.scorer.clock
        if self.scorer.view.num_classes < config.coarse_from or clock.spent:
            return []
        first = self.annealer.pilot(found[0], seed=self.seed)
        if self.annealer.evaluations_a_class() >= config.coarse_length or clock.spent:
            return first
        inner = GuidedStrategy(policy, config)
        refine = GuidedStrategy(None, config)
        levels = MultilevelStrategy(
            lambda scorer, seed: inner.search(scorer, seed=seed),
            lambda scorer, starts, seed: _Run(refine, scorer, seed).chains(starts),
        )
        with self.scorer.share(config.coarse_share) as lent:
            return levels.improve(lent, _best([*first, *found]), seed=self.seed)

    def chains(self, found: Found) -> Found:
        """Anneal until the budget is spent: one chain, or several and then grafts between them."""
        from autoplace.strategies._chains import hot_for

        annealer, config, clock = self.annealer, self.config, self.scorer.clock
        if clock.spent:
            return found
        found = _best([*found, *annealer.pilot(found[0], seed=self.seed)])
        length, begun = annealer.evaluations_a_class(), clock.progress
        count = int(min(config.most_chains, max(1.0, config.first_share * length / config.chain_length)))
        scale = found[0][0] / self.scorer.view.num_classes
        end = 1.0 - config.window_share * (1.0 - begun)
        share = config.first_share if count > 1 else 1.0
        elites: Found = []
        for index, start in enumerate(_different(found, count)):
            until = begun + (end - begun) * share * (index + 1) / count
            prior = self._prior(annealer, start[1], found)
            elites.append(
                annealer.chain(
                    start, until=until, seed=self.seed * 1009 + index, hot=hot_for(length * share / count),
                    scale=scale, prior=prior, guided=self._guided(length * share / count),
                    grafts=config.grafts if count == 1 else 0.0,
                )
            )  # fmt: skip
        if count > 1:
            elites = self._graft(annealer, _best([*elites, *found]), end, scale)
        best = _best([*elites, *found])
        best.append(self._windows(annealer, best[0]))
        return _best(best)

    def _guided(self, length: float) -> float:
        """Return the chance that a chain of so many evaluations a class asks the policy."""
        if self.policy is None:
            return 0.0
        return self.config.guided * min(1.0, self.config.guided_length / max(length, 1e-9))

    def _graft(self, annealer: Annealer, elites: Found, end: float, scale: float) -> Found:
        """Run chains from the best placement that copy parts of the others."""
        config, clock = self.config, self.scorer.clock
        length, begun = annealer.evaluations_a_class(end), clock.progress
        chains = max(1, round(length / config.graft_length))
        for index in range(chains):
            until = begun + (end - begun) * (index + 1) / chains
            elites = _best(elites)[: config.donors]
            prior = self._prior(annealer, elites[0][1], elites)
            elites.append(
                annealer.chain(
                    elites[0], until=until, seed=self.seed * 1009 + 501 + index, hot=config.graft_heat, scale=scale,
                    prior=prior, guided=self._guided(length / chains), grafts=config.graft_chance,
                )
            )  # fmt: skip
        return elites

    def _windows(self, annealer: Annealer, start: tuple[float, NDArray[np.int32]]) -> tuple[float, NDArray[np.int32]]:
        """Place windows of connected classes exactly until the budget is spent."""
        devices = max(2, self.scorer.problem.num_devices)
        size = max(2, int(np.log(self.config.window_placements) / np.log(devices)))
        prior = self._prior(annealer, start[1], [])
        return annealer.windows(start, size=size, seed=self.seed * 1009 + 999, prior=prior, guided=self._guided(1.0))

    def _prior(self, annealer: Annealer, assignment: NDArray[np.int32], donors: Found) -> Prior:
        """Return what the policy would do about a placement, and the donors."""
        view, space = self.scorer.view, annealer.space
        prior = annealer.uniform
        if donors:
            chosen = [view.gather(a) for _, a in donors[: self.config.donors]]
            prior = prior._replace(donors=np.ascontiguousarray(np.stack(chosen)))
        if self.policy is None:
            return prior
        likely = self.policy.prior(self.scorer.problem, assignment, tables=self.tables)
        first = np.zeros(view.num_classes, np.int64)
        first[view.op_class] = np.arange(len(view.op_class))
        likely = likely[first].astype(np.float64)
        doubt = 1.0 - likely[np.arange(len(likely)), view.gather(assignment)]
        wish = np.where(space.allowed, likely + _WISH_FLOOR / likely.shape[1], 0.0)
        return prior._replace(pick=np.cumsum(doubt[space.free] + _DOUBT_FLOOR), wish=np.cumsum(wish, axis=1))


_WISH_FLOOR = 0.05
"""Weight shared by all devices of a class beside the policy's probabilities."""
_DOUBT_FLOOR = 0.02
"""Weight of a class that the policy would place where it is."""


def _best(found: Sequence[tuple[float, NDArray[np.int32]]]) -> Found:
    """Return placements best first, each once."""
    unique = {a.tobytes(): (j, a) for j, a in reversed(found)}
    return sorted(unique.values(), key=lambda pair: pair[0])


def _different(found: Found, count: int) -> Found:
    """Return up to `count` placements, best first, that differ in a tenth of their ops, filled up with the best."""
    chosen: Found = []
    for value, assignment in found:
        if len(chosen) == count:
            break
        if all((assignment != other).mean() >= 0.1 for _, other in chosen):
            chosen.append((value, assignment))
    return [chosen[i % len(chosen)] for i in range(count)]
