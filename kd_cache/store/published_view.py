"""The view of a cache brought in line with the rows that an index is about to name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from kd_cache.errors import StoreError, listed, shown
from kd_cache.files.atomic import store_errors
from kd_cache.store.change import Published
from kd_cache.store.index import refuse_large_index
from kd_cache.store.pack import Pack
from kd_cache.store.snapshot import Snapshot
from kd_cache.store.union import Union
from kd_cache.store.view import ROW_FILE_NAME, in_the_way, is_row, rows_of, stored_names, view_names, write_view
from kd_cache.watch import Watcher

_BLOCK = 8192


def row_files(union: Union | None) -> Iterator[tuple[str, str]]:
    """Each row's manifest path, and its file in a view."""
    for pack in () if union is None else union.packs:
        yield from zip(pack.files, view_names(pack.keys), strict=True)


@dataclass(frozen=True)
class PublishedView:
    """The view of a cache: one folder of row files per teacher. ``named`` are the teachers whose view is ours already,
    ``withdrawn`` the files that the index named of some of them until now.

    Only what kd-cache wrote is removed or replaced: the file of a row of some pack, under its key. A cache may well
    hold folders and files of its user's, the features themselves among them.
    """

    snapshot: Snapshot
    shown_path: str
    done: Published
    watcher: Watcher
    named: Collection[str]
    withdrawn: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def bring_in_line(
        self, rows: Mapping[str, Union | None], files: Sequence[str], *, wanted: bool
    ) -> dict[str, dict[str, str]]:
        """Write what the view lacks, remove what it must not have; returns the index's maps, ordered as ``files``."""
        for name in rows:
            directory = self.snapshot.folder.view_path(name)
            if directory.is_symlink():
                raise StoreError(f"{shown(directory)} is a link; a view must be a folder of its own", hint="Remove it.")
        if wanted:
            refuse_large_index(self.snapshot.folder.index_path, files, self.shown_path, rows)
            self.watcher.stage("writing .npy files", sum(self.done.rows.values()))
        maps: dict[str, dict[str, str]] = {}
        for name, union in rows.items():
            directory = self.snapshot.folder.view_path(name)
            packs = [] if union is None else union.packs
            named: dict[str, str] = {}
            if wanted and packs:
                if name not in self.named:
                    self._refuse_what_is_in_the_way(directory, packs)
                self.done.view_written += write_view(directory, partial(_blocks, packs), self.watcher.advance)
                held = dict(row_files(union))
                named = {file: held[file] for file in files if file in held}
            self._prune(directory, set(named.values()), packs)
            maps[name] = {file: f"{self.shown_path}/{name}/{row_file}" for file, row_file in named.items()}
        return maps

    def _refuse_what_is_in_the_way(self, directory: Path, packs: Sequence[Pack]) -> None:
        known = self._known(directory, packs, self.snapshot.again())
        foreign = [name for pack in packs for name in in_the_way(directory, pack, known)]
        if foreign:
            raise StoreError(
                f"{len(foreign)} files of the view cannot be written: another file, which kd-cache did not write, has "
                f"the name of each\n{listed([directory / name for name in foreign])}",
                hint="The rows are saved. Move those files away, or pass --no-files, and run the same command again.",
            )

    def _known(self, directory: Path, packs: Sequence[Pack], snapshot: Snapshot | None = None) -> list[Pack]:
        """The packs whose rows a teacher's folder may hold; with ``snapshot`` those of another moment."""
        held = [each for each in (snapshot or self.snapshot).packs.good if each.origin.teacher == directory.name]
        return [*packs, *held]

    def _named(self, directory: Path) -> set[str]:
        """The row files of a folder that the index still names: their packs may be gone, as damaged ones are."""
        index = self.snapshot.again(maps=True).index
        paths = {} if index is None else index.maps.get(directory.name, {})
        paths = {**paths, **self.withdrawn.get(directory.name, {})}
        return {Path(path).name for path in paths.values()}

    def _prune(self, directory: Path, named: set[str], packs: Sequence[Pack]) -> None:
        """Remove row files that the index will not name. What cannot be proved to be ours is left, and said."""
        surplus = {name for name in stored_names(directory) - named if ROW_FILE_NAME.match(name)}
        if not surplus:
            return
        ours = rows_of(directory, surplus, self._known(directory, packs))
        if surplus != ours:
            ours |= {name for name in (surplus - ours) & self._named(directory) if is_row(directory / name)}
        for name in sorted(ours):
            with store_errors(directory / name, "remove"):
                (directory / name).unlink(missing_ok=True)
        self.done.view_removed += len(ours)
        if left := sorted(surplus - ours):
            what = f"{len(left)} files in {shown(directory)} stay, which kd-cache did not write"
            self.watcher.note(f"{what} (the first: {left[0]})")


def _blocks(packs: Sequence[Pack]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for pack in packs:
        for start in range(0, len(pack), _BLOCK):
            yield pack.keys[start : start + _BLOCK], pack.logits[start : start + _BLOCK]
