"""The Gymnasium environment over Problem and Evaluator, registered as `autoplace/Placement-v0`."""

from gymnasium.envs.registration import register, registry

from .placement import INFEASIBLE_REWARD, PlacementEnv, ProblemCache
from .reference import best_baseline

__all__ = ["INFEASIBLE_REWARD", "PlacementEnv", "ProblemCache", "best_baseline"]

if "autoplace/Placement-v0" not in registry:
    register(id="autoplace/Placement-v0", entry_point="autoplace.envs.placement:PlacementEnv")
