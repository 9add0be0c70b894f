"""The dump: read every permitted feature once, score what is not fresh with each teacher that needs it, publish.

A row is *fresh* if a pack holds it under the teacher's present fingerprint and the feature's present digest. Scored
rows are committed as small packs (a *shard*) every few seconds; that is all an interruption can lose. A rerun finds
them fresh.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_cache.accuracy import refuse_wrong_joins
from kd_cache.errors import (
    CorruptError,
    FeatureError,
    KDCacheError,
    StaleError,
    TeacherError,
    UsageError,
    shown,
)
from kd_cache.features import Feature, FeatureSource
from kd_cache.finish import Ending, describe, finish, nothing_readable
from kd_cache.known import ASKED, FRESH, NEW, Known
from kd_cache.manifest import SOURCE, Manifest, sample_key
from kd_cache.pending import PendingRecord
from kd_cache.plan import BatchPlan, Places, Shape, count_shapes, plan_of
from kd_cache.publish import Published
from kd_cache.shard import Shard
from kd_cache.splits import Selection
from kd_cache.storage_cost import StorageCost
from kd_cache.store.atomic import make_directory
from kd_cache.store.folder import CacheFolder, refuse_file_as_root, refuse_renamed
from kd_cache.store.index import Index, is_teacher_name
from kd_cache.store.keys import keys_of
from kd_cache.store.pack import Origin
from kd_cache.teacher import Teacher, teacher_origin
from kd_cache.value_kind import contradiction
from kd_cache.watch import Watcher

if TYPE_CHECKING:
    import torch

    from kd_cache.engine import Scored

DEFAULT_BATCH = {"cpu": 32, "cuda": 256}


@dataclass(frozen=True)
class DumpJob:
    """Everything a dump needs to know.

    Attributes:
        cache_root: as the user wrote it; the cache is ``<cache_root>/A2<target>``.
        teachers: by name, in the order of the index.
        notes: further content of a teacher's index entry (its checkpoint, for example).
        batch_size: the most samples scored at once; ``None`` chooses by device.
        shard_size, shard_seconds: finished rows are committed after so many samples or seconds.
        workers: threads that read features ahead; 0 reads in place.
        on_bad_sample: ``stop`` at a sample that cannot be scored, or ``skip`` it and list it as missing.
        part: ``(i, n)`` scores part i of n (0 ≤ i < n), commits it, and leaves view and index to a seal.
        record: what the index keeps about the run (settings, policy, tool version).
    """

    cache_root: Path
    manifest: Manifest
    selection: Selection
    source: FeatureSource
    teachers: Mapping[str, Teacher]
    device: torch.device
    dtype: str = "fp32"
    precision: str = "fp32"
    batch_size: int | None = None
    skip_existing: bool = True
    files: bool = True
    on_bad_sample: str = "stop"
    workers: int = 2
    seed: int = 42
    shard_size: int = 4096
    shard_seconds: float = 5.0
    part: tuple[int, int] | None = None
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> CacheFolder:
        return CacheFolder(self.cache_root / f"{SOURCE}2{self.selection.target}")

    @cached_property
    def origins(self) -> dict[str, Origin]:
        """What this job's rows are made by. Computed once: digesting large weights takes a while."""
        return {
            name: teacher_origin(name, teacher, precision=self.precision, dtype=self.dtype)
            for name, teacher in self.teachers.items()
        }


@dataclass
class TeacherReport:
    """Samples of one teacher by what became of them; ``rescored`` by reason."""

    scored: int = 0
    skipped: int = 0
    rescored: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    cost: StorageCost | None = None

    def count(self, state: str) -> None:
        """One more sample was scored, because it was new or for the reason given."""
        if state == NEW:
            self.scored += 1
        else:
            self.rescored[state] += 1

    def as_json(self) -> dict[str, Any]:
        return {
            "scored": self.scored,
            "skipped": self.skipped,
            "rescored": dict(self.rescored),
            "dropped": self.dropped,
            "storage_cost": None if self.cost is None else self.cost.as_json(),
        }


