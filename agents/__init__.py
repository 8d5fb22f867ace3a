"""Training of placement policies: imitation, PPO on the simulator, PPO on real runs."""

from .train import STAGES, TrainConfig, train

__all__ = ["STAGES", "TrainConfig", "train"]
