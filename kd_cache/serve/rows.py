"""One teacher's rows as a reader sees them, whether packed or left by an older script."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.errors import CorruptError, MissingLogitsError, shown
from kd_cache.files.npy import parse_header
from kd_cache.files.page_cache import expect_random, populate, read_ahead
from kd_cache.keys import KeyFinder, keys_of, sample_key, sorted_order
from kd_cache.store.pack import Pack
from kd_cache.store.permitted import Permitted
from kd_cache.store.take import take_rows
from kd_cache.store.union import Union
from kd_cache.store.view import read_row_file, view_name

_BLOCK = 16_384


@dataclass(frozen=True)
class Names:
    """UTF-8 manifest paths, each a stretch of one array of bytes."""

    blob: np.ndarray  # [M] u1
    starts: np.ndarray  # [N] int64
    lengths: np.ndarray  # [N] int64

    @classmethod
    def of(cls, names: Sequence[bytes]) -> Names:
        lengths = np.fromiter(map(len, names), np.int64, len(names))
        return cls(np.frombuffer(b"".join(names), np.uint8), np.cumsum(lengths) - lengths, lengths)

    def differ_from(self, other: Names) -> np.ndarray:
        """``[N]`` bool: which are not the same bytes."""
        differ: np.ndarray = self.lengths != other.lengths
        for length in np.unique(self.lengths[~differ]).tolist():
            same = np.flatnonzero((self.lengths == length) & ~differ)
            for start in range(0, len(same), _BLOCK):
                block = same[start : start + _BLOCK]
                differ[block] = (self._cut(block, length) != other._cut(block, length)).any(axis=1)
        return differ

    def _cut(self, numbers: np.ndarray, length: int) -> np.ndarray:
        """``[n, length]`` u1: the names of these numbers, all of one length."""
        # Every stretch of that length as one item: taking items is a copy each, without indices for their bytes.
        windows: np.ndarray = np.ndarray((len(self.blob) - length + 1,), f"V{length}", self.blob, strides=(1,))
        cut: np.ndarray = windows[self.starts[numbers]].view(np.uint8).reshape(len(numbers), length)
        return cut


class TeacherRows:
    """One teacher's rows, whatever they are stored in. A *position* counts in key order."""

    name: str
    num_classes: int
    dtype: np.dtype[Any]
    keys: np.ndarray
    finder: KeyFinder
    signature: tuple[str, ...]
    is_lazy = False  # rows are checked when they are first read

    def take(self, positions: np.ndarray) -> np.ndarray:
        """``[Q, C]`` logits."""
        raise NotImplementedError

    def take_into(self, positions: np.ndarray, out: np.ndarray) -> None:
        """The same into contiguous ``[Q, C]``. Positions are not checked: they must be some."""
        raise NotImplementedError

    def all(self) -> np.ndarray:
        """``[N, C]`` logits of all positions."""
        raise NotImplementedError

    def read_ahead(self) -> None:
        """Have mapped files read from start to end while we go on."""

    def populate(self) -> None:
        """Have all of mapped files at hand, when this returns."""

    def expect_random(self) -> None:
        """Have no more of mapped files read than is asked for."""

    def files(self, positions: np.ndarray) -> list[str]:
        raise NotImplementedError

    def names(self, positions: np.ndarray) -> Names:
        """The same as `files`, without an object for each."""
        raise NotImplementedError

    def has_names_of(self, other: TeacherRows) -> bool:
        """Whether all positions have the same names as in another, as far as that is quickly seen."""
        return False

    def is_ambiguous(self, key: np.ndarray) -> bool:
        raise NotImplementedError

    def is_promised(self, key: np.ndarray) -> bool:
        """Whether the index permits this sample, so that its row should be there."""
        return False

    def inputs(self, positions: np.ndarray) -> np.ndarray | None:
        """``[Q, 16]`` u1, the digests of the features that were scored; ``None`` where nobody knows them."""
        return None


