"""Short real runs: the protocol, the check that a plan computes the same thing, and the measuring evaluator."""

from .check import CheckConfig, CheckReport, Reference, check_plan
from .evaluator import MeasuredEvaluator
from .protocol import aa_noise, interleave, median_interval, pair_ratios, summary

__all__ = [
    "CheckConfig",
    "CheckReport",
    "MeasuredEvaluator",
    "Reference",
    "aa_noise",
    "check_plan",
    "interleave",
    "median_interval",
    "pair_ratios",
    "summary",
]
