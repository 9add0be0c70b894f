"""Keys: the MD5 of a manifest path, and finding many of them at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import islice

import numpy as np

try:  # the interpreter's own: for short texts, OpenSSL spends more on its contexts than on the digest (0.57, 0.34 µs)
    from _md5 import md5 as _md5  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    _md5 = hashlib.md5

NO_LABEL = -1
"""Stands beside a key where its sample has no label, or must not show it."""
_TOP = 1 << 16
"""So many halves of keys are kept beside an array at most: half a megabyte."""
_CHUNK = 1 << 16
"""Keys that are made, looked up, or looked at, together."""


def sample_key(file: str) -> str:
    """MD5 of the path's UTF-8 bytes exactly as the manifest writes it: 32 hex digits, the name of the stored row."""
    digest: str = _md5(file.encode("utf-8"), usedforsecurity=False).hexdigest()
    return digest


def keys_of(files: Iterable[str]) -> np.ndarray:
    """``[N, 16]`` u1: the MD5 keys of manifest paths."""
    left = iter(files)
    found = []
    while names := [file.encode("utf-8") for file in islice(left, _CHUNK)]:
        found.append(keys_of_bytes(names))
    return found[0] if len(found) == 1 else np.concatenate([np.empty((0, 16), np.uint8), *found])


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
    halves = keys.view(">u8")[:, 0]
    for start in range(0, len(keys) - 1, _CHUNK):  # memory does not grow with the keys
        high = halves[start : start + _CHUNK + 1].astype(np.uint64)
        tied = np.flatnonzero(high[1:] <= high[:-1]) + start
        if not all(keys[at].tobytes() < keys[at + 1].tobytes() for at in tied.tolist()):
            return False
    return True


class KeyFinder:
    """Finds keys, many at once, in sorted ``[N, 16]`` arrays as they lie there; a few halves of keys are kept beside.

    Args:
        parts: each ascending; equal keys may follow each other. Of several each has greater keys than the one before.
        bases: what numbers count from in each part; by default one goes on where the one before ended.
    """

    def __init__(self, *parts: np.ndarray, bases: Sequence[int] | None = None) -> None:
        starts = np.cumsum([0, *map(len, parts)]) if bases is None else np.array(bases, np.int64)
        self._parts = [
            (_Sorted(keys), int(base)) for keys, base in zip(parts, starts.tolist(), strict=False) if len(keys)
        ]

    def __len__(self) -> int:
        return sum(len(part.halves) for part, _ in self._parts)

    @cached_property
    def _ends(self) -> np.ndarray:
        """``[2, parts]`` u8: the high halves of each part's first and last key."""
        halves = [part.halves[[0, -1], 0] for part, _ in self._parts]
        return np.array(halves, np.uint64).reshape(-1, 2).T

    def find(self, keys: np.ndarray) -> np.ndarray:
        """First number of each of ``[Q, 16]`` keys, int64, ``-1`` where there is none."""
        words = np.ascontiguousarray(keys).view(np.uint64)
        high = words[:, 0].view(">u8").astype(np.uint64)
        order = np.argsort(high)  # neighbours in the array are looked up one after the other: several times as fast
        high, words = high[order], words.take(order, 0)
        found = np.full(len(keys), -1, np.int64)  # in that order
        for start in range(0, len(keys), _CHUNK):  # what is made on the way stays in the processor's cache
            chunk = slice(start, start + _CHUNK)
            self._find_sorted(high[chunk], words[chunk], found[chunk])
        in_turn = np.empty_like(found)
        in_turn[order] = found
        return in_turn

    def _find_sorted(self, high: np.ndarray, words: np.ndarray, found: np.ndarray) -> None:
        """Put the numbers of keys, ascending by their high half, into ``found``, which is all ``-1``."""
        if len(self._parts) == 1 and not self._parts[0][1]:
            self._parts[0][0].find(high, words, found)
            return
        first, last = self._ends
        starts, stops = np.searchsorted(high, first), np.searchsorted(high, last, "right")
        for number in np.flatnonzero(stops > starts).tolist():
            (part, base), mine = self._parts[number], slice(starts[number], stops[number])
            at = np.empty(stops[number] - starts[number], np.int64)
            part.find(high[mine], words[mine], at)
            # Two parts may meet within one high half: what one lacks, the other may have found.
            np.copyto(found[mine], at + base, where=at >= 0)

    def is_same(self, other: KeyFinder) -> bool:
        """Whether another finds the same keys under the same numbers, as it would from equal arrays."""
        return self is other or (
            [base for _, base in self._parts] == [base for _, base in other._parts]
            and all(np.array_equal(a.words, b.words) for (a, _), (b, _) in zip(self._parts, other._parts, strict=True))
        )


class _Sorted:
    """One sorted array of keys."""

    def __init__(self, keys: np.ndarray) -> None:
        self.words = keys.view(np.uint64)
        self.halves = keys.view(">u8")  # [N, 2]
        self._stride = 1 << (max(0, len(keys) - 1) // _TOP).bit_length()

    @cached_property
    def _top(self) -> np.ndarray:
        """The high half of every so many keys, at most `_TOP` of them."""
        return self.halves[:: self._stride, 0].astype(np.uint64)

    def find(self, high: np.ndarray, words: np.ndarray, found: np.ndarray) -> None:
        """Put the first position of each key into ``found``, ``-1`` where there is none.

        ``high`` are the ascending high halves of the keys' ``words`` (``[Q, 2]`` u8 as they lie there).
        """
        position = self._lower(high)
        found[:] = -1
        pending = np.flatnonzero(position < len(self.words))
        # Two keys rarely share their first eight bytes; where they do, step on until the rest matches too.
        while len(pending):
            at = position[pending]
            same = self.words.take(at, 0) == words.take(pending, 0)
            hit = same[:, 0] & same[:, 1]
            found[pending[hit]] = at[hit]
            pending = pending[same[:, 0] & ~hit]
            position[pending] += 1
            pending = pending[position[pending] < len(self.words)]

    def _lower(self, high: np.ndarray) -> np.ndarray:
        """Where the first high half lies that is not below each of these: the top says about where, then halving."""
        position = np.searchsorted(self._top, high)
        if self._stride == 1:
            return position
        whole = self.words.view("V16").reshape(-1)  # one item a key: taking items is a copy each
        position = np.maximum(position - 1, 0) * self._stride
        for step in (*(self._stride >> each for each in range(1, self._stride.bit_length())), 1):
            looked_at = whole.take(position + (step - 1), mode="clip").view(">u8")[::2]
            position += (looked_at < high) * step
        found: np.ndarray = np.minimum(position, len(whole))
        return found
