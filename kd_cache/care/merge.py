"""Bringing caches of one adaptation together that were made apart: by other machines, on other disks.

Packs travel whole, byte for byte, under the name that carries their digest; a pack that also holds rows which the
manifest here does not permit travels without them. What the sources say of their teachers goes into pending records,
as a dump's does, and then the same seal runs that follows a split dump. Sources are only read. Whatever is interrupted,
the same command brings the rest: packs and records have the names of their content.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kd_cache.care.seal import SealJob, SealReport, seal_cache
from kd_cache.dataset.dataset import Dataset
from kd_cache.errors import CorruptError, MissingLogitsError, StaleError, StoreError, UsageError, shown
from kd_cache.files.atomic import make_directory, open_file, store_errors, sync_directory, temporary_beside
from kd_cache.store.cache import CacheFolder, teacher_in_name
from kd_cache.store.classes import refuse_other_order
from kd_cache.store.entry import carried
from kd_cache.store.index import Index
from kd_cache.store.origin import Origin, canonical_json
from kd_cache.store.pack import Pack, write_part
from kd_cache.store.pending import Age, PendingRecord
from kd_cache.store.plan import BatchPlan
from kd_cache.store.preamble import USER_BLOCK
from kd_cache.store.snapshot import GO_ON, Snapshot
from kd_cache.store.union import Union
from kd_cache.watch import Watcher

_RESULTS = ("teachers", "digest", "format_version", "missing", "permitted", "features_at")
_CHUNK = 1 << 22
_BLOCK = 65_536


@dataclass(frozen=True)
class MergeJob:
    """What to merge into what.

    Attributes:
        snapshot: the destination, which need not exist.
        data: what it may hold. Its paths are what the index keeps: the sources' may be another machine's.
        sources: folders of caches.
        shown_path: the destination as the user wrote it; the index's paths start with it.
        only: just these teachers of the sources; all by default.
        files: whether the result is to have a view; ``None`` leaves that as the dumps said.
        workers: threads that read features.
    """

    snapshot: Snapshot
    data: Dataset
    sources: Sequence[Path]
    shown_path: str
    only: Collection[str] = ()
    files: bool | None = None
    workers: int = 2

    @property
    def folder(self) -> CacheFolder:
        return self.snapshot.folder


@dataclass
class Brought:
    """What one source had: by teacher its rows, and how many of them are not permitted here; packs that were new."""

    source: str
    rows: dict[str, int] = field(default_factory=dict)
    not_permitted: dict[str, int] = field(default_factory=dict)
    packs: int = 0


@dataclass
class MergeReport:
    """What a merge did."""

    sources: list[Brought]
    sealed: SealReport

    def as_json(self) -> dict[str, Any]:
        return {**self.sealed.as_json(), "sources": [vars(brought) for brought in self.sources]}


def merge_caches(job: MergeJob, watcher: Watcher | None = None) -> MergeReport:
    """Bring the sources' rows into the destination and seal it.

    Everything is read and checked before anything is written.

    Raises:
        UsageError: a source is the destination; two teachers have the same classes in another order.
        MissingLogitsError: a source holds no rows that it tells the making of, or ``only`` names a teacher of none; or
            the sources together lack rows of permitted samples: then what they have is kept for another merge or dump.
        StaleError: a source is of another adaptation or of an older script; two caches have rows of one teacher that
            were made differently.
        CorruptError: a source is damaged.
        StoreError: a source cannot be read, the destination not written.
    """
    watcher = watcher or Watcher()
    sources = [_Source(path, job) for path in _distinct(job)]
    _refuse_unknown(job, sources)
    held = _Destination(job.snapshot, watcher)
    _refuse_differing(held, sources)
    for source in sources:
        source.open_packs()
    make_directory(job.folder.packs_path)
    _bring_plans(job.snapshot, sources, watcher)
    watcher.stage("merging", sum(source.size for source in sources))
    brought = [source.bring(held, watcher) for source in sources]
    try:
        sealed = seal_cache(SealJob(job.snapshot.again(), job.data, job.files, job.workers), watcher)
    except MissingLogitsError as error:
        hint = "What was merged is kept. Merge what holds the others too, or score them: kd-cache dump."
        raise MissingLogitsError(error.message, hint=hint) from error
    return MergeReport(brought, sealed)


def records_in(snapshot: Snapshot) -> list[Index]:
    """What a cache says of the making of its rows: its index, then what dumps say that have not finished.

    Raises:
        MissingLogitsError: nothing.
        StaleError, CorruptError, StoreError: the index, or a pending record, is an older script's, damaged or newer.
    """
    if snapshot.trouble is not None:
        raise snapshot.refusal or snapshot.trouble
    for error in snapshot.damaged_pending:
        raise CorruptError(error.message, hint=GO_ON)
    records = ([] if snapshot.index is None else [snapshot.index]) + snapshot.pending
    if not records:
        raise snapshot.refusal or AssertionError("there is an index, or a reason why not")
    return records


def _distinct(job: MergeJob) -> list[Path]:
    """Each source once."""
    found: dict[str, Path] = {}
    own = os.path.realpath(job.folder.path)
    for path in job.sources:
        real = os.path.realpath(path)
        if real == own:
            raise UsageError(f"the source {shown(path)} is the destination itself", hint="Leave it out.")
        found.setdefault(real, path)
    return list(found.values())


class _Destination:
    """What the destination holds already."""

    def __init__(self, snapshot: Snapshot, watcher: Watcher) -> None:
        self.folder = snapshot.folder
        self.snapshot = snapshot
        self.origins: dict[str, Origin] = {}
        if snapshot.packs.good or snapshot.state is not None or snapshot.folder.pending_path.exists():
            with suppress(MissingLogitsError):  # a merge or dump that was interrupted before it had anything
                self.origins = snapshot.current(watcher).origins

    def knows(self, origin: Origin) -> bool:
        known = self.origins.get(origin.teacher)
        return known is not None and known.fingerprint.digest == origin.fingerprint.digest

    def holds(self, pack: Pack, rows: np.ndarray) -> bool:
        """Whether these rows are here already, byte for byte."""
        union = self.snapshot.union(pack.origin)
        if union is None:
            return False
        positions = union.match(pack.keys[rows], pack.inputs[rows])
        return not (positions < 0).any() and _equal_rows(union, positions, pack, rows)


def _equal_rows(union: Union, positions: np.ndarray, pack: Pack, rows: np.ndarray) -> bool:
    unsigned = f"u{pack.origin.stored.itemsize}"
    return all(
        np.array_equal(
            union.take(positions[at : at + _BLOCK]).view(unsigned), pack.logits[rows[at : at + _BLOCK]].view(unsigned)
        )
        for at in range(0, len(rows), _BLOCK)
    )


class _Source:
    """One cache to merge, only ever read."""

    def __init__(self, path: Path, job: MergeJob) -> None:
        self.folder = CacheFolder(path)
        self.snapshot = Snapshot(self.folder)
        self.job = job
        self.records = records_in(self.snapshot)
        for index in self.records:
            self._refuse_other_adaptation(index)
        self.origins: dict[str, Origin] = {}
        for index in self.records:  # a finished cache's index says what is current, whatever dumps are under way
            for name, origin in index.origins.items():
                if not job.only or name in job.only:
                    self.origins.setdefault(name, origin)

    def _refuse_other_adaptation(self, index: Index) -> None:
        found, expected = index.record.get("adaptation"), self.job.folder.path.name
        if found != expected:
            raise StaleError(
                f"{shown(index.path)} tells of a cache of {shown(found)}, expected {shown(expected)}",
                hint="Merge caches of one target; pass it with --target.",
            )

    @property
    def size(self) -> int:
        return sum(len(pack) for pack in self._current_packs())

    def _current_packs(self) -> Iterator[Pack]:
        for origin in self.origins.values():
            yield from self.snapshot.packs.of(origin)

    def open_packs(self) -> None:
        """Open and check them; a damaged one of a wanted teacher is an error."""
        for path, error in self.snapshot.packs.damaged.items():
            if teacher_in_name(path) in self.origins:
                raise CorruptError(error.message, hint="Mend the source first: kd-cache repair, or kd-cache dump.")
        self.snapshot.refuse_wrong_joins(self.origins)

    def bring(self, held: _Destination, watcher: Watcher) -> Brought:
        """Write the records of what is new, and then the packs: a seal or `gc` in between knows whose they are."""
        report = Brought(str(self.folder.path))
        wanted = []
        for pack in self._current_packs():
            name = pack.origin.teacher
            rows = np.flatnonzero(self.job.data.selection.finder.find(pack.keys) >= 0)
            report.rows[name] = report.rows.get(name, 0) + len(pack)
            report.not_permitted[name] = report.not_permitted.get(name, 0) + len(pack) - len(rows)
            if len(rows) and not held.holds(pack, rows):
                wanted.append((pack, rows))
        report.packs = len(wanted)
        if wanted or not all(held.knows(origin) for origin in self.origins.values()):
            for index in self.records:
                self._tell(held.folder, index)
        for pack, rows in wanted:
            _put(pack, rows, held.folder.packs_path)
            watcher.advance(len(pack))
        return report

    def _tell(self, folder: CacheFolder, index: Index) -> None:
        """Repeat in the destination what an index or a pending record says of the teachers that are merged."""
        mine = {name: origin for name, origin in index.origins.items() if self._is_current(name, origin)}
        if not mine:
            return
        settings = {**index.record.get("settings", {}), "paths": dict(self.job.data.paths)}
        own = {"shown_path": self.job.shown_path, "settings": settings, "begun": Age.of(index.record).begun}
        own["generation"] = self.job.snapshot.next_generation  # a source's numbers say nothing here
        record = {key: value for key, value in index.record.items() if key not in _RESULTS} | own
        entries = {name: carried(index.record["teachers"][name]) for name in mine}
        pending = PendingRecord(folder, mine, record)
        # A name by content: merging again after an interruption must not tell the same thing twice.
        content = canonical_json([index.record["digest"], sorted(mine)])
        pending.path = pending.path.with_name(f"{xxhash.xxh3_64_hexdigest(content)}.json")
        pending.write(entries, index.missing)

    def _is_current(self, name: str, origin: Origin) -> bool:
        return name in self.origins and self.origins[name].fingerprint.digest == origin.fingerprint.digest


def _refuse_unknown(job: MergeJob, sources: Sequence[_Source]) -> None:
    held = {name for source in sources for name in source.origins}
    unknown = [name for name in job.only if name not in held]
    if unknown:
        raise MissingLogitsError(f"no source holds logits of {', '.join(map(shown, unknown))}", hint="Check --only.")


def _refuse_differing(held: _Destination, sources: Sequence[_Source]) -> None:
    """Two caches that hold one teacher's rows must agree on what made them."""
    wanted = {name for source in sources for name in source.origins}
    first = {name: (origin, held.folder.path) for name, origin in held.origins.items() if name in wanted}
    for source in sources:
        for name, origin in source.origins.items():
            known, path = first.setdefault(name, (origin, source.folder.path))
            if known.fingerprint.digest != origin.fingerprint.digest:
                raise StaleError(
                    f"{name}: the rows in {shown(path)} and in {shown(source.folder.path)} were made differently: "
                    f"{known.fingerprint.difference(origin.fingerprint)}",
                    hint="Dump again where they are not as you want them, or merge other teachers: --only NAME.",
                )
    refuse_other_order(held.origins | {name: origin for name, (origin, _) in first.items()})


