from hypothesis import given, settings
from hypothesis import strategies as st

from autoplace.graph.stages import in_order, strong_components, to_stages


@st.composite
def graphs(draw, *, acyclic=True):
    count = draw(st.integers(1, 14))
    pairs = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1))
    edges = draw(st.lists(pairs, max_size=3 * count))
    successors = [set() for _ in range(count)]
    for a, b in edges:
        if a != b:
            successors[min(a, b) if acyclic else a].add(max(a, b) if acyclic else b)
    return successors


def reach(successors):
    """Per node the nodes that can be reached from it, itself included."""
    found = []
    for start in range(len(successors)):
        seen, todo = {start}, [start]
        while todo:
            for other in successors[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        found.append(seen)
    return found


@given(graphs(acyclic=False))
@settings(max_examples=200, deadline=None)
def test_strong_components_are_what_reaches_each_other(successors):
    reached = reach(successors)
    components = strong_components(successors)
    assert sorted(n for c in components for n in c) == list(range(len(successors)))
    of = {n: i for i, c in enumerate(components) for n in c}
    for a in range(len(successors)):
        for b in reached[a]:
            assert of[a] <= of[b], "topological"
            assert (of[a] == of[b]) == (a in reached[b])


@given(graphs(), st.data())
@settings(max_examples=300, deadline=None)
def test_stages_have_one_device_each_no_cycle_and_no_needless_waiting(successors, data):
    count = len(successors)
    devices = data.draw(st.lists(st.sampled_from("ABC"), min_size=count, max_size=count))
    small = data.draw(st.sampled_from([0.0, 1.0, 2.0]))
    stages = to_stages(successors, devices, [1.0] * count, small)
    assert sorted(n for stage in stages for n in stage) == list(range(count))
    of = {n: i for i, stage in enumerate(stages) for n in stage}
    assert all(len({devices[n] for n in stage}) == 1 for stage in stages)
    assert all(of[a] <= of[b] for a in range(count) for b in successors[a]), "so stages in this order can be run"
    if small:
        return
    reached = reach(successors)
    for a in range(count):
        for b in successors[a]:
            if devices[a] == devices[b]:
                continue
            # What is handed over waits for nothing but what it depends on, or what is needed there along with it.
            for other in stages[of[a]]:
                assert a in reached[other] or b in reached[other]


def test_two_branches_and_a_join():
    #  0 → 2 ↘
    #          4      1 and 3 on the other device
    #  1 → 3 ↗
    successors = [{2}, {3}, {4}, {4}, set()]
    assert to_stages(successors, "ABABA", [1.0] * 5, 0.0) == [[0, 2], [1, 3], [4]]
    assert to_stages(successors, "AAAAA", [1.0] * 5, 0.0) == [[0, 1, 2, 3, 4]]


def test_what_the_other_device_needs_early_is_a_stage_of_its_own():
    successors = [{1, 3}, {2}, {4}, {4}, set()]
    assert to_stages(successors, "AAABB", [1.0] * 5, 0.0) == [[0], [1, 2], [3], [4]]
    assert to_stages(successors, "AAABB", [1.0, 9.0, 9.0, 1.0, 9.0], 1.0) == [[0], [1, 2], [3, 4]]


def test_small_stages_join_a_neighbour_of_their_device():
    successors = [{1, 3}, {2}, set(), set()]
    assert to_stages(successors, "ABAA", [5.0, 5.0, 5.0, 1.0], 0.0) == [[0], [1], [2], [3]]
    assert to_stages(successors, "ABAA", [5.0, 5.0, 5.0, 1.0], 2.0) == [[0, 3], [1], [2]]
    assert to_stages([set(), set()], "AA", [1.0, 1.0], 2.0) == [[0, 1]]


def test_groups_are_ordered_by_their_earliest_node():
    assert in_order([[3], [0, 2], [1]], [{3}, {3}, set(), set()]) == [[0, 2], [1], [3]]
