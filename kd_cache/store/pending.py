"""What dumps are making that no index tells of yet.

Every dump writes a record before its first pack: the teachers with their fingerprints, the manifest, its settings. A
seal needs nothing else to know which rows are current, and `gc` knows whose packs they are. A record has the format of
the index, digest included. It goes when an index tells of its rows, or with ``kd-cache gc --drop-unfinished``; so do a
part's notes of the features that it read, which lie beside its record.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kd_cache.errors import CorruptError, KDCacheError, StaleError
from kd_cache.files.atomic import make_directory, remove_files, store_errors
from kd_cache.store.cache import CacheFolder, refuse_link
from kd_cache.store.index import Index, State, index_state, origin_entry, read_index, write_index
from kd_cache.store.names import PENDING_NAME, SAMPLES_NAME
from kd_cache.store.origin import Origin


def notes_beside(record: Path) -> Path:
    """Where the part of a pending record notes the features that it read (`score.unchanged`)."""
    return record.with_suffix(".seen")


class PendingRecord:
    """One process's record. Nothing is written before `write`."""

    def __init__(self, folder: CacheFolder, origins: Mapping[str, Origin], record: Mapping[str, Any]) -> None:
        self.path = folder.pending_path / f"{secrets.token_hex(8)}.json"
        self._origins = origins
        self._record = {"begun": time.time_ns(), **record}
        self.is_written = False

    def write(self, entries: Mapping[str, Mapping[str, Any]], missing: Mapping[str, str]) -> None:
        """Write it durably, or anew with the results.

        Args:
            entries: further content of a teacher's entry.
            missing: files that could not be scored, with the reason.
        """
        make_directory(self.path.parent)
        teachers = {
            name: {**origin_entry(origin), **entries.get(name, {}), "rows": 0, "packs": [], "earlier": []}
            for name, origin in self._origins.items()
        }
        record = {**self._record, "missing": dict(missing), "teachers": teachers}
        write_index(self.path, 0, {}, record)
        self.is_written = True


class Age(NamedTuple):
    """The order of runs: by what each had read, not by clocks.

    ``generation`` is one more than the largest that the run found in the index and in pending records. kd-cache 0.1
    wrote none: those have 0, come before all others, and are ordered by ``begun`` (nanoseconds since 1970).
    """

    generation: int
    begun: int

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Age:
        """What an index or a pending record, or a teacher's entry in one, says; 0 where it does not."""
        values = (record.get(name, 0) for name in cls._fields)
        return cls(*(value if type(value) is int else 0 for value in values))

    def beside(self, record: Mapping[str, Any]) -> dict[str, int]:
        """What an entry says that is of this age, in a record that may be of another."""
        return {} if self == Age.of(record) else self._asdict()


def age_with(index: Index, name: str) -> Age:
    """The age of what an index says of a teacher: of one that its dump only carried over, an earlier index's."""
    entry = index.record["teachers"].get(name, {})
    return Age.of(entry if "begun" in entry else index.record)


def is_known(index: Index | None, name: str, record: Index) -> bool:
    """Whether the index counts what a record says of a teacher: the same fingerprint, and nothing newer."""
    entry = None if index is None else index.record["teachers"].get(name)
    if index is None or entry is None:
        return False
    same = entry["fingerprint"] == record.record["teachers"][name]["fingerprint"]
    return bool(same and age_with(record, name) <= age_with(index, name))


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
    return sorted(found, key=lambda record: (Age.of(record.record), record.path.name)), damaged


def _paths(folder: CacheFolder) -> list[Path]:
    return [path for path in _listed(folder) if PENDING_NAME.match(path.name)]


def samples_tables(folder: CacheFolder) -> list[Path]:
    """What parts share of the manifest (`dataset.samples_table`): without a pending record nobody needs it."""
    return [path for path in _listed(folder) if SAMPLES_NAME.match(path.name)]


def _listed(folder: CacheFolder) -> list[Path]:
    with store_errors(folder.pending_path, "list"):
        refuse_link(folder.pending_path)
        try:
            names = sorted(entry.name for entry in os.scandir(folder.pending_path))
        except FileNotFoundError:
            return []
    return [folder.pending_path / name for name in names]


def forget(folder: CacheFolder, records: Iterable[Index], indexes: Collection[Index]) -> None:
    """Remove the records of which these indexes know all. One of other weights stays: a dump can go on from it.

    What lies beside a record goes first: without the record nobody would look for it again after a power cut.
    """

    def is_told(record: Index) -> bool:
        return all(any(is_known(index, name, record) for index in indexes) for name in record.record["teachers"])

    told = [record.path for record in records if is_told(record)]
    if not told:
        return
    tables = [] if {*_paths(folder)} - {*told} else samples_tables(folder)
    remove_files(folder.pending_path, [*map(notes_beside, told), *tables])
    remove_files(folder.pending_path, told)


def protected(records: Collection[Index]) -> set[tuple[str, str]]:
    """``(teacher, fingerprint)`` of every row that a pending dump may be making."""
    return {(name, origin.fingerprint.digest) for record in records for name, origin in record.origins.items()}
