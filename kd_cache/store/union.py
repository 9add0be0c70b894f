"""The union of a teacher's packs: which rows there are, without any file that says so; and one pack made of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.errors import CorruptError, shown
from kd_cache.keys import KeyFinder, key_columns, sorted_order
from kd_cache.store.file_names import FileNames, stretches
from kd_cache.store.origin import Origin
from kd_cache.store.pack import Pack, row_checksums, write_pack

PACK_BYTES = 8 << 30
"""The size that a merged pack is not expected to exceed."""
_MOST_BITS = 16
_BESIDE_A_ROW = 48
"""Bytes that a row takes besides its values, but for its name: key, input digest, checksum, offset."""


class Union:
    """All rows of packs that share one origin, by key and then by pack name, packs called as in ``first`` first.

    The same key may occur more than once: scored twice by two processes (equal input, the first pack wins) or scored
    again after its feature changed (another input). A *position* is an index into this order.

    Attributes:
        packs: in that order; where they follow each other without a key in common, in key order.
        stood: those called as in ``first``.
    """

    def __init__(self, packs: Sequence[Pack], first: Collection[str] = ()) -> None:
        self.packs = sorted(packs, key=lambda pack: (pack.path.name not in first, pack.path.name))
        if len({pack.origin.views for pack in self.packs}) != 1:
            raise ValueError("a union needs at least one pack, and all of the same views")
        self.stood = [pack for pack in self.packs if pack.path.name in first]
        self._single = len(self.packs) == 1
        self._order: np.ndarray | None = None
        self.keys = self.packs[0].keys
        if not self._single:
            in_turn = sorted(self.packs, key=lambda pack: pack.keys[0].tobytes())
            apart = all(one.keys[-1].tobytes() < next_.keys[0].tobytes() for one, next_ in pairwise(in_turn))
            self.packs = in_turn if apart else self.packs
            self.keys = np.concatenate([pack.keys for pack in self.packs])
            if not apart:
                self._order = sorted_order(self.keys)  # stable, so equal keys stay in the order of their packs
                self.keys = self.keys[self._order]
        self.finder = KeyFinder(self.keys)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def origin(self) -> Origin:
        return self.packs[0].origin

    @cached_property
    def pack_no(self) -> np.ndarray:
        """``[M]`` int32, the pack of each position."""
        return self._merged([np.full(len(pack), number, np.int32) for number, pack in enumerate(self.packs)])

    @cached_property
    def row_no(self) -> np.ndarray:
        """``[M]`` int64, the row of each position in its pack."""
        return self._merged([np.arange(len(pack)) for pack in self.packs])

    @cached_property
    def inputs(self) -> np.ndarray:
        """``[M, 16]`` u1, the input digest of each position."""
        return self._merged([pack.inputs for pack in self.packs])

    @cached_property
    def checksums(self) -> np.ndarray:
        """``[M]`` u8, the checksum of each position as it is stored."""
        return self._merged([pack.checksums for pack in self.packs])

    def _merged(self, columns: list[np.ndarray]) -> np.ndarray:
        """A column of every pack, in the order of the positions."""
        if self._single:
            return columns[0]
        merged: np.ndarray = np.concatenate(columns)
        return merged if self._order is None else merged[self._order]

    @cached_property
    def repeats(self) -> np.ndarray:
        """``[M]`` bool: the key is the same as the position's before."""
        same = np.zeros(len(self), bool)
        if self._order is not None:
            same[1:] = (self.keys[1:] == self.keys[:-1]).all(axis=1)
        return same

    def find(self, keys: np.ndarray) -> np.ndarray:
        """First position of each of ``[Q, 16]`` keys, ``-1`` where there is none."""
        return self.finder.find(keys)

    def match(self, keys: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        """First position with this key *and* this input digest, ``-1`` where there is none: the fresh rows."""
        position = self.find(keys)
        found = np.full(len(keys), -1, np.int64)
        pending = np.flatnonzero(position >= 0)
        while len(pending):
            hit = (self.inputs[position[pending]] == inputs[pending]).all(axis=1)
            found[pending[hit]] = position[pending[hit]]
            pending = pending[~hit]
            position[pending] += 1
            pending = pending[position[pending] < len(self)]
            pending = pending[self.repeats[position[pending]]]
        return found

    def take(self, positions: np.ndarray) -> np.ndarray:
        """``[Q, C]`` rows as stored."""
        if self._single:
            return self.packs[0].logits.take(positions, axis=0)
        out = np.empty((len(positions), self.origin.width), self.origin.stored)
        for number, rows, mine in self._by_pack(positions):
            out[mine] = self.packs[number].logits[rows]
        return out

    def take_draws(self, positions: np.ndarray) -> np.ndarray | None:
        """``[Q, V · D]`` u4: what was drawn for the views of rows; ``None`` where there are none."""
        if self.packs[0].draws is None:
            return None
        out = np.empty((len(positions), self.packs[0].draws.shape[1]), np.uint32)
        for number, rows, mine in self._by_pack(positions):
            out[mine] = self.packs[number].draws[rows]  # type: ignore[index]  # packs of one origin all have some
        return out

    def unlike(self, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """``[Q]`` bool: which of these rows, as `take` gave them, their checksum is not of."""
        if all(pack.whole is None for pack in self.packs):
            keys, inputs, draws = self.keys[positions], self.inputs[positions], self.take_draws(positions)
            return row_checksums(self.origin.fingerprint, keys, inputs, rows, draws) != self.checksums[positions]  # type: ignore[no-any-return]
        wrong = np.zeros(len(positions), bool)
        for number, mine, at in self._by_pack(positions):
            wrong[at] = np.isin(mine, self.packs[number].wrong_rows(mine))
        return wrong

    def _by_pack(self, positions: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Each pack that holds some of these: its number, its rows, and where those stand among the positions."""
        if self._single:
            yield 0, positions, np.arange(len(positions))
            return
        numbers, rows = self.pack_no[positions], self.row_no[positions]
        order = np.argsort(numbers, kind="stable")
        starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
        for mine in np.split(order, starts[1:]) if len(order) else []:
            yield int(numbers[mine[0]]), rows[mine], mine

    def file_bytes(self, positions: np.ndarray) -> list[bytes]:
        """The manifest path of each position, UTF-8."""
        pairs = zip(self.pack_no[positions].tolist(), self.row_no[positions].tolist(), strict=True)
        return [self.packs[pack].file_bytes(row) for pack, row in pairs]

    def names(self, positions: np.ndarray) -> FileNames:
        """The manifest paths of these positions."""
        lengths = np.empty(len(positions), np.int64)
        for number, rows, mine in self._by_pack(positions):
            lengths[mine] = self.packs[number].name_lengths(rows)

        def blob(part: slice) -> np.ndarray:
            ends = np.cumsum(lengths[part])
            found = np.empty(ends[-1], np.uint8)
            for number, rows, mine in self._by_pack(positions[part]):
                held = lengths[part][mine]
                found[stretches(ends[mine] - held, held)] = self.packs[number].names_blob(rows)
            return found

        return FileNames(lengths, blob)

    def files(self, positions: np.ndarray) -> list[str]:
        """The manifest path of each position. Raises `CorruptError` if one is not UTF-8."""
        pairs = zip(self.pack_no[positions].tolist(), self.row_no[positions].tolist(), strict=True)
        return [self.packs[pack].file(row) for pack, row in pairs]

    def disagreements(self) -> list[str]:
        """Files scored twice from one input with different results (the row of the first pack counts)."""
        again = np.flatnonzero(self.repeats)
        first = self.match(self.keys[again], self.inputs[again])
        item = self.origin.stored.itemsize
        ours, theirs = (self.take(part).view(f"u{item}") for part in (again, first))
        differing = again[(ours != theirs).any(axis=1)]
        return list(dict.fromkeys(self.files(differing)))


@dataclass(frozen=True)
class Merged:
    """What `merge_packs` did: wanted rows that no pack holds, how many rows it left out, and repeats that differ.

    ``paths`` are the packs of the result in key order, without a key in common, ``merged`` those that they stand for.
    These are to be removed once the index says so.
    """

    paths: list[Path]
    absent: np.ndarray  # [Q] bool, of the wanted keys
    left_out: int
    disagreements: list[str]
    merged: list[Path]


def merge_packs(
    directory: Path,
    union: Union | None,
    keys: np.ndarray,
    inputs: np.ndarray,
    required: np.ndarray | None = None,
    unread: np.ndarray | None = None,
    pack_bytes: int = PACK_BYTES,
) -> Merged:
    """Merge packs into one, or a few, that hold exactly the wanted rows. Nothing is removed.

    Args:
        directory: where the result is to be.
        union: the packs, ``None`` for none; they may be another cache's.
        keys, inputs: ``[Q, 16]`` u1, the rows to keep, keys ascending. A row with another input digest is stale.
        required: ``[Q]`` bool; if one of these rows is absent, nothing is written.
        unread: ``[Q]`` bool; nobody knows the input of these now: the first row of their key is kept.
        pack_bytes: where one pack would be larger, there are 2, 4, 8 … of them, each of the keys that begin alike.

    Equal rows give equal bytes, whatever packs they came in; a pack that already holds just its rows stays as it is.
    """
    if union is None:
        return Merged([], np.ones(len(keys), bool), 0, [], [])
    positions = union.match(keys, inputs)
    if unread is not None:
        positions[unread] = union.find(keys[unread])
    absent = positions < 0
    if required is not None and (absent & required).any():
        return Merged([], absent, 0, [], [])
    positions = positions[~absent]
    left_out = int((~union.repeats).sum()) - len(positions)
    disagreements = union.disagreements()
    paths = [_as_one_pack(directory, union, part) for part in _split(union, positions, pack_bytes)]
    merged = [pack.path for pack in union.packs if pack.path not in paths]
    return Merged(paths, absent, left_out, disagreements, merged)


def _split(union: Union, positions: np.ndarray, pack_bytes: int) -> Iterator[np.ndarray]:
    """Positions in key order, by the first k bits of their keys: with the smallest k that leaves no more in a pack.

    Keys are spread evenly, so their number says how many bytes a pack has. Another number of rows may give another k.
    """
    row = union.origin.width * union.origin.stored.itemsize + _BESIDE_A_ROW
    row += 0 if union.packs[0].draws is None else union.packs[0].draws[:1].nbytes
    size = len(positions) * row + int(union.names(positions).lengths.sum())
    bits = min(_MOST_BITS, max(0, -(-size // pack_bytes) - 1).bit_length())
    prefixes = (
        key_columns(union.keys[positions])[0] >> np.uint64(64 - bits) if bits else np.zeros(len(positions), np.uint8)
    )
    for start, stop in pairwise(
        [*np.flatnonzero(np.diff(prefixes, prepend=prefixes[:1] + 1)).tolist(), len(positions)]
    ):
        yield positions[start:stop]


def _as_one_pack(directory: Path, union: Union, positions: np.ndarray) -> Path:
    """The pack of just these rows: the one that there is already, or a new one."""
    path = _single_pack(union, positions)
    if path is not None and path.parent == directory:  # else it is another cache's
        return path
    return write_pack(
        directory,
        union.origin,
        union.keys[positions],
        union.inputs[positions],
        union.names(positions),
        lambda part: carried_over(union, positions[part]),
        draws=taken_draws(union, positions),
    )


def taken_draws(union: Union, positions: np.ndarray) -> Callable[[slice], Any] | None:
    """What `write_pack` takes the draws of these rows by; ``None`` where there are none."""
    return (lambda part: union.take_draws(positions[part])) if union.origin.views else None


def carried_over(union: Union, positions: np.ndarray) -> np.ndarray:
    """Rows as they are stored. Raises `CorruptError` for one that its checksum is not of: it must not get a new one."""
    rows = union.take(positions)
    wrong = positions[union.unlike(positions, rows)]
    if len(wrong):
        path, file = union.packs[int(union.pack_no[wrong[0]])].path, union.files(wrong[:1])[0]
        raise CorruptError(
            f"the pack {shown(path)} is damaged: the row of {shown(file)} does not match its checksum",
            hint="kd-cache repair scores it again.",
        )
    return rows


def _single_pack(union: Union, positions: np.ndarray) -> Path | None:
    """The pack that already is the result."""
    numbers = set(union.pack_no[positions].tolist())
    packs = [union.packs[number] for number in numbers]
    is_it = len(packs) == 1 and len(packs[0]) == len(positions) and packs[0].whole is None
    return packs[0].path if is_it else None
