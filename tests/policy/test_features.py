import numpy as np
import pytest

from autoplace.errors import InfeasibleError
from autoplace.policy.features import FEATURE_LIMIT, FEATURES, NUM_FEATURES, NUM_PAIR, PartialPlacement
from autoplace.problem import Semantics

NAMES = [name for name, _ in FEATURES]
CASES = [
    {},
    {"colocate": True, "memory": 0.5},
    {"goal": "throughput", "energy_weight": 0.5},
    {"semantics": Semantics(transfers="blocking", route="host", queue="priority", microbatches=4)},
    {"missing": ((0, 1), (1, 0)), "semantics": Semantics(contention="none")},
    {"ops": 1, "devices": 1},
    {"ops": 9, "devices": 20, "memory": 0.2},
]


def walk(placement, seed=0):
    """Place at random within the masks and yield (features, mask) of every decision."""
    random = np.random.default_rng(seed)
    placement.reset()
    while not placement.done and not placement.stuck:
        yield placement.features, placement.mask
        placement.place(int(random.choice(np.flatnonzero(placement.mask))))


@pytest.mark.parametrize("case", CASES)
def test_features_are_finite_and_bounded(problem_maker, case):
    placement = PartialPlacement(problem_maker(**case))
    seen = 0
    for features, _ in walk(placement):
        assert np.isfinite(features).all() and np.abs(features).max() <= FEATURE_LIMIT
        seen += 1
    assert placement.done and seen == placement.num_steps


def test_names_are_unique_and_match_the_columns(problem_maker):
    placement = PartialPlacement(problem_maker())
    assert len(set(NAMES)) == len(NAMES) == NUM_FEATURES == placement.features.shape[1]
    for features, mask in walk(placement):
        assert (features[:, NAMES.index("exists")] == 1).all()
        np.testing.assert_array_equal(features[:, NAMES.index("allowed")] == 1, mask)
        assert (features[:, NUM_PAIR:] == features[0, NUM_PAIR:]).all()


def test_features_are_free_of_scale(problem_maker):
    problem = problem_maker(memory=0.5, energy_weight=0.5)
    graph = problem.graph
    slower = problem.with_(latency_ms=problem.latency_ms * 1000)
    for (a, b), link in list(slower.cluster.links.items()):
        raise AssertionError(f"unexpected link {a}, {b}, {link}")
    link = slower.cluster.default_link
    cluster = type(slower.cluster)(
        devices=slower.cluster.devices,
        default_link=type(link)(latency_ms=link.latency_ms * 1000, bytes_per_ms=link.bytes_per_ms / 1000),
    )
    slower = slower.with_(cluster=cluster)
    assert slower.graph is graph
    for (one, _), (other, _) in zip(walk(PartialPlacement(problem)), walk(PartialPlacement(slower)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    "case",
    [
        {"energy_weight": 0.3, "goal": "throughput"},
        {"colocate": True, "ops": 60},
        {"semantics": Semantics(transfers="blocking", contention="none")},
    ],
)
def test_features_follow_permuted_devices(problem_maker, case):
    problem = problem_maker(**case)
    order = np.array([2, 0, 1])
    cluster = type(problem.cluster)(
        devices=tuple(problem.cluster.devices[i] for i in order), default_link=problem.cluster.default_link
    )
    moved = problem.with_(cluster=cluster, latency_ms=problem.latency_ms[:, order])
    one, other = PartialPlacement(problem), PartialPlacement(moved)
    back = np.argsort(order)
    while not one.done:
        np.testing.assert_allclose(one.features[order], other.features, atol=1e-5)
        device = one.step % 3
        one.place(device)
        other.place(int(back[device]))


def test_placing_against_the_mask_is_refused(problem_maker):
    problem = problem_maker()
    latency = problem.latency_ms.copy()
    latency[:, 1] = np.inf
    placement = PartialPlacement(problem.with_(latency_ms=latency))
    assert not placement.mask[1]
    with pytest.raises(InfeasibleError, match="device 1 is not allowed"):
        placement.place(1)


def test_actions_replay_an_assignment(problem_maker):
    problem = problem_maker(colocate=True)
    placement = PartialPlacement(problem)
    for _ in walk(placement, seed=4):
        pass
    assignment = placement.assignment
    placement.reset()
    for action in placement.actions(assignment):
        placement.place(int(action))
    np.testing.assert_array_equal(placement.assignment, assignment)


def test_without_hard_masks_only_devices_that_cannot_run_are_barred(problem_maker):
    problem = problem_maker(memory=0.001)
    latency = problem.latency_ms.copy()
    latency[:, 1] = np.inf
    placement = PartialPlacement(problem.with_(latency_ms=latency), masks=False)
    while not placement.done:
        np.testing.assert_array_equal(placement.mask, [True, False, True])
        assert np.isfinite(placement.features).all() and np.abs(placement.features).max() <= FEATURE_LIMIT
        placement.place(0)
    placement.reset()
    assert placement.mask.sum() == 2
