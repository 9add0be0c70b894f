"""Keys: the MD5 of a manifest path, as 16 bytes, and finding many of them at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np


def keys_of(files: Iterable[str]) -> np.ndarray:
    """``[N, 16]`` u1: the MD5 keys of manifest paths."""
    md5 = hashlib.md5
    joined = b"".join([md5(file.encode("utf-8"), usedforsecurity=False).digest() for file in files])
    return np.frombuffer(joined, np.uint8).reshape(-1, 16)


def key_columns(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``[N, 16]`` u1 keys as two ``[N]`` u8 columns that compare as the keys do."""
    halves = np.ascontiguousarray(keys).view(">u8").reshape(-1, 2)
    return halves[:, 0].astype(np.uint64), halves[:, 1].astype(np.uint64)


def sorted_order(keys: np.ndarray) -> np.ndarray:
    """The order that sorts keys, stable."""
    high, low = key_columns(keys)
    return np.lexsort((low, high))


class KeyFinder:
    """Finds keys in a sorted ``[N, 16]`` array, many at once. Equal keys may follow each other."""

    def __init__(self, keys: np.ndarray) -> None:
        self.high, self.low = key_columns(keys)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """First position of each of ``[Q, 16]`` keys, int64, ``-1`` where there is none."""
        high, low = key_columns(keys)
        position = np.searchsorted(self.high, high)
        found = np.full(len(keys), -1, np.int64)
        pending = np.arange(len(keys))
        # Two keys rarely share their first eight bytes; where they do, step on until the rest matches too.
        while len(pending):
            pending = pending[position[pending] < len(self.high)]
            pending = pending[self.high[position[pending]] == high[pending]]
            hit = self.low[position[pending]] == low[pending]
            found[pending[hit]] = position[pending[hit]]
            pending = pending[~hit]
            position[pending] += 1
        return found