class PackRows(TeacherRows):
    """Rows of packs of one origin: of those the ``permitted``, of a sample scored from two inputs none.

    What is the same in ``other`` (another teacher's rows under the same permission) is shared with it.
    """

    def __init__(
        self, packs: Sequence[Pack], permitted: Permitted | None = None, other: PackRows | None = None
    ) -> None:
        self._union = union = Union(packs)
        self._permitted = permitted
        self.name = union.origin.teacher
        self.num_classes = union.origin.num_classes
        self.dtype = union.origin.stored
        self.signature = tuple(pack.path.name for pack in union.packs)
        self.is_lazy = any(pack.unchecked is not None for pack in union.packs)
        self._kept: np.ndarray | None
        if other is not None and _same_keys(union, other._union):
            self._kept, self.keys, self.finder = other._kept, other.keys, other.finder
        else:
            self._kept = _kept(union, permitted)
            self.keys = union.keys if self._kept is None else union.keys[self._kept]
            self.finder = union.finder if self._kept is None else KeyFinder(self.keys)
        self._pack = union.packs[0] if self._kept is None else None

    def take(self, positions: np.ndarray) -> np.ndarray:
        return self._union.take(self._positions(positions))

    def take_into(self, positions: np.ndarray, out: np.ndarray) -> None:
        self._union.take_into(self._positions(positions), out)

    def read_ahead(self) -> None:
        for pack in self._union.packs:
            read_ahead(pack.logits)

    def populate(self) -> None:
        for pack in self._union.packs:
            populate(pack.logits)

    def expect_random(self) -> None:
        for pack in self._union.packs:
            expect_random(pack.logits)

    def inputs(self, positions: np.ndarray) -> np.ndarray:
        mine = self._positions(positions)
        self._union.touch(mine)
        found: np.ndarray = self._union.inputs[mine]
        return found

    def all(self) -> np.ndarray:
        if self._pack is not None and self._pack.unchecked is None:
            return self._pack.logits
        return self._union.take(self._positions(np.arange(len(self.keys))))

    def files(self, positions: np.ndarray) -> list[str]:
        mine = self._positions(positions)
        self._union.touch(mine)
        return self._union.files(mine)

    def _positions(self, positions: np.ndarray) -> np.ndarray:
        """Where these are in the union."""
        found: np.ndarray = positions if self._kept is None else self._kept[positions]
        return found

    def names(self, positions: np.ndarray) -> Names:
        if self._pack is None:
            return Names.of(self._union.file_bytes(self._positions(positions)))
        starts, ends = (self._pack.file_offsets[part].astype(np.int64) for part in (positions, positions + 1))
        return Names(self._pack.files_blob, starts, ends - starts)

    def has_names_of(self, other: TeacherRows) -> bool:
        mine, its = self._pack, other._pack if isinstance(other, PackRows) else None
        return (
            mine is not None
            and its is not None
            and np.array_equal(mine.file_offsets, its.file_offsets)
            and np.array_equal(mine.files_blob, its.files_blob)
        )

    def is_ambiguous(self, key: np.ndarray) -> bool:
        position = int(self._union.find(key)[0])
        return position >= 0 and bool(self._union.ambiguous[position])

    def is_promised(self, key: np.ndarray) -> bool:
        return self._permitted is not None and bool(KeyFinder(self._permitted.keys).find(key)[0] >= 0)


def _same_keys(one: Union, other: Union) -> bool:
    """Whether each is one pack, and both have the same keys."""
    return len(one.packs) == len(other.packs) == 1 and np.array_equal(
        one.keys.view(np.uint64), other.keys.view(np.uint64)
    )


def _kept(union: Union, permitted: Permitted | None) -> np.ndarray | None:
    """The positions of a union that are served; ``None`` where all of one pack are."""
    allowed = permitted is None or permitted.has_keys(union.keys)
    if allowed and len(union.packs) == 1:
        return None
    kept = ~union.repeats & ~union.ambiguous
    if not allowed and permitted is not None:
        kept &= KeyFinder(permitted.keys).find(union.keys) >= 0
    return None if len(union.packs) == 1 and kept.all() else np.flatnonzero(kept)


class OlderRows(TeacherRows):
    """Rows of a cache written by an older script: plain files, nothing to check them by."""

    def __init__(self, name: str, paths: Mapping[str, Path]) -> None:
        self.name = name
        names = list(paths)
        keys = keys_of(names)
        order = sorted_order(keys)
        self.keys = keys[order]
        self.finder = KeyFinder(self.keys)
        self._names = [names[number] for number in order]
        rows = [_older_row(paths[file], file) for file in self._names]
        if len({(len(row), row.dtype) for row in rows}) != 1:
            raise CorruptError(f"the rows of {shown(name)} differ in length or dtype, or there are none")
        self._logits = np.stack(rows)
        self.num_classes = self._logits.shape[1]
        self.dtype = self._logits.dtype
        self.signature = (hashlib.sha256(self.keys.tobytes() + self._logits.tobytes()).hexdigest(),)

    def take(self, positions: np.ndarray) -> np.ndarray:
        return self._logits.take(positions, axis=0)

    def take_into(self, positions: np.ndarray, out: np.ndarray) -> None:
        take_rows(self._logits, positions, out)

    def all(self) -> np.ndarray:
        return self._logits

    def files(self, positions: np.ndarray) -> list[str]:
        return [self._names[number] for number in positions.tolist()]

    def names(self, positions: np.ndarray) -> Names:
        return Names.of([file.encode("utf-8") for file in self.files(positions)])

    def is_ambiguous(self, key: np.ndarray) -> bool:
        return False


def _older_row(path: Path, file: str) -> np.ndarray:
    """``[C]`` from a plain ``.npy`` of an older cache."""
    if path.name != view_name(bytes.fromhex(sample_key(file))):
        raise CorruptError(f"the index names {shown(path.name)} for {shown(file)}, which is another sample's row")
    content = read_row_file(path)
    if content is None:
        raise MissingLogitsError(f"{shown(path)} is in the index, but not on disk")
    try:
        header = parse_header(content)
        if len(header.shape) != 1 or not header.shape[0] or header.size != len(content):
            raise ValueError(f"its shape is {list(header.shape)} and it has {len(content)} bytes, expected [classes]")
    except ValueError as error:
        raise CorruptError(f"{shown(path)}: {error}") from None
    row: np.ndarray = np.frombuffer(content, header.dtype, offset=header.offset)
    return row
