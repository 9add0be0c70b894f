"""Scored rows on their way to disk: one small durable pack per teacher every few seconds, beside the scoring."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.files.atomic import make_directory, remove_files
from kd_cache.files.turns import in_turn
from kd_cache.keys import KeyFinder, are_ascending, keys_of_bytes, sorted_order
from kd_cache.score.job import DumpJob
from kd_cache.score.stages import COMMITTING, Busy
from kd_cache.store.origin import Origin
from kd_cache.store.pack import Pack, write_pack
from kd_cache.store.pending import PendingRecord
from kd_cache.store.snapshot import Snapshot
from kd_cache.store.union import Union, merge_packs
from kd_cache.watch import Watcher

_Rows = tuple[np.ndarray, np.ndarray, Sequence[bytes], np.ndarray, np.ndarray | None]
"""Keys, inputs, names, logits, and draws where there are views."""


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
        self,
        teacher: str,
        keys: np.ndarray,
        inputs: np.ndarray,
        names: Sequence[bytes],
        logits: np.ndarray,
        draws: np.ndarray | None = None,
    ) -> None:
        """A batch of rows.

        Args:
            keys, inputs: ``[n, 16]`` u1: the samples' keys and the digests of their features.
            names: their n manifest paths, UTF-8.
            logits: ``[n, C]`` in the stored dtype. Kept as they are: do not write into them afterwards.
            draws: ``[n, D]`` u4 where they are of a view.
        """
        if not len(keys) == len(inputs) == len(names) == len(logits):
            raise ValueError(f"{len(keys)} keys, {len(inputs)} inputs, {len(names)} names, {len(logits)} rows")
        if not len(keys):
            return
        if self.is_empty:
            self._since = time.monotonic()
        self._rows.setdefault(teacher, []).append((keys, inputs, names, logits, draws))
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
            keys, inputs, logits = (np.concatenate([rows[column] for rows in batches]) for column in (0, 1, 3))
            names = [name for _, _, names, _, _ in batches for name in names]
            drawn = [draws for *_, draws in batches if draws is not None]
            draws = np.concatenate(drawn) if drawn else None
            if not are_ascending(keys):
                order = sorted_order(keys)
                keys, inputs, logits = keys[order], inputs[order], logits[order]
                draws = None if draws is None else draws[order]
                names = [names[number] for number in order.tolist()]
            taken = None if draws is None else draws.__getitem__
            path = write_pack(
                self._directory, self._origins[teacher], keys, inputs, names, logits.__getitem__, draws=taken
            )
            self.written.append(path)
            del self._rows[teacher], self._counts[teacher]


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
        self._is_told = False
        self._is_lost = False  # a shard could not be committed: what comes after it is kept, but not told to be saved
        self.written: list[Path] = []

    def add(
        self,
        teacher: str,
        keys: np.ndarray,
        inputs: np.ndarray,
        files: list[str],
        rows: np.ndarray,
        draws: np.ndarray | None = None,
    ) -> None:
        """Rows ``[n, C]`` of a teacher in the stored dtype, the samples' keys and digests ``[n, 16]`` u1, and paths."""
        self._shard.add_rows(teacher, keys, inputs, [file.encode() for file in files], rows, draws)

    def advance(self, done: int) -> None:
        """So many samples have their rows now: commit those if there are enough of them, or it is time."""
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
        """What the pending record is to say: before the first pack, it says what is being made.

        It does so again where another dump, which had the rows of until then as well, took it for finished.
        """
        told, self._is_told = self._is_told and self._pending.path.exists(), True
        return None if told else self._entries()

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


def merge_commits(snapshot: Snapshot, origins: Mapping[str, Origin], keys: np.ndarray, inputs: np.ndarray) -> None:
    """Make one pack per teacher and view of what a part committed, in several runs too, durably before those go.

    Taken are packs of nothing but rows of these ``keys`` ``[n, 16]``, ascending, and ``inputs``, which are the part's:
    no row goes. What an index names by now stays. Raises `StoreError`; every row stays committed.
    """
    finder = KeyFinder(keys)

    def is_own(pack: Pack) -> bool:
        at = finder.find(pack.keys)
        return bool((at >= 0).all() and (inputs[at] == pack.inputs).all())

    with in_turn(snapshot.folder.path):
        snapshot = snapshot.again()
        named = {*snapshot.served_paths(snapshot.origins)}
        for origin in origins.values():
            own = [pack for pack in snapshot.packs.of(origin) if pack.path not in named and is_own(pack)]
            for views in {pack.origin.views for pack in own}:
                packs = [pack for pack in own if pack.origin.views == views]
                if len(packs) > 1:
                    made = merge_packs(snapshot.folder.packs_path, Union(packs), keys, inputs)
                    remove_files(snapshot.folder.packs_path, made.merged)
