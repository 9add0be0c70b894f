"""``seen.bin``: features as the last dump found them, so that the next one need not read again what nobody touched.

A part of a dump notes what it read in a file of its own, ``pending/<hex>.seen``, beside its record: parts that end
together must not overwrite each other's notes. Who publishes their rows adds their notes to ``seen.bin``.

A note of a feature is the file's device, inode, size, mtime and ctime, its shape and its digest. It is believed where
all five numbers are still the same, and only notes are taken of files whose last change (ctime) was clearly past when
they were looked at: what is written within the granularity of a file system's clock would leave them as they are.
Whoever sets a clock back, or goes on writing into a mapped file, can still deceive it. So some features, drawn anew
each time, are read all the same: if one of them is not as noted, no note is believed. Files in memory (tmpfs) keep
their numbers when they are written through a map, and are always read; on a network, where a change shows
late, a file must have rested for longer. No audit goes by these notes: they only save the reading of features whose
rows are there. A cache is complete without them, or with damaged ones.

Layout: magic ``b"KDCSEEN\\n"``, format version (little-endian u4), xxh3-128 of what follows (16 bytes, big-endian),
then 80 bytes per sample, keys ascending: key (16), device, inode, size, mtime, ctime (little-endian i8, the times in
nanoseconds), frames and bins (i4), digest (16).
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from kd_cache.dataset.features import Feature, FeatureSource
from kd_cache.errors import StoreError, shown
from kd_cache.files.atomic import open_file, write_atomic
from kd_cache.files.file_systems import MEMORY, file_systems, is_network
from kd_cache.files.mapped import file_content
from kd_cache.keys import KeyFinder, are_ascending, sorted_order
from kd_cache.score.existing import Found
from kd_cache.score.job import DumpJob
from kd_cache.store.index import Index
from kd_cache.store.origin import FORMAT_VERSION
from kd_cache.store.pending import notes_beside
from kd_cache.watch import Watcher

SEEN_NAME = "seen.bin"
SETTLED = 2_000_000_000
"""Nanoseconds since the last change before a file is believed not to change unnoticed."""
NETWORK_SETTLED = 120_000_000_000
"""The same where another machine may have written: clients ask for a file's numbers once a minute."""
SAMPLED = 256
"""So many unchanged features are read at each dump all the same."""
_CERTAINTY = 0.99
_MAGIC = b"KDCSEEN\n"
_HEAD = struct.Struct("<8sI16s")
_NOTE = np.dtype([("key", "u1", 16), ("stat", "<i8", 5), ("shape", "<i4", 2), ("digest", "u1", 16)])
_CTIME = 4
_MOST = 1 << 34


