"""How runs are timed and compared: warm-up, then A B A B, medians, quartiles, ratios pair by pair.

Knows nothing of plans. Definitions:

- A *round* runs everything in the given order; the first `warmup` rounds are not counted. → `interleave`
- Before its timed run each gets `settle` untimed ones, so that it is timed as it would run by itself, again and again,
  and not with the caches and thread teams that its neighbour in the round left behind. Without it plain PyTorch was up
  to 30 % slower after another plan than after itself, which flatters every plan. [measured: 2 cores, BERT, 2026-11-23]
- Median and interquartile range by linear interpolation (numpy's default). → `summary`
- A *pair ratio* is sample i of A over sample i of B, both of one round, so that slow drift of a shared machine cancels;
  above 1, B is faster. → `pair_ratios`
- The *interval of a median* holds the true one with a probability of 95 % or more, whatever the distribution: of n
  sorted samples the k-th smallest to the k-th largest, k by the binomial distribution. → `median_interval`
- The *centre of pair ratios* and its interval are those of the signed-rank test (Hodges and Lehmann): the median of the
  means of all pairs of logarithms, and the means between which it lies with 95 %. It assumes that noise makes a ratio
  larger as often and as much as smaller, which holds for two plans that are equally fast, and needs about half the
  rounds of the median's interval, which at seven rounds is all of them. For steps that take a second. → `centre_of`
- *A/A noise* is the largest of |median - 1| and half the interval of that median, of the pair ratios of two series of
  the same thing. A win counts when the median pair ratio exceeds 1 by more than that. → `aa_noise`

Runs are made by the calling thread itself. A second thread that uses OpenMP has a thread team of its own; with two
teams on the same cores libgomp's threads sleep where they would spin, and plain PyTorch was 2.3 times slower in such a
thread, and beside it, than alone [measured: 2 cores, CLIP, batch 2, 2026-11-24]. A run that overruns its limit is
therefore stopped by an exception raised in the calling thread: at its next Python instruction, or where it waits for a
worker. What a worker is doing then goes on to its end there. → `Guard`
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from autoplace.errors import ExecutionError, InputError
from autoplace.interrupt import raise_in

__all__ = [
    "Guard",
    "aa_noise",
    "centre_of",
    "interleave",
    "median_interval",
    "pair_interval",
    "pair_ratios",
    "summary",
    "synchronize",
]

T = TypeVar("T")

_TICK_S = 0.05
"""How often the clock is looked at: a run may overrun by so much before it is stopped."""
_TAIL = 0.025
"""Probability on either side of the interval of a median."""
_REPEAT_S = 5.0
"""A run that goes on is stopped again after this time; sooner, it would cut clean-ups short."""


def synchronize() -> None:
    """Wait for everything queued on any GPU; nothing when CUDA is not in use."""
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)


class _Overran(BaseException):
    """Raised in the thread whose run overran; no `except Exception` on the way takes it for a failure of its own."""


class Guard:
    """Runs functions in the calling thread, and stops one that does not return in time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: tuple[int, float] | None = None
        """The thread that is in a run, and when its time is up."""
        self._closed = threading.Event()
        self._watch: threading.Thread | None = None

    def run(self, fn: Callable[[], T], limit_s: float) -> T:
        """Return what `fn` returns, raising what it raises.

        Args:
            fn: What to run. A single operation that takes long is not interrupted.
            limit_s: Seconds it may take.

        Raises:
            ExecutionError: If it takes longer.
        """
        if self._watch is None:
            self._closed.clear()
            self._watch = threading.Thread(target=self._look, name="measure limit", daemon=True)
            self._watch.start()
        threads = torch.get_num_threads()
        overran = False
        try:
            try:
                self._running = (threading.get_ident(), time.monotonic() + limit_s)
                return fn()
            finally:
                with self._lock:
                    self._running = None
        except _Overran:
            overran = True
        finally:
            if torch.get_num_threads() != threads:  # stopped where it had set a count of its own
                torch.set_num_threads(threads)
        assert overran
        raise ExecutionError(f"it did not finish within {limit_s:g} s and was stopped; allow more time or drop it")

    def _look(self) -> None:
        while not self._closed.wait(_TICK_S):
            with self._lock:
                if self._running is not None and time.monotonic() > self._running[1]:
                    ident = self._running[0]
                    self._running = (ident, time.monotonic() + _REPEAT_S)
                    raise_in(ident, _Overran)

    def close(self) -> None:
        """End the thread that looks at the clock."""
        self._closed.set()
        self._watch = None


