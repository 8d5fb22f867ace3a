"""Watches the latency of a model's calls under a plan and says when it has drifted. Knows nothing of models and plans.

The baseline is the median of the first `window` calls. Drift is when more than half of the last `window` calls took
longer than

    baseline * max(threshold, 1 + 3 * noise)        → `Monitor.observe`

so that single slow calls do not count. Keeping a count instead of sorting makes a call cost about a microsecond.

1. What the host's clock sees is watched: in training the forward alone, and on a GPU the time to queue the work, which
   follows the GPU's own time only once its queue is full.
2. A baseline that was learned in a busy moment comes down: when a whole window is faster than it by the same factor,
   that window's median replaces it.
3. Whoever acts on a drift calls `reset`. From then on drift is reported again only after a number of calls that doubles
   each time, so that a plan on an unsteady machine is not looked into for ever.
"""

from __future__ import annotations

import statistics
import threading

from autoplace.errors import InputError

__all__ = ["Monitor"]


class Monitor:
    """Compares the latency of recent calls with a baseline; may be fed from any thread.

    Args:
        expected_ms: The baseline, ms; None learns it from the first `window` calls.
        noise: Run-to-run noise as a fraction (0.03 = three percent).
        window: Calls that are looked at together.
        threshold: Ratio to the baseline that is never called drift.
        patience: Calls after the first `reset` before drift is reported again; doubles with each further one.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self,
        expected_ms: float | None = None,
        *,
        noise: float = 0.0,
        window: int = 32,
        threshold: float = 1.25,
        patience: int = 256,
    ) -> None:
        if window < 2 or threshold <= 1.0 or patience < 1 or noise < 0.0:
            raise InputError(
                f"a monitor with window {window}, threshold {threshold}, patience {patience} and noise {noise} cannot "
                "tell drift; use window >= 2, threshold > 1, patience >= 1 and noise >= 0"
            )
        self.noise = noise
        self.calls = 0
        """Calls observed in all."""
        self.other_calls = 0
        """Calls that could not be compared, as their inputs were of other shapes."""
        self.due = False
        """Whether drift stands and may be acted on; what the last `observe` returned."""
        self._threshold, self._patience = threshold, patience
        self._wait = 0
        self._lock = threading.Lock()
        self._ring = [0.0] * window
        self._forget(expected_ms)

    def __repr__(self) -> str:
        """Say how things stand."""
        expected, now = self.expected_ms, self.latency_ms
        return (
            f"Monitor(expected {f'{expected:.3g} ms' if expected is not None else 'not known yet'}, "
            f"now {f'{now:.3g} ms' if now is not None else 'not known yet'}, {self.calls} calls, "
            f"{self.other_calls} of other shapes{', drifted' if self.due else ''})"
        )

    @property
    def expected_ms(self) -> float | None:
        """The baseline, ms; None until it is learned."""
        return self._expected_ms

    @property
    def latency_ms(self) -> float | None:
        """Median of the last calls, ms, a window at most; None before the first."""
        with self._lock:
            return self._median() if self._seen else None

    def observe(self, latency_ms: float) -> bool:
        """Add one call.

        Args:
            latency_ms: How long it took.

        Returns:
            True when the recent calls have drifted and enough calls have passed since the last `reset`.
        """
        with self._lock:
            slot = self._seen % len(self._ring)
            before, self._ring[slot] = self._ring[slot], latency_ms
            self._seen += 1
            self.calls += 1
            if self._expected_ms is not None:
                self._over += (latency_ms > self._limit_ms) - (before > self._limit_ms)
            if slot == len(self._ring) - 1:
                self._learn()
            self.due = 2 * self._over > len(self._ring) and self._seen >= self._wait
            return self.due

    def observe_other(self) -> None:
        """Count one call that cannot be compared with the others."""
        with self._lock:
            self.other_calls += 1

    def reset(self, expected_ms: float | None = None) -> None:
        """Forget the recent calls and wait twice as long as last time before drift is reported again.

        Args:
            expected_ms: The new baseline, ms; None learns it from the next calls.
        """
        with self._lock:
            self._wait = max(self._patience, 2 * self._wait)
            self._forget(expected_ms)

    def _forget(self, expected_ms: float | None) -> None:
        self._ring = [0.0] * len(self._ring)
        self._seen = self._over = 0
        self.due = False
        self._expect(expected_ms)

    def _expect(self, expected_ms: float | None) -> None:
        self._expected_ms = expected_ms
        self._factor = max(self._threshold, 1.0 + 3.0 * self.noise)
        self._limit_ms = float("inf") if expected_ms is None else expected_ms * self._factor
        self._over = sum(sample_ms > self._limit_ms for sample_ms in self._ring)

    def _learn(self) -> None:
        """Take a full window's median as the baseline if there is none, or a far higher one."""
        median_ms = self._median()
        if self._expected_ms is None or median_ms * self._factor < self._expected_ms:
            self._expect(median_ms)

    def _median(self) -> float:
        return statistics.median(self._ring[: min(self._seen, len(self._ring))])
