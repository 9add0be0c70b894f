"""One teacher's rows as a reader sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kd_cache.files.mapped import expect_random
from kd_cache.keys import KeyFinder
from kd_cache.store.pack import Pack
from kd_cache.store.permitted import Permitted
from kd_cache.store.union import Union

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
    """Rows of one pack: the ``permitted`` of them. A *position* counts in key order.

    What is the same in ``other`` (another teacher's rows under the same permission) is shared with it.
    """

    def __init__(self, pack: Pack, permitted: Permitted | None = None, other: TeacherRows | None = None) -> None:
        self._union = union = Union([pack])
        self._permitted = permitted
        self.name = union.origin.teacher
        self.num_classes, self.frames, self.width = union.origin.num_classes, union.origin.frames, union.origin.width
        self.views, self.policy = len(union.origin.views) or 1, union.origin.policy
        self.dtype = union.origin.stored
        self.signature = pack.path.name
        self.is_lazy = pack.unchecked is not None
        self._kept: np.ndarray | None
        self.keys: np.ndarray
        self.finder: KeyFinder
        if other is not None and _same_keys(union, other._union):
            self._kept, self.keys, self.finder = other._kept, other.keys, other.finder
        else:
            self._kept = None if permitted is None else _kept(union, permitted)
            self.keys = union.keys if self._kept is None else union.keys[self._kept]
            self.finder = union.finder if self._kept is None else KeyFinder(self.keys)
        self._pack = pack if self._kept is None else None

    def take(self, positions: np.ndarray) -> np.ndarray:
        """``[Q, C]`` logits."""
        return self._union.take(self._positions(positions))

    def take_into(self, positions: np.ndarray, out: np.ndarray) -> None:
        """The same into contiguous ``[Q, C]``. Positions are not checked: they must be some."""
        self._union.take_into(self._positions(positions), out)

    @property
    def whole(self) -> np.ndarray | None:
        """The rows as they lie in one pack, if all of them are served and checked."""
        return self._pack.logits if self._pack is not None and self._pack.unchecked is None else None

    def take_views_into(self, positions: np.ndarray, views: np.ndarray, out: np.ndarray) -> None:
        """One view of each row into ``[Q, C]``."""
        mine = self._positions(positions)
        self._union.touch(mine)
        for number, rows, at in self._union._by_pack(mine):
            each = self._union.packs[number].logits.reshape(-1, self.width // self.views)
            out[at] = each[rows * self.views + views[at]]

    def draws(self, positions: np.ndarray) -> np.ndarray | None:
        """``[Q, V, D]`` u4: what was drawn for the views; ``None`` where there are none."""
        mine = self._positions(positions)
        self._union.touch(mine)
        found = self._union.take_draws(mine)
        return None if found is None else found.reshape(len(positions), self.views, -1)

    def expect_random(self) -> None:
        """Have no more of mapped files read than is asked for."""
        expect_random(self._union.packs[0].logits)

    def inputs(self, positions: np.ndarray) -> np.ndarray:
        """``[Q, 16]`` u1, the digests of the features that were scored."""
        mine = self._positions(positions)
        self._union.touch(mine)
        found: np.ndarray = self._union.inputs[mine]
        return found

    def all(self) -> np.ndarray:
        """``[N, C]`` logits of all positions."""
        if self.whole is not None:
            return self.whole
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
        """The same as `files`, without an object for each."""
        if self._pack is None:
            return Names.of(self._union.file_bytes(self._positions(positions)))
        starts, ends = (self._pack.file_offsets[part].astype(np.int64) for part in (positions, positions + 1))
        return Names(self._pack.files_blob, starts, ends - starts)

    def has_names_of(self, other: TeacherRows) -> bool:
        """Whether all positions have the same names as in another, as far as that is quickly seen."""
        mine, its = self._pack, other._pack
        return (
            mine is not None
            and its is not None
            and np.array_equal(mine.file_offsets, its.file_offsets)
            and np.array_equal(mine.files_blob, its.files_blob)
        )

    def is_promised(self, key: np.ndarray) -> bool:
        """Whether the index permits this sample, so that its row should be there."""
        return self._permitted is not None and bool(KeyFinder(self._permitted.keys).find(key)[0] >= 0)


def _same_keys(one: Union, other: Union) -> bool:
    return np.array_equal(one.keys.view(np.uint64), other.keys.view(np.uint64))


def _kept(union: Union, permitted: Permitted) -> np.ndarray | None:
    """The positions that are served; ``None`` where all are."""
    if permitted.has_keys(union.keys):
        return None
    kept = KeyFinder(permitted.keys).find(union.keys) >= 0
    return None if kept.all() else np.flatnonzero(kept)
