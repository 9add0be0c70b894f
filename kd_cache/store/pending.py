"""What dumps are making that no index tells of yet.

Every dump writes a record before its first pack: the teachers with their fingerprints, the manifest, its settings. A
seal needs nothing else to know which rows are current, and `gc` knows whose packs they are. A record has the format of
the index, digest included. It goes when an index tells of its teachers.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from kd_cache.errors import CorruptError, KDCacheError, StaleError
from kd_cache.files.atomic import make_directory, remove_files, store_errors
from kd_cache.store.cache import CacheFolder, refuse_link
from kd_cache.store.index import Index, State, index_state, origin_entry, read_index, write_index
from kd_cache.store.names import PENDING_NAME
from kd_cache.store.origin import Origin


class PendingRecord:
    """One process's record. Nothing is written before `write`."""

    def __init__(self, folder: CacheFolder, origins: Mapping[str, Origin], record: Mapping[str, Any]) -> None:
        self.path = folder.pending_path / f"{secrets.token_hex(8)}.json"
        self._origins = origins
        self._record = {"begun": time.time_ns(), **record}
        self.is_written = False

    @property
    def begun(self) -> int:
        return int(self._record["begun"])

    def write(self, entries: Mapping[str, Mapping[str, Any]], missing: Mapping[str, str]) -> None:
        """Write it durably, or anew with the results.

        Args:
            entries: further content of a teacher's entry.
            missing: files that could not be scored, with the reason.
        """
        make_directory(self.path.parent)
        teachers = {
            name: {**origin_entry(origin), **entries.get(name, {}), "rows": 0, "pack": None, "earlier": []}
            for name, origin in self._origins.items()
        }
        record = {**self._record, "missing": dict(missing), "teachers": teachers}
        write_index(self.path, 0, {}, record)
        self.is_written = True


def begun(record: Mapping[str, Any]) -> int:
    """When the dump of an index or of a pending record began: nanoseconds, 0 where it does not say."""
    value = record.get("begun", 0)
    return value if type(value) is int else 0


def begun_with(index: Index, name: str) -> int:
    """When what an index says of a teacher was begun: of one that its dump only carried over, an earlier index's."""
    value = index.record["teachers"].get(name, {}).get("begun")
    return value if type(value) is int else begun(index.record)


def read_pending(
    folder: CacheFolder, known: dict[Path, tuple[State, Index | KDCacheError]] | None = None
) -> tuple[list[Index], list[KDCacheError]]:
    """All pending records, the oldest first, and what is wrong with those that cannot be read.

    ``known`` remembers what was read before, under the version of its file: that is not read again.
    """
    known = {} if known is None else known
    found: list[Index] = []
    damaged: list[KDCacheError] = []
    for path in _paths(folder):
        state = index_state(path)
        if state is None or path not in known or known[path][0] != state:
            try:
                known[path] = (state, read_index(path, maps=False))
            except FileNotFoundError:
                continue  # another process has published it
            except (CorruptError, StaleError) as error:
                known[path] = (state, error)
        content = known[path][1]
        if isinstance(content, Index):
            found.append(content)
        else:
            damaged.append(content)
    return sorted(found, key=lambda record: (begun(record.record), record.path.name)), damaged


def _paths(folder: CacheFolder) -> list[Path]:
    with store_errors(folder.pending_path, "list"):
        refuse_link(folder.pending_path)
        try:
            names = sorted(entry.name for entry in os.scandir(folder.pending_path))
        except FileNotFoundError:
            return []
    return [folder.pending_path / name for name in names if PENDING_NAME.match(name)]


def forget(folder: CacheFolder, records: Iterable[Index], words: Mapping[str, int]) -> None:
    """Remove the records that an index overtook: what it says of each of their teachers is as new or newer.

    Args:
        words: by teacher of the index, when what it says was begun.
    """

    def is_told(record: Index) -> bool:
        return all(name in words and begun_with(record, name) <= words[name] for name in record.record["teachers"])

    remove_files(folder.pending_path, [record.path for record in records if is_told(record)])


def protected(records: Collection[Index]) -> set[tuple[str, str]]:
    """``(teacher, fingerprint)`` of every row that a pending dump may be making."""
    return {(name, origin.fingerprint.digest) for record in records for name, origin in record.origins.items()}
