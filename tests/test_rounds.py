"""What a deciding run does with its rounds, on passes of made-up length."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autoplace.hardware.cluster import Cluster, Device
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.result import Candidate
from autoplace.rounds import Rounds
from autoplace.tuner import TuneConfig
from autoplace.workload import Workload


class _Passes:
    """Stands for a MeasuredEvaluator: plan after plan takes the milliseconds that it is said to take."""

    def __init__(self, *length_ms: float) -> None:
        self._length_ms = length_ms

    def evaluate_interleaved(self, plans, rounds, *, drop=None, **_):
        samples = {i: [] for i in range(len(plans))}
        running = set(samples)
        for number in range(rounds):
            for i in sorted(running):
                samples[i].append(self._length_ms[i] * (1.0 + 0.01 * ((number + i) % 3)))
            running -= set(drop(self._outcomes(samples)) if drop else ())
            if not running:
                break
        return self._outcomes(samples)

    @staticmethod
    def _outcomes(samples):
        return [Outcome(source="measured", latency_ms=s[0], samples_ms=tuple(s)) for s in samples.values()]

    def compile_s(self, plan):
        return 0.0

    def close(self):
        pass


@pytest.fixture
def run():
    """Returns the rows of a run over plans of the given milliseconds, plain PyTorch's first."""

    def beside_plain(step, plain_ms, *others_ms):
        work = Workload(model=nn.Linear(2, 2), args=(torch.randn(3, 2),))
        cluster = Cluster(devices=(Device(name="host0/cpu:0", kind="cpu", cores=(0,)),))
        none = {"record": lambda *_: None, "step": lambda *_: None}
        rounds = Rounds(work, SimpleNamespace(cluster=cluster), TuneConfig(), **none)
        rounds._evaluator = _Passes(plain_ms, plain_ms, *others_ms)
        return rounds.beside_plain([Candidate(label=str(ms), plan=Plan.plain()) for ms in others_ms], 42, step)

    return beside_plain


def test_the_deciding_run_goes_on_with_those_that_can_win(run):
    plain, slow, fast, fastest = run("decide", 10.0, 12.0, 9.0, 8.0)
    assert [len(r.measured.samples_ms) for r in (plain, slow, fast, fastest)] == [42, 7, 7, 42]
    assert slow.gain < 1.0 < fast.gain < fastest.gain


def test_the_deciding_run_ends_when_nothing_can_win(run):
    rows = run("decide", 10.0, 12.0, 11.0)
    assert [len(r.measured.samples_ms) for r in rows] == [7, 7, 7]


def test_nothing_leaves_a_screening(run):
    rows = run("screen", 10.0, 12.0, 8.0)
    assert [len(r.measured.samples_ms) for r in rows] == [42, 42, 42]
