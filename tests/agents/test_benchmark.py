import math

import pytest

from autoplace.agents.benchmark import _find, _slots, benchmark_problems, is_binding
from autoplace.agents.distribution import HELD_OUT_FAMILIES, TRAIN_MODELS


@pytest.fixture(scope="module")
def found():
    return benchmark_problems(seed=0, captured=False)


def test_it_is_as_wide_as_the_benchmark_asks(found):
    small = [b for b in found if "small" in b.tags]
    large = [b for b in found if "small" not in b.tags]
    assert len(large) == 48 and len(small) == 8
    count = {tag: sum(tag in b.tags for b in large) for tag in ("operator", "memory", "latency", "throughput")}
    assert count["operator"] >= 12 and count["memory"] >= 12 and count["latency"] == count["throughput"] == 24
    assert {b.problem.num_devices for b in large} >= {2, 4, 8, 16}
    assert all(500 <= b.problem.num_ops <= 2500 for b in large if "operator" in b.tags)
    assert all(b.problem.num_ops <= 12 and b.problem.num_devices <= 3 for b in small)
    special = [b.problem for b in large if "special" in b.tags]
    assert {p.semantics.microbatches for p in special} == {1, 4} and any(p.objective.energy_weight for p in special)


def test_memory_binds_where_it_says_so_and_only_held_out_families_appear(found):
    for b in found:
        limited = any(math.isfinite(d.memory_bytes) for d in b.problem.cluster.devices)
        assert is_binding(b.problem) if "memory" in b.tags else limited or "memory" not in b.tags
        assert b.problem.name.split("-")[2] in HELD_OUT_FAMILIES


def test_the_seed_alone_decides(found):
    again = benchmark_problems(seed=0, captured=False)
    assert [b.problem.fingerprint for b in again] == [b.problem.fingerprint for b in found]


def test_half_of_it_is_captured_from_models_that_training_never_sees():
    pytest.importorskip("transformers")
    slots = [slot for slot in _slots() if slot.model is not None]
    assert len(slots) == 24 and not {slot.model for slot in slots} & set(TRAIN_MODELS)
    found = _find(0, next(slot for slot in slots if slot.model == "convnext"))
    assert "captured" in found.tags and "convnext" in found.problem.name and found.problem.graph.flops.sum() > 0
