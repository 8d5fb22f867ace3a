import torch
from torch import nn

from autoplace.measure.memory import HeapLine, PeakMemory, SavedBytes, host_free_bytes


def test_the_peak_of_a_stretch_is_seen():
    peak = PeakMemory()
    peak.begin(trim=True)
    block = torch.ones(32 << 20, dtype=torch.uint8)
    del block
    peak.end()
    assert 30 * 2**20 < peak.host_bytes < 200 * 2**20
    largest = peak.host_bytes
    peak.begin()
    peak.end()
    assert peak.host_bytes == largest


def test_free_memory_is_a_number_of_bytes():
    assert 0 <= host_free_bytes() < 2**50


def test_saved_tensors_count_once_and_without_weights():
    model = nn.Sequential(nn.Linear(64, 64), nn.Sigmoid())
    x = torch.randn(100, 64)
    count = SavedBytes()
    with count:
        model(x)
    # x for the weight's gradient, and the sigmoid's output.
    assert count.total(model) == 2 * 100 * 64 * 4


def test_a_heap_that_grew_is_given_back_and_an_unlimited_one_is_left_alone(monkeypatch):
    from autoplace.measure import memory

    held, given = [100.0], []
    monkeypatch.setattr(memory, "process_bytes", lambda: held[0])
    monkeypatch.setattr(memory, "give_back", lambda: given.append(held[0]))
    line, without = HeapLine(200.0), HeapLine(float("inf"))
    assert given == [100.0], "what counts is what is held after the heap was given back"
    for held[0] in (100.0, 174.0, 176.0):
        line.keep()
        without.keep()
    assert given == [100.0, 176.0] and line.crossed() and not without.crossed()
