"""Strategies: a Problem in, candidate Plans out."""

from autoplace.strategies._base import Budget, Clock, Strategy
from autoplace.strategies.heuristics import HEURISTICS
from autoplace.strategies.portfolio import best_of, compare
from autoplace.strategies.registry import make_strategy, portfolio_strategies, strategy_names

__all__ = [
    "HEURISTICS",
    "Budget",
    "Clock",
    "Strategy",
    "best_of",
    "compare",
    "make_strategy",
    "portfolio_strategies",
    "strategy_names",
]
