"""Removing what a cache no longer needs: leftovers of killed processes, superseded rows, files without an index entry.

What goes must be older than a grace period, so that nothing running loses what it is making: a dump's temporaries are
seconds old, and a superseded file counts from the moment the index that superseded it was written. What an index names
stays, whatever its age, and what a pending record names, unless the user says that unfinished dumps may go; so does a
damaged pack, which `verify` and `repair` tell of. Packs of the current fingerprint stay even if another holds all their
rows: a seal that runs at the same time may be keeping just this one. Each removal stands for itself: wherever a machine
stops, what is gone was superfluous.

Only what kd-cache can prove that it wrote goes: packs and permitted lists by their digests, row files that are some
pack's row, temporaries by their exact names in folders of its own. What else lies there is told of and left.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_cache.errors import CorruptError, KDCacheError, MissingLogitsError, StaleError, StoreError, shown
from kd_cache.files.atomic import TEMPORARY_NAME, store_errors, sync_opened_directory
from kd_cache.store.cache import CacheFolder, Named, no_cache, no_finished_cache
from kd_cache.store.index import Index
from kd_cache.store.names import IN_PENDING, NOTES_NAME, PACK_NAME, RESERVED_NAMES
from kd_cache.store.pack import Pack
from kd_cache.store.pending import notes_beside, protected, samples_tables
from kd_cache.store.permitted import PERMITTED_NAME, read_permitted
from kd_cache.store.snapshot import Snapshot
from kd_cache.store.view import ROW_FILE_NAME, rows_of

OLDER_THAN = 3600
TEMPORARY_FILE, PACK, PERMITTED, ROW_FILE, FOLDER = "temporary", "pack", "permitted file", "row file", "folder"
PENDING, NOTES = "pending record", "notes of parts"
_MOST_TOLD = 10
_Made = tuple[str, str]  # teacher, fingerprint


@dataclass(frozen=True)
class Garbage:
    """Something that may go, as it was when it was found. ``made`` is a pack's teacher and fingerprint."""

    kind: str
    path: Path
    reason: str
    size: int
    inode: int
    changed: int
    made: _Made | None = None

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "path": str(self.path), "bytes": self.size, "reason": self.reason}


@dataclass
class GcReport:
    """What one cache holds that may go; after `remove_garbage`, what went. Damaged packs are only told of."""

    cache: str
    drop_unfinished: bool = False
    garbage: list[Garbage] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(item.size for item in self.garbage)

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"bytes": self.size, "garbage": [item.as_json() for item in self.garbage]}


def is_cache(folder: CacheFolder) -> bool:
    """Whether there is an index, or packs that no index tells of yet."""
    return folder.is_anything


def caches_below(root: Path, is_named: Named) -> list[CacheFolder]:
    """The caches under a root: its folders that are called as one, with an index or packs, and those with both.

    Links are passed over.

    Raises:
        MissingLogitsError: there is none.
        StoreError: the root cannot be listed.
    """
    paths = _folders(root) if root.is_dir() else []
    folders = [CacheFolder(path) for path in paths]
    others = [folder for folder in folders if folder.index_path.is_file() and folder.packs_path.is_dir()]
    caches = [folder for folder in folders if folder in others or (is_named(folder.path.name) and is_cache(folder))]
    if not caches:
        raise no_finished_cache(root, is_named)
    return caches


def find_garbage(
    path: str | Path, older_than: float = OLDER_THAN, now: float | None = None, *, drop_unfinished: bool = False
) -> GcReport:
    """What may go from one cache; removes nothing.

    Args:
        path: the cache's folder.
        older_than: seconds of grace. Less than a dump takes between two commits endangers what runs at the same time.
        now: seconds since the epoch; by default the present.
        drop_unfinished: what dumps committed that did not finish goes too: all packs that the index does not name.

    Raises:
        MissingLogitsError: there is no cache.
        StoreError: something there is of a newer format, or cannot be read.
    """
    folder = CacheFolder(Path(path).expanduser())
    if not is_cache(folder):
        raise no_cache(folder.path)
    return _Search(folder, older_than, time.time() if now is None else now, drop_unfinished).run()