@dataclass(frozen=True)
class Seen:
    """Notes, keys ascending; read-only."""

    notes: np.ndarray  # [N] of _NOTE

    def __len__(self) -> int:
        return len(self.notes)

    @classmethod
    def nothing(cls) -> Seen:
        return cls(np.empty(0, _NOTE))

    @classmethod
    def load(cls, path: Path, keys: np.ndarray | None = None) -> Seen:
        """The notes in a file; none where it is missing, damaged, of another version or cannot be read.

        A file that ends before the first of ``keys`` ``[n, 16]`` (ascending), or begins after the last, is not read.
        """
        try:
            with open_file(path) as file:
                size = os.fstat(file.fileno()).st_size
                if not _HEAD.size < size < _MOST or (size - _HEAD.size) % _NOTE.itemsize:
                    return cls.nothing()
                first, last = (os.pread(file.fileno(), 16, at) for at in (_HEAD.size, size - _NOTE.itemsize))
                if keys is not None and (not len(keys) or last < keys[0].tobytes() or keys[-1].tobytes() < first):
                    return cls.nothing()
                content = file_content(file, 1 << 20).data
        except OSError:  # it only ever saves time
            return cls.nothing()
        magic, version, digest = _HEAD.unpack_from(content)
        rest = content[_HEAD.size :]
        if (magic, version) != (_MAGIC, FORMAT_VERSION) or xxhash.xxh3_128_digest(rest) != digest:
            return cls.nothing()
        notes = np.frombuffer(rest, _NOTE)
        return cls(notes) if are_ascending(np.ascontiguousarray(notes["key"])) else cls.nothing()

    @classmethod
    def of_parts(cls, records: Iterable[Index], keys: np.ndarray | None = None) -> Seen:
        """What parts noted that no index tells of yet; ``keys`` as for `load`, ``records`` the oldest first."""
        return cls._newest([cls.load(notes_beside(record.path), keys) for record in records])

    def and_newer(self, further: Seen) -> Seen:
        """These notes and others, which count where both speak of a sample."""
        return self._newest([self, further])

    @classmethod
    def _newest(cls, several: Sequence[Seen]) -> Seen:
        several = [seen for seen in several if len(seen)]
        if len(several) < 2:
            return several[0] if several else cls.nothing()
        notes = _ordered(np.concatenate([seen.notes for seen in several])).notes
        return cls(notes[np.append((notes["key"][1:] != notes["key"][:-1]).any(axis=1), True)])

    def lookup(self, keys: np.ndarray, stats: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is known of features as they are now.

        Args:
            keys: ``[n, 16]`` u1.
            stats: ``[n, 5]`` i8 as `FeatureSource.stat_many` gives them, -1 where nothing can be said.

        Returns:
            believed ``[n]`` bool; where it is true, digests ``[n, 16]`` u1 and shapes ``[n, 2]`` i4 of the features
            (zeros elsewhere).
        """
        at = self._finder.find(keys)
        held = np.flatnonzero((at >= 0) & (stats[:, 0] >= 0))
        held = held[(self.notes["stat"][at[held]] == stats[held]).all(axis=1)]
        believed = np.zeros(len(keys), bool)
        digests, shapes = np.zeros((len(keys), 16), np.uint8), np.zeros((len(keys), 2), np.int32)
        believed[held] = True
        digests[held], shapes[held] = self.notes["digest"][at[held]], self.notes["shape"][at[held]]
        return believed, digests, shapes

    def noted(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of which samples ``[n]`` bool there is a note, and the digests ``[n, 16]`` in it, whatever became of them."""
        at = self._finder.find(keys)
        digests = np.zeros((len(keys), 16), np.uint8)
        digests[at >= 0] = self.notes["digest"][at[at >= 0]]
        return at >= 0, digests

    @cached_property
    def _finder(self) -> KeyFinder:
        return KeyFinder(np.ascontiguousarray(self.notes["key"]))

    def record(self, keys: np.ndarray, stats: np.ndarray, shapes: np.ndarray, digests: np.ndarray, moment: int) -> Seen:
        """These notes and further ones, which replace those of the same samples.

        Args:
            keys, stats, shapes, digests: of features that were read, as `lookup` gives and takes them. The stats are
                of before the reading.
            moment: a time, in nanoseconds since the epoch, at which none of them had been looked at yet. A file that
                changed less than `SETTLED` before it, or in the future, is not noted: it will be read again.
        """
        settled = (stats[:, 0] >= 0) & (stats[:, _CTIME] <= moment - SETTLED)
        further = np.empty(int(settled.sum()), _NOTE)
        for name, column in (("key", keys), ("stat", stats), ("shape", shapes), ("digest", digests)):
            further[name] = column[settled]
        kept = np.ones(len(self), bool)
        replaced = self._finder.find(keys)
        kept[replaced[replaced >= 0]] = False
        return _ordered(np.concatenate([self.notes[kept], further]))

    def only(self, keys: np.ndarray) -> Seen:
        """The notes of these samples (``[n, 16]``): what is no longer permitted is forgotten."""
        at = self._finder.find(keys)
        return Seen(self.notes[np.unique(at[at >= 0])])

    def save(self, path: Path) -> bool:
        """Write them; whether that went well: a dump that ends with a full disk has not failed for this."""
        content = self.notes.tobytes()
        head = _HEAD.pack(_MAGIC, FORMAT_VERSION, xxhash.xxh3_128_digest(content))
        try:
            write_atomic(path, [head, content])
        except StoreError:
            return False
        return True


def _ordered(notes: np.ndarray) -> Seen:
    return Seen(notes[sorted_order(np.ascontiguousarray(notes["key"]))])


_AT_ONCE = 65_536


def trusted(stats: np.ndarray, moment: int) -> np.ndarray:
    """``[n]`` bool: files whose numbers say something on their file system at all. ``moment`` is now, in ns."""
    kinds = file_systems()
    good: np.ndarray = stats[:, 0] >= 0
    for device in np.unique(stats[good, 0]).tolist():
        kind = kinds.get(device, "")
        if kind in MEMORY:
            good &= stats[:, 0] != device
        elif is_network(kind):
            good &= (stats[:, 0] != device) | (stats[:, _CTIME] <= moment - NETWORK_SETTLED)
    return good


def as_noted(source: FeatureSource, files: Sequence[str], digests: np.ndarray, watcher: Watcher) -> bool:
    """Whether features drawn at random have the digests ``[n, 16]`` that were noted; says how sure that makes one."""
    drawn = np.random.default_rng().choice(len(files), min(SAMPLED, len(files)), replace=False)
    for number in drawn.tolist():
        feature = source.try_read(files[number])
        if not isinstance(feature, Feature) or feature.digest != digests[number].tobytes():
            watcher.note(
                f"feature {shown(files[number])} changed, though {source.witness} are as before{source.excuse}; every "
                "feature is read"
            )
            return False
    if 0 < len(drawn) < len(files):
        most = 1 - (1 - _CERTAINTY) ** (1 / len(drawn))
        watcher.note(
            f"{len(files):,} features are unchanged by {source.witness}; {len(drawn)} of them, drawn at "
            f"random, were read and are as noted ({_CERTAINTY:.0%} sure that fewer than {most:.1%} of all differ)"
        )
    return True


def noted_digests(
    parts: Seen, before: Seen, source: FeatureSource, files: Sequence[str], keys: np.ndarray, watcher: Watcher
) -> tuple[np.ndarray, np.ndarray]:
    """``[N]`` bool, the features that need not be read, and their digests ``[N, 16]``.

    Args:
        parts: notes of the reading that made the rows in question: nothing is drawn of them.
        before: notes of earlier dumps, which are believed as a dump believes them.
        keys: ``[N, 16]`` u1, those of ``files``, in any order.
    """
    moment, stats = time.time_ns(), source.stat_many(files)
    good = trusted(stats, moment)
    noted, digests, _ = parts.lookup(keys, stats)
    noted &= good
    known, others, _ = before.lookup(keys, stats)
    numbers = np.flatnonzero(known & good & ~noted)
    if as_noted(source, [files[number] for number in numbers.tolist()], others[numbers], watcher):
        noted[numbers], digests[numbers] = True, others[numbers]
    return noted, digests


class Unchanged:
    """The shortcut of a rerun. `feature_notes` says when a note is believed; a row's freshness is decided as ever.

    Args:
        files: of all permitted samples, in key order; ``keys`` ``[N, 16]`` u1 theirs.
        part: which of them this run scores.

    Attributes:
        digests, shapes: ``[N, 16]`` u1 and ``[N, 2]`` int32 of the features that need not be read, 0 elsewhere.
        fresh: ``[N]`` bool: which those are.
    """

    def __init__(
        self, job: DumpJob, found: Found, files: Sequence[str], keys: np.ndarray, part: range, watcher: Watcher
    ) -> None:
        self._path, self._keys = job.folder.seen_path, keys
        self._part = slice(part.start, part.stop)
        self._moment = time.time_ns()
        self._stats = np.empty((len(files), 5), np.int64)  # only the part's are ever written or looked at
        self.digests = np.zeros((len(files), 16), np.uint8)
        self.shapes = np.zeros((len(files), 2), np.int32)
        self.fresh = np.zeros(len(files), bool)
        own = keys[self._part]
        self._from_parts = Seen.of_parts(found.snapshot.pending, own)
        seen = Seen.load(self._path, own).and_newer(self._from_parts)
        for start in range(part.start, part.stop, _AT_ONCE):
            block = slice(start, min(start + _AT_ONCE, part.stop))
            self._stats[block] = job.data.features.stat_many(files[block])
        if job.reread or not job.skip_existing or not len(seen):
            return
        believed, digests, shapes = seen.lookup(own, self._stats[self._part])
        numbers = np.flatnonzero(believed & trusted(self._stats[self._part], self._moment))
        for known in found.known.values():
            numbers = numbers[known.are_fresh(numbers + part.start, digests[numbers])]
        at = numbers + part.start
        if not as_noted(job.data.features, [files[number] for number in at.tolist()], digests[numbers], watcher):
            return
        self.fresh[at] = True
        self.digests[at], self.shapes[at] = digests[numbers], shapes[numbers]

    def remember(self, read: np.ndarray, digests: np.ndarray, shapes: np.ndarray, path: Path | None = None) -> None:
        """Take notes of the samples of which ``read`` ``[N]`` bool says that their features were read by this run.

        ``path`` is a part's own file; without it the cache's notes are added to, and get those of parts, too. A note
        that cannot be written is none: the next run reads the feature.
        """
        if not read.any() and (path is not None or not len(self._from_parts)):
            return
        seen = Seen.nothing() if path is not None else Seen.load(self._path).and_newer(self._from_parts)
        noted = seen.record(self._keys[read], self._stats[read], shapes[read], digests[read], self._moment)
        if len(noted) or len(seen):
            noted.only(self._keys).save(path or self._path)
