"""Keys: the MD5 of a manifest path, and finding many of them at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import islice, pairwise

import numpy as np

try:  # the interpreter's own: for short texts, OpenSSL spends more on its contexts than on the digest (0.57, 0.34 µs)
    from _md5 import md5 as _md5  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    _md5 = hashlib.md5

NO_LABEL = -1
"""Stands beside a key where its sample has no label, or must not show it."""
_BLOCK = 65_536
_BLOCK = 4096
"""Keys that are searched, or looked at, together."""
_CHUNK = 1 << 16
_MANY = 128
"""From so many queries a block on it is cheaper to bring the block into native order than to halve it for each."""


def sample_key(file: str) -> str:
    """MD5 of the path's UTF-8 bytes exactly as the manifest writes it: 32 hex digits, the name of the stored row."""
    digest: str = _md5(file.encode("utf-8"), usedforsecurity=False).hexdigest()
    return digest


def keys_of(files: Iterable[str]) -> np.ndarray:
    """``[N, 16]`` u1: the MD5 keys of manifest paths."""
    left = iter(files)
    found = []
    while names := [file.encode("utf-8") for file in islice(left, _BLOCK)]:
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
    """Finds keys, many at once, in sorted ``[N, 16]`` arrays as they lie there: of every 4,096th a half is kept beside.

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
        first, last = self._ends
        starts, stops = np.searchsorted(high, first), np.searchsorted(high, last, "right")
        for number in np.flatnonzero(stops > starts).tolist():
            (part, base), mine = self._parts[number], slice(starts[number], stops[number])
            at = part.find(high[mine], words[mine])
            # Two parts may meet within one high half: what one lacks, the other may have found.
            np.copyto(found[mine], at + base, where=at >= 0)
        in_turn = np.empty_like(found)
        in_turn[order] = found
        return in_turn

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

    @cached_property
    def _top(self) -> np.ndarray:
        """The high half of every `_BLOCK`-th key."""
        return self.halves[::_BLOCK, 0].astype(np.uint64)

    def find(self, high: np.ndarray, words: np.ndarray) -> np.ndarray:
        """First position of each key, ``-1`` where there is none; ``high`` are the ascending high halves of the keys'
        ``words`` (``[Q, 2]`` u8 as they lie there).
        """
        position = self._in_blocks(high) if len(high) > _MANY * (len(self._top) - 1) else self._by_halving(high)
        found = np.full(len(high), -1, np.int64)
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
        return found

    def _in_blocks(self, high: np.ndarray) -> np.ndarray:
        """Where the first high half lies that is not below each of these. Each block is brought into native order."""
        position = np.zeros(len(high), np.int64)
        bounds = [*np.searchsorted(high, self._top, "right").tolist(), len(high)]
        for number, (start, stop) in enumerate(pairwise(bounds)):
            if stop > start:
                block = self.halves[number * _BLOCK : (number + 1) * _BLOCK, 0].astype(np.uint64)
                np.add(np.searchsorted(block, high[start:stop]), number * _BLOCK, out=position[start:stop])
        return position

    def _by_halving(self, high: np.ndarray) -> np.ndarray:
        """The same for few keys: each looks at thirteen halves."""
        whole = self.words.view("V16").reshape(-1)  # one item a key: taking items is a copy each
        position = np.maximum(np.searchsorted(self._top, high) - 1, 0) * _BLOCK
        for step in (*(_BLOCK >> each for each in range(1, _BLOCK.bit_length())), 1):
            looked_at = whole.take(position + (step - 1), mode="clip").view(">u8")[::2]
            position += (looked_at < high) * step
        found: np.ndarray = np.minimum(position, len(whole))
        return found
