"""Scored rows on their way to disk: one small durable pack per teacher every few seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

from kd_cache.store.atomic import make_directory
from kd_cache.store.keys import keys_of_bytes, sorted_order
from kd_cache.store.pack import Origin, write_pack

_Rows = tuple[np.ndarray, np.ndarray, Sequence[bytes], np.ndarray]  # keys, inputs, names, logits


class Shard:
    """Scored rows that are not committed yet.

    Args:
        directory: where packs live.
        origins: what makes each teacher's rows.
        size, seconds: a commit is due after so many samples, or so long after the first one.
    """

    def __init__(self, directory: Path, origins: Mapping[str, Origin], size: int, seconds: float) -> None:
        self._directory = directory
        self._origins = origins
        self._size = size
        self._seconds = seconds
        self._rows: dict[str, list[_Rows]] = {}
        self._counts: dict[str, int] = {}
        self._since = time.monotonic()
        self.written: list[Path] = []

    def add(self, teacher: str, file: str, digest: bytes, row: np.ndarray) -> None:
        """One row. `add_rows` takes a whole batch in the time of one."""
        names = [file.encode()]
        self.add_rows(teacher, keys_of_bytes(names), np.frombuffer(digest, np.uint8)[None], names, row[None])

    def add_rows(
        self, teacher: str, keys: np.ndarray, inputs: np.ndarray, names: Sequence[bytes], logits: np.ndarray
    ) -> None:
        """A batch of rows.

        Args:
            keys, inputs: ``[n, 16]`` u1: the samples' keys and the digests of their features.
            names: their n manifest paths, UTF-8.
            logits: ``[n, C]`` in the stored dtype. Kept as they are: do not write into them afterwards.
        """
        if not len(keys) == len(inputs) == len(names) == len(logits):
            raise ValueError(f"{len(keys)} keys, {len(inputs)} inputs, {len(names)} names, {len(logits)} rows")
        if not len(keys):
            return
        if self.is_empty:
            self._since = time.monotonic()
        self._rows.setdefault(teacher, []).append((keys, inputs, names, logits))
        self._counts[teacher] = self._counts.get(teacher, 0) + len(keys)

    @property
    def is_empty(self) -> bool:
        return not self._rows

    @property
    def due(self) -> bool:
        if self.is_empty:
            return False
        return max(self._counts.values()) >= self._size or time.monotonic() - self._since >= self._seconds

    def commit(self) -> None:
        """One durable pack per teacher; after this returns its rows survive a crash."""
        if self._rows:
            make_directory(self._directory)
        while self._rows:
            teacher, batches = next(iter(self._rows.items()))
            keys = np.concatenate([keys for keys, _, _, _ in batches])
            order = sorted_order(keys)
            inputs = np.concatenate([inputs for _, inputs, _, _ in batches])[order]
            names = [name for _, _, names, _ in batches for name in names]
            logits = np.concatenate([logits for _, _, _, logits in batches])[order]
            ordered = [names[number] for number in order.tolist()]
            path = write_pack(self._directory, self._origins[teacher], keys[order], inputs, ordered, logits.__getitem__)
            self.written.append(path)
            del self._rows[teacher], self._counts[teacher]


class Commits:
    """Shards that a thread commits while the next one fills. Use it in a ``with`` statement.

    A shard is handed over with a *mark*, whatever the caller counts by. What `durable` returns is the mark of the last
    shard whose packs are on the disk: rows count as kept only then. What goes wrong in the thread is raised by the next
    call of `hand_over`, `durable` or `finish`; from then on the mark stays. At most two shards are in memory.
    """

    def __init__(self, directory: Path, origins: Mapping[str, Origin], size: int, seconds: float) -> None:
        self._arguments = (directory, origins, size, seconds)
        self.filling = Shard(*self._arguments)
        self.written: list[Path] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._running: tuple[Shard, int, Future[None]] | None = None
        self._mark = 0
        self._failed = False

    def __enter__(self) -> Commits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def hand_over(self, mark: int) -> None:
        """Have what was added so far committed; waits for the shard before, if that is not durable yet."""
        self._settle(wait=True)
        if self.filling.is_empty:
            self._advance(mark)
            return
        shard, self.filling = self.filling, Shard(*self._arguments)
        self._running = (shard, mark, self._pool.submit(shard.commit))

    def durable(self) -> int:
        """The mark up to which everything is on the disk; does not wait."""
        self._settle(wait=False)
        return self._mark

    def finish(self, mark: int) -> None:
        """Hand over the rest and wait until it is durable. Nothing is lost if it is called twice."""
        self.hand_over(mark)
        self._settle(wait=True)

    def _settle(self, *, wait: bool) -> None:
        if self._running is None:
            return
        shard, mark, running = self._running
        if not (wait or running.done()):
            return
        try:
            running.result()
        except BaseException:
            self._failed = running.done()  # it is not, where Ctrl-C ended the waiting
            raise
        finally:
            if running.done():
                self.written += shard.written  # some teachers' packs may be there although the next one failed
                self._running = None
        self._advance(mark)

    def _advance(self, mark: int) -> None:
        """Rows that were lost lie below every later mark."""
        if not self._failed:
            self._mark = mark
