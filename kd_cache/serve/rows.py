"""One teacher's rows as a reader sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from kd_cache.keys import KeyFinder
from kd_cache.store.pack import Pack
from kd_cache.store.permitted import Permitted
from kd_cache.store.shelf import RowNumbers, Shelf
from kd_cache.store.take import take_rows

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

    def at(self, numbers: np.ndarray | slice) -> Names:
        """Some of them."""
        return Names(self.blob, self.starts[numbers], self.lengths[numbers])

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
    """Rows of one teacher's packs, the ``permitted`` of them, under `RowNumbers`: where all are served, the packs' own.

    Packs are in key order, and what is the same in ``other`` (another teacher's rows under the same permission) is
    shared with it.
    """

    def __init__(
        self, packs: Sequence[Pack], permitted: Permitted | None = None, other: TeacherRows | None = None
    ) -> None:
        self._shelf = shelf = Shelf(packs)
        self._permitted = permitted
        self._describe(packs)
        self._kept: np.ndarray | None  # the packs' numbers of the rows that are served; None where all are
        self._parts: list[np.ndarray]  # the keys of these
        self.numbers: RowNumbers
        self.finder: KeyFinder
        if other is not None and shelf.finder.is_same(other._shelf.finder):
            self._kept, self._parts = other._kept, other._parts
            self.numbers, self.finder = other.numbers, other.finder
        else:
            self._kept = None if permitted is None else _kept(shelf, permitted)
            self._parts = [pack.keys for pack in packs] if self._kept is None else _keys_at(shelf, self._kept)
            self.numbers = shelf.numbers if self._kept is None else RowNumbers([len(self._kept)])
            self.finder = shelf.finder if self._kept is None else KeyFinder(*self._parts)

    def _describe(self, packs: Sequence[Pack]) -> None:
        origin = packs[0].origin
        self.name = origin.teacher
        self.num_classes, self.frames, self.width = origin.num_classes, origin.frames, origin.width
        self.views, self.policy = len(origin.views) or 1, origin.policy
        self.dtype, self.topk = origin.stored, origin.topk
        names = "+".join(pack.path.name for pack in packs)
        self.signature = names if len(packs) == 1 else f"{origin.teacher}-{xxhash.xxh3_128_hexdigest(names.encode())}"

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def keys(self) -> np.ndarray:
        """``[N, 16]`` u1, ascending; of several packs a copy."""
        return self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)

    @property
    def packs(self) -> list[Pack]:
        return self._shelf.packs

    @property
    def is_lazy(self) -> bool:
        """Whether rows are checked as they are read."""
        return self._shelf.is_lazy

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """``[Q, C]`` logits."""
        return self._shelf.take(self.own(numbers))

    def take_into(self, numbers: np.ndarray, out: np.ndarray) -> None:
        """The same into contiguous ``[Q, C]``. Numbers are not checked: they must be rows."""
        self._shelf.take_into(self.own(numbers), out)

    def draws(self, numbers: np.ndarray) -> np.ndarray | None:
        """``[Q, V, D]`` u4: what was drawn for the views; ``None`` where there are none."""
        if self.policy is None:
            return None
        return self._shelf.column("draws", self.own(numbers)).reshape(len(numbers), self.views, -1)

    def take_views_into(self, numbers: np.ndarray, out: np.ndarray) -> None:
        """Into contiguous ``[Q, C]``, with V numbers for each row: r · V + v is view v of row r."""
        if self._kept is not None or self.is_lazy or self._shelf.logits is None:
            rows, views = np.divmod(numbers, self.views)
            rows = self.own(rows)
            self._shelf.touch(rows)
            numbers = rows * self.views + views
        if self._shelf.logits is not None:
            take_rows(self._shelf.logits.reshape(-1, out.shape[1]), numbers, out)
            return
        for pack, mine, at in self._shelf.by_pack(rows):
            out[at] = pack.logits.reshape(-1, out.shape[1])[mine * self.views + views[at]]

    def expect_random(self) -> None:
        """Have no more of mapped files read than is asked for."""
        self._shelf.expect_random()

    def inputs(self, numbers: np.ndarray) -> np.ndarray:
        """``[Q, 16]`` u1, the digests of the features that were scored."""
        return self._shelf.column("inputs", self.own(numbers))

    def fill(self, out: np.ndarray) -> None:
        """Copy all rows, each to its number in ``[limit, C]``; what is between packs is left as it is."""
        if self._kept is None:
            self._shelf.fill(out)
        else:
            out[:] = self._shelf.take(self._kept)

    def files(self, numbers: np.ndarray) -> list[str]:
        return self._shelf.files(self.own(numbers))

    def own(self, numbers: np.ndarray) -> np.ndarray:
        """The packs' own numbers of these rows."""
        found: np.ndarray = numbers if self._kept is None else self._kept[numbers]
        return found

    def names(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray | slice, Names]]:
        """The same as `files`, without an object for each: the names in each pack, and which these are of all."""
        for pack, rows, mine in self._shelf.by_pack(self.own(numbers)):
            starts, ends = (pack.file_offsets[part].astype(np.int64) for part in (rows, rows + 1))
            yield mine, Names(pack.files_blob, starts, ends - starts)

    def has_names_of(self, other: TeacherRows) -> bool:
        """Whether all rows have the same names as in another, as far as that is quickly seen."""
        if self._kept is not None or other._kept is not None or not self.finder.is_same(other.finder):
            return False
        return all(
            np.array_equal(mine.file_offsets, its.file_offsets) and np.array_equal(mine.files_blob, its.files_blob)
            for mine, its in zip(self.packs, other.packs, strict=True)
        )

    def is_promised(self, key: np.ndarray) -> bool:
        """Whether the index permits this sample, so that its row should be there."""
        return self._permitted is not None and bool(KeyFinder(self._permitted.keys).find(key)[0] >= 0)


def _kept(shelf: Shelf, permitted: Permitted) -> np.ndarray | None:
    """The numbers that are served; ``None`` where all are."""
    keys = [pack.keys for pack in shelf.packs]
    if permitted.has_keys(*keys):
        return None
    finder = KeyFinder(permitted.keys)
    served = [np.flatnonzero(finder.find(part) >= 0) for part in keys]
    if sum(map(len, served)) == len(shelf):
        return None
    return np.concatenate([base + part for base, part in zip(shelf.numbers.bases, served, strict=True)])


def _keys_at(shelf: Shelf, numbers: np.ndarray) -> list[np.ndarray]:
    """``[[Q, 16]]``: the keys of some rows, as one part."""
    return [np.concatenate([pack.keys[rows] for pack, rows, _ in shelf.by_pack(numbers)])]
