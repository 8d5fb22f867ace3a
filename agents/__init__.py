"""Training of placement policies: imitation, PPO on the simulator, PPO on real runs; the door is `agents.train`."""
