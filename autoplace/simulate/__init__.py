"""The simulator: what a plan costs, from the problem alone."""

from autoplace.simulate.evaluator import SimulatedEvaluator
from autoplace.simulate.expand import Part, expand

__all__ = ["Part", "SimulatedEvaluator", "expand"]
