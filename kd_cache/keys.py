"""Keys: the MD5 of a manifest path, and finding many of them at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property

import numpy as np

try:  # the interpreter's own: for short texts, OpenSSL spends more on its contexts than on the digest (0.57, 0.34 µs)
    from _md5 import md5 as _md5  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    _md5 = hashlib.md5

NO_LABEL = -1
"""Stands beside a key where its sample has no label, or must not show it."""


def sample_key(file: str) -> str:
    """MD5 of the path's UTF-8 bytes exactly as the manifest writes it: 32 hex digits, the name of the stored row."""
    digest: str = _md5(file.encode("utf-8"), usedforsecurity=False).hexdigest()
    return digest


def keys_of(files: Iterable[str]) -> np.ndarray:
    """``[N, 16]`` u1: the MD5 keys of manifest paths."""
    return keys_of_bytes([file.encode("utf-8") for file in files])


def keys_of_bytes(names: Iterable[bytes]) -> np.ndarray:
    """``[N, 16]`` u1: the MD5 keys of manifest paths that are UTF-8 already."""
    joined = b"".join([_md5(name, usedforsecurity=False).digest() for name in names])
    return np.frombuffer(joined, np.uint8).reshape(-1, 16)


def key_columns(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``[N, 16]`` u1 keys as two ``[N]`` u8 columns that compare as the keys do."""
    halves = np.ascontiguousarray(keys).view(">u8").reshape(-1, 2)
    return halves[:, 0].astype(np.uint64), halves[:, 1].astype(np.uint64)


def sorted_order(keys: np.ndarray) -> np.ndarray:
    """The order that sorts keys, stable."""
    high, low = key_columns(keys)
    return np.lexsort((low, high))


def are_ascending(keys: np.ndarray) -> bool:
    """Whether each of ``[N, 16]`` keys is greater than the one before."""
    high = keys.view(">u8")[:, 0].astype(np.uint64)
    tied = np.flatnonzero(high[1:] <= high[:-1])
    return all(keys[at].tobytes() < keys[at + 1].tobytes() for at in tied.tolist())


class KeyFinder:
    """Finds keys in a sorted ``[N, 16]`` array, many at once. Equal keys may follow each other."""

    def __init__(self, keys: np.ndarray) -> None:
        self._keys = keys

    @cached_property
    def _high(self) -> np.ndarray:
        return key_columns(self._keys)[0]

    def _low(self, positions: np.ndarray) -> np.ndarray:
        low: np.ndarray = self._keys.view(">u8")[:, 1][positions].astype(np.uint64)
        return low

    def find(self, keys: np.ndarray) -> np.ndarray:
        """First position of each of ``[Q, 16]`` keys, int64, ``-1`` where there is none."""
        high, low = key_columns(keys)
        order = np.argsort(high)  # neighbours in the array are looked up one after the other: several times as fast
        high, low = high[order], low[order]
        position = np.searchsorted(self._high, high)
        found = np.full(len(keys), -1, np.int64)  # in that order
        there = np.flatnonzero(position < len(self._keys))
        pending = there[self._high[position[there]] == high[there]]
        # Two keys rarely share their first eight bytes; where they do, step on until the rest matches too.
        while len(pending):
            at = position[pending]
            hit = self._low(at) == low[pending]
            found[pending[hit]] = at[hit]
            pending = pending[~hit]
            position[pending] += 1
            pending = pending[position[pending] < len(self._keys)]
            pending = pending[self._high[position[pending]] == high[pending]]
        in_turn = np.empty_like(found)
        in_turn[order] = found
        return in_turn
