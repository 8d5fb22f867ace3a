import torch
from torch import nn

from autoplace.measure.memory import PeakMemory, SavedBytes, host_free_bytes


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
