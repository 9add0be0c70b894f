"""Packs side by side: the rows of many files under one number each, gathered as if they were one array."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from kd_cache.files.mapped import expect_random, side_by_side
from kd_cache.keys import KeyFinder
from kd_cache.store.origin import Origin
from kd_cache.store.pack import CHECKED_AT_ONCE, Pack
from kd_cache.store.take import take_rows

_STEP_BITS = 12
STEP = 1 << _STEP_BITS
"""Each pack's rows count from a multiple of this, so that rows of any size begin at a page's border there."""


class RowNumbers:
    """Which numbers are rows: those of each pack follow its base. Up to the next base they are nobody's.

    Attributes:
        bases: ``[P]`` int64, multiples of `STEP`, beginning with 0.
        limit: one more than the largest number.
        has_holes: whether numbers below that are nobody's.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = np.array(counts, np.int64)
        spans = -(-self._counts // STEP) * STEP
        self.bases = np.cumsum(spans) - spans
        self.limit = int(self.bases[-1] + self._counts[-1])
        self._count = int(self._counts.sum())
        self.has_holes = self._count < self.limit

    def __len__(self) -> int:
        """How many rows there are."""
        return self._count

    def all(self) -> np.ndarray:
        """``[N]`` int64, ascending."""
        spans = zip(self.bases.tolist(), self._counts.tolist(), strict=True)
        return np.concatenate([np.arange(base, base + count) for base, count in spans])

    @cached_property
    def _ends(self) -> np.ndarray:
        """``[blocks]`` u8, for every `STEP` numbers: up to where they are rows."""
        ends: np.ndarray = np.arange(STEP, self.limit + STEP, STEP, dtype=np.uint64)
        ends[(self.bases + self._counts - 1) // STEP] = self.bases + self._counts
        return ends

    def refuse_others(self, numbers: np.ndarray, first: int = 0) -> None:
        """Raise `IndexError` unless all of ``[Q]`` int64 are rows; with ``first`` -1 that may be among them."""
        if not len(numbers):
            return
        if self.has_holes:
            wrong = not self._are_rows(numbers[numbers != -1] if first else numbers)
        else:  # as unsigned numbers the negative ones are the largest: one look finds both ends
            wrong = np.maximum.reduce((numbers - first if first else numbers).view(np.uint64)) >= self.limit - first
        if not wrong:
            return
        if numbers.min() < first or numbers.max() >= self.limit:
            raise IndexError(f"rows must lie in [0, {self.limit}), found {numbers.min()} to {numbers.max()}")
        hole = next(number for number in numbers[numbers >= 0] if not self._are_rows(np.array([number])))
        raise IndexError(f"{hole} is no row: it lies between two packs; all_rows() gives the numbers of rows")

    def _are_rows(self, numbers: np.ndarray) -> bool:
        # Those beyond either end are compared with the last or the first block's, as unsigned numbers all too large.
        ends = self._ends.take(numbers >> _STEP_BITS, 0, None, "clip")
        return bool(np.count_nonzero(numbers.view(np.uint64) < ends) == len(numbers))


class Shelf:
    """Packs of one origin; a row's number is its pack's base and its row there.

    Where it can be had, all rows lie in one stretch of addresses, each at its number (`logits`); else they are gathered
    pack by pack. Numbers that are given must be rows.

    Raises:
        CorruptError: from what reads rows, keys or names, where packs are checked as they are read.
    """

    def __init__(self, packs: Sequence[Pack]) -> None:
        self.numbers = RowNumbers([len(pack) for pack in packs])
        self.logits: np.ndarray | None = packs[0].logits if len(packs) == 1 else _together(packs, self.numbers)
        self._unchecked = packs[0].unchecked if len(packs) == 1 else _to_check(packs, self.numbers)
        self.packs = list(packs) if len(packs) == 1 else list(map(self._placed, packs, self.numbers.bases.tolist()))

    def _placed(self, pack: Pack, base: int) -> Pack:
        """A pack as it stands here: what is served of it is what is checked."""
        logits = pack.logits if self.logits is None else self.logits[base : base + len(pack)]
        if pack.unchecked is None or self._unchecked is None:
            return replace(pack, logits=logits)
        block = base // CHECKED_AT_ONCE
        return replace(pack, logits=logits, unchecked=self._unchecked[block : block + len(pack.unchecked)])

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def origin(self) -> Origin:
        return self.packs[0].origin

    @property
    def is_lazy(self) -> bool:
        """Whether rows are checked as they are read."""
        return self._unchecked is not None

    @cached_property
    def finder(self) -> KeyFinder:
        """Finds numbers by key, where packs are in key order."""
        return KeyFinder(*(pack.keys for pack in self.packs), bases=self.numbers.bases.tolist())

    @property
    def keys(self) -> np.ndarray:
        """``[N, 16]`` u1, pack after pack; of several packs a copy."""
        return self.packs[0].keys if len(self.packs) == 1 else np.concatenate([pack.keys for pack in self.packs])

    def touch(self, numbers: np.ndarray) -> None:
        """Check these rows where packs are checked as they are read, each the first time."""
        unchecked = self._unchecked  # another thread may be done with the last one meanwhile
        if unchecked is None or not (pending := unchecked[numbers // CHECKED_AT_ONCE]).any():
            return
        for pack, rows, _ in self.by_pack(numbers[pending]):
            pack.touch(rows)
        if not unchecked.any():
            self._unchecked = None  # every block was looked at: nothing is left to ask

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """``[Q, C]`` rows as stored."""
        rows = self.packs[0].logits
        out = np.empty((len(numbers), *rows.shape[1:]), rows.dtype)
        self.take_into(numbers, out)
        return out

    def take_into(self, numbers: np.ndarray, out: np.ndarray) -> None:
        """Copy rows into contiguous ``[Q, C]``."""
        if self._unchecked is not None:
            self.touch(numbers)
        if self.logits is not None:
            take_rows(self.logits, numbers, out)
            return
        for pack, rows, mine in self.by_pack(numbers):
            out[mine] = pack.logits[rows]

    def fill(self, out: np.ndarray) -> None:
        """Copy every row to its number in ``[limit, C]``. What is between packs is left as it is."""
        for pack, base in zip(self.packs, self.numbers.bases.tolist(), strict=True):
            if pack.unchecked is not None:
                pack.touch(np.arange(len(pack)))
            out[base : base + len(pack)] = pack.logits

    def column(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """What packs hold beside these rows: ``inputs`` ``[Q, 16]`` u1 or ``checksums`` ``[Q]`` u8."""
        self.touch(numbers)
        column: np.ndarray = getattr(self.packs[0], name)
        if len(self.packs) == 1:
            found: np.ndarray = column[numbers]
            return found
        out = np.empty((len(numbers), *column.shape[1:]), column.dtype)
        for pack, rows, mine in self.by_pack(numbers):
            out[mine] = getattr(pack, name)[rows]
        return out

    def files(self, numbers: np.ndarray) -> list[str]:
        """The manifest path of each row."""
        self.touch(numbers)
        if len(self.packs) == 1:
            return list(map(self.packs[0].file, numbers.tolist()))
        files = np.empty(len(numbers), object)
        for pack, rows, mine in self.by_pack(numbers):
            files[mine] = list(map(pack.file, rows.tolist()))
        found: list[str] = files.tolist()
        return found

    def expect_random(self) -> None:
        """Have no more of mapped files read than is asked for."""
        for array in [pack.logits for pack in self.packs] if self.logits is None else [self.logits]:
            expect_random(array)

    def by_pack(self, numbers: np.ndarray) -> Iterator[tuple[Pack, np.ndarray, np.ndarray | slice]]:
        """Each pack that holds some of these: itself, the rows in it, and where those stand among the numbers."""
        if len(self.packs) == 1:
            yield self.packs[0], numbers, slice(None)
            return
        holders = np.searchsorted(self.numbers.bases, numbers, "right") - 1
        order = np.argsort(holders, kind="stable")
        bounds = np.searchsorted(holders[order], np.arange(len(self.packs) + 1))
        for number, (start, stop) in enumerate(pairwise(bounds.tolist())):
            if stop > start:
                mine = order[start:stop]
                yield self.packs[number], numbers[mine] - self.numbers.bases[number], mine


def _together(packs: Sequence[Pack], numbers: RowNumbers) -> np.ndarray | None:
    """``[limit, C]``: every row at its number. ``None`` where that cannot be had."""
    first = packs[0].logits
    width = first.nbytes // len(first)
    places = (numbers.bases * width).tolist()
    parts = [(pack.logits, pack.path, place) for pack, place in zip(packs, places, strict=True)]
    stretch = side_by_side(parts, numbers.limit * width)
    return None if stretch is None else stretch.view(first.dtype).reshape(numbers.limit, *first.shape[1:])


def _to_check(packs: Sequence[Pack], numbers: RowNumbers) -> np.ndarray | None:
    """``[blocks]`` bool, of blocks of all numbers: which are still to be checked. ``None`` for none."""
    if all(pack.unchecked is None for pack in packs):
        return None
    found = np.zeros(-(-numbers.limit // CHECKED_AT_ONCE), bool)
    for pack, base in zip(packs, numbers.bases.tolist(), strict=True):
        if pack.unchecked is not None:
            block = base // CHECKED_AT_ONCE
            found[block : block + len(pack.unchecked)] = pack.unchecked
    return found
