import json

import numpy as np
import pytest

from autoplace.errors import InfeasibleError, PolicyError
from autoplace.policy.network import PolicyConfig, PolicyNetwork
from autoplace.policy.policy import Policy
from autoplace.policy.store import write_policy


def test_save_and_load_give_the_same_placements(problem_maker, tmp_path):
    policy, problem = Policy.of(PolicyNetwork(seed=5)), problem_maker()
    policy.save(tmp_path / "p", card="# card", evaluation={"x": 1})
    again = Policy.load(tmp_path / "p")
    assert again.card == "# card" and again.evaluation == {"x": 1} and again.config == policy.config
    np.testing.assert_array_equal(again.greedy(problem), policy.greedy(problem))
    assert all(np.array_equal(again.tensors[k], v) for k, v in policy.tensors.items())


def test_another_feature_version_says_train_again(tmp_path):
    policy = Policy.of(PolicyNetwork())
    policy.save(tmp_path / "p")
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    write_policy(tmp_path / "q", policy.tensors, {**config, "feature_version": 999}, "", {})
    with pytest.raises(PolicyError, match="train it again"):
        Policy.load(tmp_path / "q")


def test_missing_and_broken_tensors_are_refused():
    policy = Policy.of(PolicyNetwork())
    tensors = dict(policy.tensors)
    with pytest.raises(PolicyError, match=r"embed1\.weight"):
        Policy(policy.config, {k: v for k, v in tensors.items() if k != "embed1.weight"})
    broken = tensors["score2.weight"].copy()
    broken[0, 0] = np.nan
    with pytest.raises(PolicyError, match="NaN"):
        Policy(policy.config, {**tensors, "score2.weight": broken})


def test_a_problem_without_a_placement_raises_with_its_name(problem_maker):
    policy, problem = Policy.of(PolicyNetwork()), problem_maker(memory=0.001)
    with pytest.raises(InfeasibleError, match="small"):
        policy.greedy(problem)
    assert policy.sample(problem, 3).shape == (0, problem.num_ops)


def test_a_configuration_without_the_switches_has_both_on(tmp_path):
    policy = Policy.of(PolicyNetwork(PolicyConfig(message_passing=False, masks=False)))
    policy.save(tmp_path / "p")
    stored = json.loads((tmp_path / "p" / "config.json").read_text())
    assert Policy.load(tmp_path / "p").config == policy.config
    older = {key: value for key, value in stored.items() if key not in ("message_passing", "masks")}
    write_policy(tmp_path / "q", policy.tensors, older, "", {})
    config = Policy.load(tmp_path / "q").config
    assert config.message_passing and config.masks
