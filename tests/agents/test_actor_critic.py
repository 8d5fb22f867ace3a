import numpy as np
import torch
from gymnasium import spaces

from autoplace.agents.actor_critic import PlacementActorCritic
from autoplace.policy.features import NUM_FEATURES
from autoplace.policy.network import PolicyNetwork


def test_it_is_the_policy_network_with_masks():
    network = PolicyNetwork(seed=1)
    policy = PlacementActorCritic(
        spaces.Box(-10, 10, (4, NUM_FEATURES), np.float32),
        spaces.Discrete(4),
        lambda _: 1e-3,
        tensors=network.tensors(),
    )
    observation = torch.randn((6, 4, NUM_FEATURES), generator=torch.Generator().manual_seed(0))
    observation[..., 0] = 1.0
    mask = np.tile([True, False, True, False], (6, 1))
    scores, value = network(observation)
    actions, values, log_prob = policy(observation, action_masks=mask)
    assert set(actions.tolist()) <= {0, 2}
    torch.testing.assert_close(values.squeeze(-1), value)
    expected = scores.masked_fill(~torch.from_numpy(mask), -1e8).log_softmax(-1)
    torch.testing.assert_close(log_prob, expected[torch.arange(6), actions])
    again, same, entropy = policy.evaluate_actions(observation, actions, torch.from_numpy(mask))
    torch.testing.assert_close(same, log_prob)
    torch.testing.assert_close(again, values)
    assert entropy is not None and (entropy <= np.log(2) + 1e-6).all()
    torch.testing.assert_close(policy.predict_values(observation), values)
    best = policy.get_distribution(observation, mask).get_actions(deterministic=True)
    torch.testing.assert_close(best, expected.argmax(-1))
