import numpy as np
import pytest
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


@pytest.mark.parametrize("states", [40, 700])
def test_padding_and_groups_change_nothing_but_rounding(states):
    generator, network = torch.Generator().manual_seed(1), PolicyNetwork(seed=1)
    policy = PlacementActorCritic(
        spaces.Box(-10, 10, (9, NUM_FEATURES), np.float32),
        spaces.Discrete(9),
        lambda _: 1e-3,
        tensors=network.tensors(),
    )
    present = torch.randint(1, 8, (states,), generator=generator)
    exists = torch.arange(9) < present[:, None]
    observation = torch.randn((states, 9, NUM_FEATURES), generator=generator) * exists[..., None]
    observation[..., 0] = exists.float()
    mask = exists & (torch.rand((states, 9), generator=generator) < 0.7)
    mask[:, 0] = True
    actions = mask.int().argmax(dim=-1)
    values, log_probs, entropy = policy.evaluate_actions(observation, actions, mask)
    scores, value = network(observation)
    expected = scores.masked_fill(~mask, -1e8).log_softmax(-1)
    torch.testing.assert_close(values.squeeze(-1), value)
    torch.testing.assert_close(log_probs, expected.gather(-1, actions[:, None]).squeeze(-1))
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=expected).entropy())
    log_probs.sum().backward()
    scores.masked_fill(~mask, -1e8).log_softmax(-1).gather(-1, actions[:, None]).sum().backward()
    for name, parameter in policy.network.named_parameters():
        wanted = dict(network.named_parameters())[name].grad
        if wanted is not None:
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-4)


def test_actions_are_drawn_from_the_softmax_of_the_allowed_devices():
    network = PolicyNetwork(seed=3)
    policy = PlacementActorCritic(
        spaces.Box(-10, 10, (4, NUM_FEATURES), np.float32),
        spaces.Discrete(4),
        lambda _: 1e-3,
        tensors=network.tensors(),
    )
    observation = torch.randn((1, 4, NUM_FEATURES), generator=torch.Generator().manual_seed(5)).repeat(20_000, 1, 1)
    observation[..., 0], observation[:, 3] = 1.0, 0.0
    mask = np.tile([True, True, False, True], (20_000, 1))
    mask[:, 3] = False
    torch.manual_seed(0)
    actions, _, log_probs = policy(observation, action_masks=mask)
    wanted = network(observation[:1])[0][0, :2].softmax(-1)
    shares = torch.bincount(actions, minlength=4) / 20_000
    assert shares[2:].tolist() == [0, 0] and wanted.min() > 0.02
    torch.testing.assert_close(shares[:2], wanted, rtol=0, atol=0.015)
    torch.testing.assert_close(log_probs, wanted.log()[actions])
