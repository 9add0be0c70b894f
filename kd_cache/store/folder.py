"""One cache on disk: ``cache/A2b/`` with its index, its packs and its view."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from kd_cache.errors import CorruptError, StoreError, shown
from kd_cache.store.atomic import TEMPORARY, store_errors
from kd_cache.store.index import INDEX_NAME, Index, read_index
from kd_cache.store.pack import Origin, Pack, open_pack
from kd_cache.store.union import Union


@dataclass
class PackSet:
    """The packs found in one look at a cache: the good ones, and the path and error of each damaged one."""

    good: list[Pack] = field(default_factory=list)
    damaged: dict[Path, CorruptError] = field(default_factory=dict)

    def of(self, origin: Origin) -> list[Pack]:
        """The packs with this teacher and fingerprint."""
        wanted = (origin.teacher, origin.fingerprint.digest)
        return [pack for pack in self.good if (pack.origin.teacher, pack.origin.fingerprint.digest) == wanted]

    def union(self, origin: Origin) -> Union | None:
        packs = self.of(origin)
        return Union(packs) if packs else None


@dataclass(frozen=True)
class CacheFolder:
    """Paths of one cache, and looking into it. Nothing is created by constructing it."""

    path: Path

    @property
    def index_path(self) -> Path:
        return self.path / INDEX_NAME

    @property
    def packs_path(self) -> Path:
        return self.path / "packs"

    @property
    def plan_path(self) -> Path:
        return self.path / "plan.json"

    def view_path(self, teacher: str) -> Path:
        return self.path / teacher

    def index(self) -> Index | None:
        """The checked index, ``None`` if the cache has none (its dump did not finish). Raises as `read_index`."""
        try:
            return read_index(self.index_path)
        except FileNotFoundError:
            return None

    def packs(self, teachers: Collection[str] | None = None) -> PackSet:
        """Open every pack (of these teachers). One that is sealed away meanwhile starts the look anew: no row is missed."""
        for _ in range(100):
            try:
                return self._look(teachers)
            except FileNotFoundError:
                continue
        raise StoreError(f"the packs in {shown(self.packs_path)} keep changing; try again when the dumps are done")

    def _look(self, teachers: Collection[str] | None) -> PackSet:
        found = PackSet()
        for path in self.pack_paths():
            if teachers is not None and teacher_in_name(path) not in teachers:
                continue
            try:
                found.good.append(open_pack(path))
            except CorruptError as error:
                found.damaged[path] = error
        return found

    def pack_paths(self) -> list[Path]:
        with store_errors(self.packs_path, "list"):
            try:
                entries = list(os.scandir(self.packs_path))
            except FileNotFoundError:
                return []
        names = sorted(e.name for e in entries if e.name.endswith(".h5") and not e.name.startswith(TEMPORARY))
        return [self.packs_path / name for name in names]


def teacher_in_name(path: Path) -> str:
    """Whose pack this is, by its file name alone (all that a damaged one can tell)."""
    return path.name.rpartition("-")[0]


def find_caches(root: Path) -> list[CacheFolder]:
    """The caches under a root: its folders ``A2*`` that hold an index, by name."""
    with store_errors(root, "list"):
        try:
            names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        except FileNotFoundError:
            return []
    folders = [CacheFolder(root / name) for name in names if name.startswith("A2")]
    return [folder for folder in folders if folder.index_path.is_file()]
