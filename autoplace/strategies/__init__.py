"""Strategies: a Problem in, candidate Plans out."""

from autoplace.strategies._base import Budget, Clock, Strategy
from autoplace.strategies.heuristics import HEURISTICS
from autoplace.strategies.infeasible import explain_infeasible, prove_infeasible
from autoplace.strategies.portfolio import Comparison, best_of, compare
from autoplace.strategies.registry import (
    make_strategy,
    placement_strategy_names,
    portfolio_strategies,
    strategy_names,
)

__all__ = [
    "HEURISTICS",
    "Budget",
    "Clock",
    "Comparison",
    "Strategy",
    "best_of",
    "compare",
    "explain_infeasible",
    "make_strategy",
    "placement_strategy_names",
    "portfolio_strategies",
    "prove_infeasible",
    "strategy_names",
]