@dataclass
class DumpReport:
    """What a dump did, or with ``dry_run`` would do. ``missing`` maps files that could not be scored to the reason.

    ``part_size`` is the number of samples in this process's part, all of them where the work was not split.
    """

    cache: Path
    permitted: int
    part_size: int
    per_device: dict[str, int]
    teachers: dict[str, TeacherReport]
    missing: dict[str, str] = field(default_factory=dict)
    samples_scored: int = 0
    seconds: float = 0.0
    bytes_planned: int = 0
    published: Published | None = None

    @property
    def rate(self) -> float:
        """Samples scored per second, whatever the number of teachers."""
        return self.samples_scored / self.seconds if self.seconds else 0.0


def dump_logits(job: DumpJob, watcher: Watcher | None = None) -> DumpReport:
    """Run a dump to its end: every permitted sample scored or listed as missing, packs sealed, view and index written.

    With ``part`` only that part is scored, and nothing is sealed: `kd_cache.seal_cache` does that when all are done.

    Raises:
        StaleError: the cache was written by an older script (and ``skip_existing`` is on).
        CorruptError: logits that the cache holds were joined to wrong rows.
        FeatureError, TeacherError: a bad sample with ``on_bad_sample="stop"``; what was scored before stays committed.
        StoreError: the cache cannot be written.
    """
    return _Dump(job, watcher or Watcher()).run()


def plan_dump(job: DumpJob) -> DumpReport:
    """What `dump_logits` would do, without scoring or writing anything."""
    return _Dump(job, Watcher()).survey()


