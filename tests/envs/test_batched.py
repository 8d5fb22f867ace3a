import math

import gymnasium
import numpy as np
import pytest

from autoplace.agents.distribution import training_problems
from autoplace.envs import INFEASIBLE_REWARD, PlacementEnv, PlacementVectorEnv, ProblemCache
from autoplace.errors import InputError
from autoplace.outcome import Outcome

ENVS, DEVICES = 6, 5


class Alone:
    """Single environments, stepped one by one and reset when done: what the batch must equal."""

    def __init__(self, problems, **settings):
        self.envs = [PlacementEnv(problems, max_devices=DEVICES, **settings) for _ in range(ENVS)]

    def reset(self, seed):
        return np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(self.envs)])

    def masks(self):
        return np.stack([env.action_masks() for env in self.envs])

    def step(self, actions):
        rows, rewards, dones, ended = [], [], [], []
        for index, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            row, reward, done, _, info = env.step(action)
            if done:
                assert not row.any()
                row, _ = env.reset()
                ended.append((index, info))
            rows.append(row)
            rewards.append(reward)
            dones.append(done)
        return np.stack(rows), rewards, dones, ended


def same_info(one, other):
    np.testing.assert_array_equal(one["assignment"], other["assignment"])
    rest = [{k: v for k, v in info.items() if k != "assignment"} for info in (one, other)]
    assert rest[0] == rest[1]


def compare(batch, alone, steps, *, reckless=0.0, seed=3):
    """Step both with the same random actions, a share of them outside the mask; returns the infos of ended episodes."""
    random, seen = np.random.default_rng(0), []
    observations, _ = batch.reset(seed=seed)
    np.testing.assert_array_equal(observations, alone.reset(seed))
    for _ in range(steps):
        masks = batch.action_masks()
        np.testing.assert_array_equal(masks, alone.masks())
        offered = np.where(random.random((ENVS, 1)) < reckless, True, masks | ~masks.any(axis=1, keepdims=True))
        actions = (random.random(masks.shape) * offered).argmax(axis=1)
        observations, rewards, dones, ended = batch.advance(actions)
        expected = alone.step(actions)
        np.testing.assert_array_equal(observations, expected[0])
        np.testing.assert_array_equal(rewards, expected[1])
        np.testing.assert_array_equal(dones, expected[2])
        assert [i for i, _ in ended] == [i for i, _ in expected[3]]
        for (_, info), (_, wanted) in zip(ended, expected[3], strict=True):
            same_info(info, wanted)
            seen.append(info)
    return seen


@pytest.fixture(scope="module")
def mixed():
    """Problems of all semantics, some with binding memory, some with ops that cannot run everywhere."""
    problems = training_problems(40, seed=5, max_ops=25, max_devices=DEVICES)
    assert {p.objective.goal for p in problems} == {"latency", "throughput"}
    assert {(p.semantics.transfers, p.semantics.route) for p in problems} >= {
        ("blocking", "direct"),
        ("blocking", "host"),
    }
    assert any(p.semantics.microbatches > 1 for p in problems)
    return problems


@pytest.mark.parametrize("settings", [{}, {"shaping": False}, {"hard_masks": False}])
def test_it_equals_single_environments_step_for_step(mixed, settings):
    cache = ProblemCache()
    batch = PlacementVectorEnv(mixed, ENVS, max_devices=DEVICES, cache=cache, **settings)
    seen = compare(batch, Alone(mixed, cache=cache, **settings), 300)
    assert len({info["problem"] for info in seen}) > 20
    assert sum(info["feasible"] for info in seen) > 20


def test_it_equals_single_environments_where_episodes_fail(mixed, problem_maker):
    tight = [problem_maker(seed=s, memory=0.4) for s in range(3)]
    hopeless = [problem_maker(seed=9, memory=0.01)]
    problems, cache = mixed[:5] + tight + hopeless, ProblemCache()
    batch = PlacementVectorEnv(problems, ENVS, max_devices=DEVICES, cache=cache)
    seen = compare(batch, Alone(problems, cache=cache), 150, reckless=0.1)
    failed = [info for info in seen if not info["feasible"]]
    assert any("not allowed" in info["reason"] for info in failed)
    assert all(info["log_ratio"] == INFEASIBLE_REWARD and info["objective"] == math.inf for info in failed)


class Stopwatch:
    """An evaluator with the face of real runs: 1 ms per op on device 0."""

    def __init__(self, problem):
        self.problem, self.asked = problem, []

    def evaluate(self, plans):
        self.asked.append(len(plans))
        on_first = [int((plan.assignment_array(self.problem) == 0).sum()) for plan in plans]
        return [Outcome(source="measured", latency_ms=1.0 + n, objective=1.0 + n) for n in on_first]