def remove_garbage(report: GcReport) -> None:
    """Remove what `find_garbage` found, as far as it is still the same and still nobody's; the rest leaves the report.

    Raises:
        StoreError: naming the path that could not be removed; what went before it stays gone.
    """
    folder = CacheFolder(Path(report.cache))
    snapshot = Snapshot(folder)
    if isinstance(snapshot.trouble, StoreError):  # nothing is known of it, not even that it is damaged
        raise snapshot.trouble
    sure = snapshot.index is not None and not snapshot.damaged_pending
    if not sure and any(item.kind == PACK for item in report.garbage):
        report.notes.append("the index or a pending record was damaged or removed meanwhile; all packs stay")
    by_folder: dict[Path, list[Garbage]] = {}
    for item in report.garbage:
        if item.made is None or (sure and not _is_needed(snapshot, item.made, item.path, report.drop_unfinished)):
            by_folder.setdefault(item.path.parent, []).append(item)
    # The cache's own entries last: among them are folders that must be empty by then. Packs prove whose row files are.
    directories = sorted(by_folder, key=lambda path: (path == folder.path, path == folder.packs_path, path))
    report.garbage = [
        item
        for directory in directories
        for item in _remove(directory, by_folder[directory], may_be_link=directory == folder.path)
    ]


def _is_needed(snapshot: Snapshot, made: _Made, path: Path, drop_unfinished: bool) -> bool:
    """Whether a pack must stay, as the index and the pending records have it at this moment."""
    if drop_unfinished:
        return path in snapshot.served_paths(snapshot.origins)
    current = {(name, origin.fingerprint.digest) for name, origin in snapshot.origins.items()}
    return made in current | protected(snapshot.pending)


