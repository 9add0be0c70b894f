"""Shards on their way to disk, one at a time, beside the scoring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.score.job import DumpJob
from kd_cache.score.shard import Shard
from kd_cache.score.stages import COMMITTING, Busy
from kd_cache.store.pending import PendingRecord
from kd_cache.watch import Watcher

Entries = Callable[[], Mapping[str, Mapping[str, Any]]]


class Commits:
    """Takes scored rows; makes them durable in a thread of its own, a shard at a time, and tells when they are.

    Args:
        entries: gives what the pending record says of each teacher, asked for before the first shard.
    """

    def __init__(self, job: DumpJob, pending: PendingRecord, entries: Entries, watcher: Watcher, busy: Busy) -> None:
        self._job, self._pending, self._entries, self._watcher, self._busy = job, pending, entries, watcher, busy
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._running: Future[None] | None = None
        self._shard = self._empty()
        self._is_lost = False  # a shard could not be committed: what comes after it is kept, but not told to be saved
        self.written: list[Path] = []

    def add(self, teacher: str, keys: np.ndarray, inputs: np.ndarray, files: list[str], rows: np.ndarray) -> None:
        """Rows ``[n, C]`` of a teacher in the stored dtype, the samples' keys and digests ``[n, 16]`` u1, and paths."""
        self._shard.add_rows(teacher, keys, inputs, [file.encode() for file in files], rows)

    def advance(self, done: int) -> None:
        """The run is through with ``done`` samples: commit their rows if there are enough of them, or it is time."""
        if self._shard.due:
            self._wait()
            self._hand_over(done)

    def finish(self, done: int) -> None:
        """Commit what is left, also when stopping. Raises what a commit raised."""
        try:
            self._wait()
        finally:
            try:
                if not self._shard.is_empty:
                    self._hand_over(done)
                self._wait()
            finally:
                self._thread.shutdown(wait=False)

    def _hand_over(self, done: int) -> None:
        shard, self._shard = self._shard, self._empty()
        self._running = self._thread.submit(self._commit, shard, self._first_entries(), done)

    def _commit(self, shard: Shard, entries: Mapping[str, Mapping[str, Any]] | None, done: int) -> None:
        with self._busy.doing(COMMITTING):
            if entries is not None:
                self._pending.write(entries, {})
            shard.commit()
        self.written += shard.written
        if not self._is_lost:
            self._watcher.saved(done)

    def _first_entries(self) -> Mapping[str, Mapping[str, Any]] | None:
        """What the pending record is to say: before the first pack, it says what is being made."""
        return None if self._pending.is_written else self._entries()

    def _wait(self) -> None:
        """Until nothing is being committed, whatever signals come meanwhile: it takes seconds, and is worth them."""
        interrupt: BaseException | None = None
        while (running := self._running) is not None:
            try:
                wait([running])
                self._running = None
                running.result()
            except BaseException as error:
                if self._running is None:
                    self._is_lost = True
                    raise
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _empty(self) -> Shard:
        return Shard(self._job.folder.packs_path, self._job.origins, self._job.shard_size, self._job.shard_seconds)
