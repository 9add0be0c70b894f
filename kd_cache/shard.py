"""Scored rows on their way to disk: one small durable pack per teacher every few seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kd_cache.store.atomic import make_directory
from kd_cache.store.keys import keys_of
from kd_cache.store.pack import Origin, write_pack


class Shard:
    """Scored rows that are not committed yet."""

    def __init__(self, directory: Path, origins: Mapping[str, Origin], size: int, seconds: float) -> None:
        self._directory = directory
        self._origins = origins
        self._size = size
        self._seconds = seconds
        self._rows: dict[str, list[tuple[bytes, bytes, bytes, np.ndarray]]] = {}
        self._since = time.monotonic()
        self.written: list[Path] = []

    def add(self, teacher: str, file: str, digest: bytes, row: np.ndarray) -> None:
        name = file.encode()
        self._rows.setdefault(teacher, []).append((keys_of([file]).tobytes(), digest, name, row))

    @property
    def is_empty(self) -> bool:
        return not self._rows

    @property
    def due(self) -> bool:
        largest = max(map(len, self._rows.values()), default=0)
        late = time.monotonic() - self._since >= self._seconds
        return largest >= self._size or (late and largest > 0)

    def commit(self) -> None:
        """One durable pack per teacher; after this returns its rows survive a crash."""
        if self._rows:
            make_directory(self._directory)
        while self._rows:
            teacher, rows = next(iter(self._rows.items()))
            rows.sort(key=lambda row: row[0])
            keys = np.frombuffer(b"".join([key for key, _, _, _ in rows]), np.uint8).reshape(-1, 16)
            inputs = np.frombuffer(b"".join([digest for _, digest, _, _ in rows]), np.uint8).reshape(-1, 16)
            logits = np.stack([row for _, _, _, row in rows])
            path = write_pack(
                self._directory,
                self._origins[teacher],
                keys,
                inputs,
                [file for _, _, file, _ in rows],
                logits.__getitem__,
            )
            self.written.append(path)
            del self._rows[teacher]
        self._since = time.monotonic()