def _bring_plans(held: Snapshot, sources: Sequence[_Source], watcher: Watcher) -> None:
    """The batch sizes that rows were scored in: a dump goes on with them, and `verify --recompute` needs them."""
    before = plan = held.saved_plan
    for source in sources:
        found = source.snapshot.saved_plan
        if plan is None or found is None:
            plan = plan or found
        elif (found.batch_size, found.bins) == (plan.batch_size, plan.bins) and all(
            plan.batches.get(shape, size) == size for shape, size in found.batches.items()
        ):
            plan = BatchPlan(plan.batch_size, plan.bins, {**plan.batches, **found.batches})
        else:
            watcher.note(
                f"{source.folder.path} was scored in batches of other sizes; the last bits of its rows may be others"
            )
    if plan is not None and plan != before:
        plan.save(held.folder.plan_path)


def _put(pack: Pack, rows: np.ndarray, directory: Path) -> None:
    """Write these rows of a pack durably: its very bytes where that is all of them."""
    if len(rows) == len(pack):
        _copy(pack.path, directory)
        return
    write_part(directory, pack, rows)


def _copy(source: Path, directory: Path) -> None:
    """Copy a checked pack. What is put in place was read back and has the digest that its name carries."""
    target = directory / source.name
    with store_errors(target, "write"), temporary_beside(target) as temporary:
        with temporary.open("xb") as file:
            file.writelines(_chunks(source))
            file.flush()
            os.fsync(file.fileno())
        if _digests(temporary) != (_head(source), source.stem.rpartition("-")[2]):
            raise StoreError(f"the copy of {shown(source)} in {shown(directory)} is not what was copied")
        temporary.replace(target)
        sync_directory(directory)


def _digests(path: Path) -> tuple[bytes, str]:
    """The first bytes of a pack, and the digest of all others."""
    digest = xxhash.xxh3_128()
    head = b""
    for chunk in _chunks(path):
        digest.update(chunk if head else chunk[USER_BLOCK:])
        head = head or chunk[:USER_BLOCK]
    return head, digest.hexdigest()


def _head(path: Path) -> bytes:
    with store_errors(path, "read"), open_file(path) as file:
        return file.read(USER_BLOCK)


def _chunks(path: Path) -> Iterator[bytes]:
    with store_errors(path, "read"), open_file(path) as file:
        while chunk := file.read(_CHUNK):
            yield chunk
