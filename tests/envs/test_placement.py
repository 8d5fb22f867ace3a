import math
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

import autoplace.envs
from autoplace.envs import INFEASIBLE_REWARD, PlacementEnv, ProblemCache, best_baseline
from autoplace.errors import InputError
from autoplace.outcome import Outcome
from autoplace.policy.features import NUM_FEATURES
from autoplace.simulate.evaluator import SimulatedEvaluator


def play(env, *, seed=0, problem=None):
    """Run one random masked episode; returns (rewards, last info)."""
    random, rewards, done = np.random.default_rng(seed), [], False
    env.reset(seed=seed, options=None if problem is None else {"problem": problem})
    while not done:
        action = random.choice(np.flatnonzero(env.action_masks()))
        observation, reward, done, truncated, info = env.step(action)
        assert env.observation_space.contains(observation) and not truncated
        rewards.append(reward)
    return rewards, info


def test_checkers_of_gymnasium_and_stable_baselines3_pass():
    env = gymnasium.make("autoplace/Placement-v0").unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # A matrix per observation is what our own policy reads.
        warnings.filterwarnings("ignore", message=".*unconventional shape")
        check_env(env, skip_render_check=True)
        check_env_sb3(env)


@pytest.mark.parametrize("shaping", [True, False])
@pytest.mark.parametrize("case", [{}, {"goal": "throughput", "energy_weight": 0.5}, {"memory": 0.5}])
def test_rewards_sum_to_the_true_log_ratio(problem_maker, shaping, case):
    problem = problem_maker(**case)
    env, reference = PlacementEnv(problem, shaping=shaping), best_baseline(problem).objective
    for seed in range(5):
        rewards, info = play(env, seed=seed)
        objective = SimulatedEvaluator(problem).score(info["assignment"])[0]
        assert info["objective"] == objective and info["feasible"]
        assert sum(rewards) == pytest.approx(math.log(reference / objective), abs=1e-6)
        assert info["log_ratio"] == pytest.approx(sum(rewards), abs=1e-9)
        assert shaping or all(r == 0 for r in rewards[:-1])


def test_same_seed_same_problems_and_observations(problem_maker):
    problems = [problem_maker(seed=i) for i in range(5)]
    one, other = PlacementEnv(problems), PlacementEnv(problems)
    names = []
    for index in range(6):
        (first, info), (second, same) = (e.reset(seed=3 if index == 0 else None) for e in (one, other))
        np.testing.assert_array_equal(first, second)
        assert info == same
        names.append(info["problem"])
    assert len(set(names)) > 1


def test_masks_and_padding(problem_maker):
    env = PlacementEnv(problem_maker(devices=3), max_devices=5)
    observation, _ = env.reset(seed=0)
    assert observation.shape == (5, NUM_FEATURES) and (observation[3:] == 0).all()
    assert env.action_masks().tolist() == [True, True, True, False, False]


def test_a_forbidden_action_ends_the_episode_as_infeasible(problem_maker):
    env = PlacementEnv(problem_maker(devices=2), max_devices=4)
    env.reset(seed=0)
    _, first, *_ = env.step(0)
    _, second, terminated, _, info = env.step(3)
    assert terminated and not info["feasible"] and "not allowed" in info["reason"]
    assert first + second == pytest.approx(INFEASIBLE_REWARD)


def test_more_devices_than_rows_are_refused(problem_maker):
    env = PlacementEnv(problem_maker(devices=3), max_devices=2)
    with pytest.raises(InputError, match="larger max_devices"):
        env.reset()


class Stopwatch:
    """An evaluator with the face of real runs: what lands on device 0 alone is infeasible, the rest takes 2 ms."""

    def __init__(self, problem):
        self.evaluations = 0

    def evaluate(self, plans):
        self.evaluations += len(plans)
        return [
            Outcome(source="measured", feasible=False, reason="out of memory on host0/cuda:0")
            if plan.devices == ("host0/cuda:0",)
            else Outcome(source="measured", latency_ms=2.0, objective=2.0)
            for plan in plans
        ]


def test_measured_evaluators_decide_the_reward(problem_maker):
    problem = problem_maker()
    env = PlacementEnv(problem, evaluator_factory=Stopwatch, reference=lambda p: 3.0)
    env.reset(seed=0)
    total, done, device = 0.0, False, 0
    while not done:
        _, reward, done, _, info = env.step(device)
        total, device = total + reward, 1
    assert total == pytest.approx(math.log(1.5)) and info["outcome"].source == "measured"
    env.reset()
    total, done = 0.0, False
    while not done:
        _, reward, done, _, info = env.step(0)
        total += reward
    assert total == pytest.approx(INFEASIBLE_REWARD) and "out of memory" in info["reason"]


def test_a_shared_cache_asks_for_each_reference_once(problem_maker):
    problem, asked = problem_maker(), []

    def reference(p):
        asked.append(p)
        return 1.0

    cache = ProblemCache(None, reference)
    for seed in range(3):
        play(PlacementEnv(problem, cache=cache), seed=seed)
    assert len(asked) == 1


def test_an_episode_can_be_given_its_problem(problem_maker):
    env, special = PlacementEnv(problem_maker(seed=0)), problem_maker(seed=9)
    _, info = play(env, problem=special)
    assert info["problem"] == "small-9"


def test_stepping_before_reset_or_after_the_end_says_reset(problem_maker):
    env = PlacementEnv(problem_maker())
    with pytest.raises(InputError, match="reset"):
        env.step(0)
    play(env)
    with pytest.raises(InputError, match="reset"):
        env.step(0)


def test_public_names_are_exported():
    assert autoplace.envs.__all__ == sorted(autoplace.envs.__all__)
