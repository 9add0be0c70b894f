"""From files to row numbers: which rows all opened teachers hold, and why one is missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.errors import CorruptError, MissingLogitsError, UsageError, listed, shown
from kd_cache.keys import KeyFinder, keys_of_bytes
from kd_cache.serve.rows import Names, TeacherRows
from kd_cache.store.index import Index

_MANY = 100_000
"""From so many files on it is worth looking whether two teachers' packs name the same files."""


class Resolver:
    """The common rows of teachers, ordered by key.

    Attributes:
        positions: where the common rows are among each teacher's own; ``None`` where they are the same.
    """

    def __init__(self, path: Path, teachers: Sequence[TeacherRows], index: Index | None) -> None:
        self._path = path
        self._teachers = teachers
        self._index = index
        self._keys = _common_keys([rows.keys for rows in teachers])
        self.positions = [
            None if len(rows.keys) == len(self._keys) else rows.finder.find(self._keys) for rows in teachers
        ]
        self._finder = teachers[0].finder if self.positions[0] is None else KeyFinder(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def position(self, number: int, rows: Any) -> Any:
        """Where these rows are in a teacher's own order."""
        positions = self.positions[number]
        return rows if positions is None else positions[rows]

    def files(self, rows: np.ndarray) -> list[str]:
        return self._teachers[0].files(self.position(0, rows))

    def find(self, files: list[str]) -> np.ndarray:
        """Row of each file, int64, -1 where there is none. Raises `CorruptError` for two files of one key."""
        names = _encoded(files)
        found = self._finder.find(keys_of_bytes(names))
        self._refuse_collisions(names, found)
        return found

    def missing(self, files: list[str], asked: int) -> MissingLogitsError:
        """What to say of these files without logits, among so many."""
        reasons = [f"{file}: {self._why_missing(file)}" for file in files[:20]]
        return MissingLogitsError(
            f"{len(files)} of {asked} files have no logits in {shown(self._path)}\n"
            + listed(reasons, total=len(files)),
            hint="Run kd-cache dump with the manifest you train on.",
        )

    def _refuse_collisions(self, names: list[bytes], found: np.ndarray) -> None:
        """Refuse a file whose key is that of another file's row."""
        present = np.flatnonzero(found >= 0)
        asked = Names.of(names if len(present) == len(names) else [names[number] for number in present.tolist()])
        for number, rows in enumerate(self._teachers):
            if number and len(present) >= _MANY and rows.has_names_of(self._teachers[0]):
                continue
            positions = self.position(number, found[present])
            for at in np.flatnonzero(asked.differ_from(rows.names(positions)))[:1].tolist():
                name, other = names[present[at]].decode("utf-8", "replace"), rows.files(positions[at : at + 1])[0]
                raise CorruptError(
                    f"{shown(name)} and {shown(other)} have the same MD5 key; one of them must be renamed"
                )

    def _why_missing(self, file: str) -> str:
        reason = self._index.missing.get(file) if self._index is not None else None
        if reason is not None:
            return f"could not be scored ({reason})"
        key = keys_of_bytes([file.encode("utf-8", "surrogatepass")])
        holders = [rows.name for rows in self._teachers if rows.finder.find(key)[0] >= 0]
        if holders:
            return f"only {', '.join(holders)} scored it"
        if any(rows.is_promised(key) for rows in self._teachers):
            return "its row is gone or damaged; run kd-cache repair"
        return "not in the cache: not in the manifest of the dump, or not a permitted train sample"


def _encoded(files: list[str]) -> list[bytes]:
    """Their UTF-8. A lone surrogate is not in any manifest; it has an encoding here, so that it can be missed."""
    try:
        return list(map(str.encode, files))
    except UnicodeEncodeError:
        return [file.encode("utf-8", "surrogatepass") for file in files]
    except TypeError:
        at, wrong = next((number, file) for number, file in enumerate(files) if not isinstance(file, str))
        found = f"{shown(repr(wrong))} ({type(wrong).__name__}) at position {at}"
        raise UsageError(
            f"expected the manifest's files as texts, found {found}",
            hint='A key is a sample\'s "file". Row numbers come from LogitCache.rows, as a tensor or an array.',
        ) from None


def _common_keys(keys: list[np.ndarray]) -> np.ndarray:
    """Keys that all teachers hold, sorted."""
    common = keys[0]
    for other in keys[1:]:
        if other is not common and not np.array_equal(common.view(np.uint64), other.view(np.uint64)):
            common = common[KeyFinder(other).find(common) >= 0]
    return common
