"""Where a run's time goes: how busy each of its stages is, so that a person sees which one to make faster."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

READING = "reading"
COPYING = "copying"
SCORING = "scoring"
COMMITTING = "committing"


class Busy:
    """Seconds that each stage has worked, added up from any thread. ``clock`` gives the time in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._clock = clock
        self._began = clock()
        self._lock = threading.Lock()

    @contextmanager
    def doing(self, stage: str, workers: int = 1) -> Iterator[None]:
        """Work of one of ``workers`` that a stage has."""
        began = self._clock()
        try:
            yield
        finally:
            self.add(stage, (self._clock() - began) / workers)

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._seconds[stage] += seconds

    @property
    def shares(self) -> dict[str, float]:
        """The part of the time since the beginning that each stage worked, from 0 to 1; the busiest first."""
        elapsed = max(self._clock() - self._began, 1e-9)
        with self._lock:
            busiest = sorted(self._seconds.items(), key=lambda item: -item[1])
            return {stage: min(seconds / elapsed, 1.0) for stage, seconds in busiest}
