"""Module paths in few words."""

import pytest

from autoplace.report.places import module_ranges, paths_on


@pytest.mark.parametrize(
    ("paths", "texts"),
    [
        ([], []),
        (["a"], ["a"]),
        ([f"h.{i}" for i in (3, 0, 1, 2)], ["h.0-3"]),
        (["embed", "h.0", "h.1", "h.9", "head"], ["embed", "h.0-1,9", "head"]),
        (["h.0.attn", "h.1.attn", "h.0.mlp"], ["h.0-1.attn", "h.0.mlp"]),
        ([f"h.{i}.experts.{j}" for i in range(2) for j in range(3)], ["h.0-1.experts.0-2"]),
        (["0", "1", "2"], ["0-2"]),
        (["lm_head", "lm_head#1"], ["lm_head", "lm_head#1"]),
    ],
)
def test_paths_that_differ_in_a_number_become_ranges(paths, texts):
    assert module_ranges(paths) == texts


def test_a_device_is_given_the_largest_modules_that_it_has_wholly():
    groups = {"embed": "a", "h.0.attn": "a", "h.0.mlp": "a", "h.1.attn": "a", "h.1.mlp": "b", "h.1.mlp~backward": "a"}
    assert paths_on("a", groups) == ["embed", "h.0", "h.1.attn"]
    assert paths_on("b", groups) == ["h.1.mlp"]
    assert paths_on("a", {"x": "a", "y.0": "a"}) == [""]
    assert paths_on("a", {".": "a"}) == [""]
    assert paths_on("a", {"h.0+h.1": "a", "head": "b"}) == ["h"]


def test_a_module_whose_calls_are_on_two_devices_keeps_the_calls_apart():
    groups = {"emb": "a", "emb#1": "b", "head": "b"}
    assert paths_on("a", groups) == ["emb"] and paths_on("b", groups) == ["emb#1", "head"]