class _Search:
    """One look at a cache. Nothing is removed before the whole of it has succeeded."""

    def __init__(self, folder: CacheFolder, older_than: float, now: float, drop_unfinished: bool) -> None:
        self.folder = folder
        self.snapshot = Snapshot(folder, maps=True)
        self.older_than = older_than
        self.limit = now - older_than
        self.young = 0
        self.since = 0.0  # when the index was written: what it superseded counts from then
        self.drop_unfinished = drop_unfinished
        self.report = GcReport(str(folder.path), drop_unfinished)

    def run(self) -> GcReport:
        ours = (self.folder.packs_path.name, self.folder.pending_path.name)
        inside = _folders(self.folder.path, self.report.notes)
        named = self.snapshot.origins if self.folder.packs_path.is_symlink() else self.snapshot.named
        views = [path for path in inside if path.name in named]
        self._find_temporaries([self.folder.path, *[path for path in inside if path.name in ours], *views])
        pending, index = self.snapshot.pending, self._index()
        if index is not None:
            if self.folder.packs_path in inside:
                self._find_packs(index)
                for directory in views:
                    self._find_row_files(directory, index)
            self._find_permitted([index, *pending])
            if self.folder.pending_path in inside:
                self._find_notes()
            self._tell_of_others(index, views)
        if self.young:
            self.report.notes.append(f"{self.young:,} more stay for now: not older than {self.older_than:,.0f} s")
        return self.report

    def _index(self) -> Index | None:
        """The index; a note where there is none to say what is superfluous."""
        if self.snapshot.index is None:
            refusal = self.snapshot.refusal
            if refusal is not None and not isinstance(refusal, CorruptError | StaleError | MissingLogitsError):
                raise refusal
            self.report.notes.append(f"{refusal.message if refusal else ''}; only temporaries are removed")
            return None
        found = _look(self.folder.index_path)
        self.since = time.time() if found is None else found.st_mtime
        return self.snapshot.index

    def _add(self, kind: str, path: Path, reason: str, *, since: float = 0.0, made: _Made | None = None) -> None:
        """Garbage, if it is a plain file (or a folder where that is meant) and old enough, whatever became of it."""
        found = _look(path)
        if found is None or not (stat.S_ISDIR if kind == FOLDER else stat.S_ISREG)(found.st_mode):
            return
        if max(found.st_mtime, since) > self.limit:
            self.young += 1
            return
        size = 0 if kind == FOLDER else found.st_size
        self.report.garbage.append(Garbage(kind, path, reason, size, found.st_ino, found.st_mtime_ns, made))

    def _find_temporaries(self, directories: Sequence[Path]) -> None:
        left = "left by a process that was killed"
        for directory in directories:
            for name in _names(directory):
                if TEMPORARY_NAME.match(name):
                    self._add(TEMPORARY_FILE, directory / name, left)
        for directory in _folders(self.folder.path):
            names = _names(directory) if TEMPORARY_NAME.match(directory.name) else [""]
            if all(map(ROW_FILE_NAME.match, names)):  # a view that was not finished
                made = _look(directory)
                youngest = 0.0 if made is None else made.st_mtime  # as long as files come, none of them is left over
                for name in names:
                    self._add(TEMPORARY_FILE, directory / name, left, since=youngest)
                self._add(FOLDER, directory, left)

    def _find_packs(self, index: Index) -> None:
        packs = self.snapshot.packs
        self.report.damaged = [error.message for error in packs.damaged.values()]
        if damaged := self.snapshot.damaged_pending:
            self.report.notes += [f"{error.message}; no packs are removed while it is there" for error in damaged]
            return
        groups: dict[_Made, list[Pack]] = {}
        for pack in packs.good:
            made = (pack.origin.teacher, pack.origin.fingerprint.digest)
            if not _is_needed(self.snapshot, made, pack.path, self.drop_unfinished):
                groups.setdefault(made, []).append(pack)
        for made, group in groups.items():
            self._add_packs(made, group, index)
        for record in self.snapshot.pending if self.drop_unfinished else []:
            youngest = max((_youngest(groups.get(made, [])) for made in protected([record])), default=0.0)
            for kind, path in ((PENDING, record.path), (NOTES, notes_beside(record.path))):
                self._add(kind, path, "its dump has not finished", since=youngest)

    def _find_notes(self) -> None:
        """Notes whose record is gone, and samples tables where none is left: nobody reads them."""
        if self.drop_unfinished or not (self.snapshot.pending or self.snapshot.damaged_pending):
            for path in samples_tables(self.folder):
                self._add(NOTES, path, "no dump goes on from it", since=self.since)
        names = _names(self.folder.pending_path)
        for name in names:
            if NOTES_NAME.match(name) and f"{name.removesuffix('.seen')}.json" not in names:
                self._add(NOTES, self.folder.pending_path / name, "no pending record is beside it", since=self.since)

    def _add_packs(self, made: _Made, group: Sequence[Pack], index: Index) -> None:
        """Packs of one fingerprint: as long as one of them is young, a dump may be adding to them."""
        newest = _youngest(group)
        current = index.origins.get(made[0])
        reason = f"{made[0]} is not in the index"
        if current is not None:
            changed = group[0].origin.fingerprint.differing_parts(current.fingerprint)
            reason = f"superseded: {', '.join(map(shown, changed))} changed" if changed else "no index names it"
        for pack in group:
            self._add(PACK, pack.path, reason, since=max(newest, self.since), made=made)

    def _find_permitted(self, records: Sequence[Index]) -> None:
        entries = [record.record.get("permitted") for record in records]
        named = {entry["file"] for entry in entries if entry is not None}
        for name in _names(self.folder.path):
            if PERMITTED_NAME.match(name) and name not in named and _is_whole(self.folder.path / name):
                self._add(PERMITTED, self.folder.path / name, "superseded: the index names another", since=self.since)

    def _find_row_files(self, directory: Path, index: Index) -> None:
        """Rows of some pack that no map of the index names, and the folder if nothing else is in it."""
        names = _names(directory)
        surplus = {name for name in names if ROW_FILE_NAME.match(name)} - _promised(index, directory)
        packs = [pack for pack in self.snapshot.packs.good if pack.origin.teacher == directory.name]
        for name in sorted(rows_of(directory, surplus, packs)):
            self._add(ROW_FILE, directory / name, "the index does not name it", since=self.since)
        if directory.name in index.origins:
            return
        going = {item.path.name for item in self.report.garbage if item.path.parent == directory}
        if going.issuperset(names):
            self._add(FOLDER, directory, "then empty, and of no teacher in the index", since=self.since)

    def _tell_of_others(self, index: Index, views: Sequence[Path]) -> None:
        """What is not ours: a user's own files, copies, and what other systems leave (``._x``, ``.DS_Store``)."""
        ours = {*RESERVED_NAMES, *(path.name for path in views), *(item.path.name for item in self.report.garbage)}
        known: list[tuple[Path, re.Pattern[str] | None, set[str]]] = [(self.folder.path, PERMITTED_NAME, ours)]
        known += [(self.folder.packs_path, PACK_NAME, ours), (self.folder.pending_path, IN_PENDING, ours)]
        known += [(directory, None, ours | _promised(index, directory)) for directory in views]
        for directory, named, held in known:
            others = [
                name
                for name in ([] if directory.is_symlink() else _names(directory))
                if name not in held and not TEMPORARY_NAME.match(name) and not (named and named.match(name))
            ]
            if others:
                what = f"{len(others):,} entries of {shown(directory)} stay, which kd-cache did not write"
                self.report.notes.append(f"{what}: {', '.join(map(shown, others[:_MOST_TOLD]))}")