def interleave(
    runs: Mapping[str, Callable[[], None]],
    *,
    repeats: int,
    warmup: int,
    deadline_s: float | Mapping[str, float],
    settle: int = 1,
    progress: Callable[[str, int], None] | None = None,
    before: Callable[[str], None] | None = None,
    after: Callable[[str, float], None] | None = None,
    failed: Callable[[str, Exception], None] | None = None,
    drop: Callable[[Mapping[str, Sequence[float]]], Collection[str]] | None = None,
) -> dict[str, list[float]]:
    """Time runs against each other, round by round.

    Args:
        runs: Name to what is timed.
        repeats: Counted rounds.
        warmup: Rounds before them.
        deadline_s: Seconds that one run may take; one figure, or one per name.
        settle: Untimed runs right before each counted one.
        progress: Called with name and round (0 = first warm-up) after every run.
        before: Called with the name before every run, timed or not; takes no time itself.
        after: Called with the name and the milliseconds after every counted run, untimed.
        failed: Called with the name and the exception of a run that raised or overran; it takes no further part.
            None = the exception is raised.
        drop: Asked with the samples so far after every counted round for the names that take no further part; with
            none left the run ends.

    Returns:
        Name to milliseconds, one per counted round; of a run that failed or was dropped, those before that.

    Raises:
        InputError: If `repeats` is below 1, or `warmup` or `settle` below 0.
        Exception: What a run raised, or ExecutionError where it overran, when `failed` is None.
    """
    if repeats < 1 or warmup < 0 or settle < 0:
        raise InputError(
            f"repeats {repeats}, warmup {warmup} and settle {settle} make no measurement; "
            "use repeats >= 1, warmup >= 0 and settle >= 0"
        )
    samples: dict[str, list[float]] = {name: [] for name in runs}
    alive = dict(runs)
    guard = Guard()
    try:
        for number in range(warmup + repeats):
            counted = number >= warmup
            for name, run in list(alive.items()):
                limit_s = deadline_s if isinstance(deadline_s, int | float) else deadline_s[name]
                elapsed_ms = 0.0
                try:
                    for _ in range(settle + 1 if counted else 1):
                        if before is not None:
                            before(name)
                        elapsed_ms = guard.run(lambda run=run: _time_ms(run), limit_s)  # type: ignore[misc]
                except Exception as error:
                    if failed is None:
                        raise
                    failed(name, error)
                    del alive[name]
                    continue
                if counted:
                    samples[name].append(elapsed_ms)
                    if after is not None:
                        after(name, elapsed_ms)
                if progress is not None:
                    progress(name, number)
            if counted and drop is not None:
                dropped = drop(samples)
                alive = {name: run for name, run in alive.items() if name not in dropped}
            if not alive:
                break
    finally:
        guard.close()
    return samples


def _time_ms(run: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return (time.perf_counter() - start) * 1e3


def summary(samples: Sequence[float]) -> tuple[float, float]:
    """Return the median and the interquartile range.

    Raises:
        InputError: If there are no samples.
    """
    if not len(samples):
        raise InputError("there are no samples to summarise; measure at least once")
    low, median, high = np.percentile(np.asarray(samples, float), [25, 50, 75])
    return float(median), float(high - low)


def pair_ratios(a: Sequence[float], b: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the median of a_i / b_i and its quartiles; above 1, b is faster.

    Raises:
        InputError: If the series are empty or of different length.
    """
    if len(a) != len(b) or not len(a):
        raise InputError(f"{len(a)} and {len(b)} samples do not pair; measure both in the same interleaved run")
    low, median, high = np.percentile(np.asarray(a, float) / np.asarray(b, float), [25, 50, 75])
    return float(median), (float(low), float(high))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the median; of fewer than six values, the smallest and the largest.

    Raises:
        InputError: If there are no values.
    """
    if not len(values):
        raise InputError("there are no samples to summarise; measure at least once")
    ordered, count = sorted(values), len(values)
    rank, below = 0, 0.5**count  # `below`: the probability that at most `rank` samples lie below the true median
    while below <= _TAIL:
        rank += 1
        below += math.comb(count, rank) * 0.5**count
    rank = max(rank - 1, 0)
    return ordered[rank], ordered[count - 1 - rank]


def centre_of(ratios: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the centre of pair ratios and its 95 % interval; of fewer than six, the smallest and the largest.

    Args:
        ratios: Above 0.

    Raises:
        InputError: If there are no ratios.
    """
    if not len(ratios):
        raise InputError("there are no samples to summarise; measure at least once")
    logs, count = np.log(np.asarray(ratios, float)), len(ratios)
    first, second = np.triu_indices(count)
    means = np.sort((logs[first] + logs[second]) / 2.0)
    # ways[s]: in how many of the 2^n patterns of signs the ranks of the positive ones sum up to s
    ways = np.zeros(len(means) + 1)
    ways[0] = 1.0
    for rank in range(1, count + 1):
        ways[rank:] += ways[:-rank].copy()
    below = np.cumsum(ways) / 2.0**count
    cut = int(np.searchsorted(below, _TAIL, side="right"))
    low, high = (means[cut - 1], means[len(means) - cut]) if cut else (logs.min(), logs.max())
    return float(np.exp(np.median(means))), (float(np.exp(low)), float(np.exp(high)))


def pair_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Return the `median_interval` of a_i / b_i."""
    return median_interval([x / y for x, y in zip(a, b, strict=True)])


def aa_noise(samples_a: Sequence[float], samples_a2: Sequence[float]) -> float:
    """Return the noise between two series of the same thing, as a fraction (0.03 = three percent)."""
    median, _ = pair_ratios(samples_a, samples_a2)
    low, high = pair_interval(samples_a, samples_a2)
    return max(abs(median - 1.0), (high - low) / 2.0)
