"""The Gymnasium environment over Problem and Evaluator, registered as `autoplace/Placement-v0`."""

from gymnasium.envs.registration import register, registry

from .batched import PlacementVectorEnv
from .cache import INFEASIBLE_REWARD, ProblemCache
from .placement import PlacementEnv
from .reference import best_baseline

__all__ = ["INFEASIBLE_REWARD", "PlacementEnv", "PlacementVectorEnv", "ProblemCache", "best_baseline"]

if "autoplace/Placement-v0" not in registry:
    register(
        id="autoplace/Placement-v0",
        entry_point="autoplace.envs.placement:PlacementEnv",
        vector_entry_point="autoplace.envs.batched:PlacementVectorEnv",
    )
