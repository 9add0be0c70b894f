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
from kd_cache.store.shelf import RowNumbers

_MANY = 100_000
"""From so many files on it is worth looking whether two teachers' packs name the same files."""


class Resolver:
    """The common rows of teachers, ordered by key.

    Attributes:
        numbers: of these rows: the teachers' own where all of them hold the same, else 0, 1, 2, …
        positions: each teacher's own numbers of the common rows; ``None`` where they are the same.
    """

    def __init__(self, path: Path, teachers: Sequence[TeacherRows], index: Index | None) -> None:
        self._path = path
        self._teachers = teachers
        self._index = index
        first = teachers[0]
        if all(rows.finder.is_same(first.finder) for rows in teachers):
            self.numbers, self._finder = first.numbers, first.finder
            self.positions: list[np.ndarray | None] = [None] * len(teachers)
            return
        keys = _common_keys(teachers)
        self.numbers, self._finder = RowNumbers([len(keys)]), KeyFinder(keys)
        self.positions = [None if rows.finder.is_same(self._finder) else rows.finder.find(keys) for rows in teachers]

    def position(self, number: int, rows: Any) -> Any:
        """A teacher's own numbers of these rows."""
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
            for mine, stored in rows.names(positions):
                for at in np.arange(len(present))[mine][asked.at(mine).differ_from(stored)][:1].tolist():
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


def _common_keys(teachers: Sequence[TeacherRows]) -> np.ndarray:
    """Keys that all teachers hold, sorted."""
    common: np.ndarray = teachers[0].keys
    for rows in teachers[1:]:
        common = common[rows.finder.find(common) >= 0]
    return common