def _promised(index: Index, directory: Path) -> set[str]:
    """The row files of a teacher's folder that the index names."""
    return {path.rpartition("/")[2] for path in index.maps.get(directory.name, {}).values()}


def _is_whole(path: Path) -> bool:
    """Whether a permitted list is what its name says. Raises nothing: a damaged one may be anybody's."""
    try:
        read_permitted(path)
    except (KDCacheError, FileNotFoundError):
        return False
    return True


def _youngest(packs: Sequence[Pack]) -> float:
    return max([found.st_mtime for pack in packs if (found := _look(pack.path)) is not None], default=0.0)


def _folders(directory: Path, notes: list[str] | None = None) -> list[Path]:
    """The folders in a folder, by name. Links are not followed, which is noted where one leads to a folder."""
    with store_errors(directory, "list"):
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        links = [entry.name for entry in entries if entry.is_symlink() and entry.is_dir()]
        found = [directory / entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    if notes is not None:
        notes += [f"{shown(directory / name)} is a link; what is behind it is left alone" for name in links]
    return found


def _names(directory: Path) -> list[str]:
    with store_errors(directory, "list"):
        try:
            return sorted(os.listdir(directory))
        except FileNotFoundError:
            return []


def _look(path: Path) -> os.stat_result | None:
    """What is there, links not followed; ``None`` if it is gone."""
    with store_errors(path, "look at"):
        try:
            return path.lstat()
        except FileNotFoundError:
            return None


def _remove(directory: Path, items: Sequence[Garbage], *, may_be_link: bool) -> Iterator[Garbage]:
    """Remove these entries of a folder, then make that durable. Yields what went.

    The folder is opened once and its entries are removed through that, so that nothing put in its place is touched.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | (0 if may_be_link else os.O_NOFOLLOW)
    with store_errors(directory, "open the folder"):
        try:
            descriptor = os.open(directory, flags)
        except FileNotFoundError:
            return
    try:
        for item in items:
            with store_errors(item.path, "remove"):
                went = _unlink(item, descriptor)
            if went:
                yield item
    finally:
        with store_errors(directory, "sync"):
            try:
                sync_opened_directory(descriptor, directory)
            finally:
                os.close(descriptor)


def _unlink(item: Garbage, directory: int) -> bool:
    """Remove it if it is still what was found; gone or replaced, it is nobody's garbage any more."""
    name = item.path.name
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if item.kind == FOLDER:
            os.rmdir(name, dir_fd=directory)
        elif (found.st_ino, found.st_mtime_ns) == (item.inode, item.changed):
            os.unlink(name, dir_fd=directory)
        else:
            return False
    except FileNotFoundError:
        return False
    except OSError as error:
        if item.kind == FOLDER and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False  # something was put into it, or in its place
        raise
    return True