def test_measured_evaluators_get_the_plans_of_a_step_in_one_call(problem_maker):
    problem, watches = problem_maker(ops=6), []

    def make(p):
        watches.append(Stopwatch(p))
        return watches[-1]

    batch = PlacementVectorEnv(problem, ENVS, max_devices=DEVICES, evaluator_factory=make, reference=lambda p: 3.0)
    alone = Alone(problem, cache=ProblemCache(Stopwatch, lambda p: 3.0))
    seen = compare(batch, alone, 12)
    assert len(seen) == 2 * ENVS and watches[0].asked == [ENVS] * 2
    assert {info["outcome"].source for info in seen} == {"measured"}


def test_without_hard_masks_every_device_that_can_run_the_class_is_offered(problem_maker):
    problem = problem_maker(memory=0.36, ops=12)
    env = PlacementEnv(problem, max_devices=4, hard_masks=False)
    env.reset(seed=0)
    total, done = 0.0, False
    while not done:
        assert env.action_masks().tolist() == [True, True, True, False]
        _, reward, done, _, info = env.step(0)
        total += reward
    assert not info["feasible"] and total == pytest.approx(INFEASIBLE_REWARD)


def test_gymnasium_makes_it_and_its_infos_are_gymnasiums(problem_maker):
    problems = [problem_maker(seed=s, ops=3 + s) for s in range(3)]
    envs = gymnasium.make_vec("autoplace/Placement-v0", num_envs=4, problems=problems, max_devices=3)
    assert isinstance(envs.unwrapped, PlacementVectorEnv)
    observations, infos = envs.reset(seed=1)
    assert envs.observation_space.contains(observations) and infos["_problem"].all()
    lengths = set()
    for _ in range(12):
        masks = envs.unwrapped.action_masks()
        observations, rewards, terminations, truncations, infos = envs.step(masks.argmax(axis=1))
        assert envs.observation_space.contains(observations) and rewards.shape == (4,) and not truncations.any()
        assert ("final_info" in infos) == terminations.any()
        for index in np.flatnonzero(terminations):
            assert infos["_final_info"][index] and not infos["final_obs"][index].any()
            lengths.add(len(infos["final_info"]["assignment"][index]))
            assert infos["final_info"]["feasible"][index]
    assert lengths == {3, 4, 5}


def test_observations_without_copies_last_for_one_more_step(mixed):
    kept = PlacementVectorEnv(mixed, ENVS, max_devices=DEVICES)
    fast = PlacementVectorEnv(mixed, ENVS, max_devices=DEVICES, copy=False)
    before, again = kept.reset(seed=0)[0], fast.reset(seed=0)[0]
    for _ in range(60):
        masks = kept.action_masks()
        np.testing.assert_array_equal(masks, fast.action_masks())
        after, same = (envs.advance(masks.argmax(axis=1))[0] for envs in (kept, fast))
        np.testing.assert_array_equal(before, again)
        np.testing.assert_array_equal(after, same)
        before, again = after, same


def test_reset_starts_over_and_takes_seeds_and_a_problem(problem_maker):
    problems = [problem_maker(seed=s) for s in range(4)]
    envs = PlacementVectorEnv(problems, 3, max_devices=3)
    first, _ = envs.reset(seed=[7, 8, 9])
    envs.advance(np.zeros(3, np.int64))
    again, _ = envs.reset(seed=7)
    np.testing.assert_array_equal(first, again)
    _, infos = envs.reset(options={"problem": problem_maker(seed=77)})
    assert infos["problem"].tolist() == ["small-77"] * 3 == [p.name for p in envs.problems]


def test_wrong_use_is_refused(problem_maker):
    problem = problem_maker(devices=3)
    with pytest.raises(InputError, match="larger max_devices"):
        PlacementVectorEnv(problem, 2, max_devices=2).reset()
    with pytest.raises(InputError, match="1 or more"):
        PlacementVectorEnv(problem, 0)
    envs = PlacementVectorEnv(problem, 2)
    with pytest.raises(InputError, match="reset"):
        envs.step(np.zeros(2, np.int64))
    with pytest.raises(InputError, match="one for each"):
        envs.reset(seed=[1, 2, 3])
    envs.reset(seed=1)
    with pytest.raises(InputError, match="one for each"):
        envs.step(np.zeros(3, np.int64))
