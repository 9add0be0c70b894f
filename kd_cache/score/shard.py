"""Scored rows on their way to disk: one small durable pack per teacher every few seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kd_cache.files.atomic import make_directory
from kd_cache.keys import are_ascending, keys_of_bytes, sorted_order
from kd_cache.store.origin import Origin
from kd_cache.store.pack import write_pack

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
            inputs = np.concatenate([inputs for _, inputs, _, _ in batches])
            names = [name for _, _, names, _ in batches for name in names]
            logits = np.concatenate([logits for _, _, _, logits in batches])
            if not are_ascending(keys):
                order = sorted_order(keys)
                keys, inputs, logits = keys[order], inputs[order], logits[order]
                names = [names[number] for number in order.tolist()]
            path = write_pack(self._directory, self._origins[teacher], keys, inputs, names, logits.__getitem__)
            self.written.append(path)
            del self._rows[teacher], self._counts[teacher]
