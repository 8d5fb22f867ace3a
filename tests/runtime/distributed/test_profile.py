"""Links on a simulated wire; real processes are those of `tests/cli/test_profile.py`."""

import pytest

from autoplace.runtime.distributed.profile import SIZES_BYTES, answer_link, time_link


class SlowWire:
    """A wire to a rank that answers at once, with a clock of its own."""

    def __init__(self, latency_s, bytes_per_s):
        self.latency_s, self.bytes_per_s = latency_s, bytes_per_s
        self.now_s, self.told, self.rounds = 0.0, [], []

    def clock(self):
        self.now_s += 1e-9
        return self.now_s

    def send(self, num_bytes):
        self.now_s += self.latency_s + num_bytes / self.bytes_per_s
        self.rounds.append(num_bytes)

    def receive(self, num_bytes):
        self.now_s += self.latency_s

    def tell(self, *numbers):
        self.told.append(numbers)


@pytest.mark.parametrize(
    ("latency_s", "bytes_per_s"), [(1e-5, 5e9), (1e-4, 125e6), (2e-3, 12.5e6), (0.05, 1e6), (1e-3, 1e5)]
)
def test_latency_and_bandwidth_are_found_within_the_budget(latency_s, bytes_per_s):
    wire = SlowWire(latency_s, bytes_per_s)
    link = time_link(wire, budget_s=2.0, clock=wire.clock)
    assert link.latency_ms == pytest.approx(latency_s * 1e3, rel=0.1)
    assert link.bytes_per_ms == pytest.approx(bytes_per_s / 1e3, rel=0.1)
    # 64 KiB are sent on any link.
    assert wire.now_s < 2.5 + 2 * (65536 / bytes_per_s + 2 * latency_s)
    assert wire.told[-1] == (0, 0)
    assert len(wire.rounds) == sum(count for _, count in wire.told)


def test_a_slow_link_is_spared_what_it_cannot_send():
    fast, slow = SlowWire(1e-4, 1e9), SlowWire(1e-4, 1e6)
    for wire in (fast, slow):
        time_link(wire, budget_s=1.0, clock=wire.clock)
    assert max(fast.rounds) == SIZES_BYTES[-1] and max(slow.rounds) < SIZES_BYTES[-1]


def test_figures_have_six_digits():
    wire = SlowWire(1.23456789e-4, 1.23456789e8)
    link = time_link(wire, budget_s=0.1, clock=wire.clock)
    assert all(len(f"{figure:g}".replace(".", "").strip("0")) <= 6 for figure in (link.latency_ms, link.bytes_per_ms))
    assert link.latency_ms == float(f"{link.latency_ms:.6g}")


def test_the_other_end_answers_until_it_is_told_to_stop():
    done = []

    class Wire:
        numbers = iter([(8, 2), (1024, 1), (0, 0)])

        def hear(self):
            return next(self.numbers)

        def receive(self, num_bytes):
            done.append(("receive", num_bytes))

        def send(self, num_bytes):
            done.append(("send", num_bytes))

    answer_link(Wire())
    assert done == [("receive", 8), ("send", 8)] * 2 + [("receive", 1024), ("send", 8)]
