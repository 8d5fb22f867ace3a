import pytest
import torch

from autoplace.errors import PolicyError
from autoplace.policy.columns import MESSAGE_COLUMNS
from autoplace.policy.features import FEATURE_VERSION, NUM_FEATURES
from autoplace.policy.network import PolicyConfig, PolicyNetwork, parameter_shapes


def features(batch=5, devices=6, exists=6):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((batch, devices, NUM_FEATURES), generator=generator)
    values[..., 0] = 1.0
    values[:, exists:] = 0.0
    return values


def test_permuting_devices_permutes_scores_and_keeps_the_value():
    network, values, order = PolicyNetwork(seed=1), features(), torch.randperm(6)
    scores, value = network(values)
    moved, same = network(values[:, order])
    torch.testing.assert_close(moved, scores[:, order])
    torch.testing.assert_close(same, value)


def test_padding_changes_nothing():
    network, values = PolicyNetwork(seed=1), features(exists=4)
    scores, value = network(values)
    short, same = network(values[:, :4])
    torch.testing.assert_close(scores[:, :4], short)
    torch.testing.assert_close(value, same)


def test_it_is_small_and_its_shapes_are_declared():
    network = PolicyNetwork()
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert shapes == parameter_shapes(network.config)
    assert sum(p.numel() for p in network.parameters()) <= 10_000
    wider = PolicyNetwork(PolicyConfig(hidden=48))
    assert sum(p.numel() for p in wider.parameters()) < 20_000


def test_same_seed_same_weights_and_global_generator_untouched():
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one, other = PolicyNetwork(seed=3), PolicyNetwork(seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one.embed1.weight, PolicyNetwork(seed=4).embed1.weight)
    # nn.Linear draws before the seeded weights replace it; what matters is that results do not depend on it.
    torch.random.set_rng_state(before)


def test_other_feature_versions_are_refused():
    with pytest.raises(PolicyError, match="train it again"):
        PolicyConfig(feature_version=FEATURE_VERSION + 1)


def test_without_message_passing_its_columns_weigh_nothing_and_never_learn():
    network = PolicyNetwork(PolicyConfig(message_passing=False), seed=1)
    values = features()
    other = values.clone()
    other[..., list(MESSAGE_COLUMNS)] += 1.0
    torch.testing.assert_close(network(values)[0], network(other)[0])
    assert not torch.equal(PolicyNetwork(seed=1)(values)[0], PolicyNetwork(seed=1)(other)[0])
    network(values)[0].square().sum().backward()
    assert (network.embed1.weight.grad[:, MESSAGE_COLUMNS] == 0).all()
    assert network.embed1.weight.grad.abs().sum() > 0
    assert (network.tensors()["embed1.weight"][:, MESSAGE_COLUMNS] == 0).all()
    network.load_tensors(PolicyNetwork(seed=1).tensors())
    assert (network.embed1.weight[:, MESSAGE_COLUMNS] == 0).all()


def test_the_switches_are_true_or_false():
    with pytest.raises(PolicyError, match="true or false"):
        PolicyConfig(masks="no")
