"""Strategies by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoplace.errors import InputError
from autoplace.strategies._base import Strategy
from autoplace.strategies.annealing import AnnealingStrategy
from autoplace.strategies.exact import ExactStrategy
from autoplace.strategies.guided import GuidedStrategy
from autoplace.strategies.heuristics import HEURISTICS
from autoplace.strategies.multilevel import MultilevelStrategy
from autoplace.strategies.random_search import RandomStrategy
from autoplace.strategies.replicas import ReplicasStrategy
from autoplace.strategies.threads import ThreadsStrategy

if TYPE_CHECKING:
    from autoplace.policy.policy import Policy

__all__ = ["GUIDED", "LEARNED", "make_strategy", "placement_strategy_names", "portfolio_strategies", "strategy_names"]

LEARNED = "learned"
"""Name of the strategy that needs a policy."""
GUIDED = "guided"
"""Name of the search that uses a policy where there is one."""

_PLACERS: tuple[type[Strategy], ...] = (
    *HEURISTICS,
    RandomStrategy,
    AnnealingStrategy,
    MultilevelStrategy,
    ExactStrategy,
)
_OTHERS: tuple[type[Strategy], ...] = (ReplicasStrategy, ThreadsStrategy)
_KINDS: dict[str, type[Strategy]] = {kind.name: kind for kind in _PLACERS + _OTHERS}


def strategy_names() -> tuple[str, ...]:
    """Return the names that `make_strategy` knows, `learned` last."""
    return (*_KINDS, GUIDED, LEARNED)


def placement_strategy_names() -> tuple[str, ...]:
    """Return the names of those whose plans are one assignment and nothing else, `learned` last."""
    return (*(kind.name for kind in _PLACERS), GUIDED, LEARNED)


def make_strategy(name: str, policy: Policy | None = None) -> Strategy:
    """Make a strategy.

    Args:
        name: One of `strategy_names()`.
        policy: What `learned` proposes with and what guides `guided`; others don't look at it.

    Raises:
        InputError: If the name is unknown, or `learned` comes without a policy.
    """
    if name == LEARNED:
        if policy is None:
            raise InputError("the strategy 'learned' needs a policy; name one, or train one with `autoplace train`")
        from autoplace.strategies.learned import LearnedStrategy

        return LearnedStrategy(policy)
    if name == GUIDED:
        return GuidedStrategy(policy)
    if name not in _KINDS:
        raise InputError(f"strategy {name!r} is unknown; use one of {', '.join(strategy_names())}")
    return _KINDS[name]()


def portfolio_strategies(policy: Policy | None = None) -> list[Strategy]:
    """Return what `best_of` runs when nobody chooses: the heuristics, then the search that the policy guides."""
    heuristics: list[Strategy] = [kind() for kind in HEURISTICS]
    return [*heuristics, GuidedStrategy(policy)]
