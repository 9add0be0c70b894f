"""A file from a store to a disk: in pieces, under a name of its own, checked, and only then under its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from kd_cache.errors import ChangedError, CorruptError, KDCacheError, shown
from kd_cache.files.atomic import store_errors, sync_directory, temporary_beside
from kd_cache.remote.store import PIECE, Entry, RemoteStore
from kd_cache.watch import Watcher

Check = Callable[[Path, str], object]
"""Raises `CorruptError` where the file at a path is not what belongs under a name."""


def fetch(store: RemoteStore, entry: Entry, path: Path, check: Check, watcher: Watcher) -> None:
    """Bring a file to ``path``, whose folder is there. What does not pass the check is fetched a second time.

    Raises:
        CorruptError: it is not as it should be, twice; nothing is at ``path`` then that was not there before.
        StoreError: the store cannot be read, or the disk not be written.
    """
    wrong: KDCacheError | None = None
    for _ in range(2):
        with store_errors(path, "write"), temporary_beside(path) as temporary:
            try:
                _download(store, entry, temporary, watcher)
                check(temporary, path.name)
            except (CorruptError, ChangedError) as error:
                watcher.advance(-temporary.stat().st_size)
                wrong, entry = error, store.head(entry.name) or entry
                continue
            temporary.replace(path)
            sync_directory(path.parent)
            return
    raise CorruptError(
        f"{shown(store.url)}/{entry.name} is not what its name says, twice: {wrong.message if wrong else ''}",
        hint="Where the cache is whole, kd-cache push --check sends it again.",
    ) from wrong


def _download(store: RemoteStore, entry: Entry, path: Path, watcher: Watcher) -> None:
    with path.open("xb") as file:
        for start in range(0, entry.size, PIECE):
            piece = store.get_range(entry.name, start, min(start + PIECE, entry.size), entry.etag)
            file.write(piece)
            watcher.advance(len(piece))
        file.flush()
        os.fsync(file.fileno())
