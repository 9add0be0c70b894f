"""The driver: hands out parts, tries again those whose process died, and stops at the first error of a part."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kd_cache.cluster.ray_tasks import Cluster, Crashed
from kd_cache.cluster.worker import PartReport
from kd_cache.errors import KDCacheError, worst_exit_code
from kd_cache.watch import Stopped, Watcher

ATTEMPTS = 3
"""A part whose process died so often is given up: something in it kills the process."""
_PATIENCE = 10.0
"""Seconds that interrupted parts have to commit what they have scored."""


def parts_of(samples: int, slots: int) -> int:
    """How many parts by default: several for each slot, so that none is waited for long, but none too small."""
    return max(1, min(max(4 * slots, -(-samples // 65_536)), samples // 256))


@dataclass
class PartsRun:
    """All parts of a dump on a cluster; ``where`` says what samples a part has."""

    cluster: Cluster
    count: int
    where: Callable[[tuple[int, int]], str]
    watcher: Watcher
    reports: list[PartReport] = field(default_factory=list)
    attempts: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._left = deque(range(self.count))
        self._running: dict[Any, int] = {}
        self._errors: list[KDCacheError] = []
        self._given_up: list[KDCacheError] = []

    def run(self) -> None:
        """Until every part has ended, in some way.

        Raises:
            KDCacheError: the worst error (`worst_exit_code`). After one that a part gave, no further part is started;
                after a part was given up, the others are. What was scored stays committed.
        """
        try:
            while self._running or self._left:
                while self._left and len(self._running) <= self.cluster.slots():  # one waits: a cluster grows for it
                    number = self._left.popleft()
                    self.attempts[number] += 1
                    self._running[self.cluster.submit((number, self.count))] = number
                for reference in self.cluster.wait(list(self._running), 1.0):
                    self._ended(reference, self._running.pop(reference))
                self.watcher.advance(0)
        except (KeyboardInterrupt, Stopped):
            self._interrupt()
            raise
        found = [*self._errors, *self._given_up]
        if found:
            code = worst_exit_code(error.exit_code for error in found)
            worst = next(error for error in found if error.exit_code == code)
            for other in {error.message for error in found} - {worst.message}:
                self.watcher.note(f"another part failed: {other}")
            raise worst

    def _ended(self, reference: Any, number: int) -> None:
        try:
            outcome = self.cluster.result(reference)
        except Crashed as crash:
            self._crashed(number, str(crash))
            return
        if isinstance(outcome, KDCacheError):
            self._errors.append(outcome)
            self._left.clear()
            return
        self.reports.append(outcome)
        for note in outcome.notes:
            self.watcher.note(note)
        self.watcher.parts(len(self.reports), self.count)
        self.watcher.advance(outcome.samples)

    def _crashed(self, number: int, why: str) -> None:
        if self.attempts[number] < ATTEMPTS:
            if not self._errors:
                self.watcher.note(f"part {number} of {self.count} is started again after {why}")
                self._left.append(number)
            return
        self._given_up.append(
            KDCacheError(
                f"part {number} of {self.count} ({self.where((number, self.count))}) ended {ATTEMPTS} times without a "
                f"word: {why}",
                hint="Its teacher may crash, or need more memory than there is, for one of these samples. What other "
                "parts scored is committed; the same command goes on from there.",
            )
        )

    def _interrupt(self) -> None:
        """Let what runs commit what it has scored."""
        until = time.monotonic() + (_PATIENCE if self.cluster.interrupt() else 0)
        while self._running and (left := until - time.monotonic()) > 0:
            for reference in self.cluster.wait(list(self._running), left):
                del self._running[reference]
