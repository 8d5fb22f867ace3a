import numpy as np
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

from autoplace.agents.vec_env import PlacementVecEnv
from autoplace.envs import PlacementVectorEnv


def test_it_is_the_batch_behind_another_face(lanes):
    envs, batch = (PlacementVectorEnv(lanes[0], 3, max_devices=4) for _ in range(2))
    wrapped = PlacementVecEnv(envs)
    assert (wrapped.num_envs, wrapped.observation_space) == (3, batch.single_observation_space)
    assert is_masking_supported(wrapped) and wrapped.env_is_wrapped(object) == [False] * 3
    assert wrapped.get_attr("max_devices", [0, 2]) == [4, 4]
    wrapped.seed(5)
    np.testing.assert_array_equal(wrapped.reset(), batch.reset(seed=5)[0])
    for step in range(8):
        masks = get_action_masks(wrapped)
        np.testing.assert_array_equal(masks, batch.action_masks())
        np.testing.assert_array_equal(wrapped.env_method("action_masks", indices=1), masks[1:2])
        observations, rewards, dones, infos = wrapped.step(np.asarray([0, 1, 0]))
        same, paid, ended, last = batch.advance(np.asarray([0, 1, 0]))
        np.testing.assert_array_equal(observations, same)
        np.testing.assert_array_equal(rewards, paid.astype(np.float32))
        assert dones.tolist() == ended.tolist() == [step == 7] * 3
        assert [bool(info) for info in infos] == dones.tolist()
    for index, info in last:
        assert infos[index]["log_ratio"] == info["log_ratio"] and not infos[index]["TimeLimit.truncated"]


def test_attributes_are_set_on_the_batch(lanes):
    wrapped = PlacementVecEnv(PlacementVectorEnv(lanes[0], 2))
    wrapped.set_attr("shaping", False)
    assert wrapped.get_attr("shaping") == [False, False]
    wrapped.reset()
    _, rewards, _, _ = wrapped.step(np.zeros(2, np.int64))
    assert rewards.tolist() == [0, 0]
    wrapped.close()