class _Dump:
    def __init__(self, job: DumpJob, watcher: Watcher) -> None:
        self.job = job
        self.watcher = watcher
        self.folder = job.folder
        self.begun = time.time_ns()
        # In key order, so that ranks (and with them the last bits) do not depend on the manifest's order.
        self.files = sorted(job.selection.files, key=sample_key)
        self.earlier = self._earlier_index()
        self.origins = job.origins
        self.others = {
            name: origin
            for name, origin in (self.earlier.origins if self.earlier else {}).items()
            if name not in self.origins
        }
        self.packs = self.folder.packs()
        if self.earlier is None and self.folder.index_path.exists():
            self.others = self.packs.sole_origins(self.origins)
        for error in self.packs.damaged.values():
            watcher.note(error.message)
        kept = self.others | (self.origins if job.skip_existing else {})
        refuse_wrong_joins(self.folder, self.packs, self.earlier, kept)
        self.keys = keys_of(self.files)
        self.part = self._part()
        self.known = {name: Known(origin, self.packs, self.keys) for name, origin in self.origins.items()}
        self.inputs = np.zeros((len(self.files), 16), np.uint8)
        self.readable = np.zeros(len(self.files), bool)
        self.due: dict[int, dict[str, str]] = {}  # by sample and teacher: why it must be scored
        self.plan: BatchPlan | None = None
        self.places = Places()
        self.shard = Shard(job.folder.packs_path, job.origins, job.shard_size, job.shard_seconds)
        self.pending = PendingRecord(job.folder, self.origins, self._record())
        self.report = DumpReport(
            self.folder.path,
            len(self.files),
            len(self.part),
            job.selection.per_device,
            {name: TeacherReport(cost=self._cost(origin)) for name, origin in self.origins.items()},
        )

    # -- the two ways to run ------------------------------------------------------------------------------------------

    def survey(self) -> DumpReport:
        """Count without scoring. Where no stored row could be fresh, only a feature's header is read."""
        for number in self.part:
            file = self.files[number]
            held = self.job.skip_existing and any(known.holds(number) for known in self.known.values())
            digest = b""
            try:
                if held:
                    digest = self.job.source.read(file).digest
                else:
                    self.job.source.shape(file)
            except FeatureError as error:
                self._bad(number, error)
                continue
            needed = self._needed(number, digest)
            self.report.samples_scored += bool(needed)
            for name in needed:
                origin = self.origins[name]
                self.report.teachers[name].count(self.due[number][name])
                self.report.bytes_planned += origin.num_classes * origin.stored.itemsize
        self._count_dropped()
        return self.report

    def run(self) -> DumpReport:
        began = time.monotonic()
        # Packs are content-named: a row scored again may bring back a name that was here before.
        before = [pack.path for origin in self.origins.values() for pack in self.packs.of(origin)]
        try:
            self._score_all()
        finally:
            self._commit()  # also when stopping: what was scored is kept
        self.report.seconds = time.monotonic() - began
        if self.job.part is not None:
            self.pending.write(self._entries(), self.report.missing)
            return self.report
        if self.part and not self.readable.any():
            raise nothing_readable(len(self.part))
        self._count_dropped()
        if not self.pending.is_written and self._is_news():
            self.pending.write(self._entries(), self.report.missing)
        replaced = [] if self.job.skip_existing else [path for path in before if path not in self.shard.written]
        self.report.published = self._publish(replaced)
        return self.report

    def _is_news(self) -> bool:
        """Whether rows become current of which no index tells: until then a pending record keeps `gc` from them."""
        told = self.earlier.origins if self.earlier else {}
        return any(
            name not in told or told[name].fingerprint.digest != origin.fingerprint.digest
            for name, origin in self.origins.items()
        )

    def _commit(self) -> None:
        """Make what was scored durable; before the first time, say what is being made."""
        if self.shard.is_empty:
            return
        if not self.pending.is_written:
            self.pending.write(self._entries(), {})
        self.shard.commit()
        self.watcher.saved()

    # -- scoring ------------------------------------------------------------------------------------------------------

    def _score_all(self) -> None:
        from kd_cache.engine import Batcher, Engine, numerics

        self.watcher.stage("scoring", len(self.part))
        with numerics(self.job.device, self.job.precision, self.job.seed):
            batcher = Batcher(Engine(self.job.teachers, self.job.device))
            for number, feature in self._read_ahead():
                if feature is None:
                    self._rank_unread(number)
                    continue
                if isinstance(feature, FeatureError):
                    self._bad(number, feature)
                    self._rank_unread(number)
                    continue
                self.inputs[number] = np.frombuffer(feature.digest, np.uint8)
                self.readable[number] = True
                shape = (feature.array.shape[0], feature.array.shape[1])
                rank = self.places.next_rank(shape)
                needed = self._needed(number, feature.digest)
                if not needed:
                    self.watcher.advance(1)
                    continue
                plan = self._planned(shape)
                if shape[1] == plan.bins:
                    self._keep(batcher.add(number, feature.array, needed, plan.place(shape, rank)))
                else:
                    what = f"has {shape[1]} bins, expected {plan.bins} as the others have"
                    self._bad(number, FeatureError(f"feature {shown(self.files[number])} {what}"))
            self._keep(batcher.finish())

    def _rank_unread(self, number: int) -> None:
        """A feature with a good header has its rank, be it another part's or unreadable: its neighbours keep theirs."""
        with suppress(FeatureError):
            self.places.next_rank(self.job.source.shape(self.files[number]))

    def _read_ahead(self) -> Iterator[tuple[int, Feature | FeatureError | None]]:
        """Each permitted sample's feature, read once, a few ahead of its use; ``None`` for those of other parts."""
        read = self.job.source.try_read
        if self.job.workers == 0:
            for number, file in enumerate(self.files):
                yield number, read(file) if number in self.part else None
            return
        waiting: deque[Future[Feature | FeatureError]] = deque()
        with ThreadPoolExecutor(self.job.workers, thread_name_prefix="read") as pool:
            try:
                upcoming = iter(self.part)
                for number in range(len(self.files)):
                    if number not in self.part:
                        yield number, None
                        continue
                    while len(waiting) < 16 * self.job.workers and (ahead := next(upcoming, None)) is not None:
                        waiting.append(pool.submit(read, self.files[ahead]))
                    yield number, waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _needed(self, number: int, digest: bytes) -> frozenset[str]:
        """The teachers that must score this sample. Why is counted when they have."""
        for name, known in self.known.items():
            state = self._state(known, number, digest)
            if state == FRESH:
                self.report.teachers[name].skipped += 1
            else:
                self.due.setdefault(number, {})[name] = state
        return frozenset(self.due.get(number, ()))

    def _state(self, known: Known, number: int, digest: bytes) -> str:
        if self.job.skip_existing:
            return known.state(number, digest)
        return ASKED if known.holds(number) or number in known.superseded else NEW

    def _keep(self, batches: Iterator[Scored]) -> None:
        for scored in batches:
            for name, logits in scored.logits.items():
                self._keep_rows(name, scored.numbers, logits)
            for error in scored.errors.values():
                for number in scored.numbers:
                    self._bad(number, TeacherError(f"{error.message} (sample {shown(self.files[number])})"))
            for number in scored.numbers:
                del self.due[number]
            self.report.samples_scored += len(scored.numbers)
            self.watcher.advance(len(scored.numbers))
            if self.shard.due:
                self._commit()

    def _keep_rows(self, name: str, numbers: list[int], logits: np.ndarray) -> None:
        with np.errstate(over="ignore"):  # an overflow to inf is reported below, by name
            stored = logits.astype(self.origins[name].stored)
        good = np.isfinite(logits).all(axis=1)
        wrong = contradiction(self.origins[name].value_kind, logits[good])
        if wrong is not None:
            raise TeacherError(
                f"teacher {name} says value_kind {self.origins[name].value_kind}, but its rows {wrong}",
                hint="Return raw logits, or declare the value_kind that the teacher returns.",
            )
        fits = np.isfinite(stored).all(axis=1)
        for row, number in enumerate(numbers):
            if fits[row]:
                self.shard.add(name, self.files[number], self.inputs[number].tobytes(), stored[row])
                self.report.teachers[name].count(self.due[number][name])
                continue
            largest = np.abs(logits[row]).max()
            reason = f"do not fit {self.job.dtype} (largest {largest:.6g}); use --dtype fp32"
            what = reason if good[row] else f"are not finite (classes {np.flatnonzero(~np.isfinite(logits[row]))})"
            self._bad(number, TeacherError(f"teacher {name}: the logits of {shown(self.files[number])} {what}"))
        cost = self.report.teachers[name].cost
        if cost is not None and fits.any():
            cost.add(logits[fits], stored[fits])

    def _bad(self, number: int, error: KDCacheError) -> None:
        """A sample that cannot be scored: stop, or list it as missing."""
        if self.job.on_bad_sample == "stop":
            what = "the sample" if isinstance(error, FeatureError) else "the teacher, or the sample"
            hint = error.hint or f"Mend {what}, or pass --on-bad-sample skip to leave such samples out."
            raise type(error)(error.message, hint=hint)
        self.report.missing.setdefault(self.files[number], error.message)
        if isinstance(error, FeatureError):
            self.readable[number] = False
            self.watcher.advance(1)

    # -- the batch plan -----------------------------------------------------------------------------------------------

    def _planned(self, shape: Shape) -> BatchPlan:
        """The plan, made or extended where it does not cover ``shape`` yet."""
        if self.plan is None:
            self.plan = self._saved_plan(shape[1])
        # A shape with other bins is of a bad sample, for which the plan must not grow.
        if self.plan is None or (shape[1] == self.plan.bins and shape not in self.plan.batches):
            self.plan = self._make_plan(earlier=self.plan)
        return self.plan

    def _saved_plan(self, bins: int) -> BatchPlan | None:
        """The plan of the rows that are kept, or that other processes are making; none where there are no such rows."""
        begun = self.packs.good or self.folder.pending_path.exists()
        told = None if self.earlier is None else self.earlier.record
        saved = plan_of(self.folder.plan_path, told) if begun and self.job.skip_existing else None
        asked = any(known.union is not None for known in self.known.values())
        if saved is None or (saved.bins != bins and not asked):
            return None
        if self.job.batch_size in (None, saved.batch_size):
            return saved
        if asked or any(self.packs.of(origin) for origin in self.others.values()):
            self.watcher.note(f"the batch size stays {saved.batch_size}, with which this cache was begun")
            return saved
        return None

    def _make_plan(self, earlier: BatchPlan | None) -> BatchPlan:
        size = self.job.batch_size or DEFAULT_BATCH[self.job.device.type]
        counts = count_shapes(self.job.source, self.files, skip_bad=self.job.on_bad_sample == "skip")
        plan = BatchPlan.from_counts(counts, size, earlier)
        make_directory(self.folder.path)
        plan.save(self.folder.plan_path)
        return plan

    # -- the end ------------------------------------------------------------------------------------------------------

    def _count_dropped(self) -> None:
        """Samples that the cache holds, of scored and other teachers, and that are no longer permitted."""
        permitted = {key.tobytes() for key in self.keys}
        gone: dict[str, set[bytes]] = {}
        for pack in self.packs.good:
            surplus = {key.tobytes() for key in pack.keys} - permitted
            gone.setdefault(pack.origin.teacher, set()).update(surplus)
        for name, keys in gone.items():
            if keys or name in self.report.teachers:
                self.report.teachers.setdefault(name, TeacherReport()).dropped = len(keys)

    def _publish(self, replaced: list[Path]) -> Published:
        position = {file: number for number, file in enumerate(self.files)}
        order = [position[file] for file in self.job.selection.files]  # the manifest's, in which the index lists them
        end = Ending(
            self.folder,
            self._shown_path,
            self.job.manifest,
            self.job.selection,
            self.inputs[order],
            self.readable[order],
            self.origins,
            self._record(),
            self.job.files,
            self.packs,
            others=self.others,
            entries=self._entries(),
            missing=self.report.missing,
            earlier=self.earlier,
            replaced=replaced,
        )
        return finish(end, self.watcher)

    @property
    def _shown_path(self) -> str:
        return f"{self.job.cache_root}/{self.folder.path.name}"

    def _record(self) -> dict[str, Any]:
        """What index and pending record keep of this run, besides its results."""
        from kd_cache.engine import environment

        described = describe(self.folder, self.job.manifest, self.job.selection, self.job.record)
        own = {"environment": environment(self.job.device), "files": self.job.files, "shown_path": self._shown_path}
        part = {} if self.job.part is None else {"part": list(self.job.part)}
        return {"begun": self.begun, **described, **own, **part}

    def _entries(self) -> dict[str, dict[str, Any]]:
        """What this run adds to its teachers' entries."""
        entries = {}
        for name, report in self.report.teachers.items():
            entries[name] = dict(self.job.notes.get(name, {}))
            if report.cost is not None and report.cost.rows:
                entries[name]["storage_cost"] = report.cost.as_json()
        return entries

    # -- the beginning ------------------------------------------------------------------------------------------------

    def _part(self) -> range:
        """The samples to score, by number: neighbours in key order, so that few batches are shared between parts."""
        number, count = self.job.part or (0, 1)
        if not 0 <= number < count:
            raise UsageError(f"part {number} of {count} does not exist; the first is 0/{count}")
        if self.job.part is not None and not self.job.skip_existing:
            raise UsageError(
                "a part cannot score again what is fresh: nobody could tell its rows from those of before",
                hint="Dump with --no-skip-existing in one process, or remove the cache.",
            )
        return range(len(self.files) * number // count, len(self.files) * (number + 1) // count)

    def _cost(self, origin: Origin) -> StorageCost | None:
        return StorageCost(origin.value_kind) if origin.dtype == "fp16" else None

    def _earlier_index(self) -> Index | None:
        for name in self.job.teachers:
            if not is_teacher_name(name):
                raise TeacherError(f"{shown(name)!r} cannot be a teacher's name (letters, digits, _ . -)")
        refuse_file_as_root(self.job.cache_root)
        try:
            index = self.folder.index(maps=False)
        except StaleError as error:
            # A dump that was begun anew left packs of its own here; an interrupted adoption's are no reason to go on.
            adopted = all("adopted" in pack.origin.fingerprint.parts for pack in self.folder.packs().good)
            if self.job.skip_existing and adopted:
                raise StaleError(
                    error.message,
                    hint="Its rows cannot be checked. Dump into another --cache-root, adopt them, "
                    "or pass --no-skip-existing to score everything again.",
                ) from error
            return None
        except CorruptError as error:
            if not self.folder.pack_paths() and self.job.skip_existing:
                raise CorruptError(
                    error.message,
                    hint="There are no packs to rebuild it from. Move the folder away, or pass --no-skip-existing.",
                ) from error
            self.watcher.note(f"{error.message}; it is written anew from the packs")
            return None
        refuse_renamed(self.folder, index)
        return index
