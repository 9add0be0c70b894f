"""Repairing a cache: an audit of everything, then only what it reports is scored again or rebuilt from the packs.

Rows that are wrong although they look fresh leave their packs first: from then on they are missed, never served, and a
dump scores them as it scores any missing row. View, index and the list of permitted samples need no teacher.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.dump import DumpJob, dump_logits
from kd_cache.errors import KDCacheError, MissingLogitsError
from kd_cache.seal import SealJob, current_in, seal_cache
from kd_cache.store.folder import CacheFolder
from kd_cache.store.keys import keys_of
from kd_cache.store.pack import Origin, Pack, write_pack
from kd_cache.store.seal import remove_files
from kd_cache.verify import (
    CORRUPT,
    FEATURE,
    INDEX,
    MISS,
    PACK,
    ROW,
    STALE,
    TEACHER,
    Problem,
    VerifyJob,
    VerifyReport,
    open_index,
    verify_cache,
)
from kd_cache.watch import Watcher

_SCORED_AGAIN = (MISS, CORRUPT, STALE)
_RUN = ("tool", "created", "settings")


@dataclass(frozen=True)
class RepairJob:
    """What to repair.

    Attributes:
        audit: what to verify, with the teachers loaded; it is asked about everything, whatever its ``n``.
        cache_root: as the user wrote it.
        notes: further content of the teachers' index entries.
        record: what the index is to say of the run where the cache does not say it any more.
    """

    audit: VerifyJob
    cache_root: Path
    on_bad_sample: str = "stop"
    workers: int = 2
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class RepairReport:
    """What was found, what was done, and what is left.

    ``scored`` and ``confirmed`` count by teacher: rows scored again, and adopted rows that scoring again confirmed.
    """

    before: VerifyReport
    after: VerifyReport
    scored: dict[str, int] = field(default_factory=dict)
    confirmed: dict[str, int] = field(default_factory=dict)
    rebuilt: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "exit_code": self.after.exit_code,
            "before": self.before.as_json(),
            "scored": self.scored,
            "confirmed": self.confirmed,
            "rebuilt": self.rebuilt,
            "after": self.after.as_json(),
        }


def repair_cache(job: RepairJob, watcher: Watcher | None = None) -> RepairReport:
    """Audit, repair, audit again.

    Raises:
        CorruptError, MissingLogitsError: the index cannot be rebuilt from what is there.
        FeatureError, TeacherError, StoreError: as `dump_logits`.
    """
    watcher = watcher or Watcher()
    audit = replace(job.audit, n=None)
    before = verify_cache(audit, watcher)
    report = RepairReport(before, before)
    if any(problem.about == INDEX for problem in before.problems) and _index_can_be_rebuilt(audit.folder):
        _rebuild(job, report, watcher)
        report.after = verify_cache(audit, watcher)
    if report.after.problems:
        _repair(job, report, watcher)
        report.after = verify_cache(replace(audit, recompute=False), watcher)
    return report


def _index_can_be_rebuilt(folder: CacheFolder) -> bool:
    """Not the cache of an older script, of another target, or of a newer kd-cache: those are no damage."""
    try:
        index = folder.index(maps=False)
    except KDCacheError as error:
        return error.exit_code == 4
    return index is None or open_index(folder)[0] is not None


def _rebuild(job: RepairJob, report: RepairReport, watcher: Watcher) -> None:
    """A new index from the packs; where these lack rows as well, by scoring them."""
    try:
        _seal(job, watcher)
    except MissingLogitsError:
        current = current_in(job.audit.folder, watcher)
        due = current.origins.keys() & job.audit.teachers.keys()
        if not due:
            raise
        _score(job, report, _Rows(current.origins, current.record), due, watcher)
    report.rebuilt = True


def _repair(job: RepairJob, report: RepairReport, watcher: Watcher) -> None:
    index = open_index(job.audit.folder)[0]
    if index is None:
        return
    rows = _Rows(index.origins, index.record)
    found = report.after
    due = {name for name in index.origins if name in job.audit.teachers and _needs_scoring(name, found, job, rows)}
    # Where an accuracy moved, nobody knows which rows are wrong: every one of that teacher is scored again.
    every = {problem.teacher for problem in found.problems if (problem.kind, problem.about) == (CORRUPT, TEACHER)}
    for name in due:
        wrong = found.wrong_rows.get(name, set())
        if name in rows.adopted:
            report.confirmed[name] = (found.teachers[name].recomputed or 0) - len(wrong)
        elif name not in every:
            drop_rows(job.audit.folder, index.origins[name], wrong)
    _score(job, report, rows, due, watcher, every)
    if not due and any(problem.about not in (FEATURE, TEACHER) for problem in found.problems):
        _seal(job, watcher)
        report.rebuilt = True


@dataclass(frozen=True)
class _Rows:
    """How a cache's rows were made: its teachers, and what the index, or what is left of it, says of the run."""

    origins: Mapping[str, Origin]
    record: Mapping[str, Any]

    @property
    def adopted(self) -> set[str]:
        return {name for name, entry in self.record.get("teachers", {}).items() if "adopted" in entry}


def _needs_scoring(name: str, found: VerifyReport, job: RepairJob, rows: _Rows) -> bool:
    if name in rows.adopted:
        return job.audit.recompute
    return any(_asks_for(problem, name) for problem in found.problems)


def _asks_for(problem: Problem, name: str) -> bool:
    """Whether only a teacher can mend it. A damaged pack's rows are asked for as misses."""
    return problem.teacher == name and problem.kind in _SCORED_AGAIN and problem.about in (ROW, TEACHER, PACK)


def _score(
    job: RepairJob,
    report: RepairReport,
    rows: _Rows,
    due: Collection[str],
    watcher: Watcher,
    every: Collection[str] = (),
) -> None:
    """Score what is not fresh, and ``every`` row of some, those teachers together that compute and store alike."""

    def alike(name: str) -> tuple[str, str, bool]:
        precision = "fp32" if name in rows.adopted else rows.origins[name].fingerprint.parts["precision"]
        return rows.origins[name].dtype, precision, name not in every

    for (dtype, precision, skip_existing), names in groupby(sorted(due, key=alike), alike):
        done = dump_logits(_dump_job(job, rows, list(names), dtype, precision, skip_existing), watcher)
        for name in done.teachers.keys() & due:
            report.scored[name] = done.teachers[name].scored + done.teachers[name].rescored.total()


def _dump_job(
    job: RepairJob, rows: _Rows, names: Sequence[str], dtype: str, precision: str, skip_existing: bool
) -> DumpJob:
    if job.audit.device is None:
        raise ValueError("scoring again needs a device")
    return DumpJob(
        cache_root=job.cache_root,
        manifest=job.audit.manifest,
        selection=job.audit.selection,
        source=job.audit.source,
        teachers={name: job.audit.teachers[name] for name in names},
        device=job.audit.device,
        dtype=dtype,
        precision=precision,
        skip_existing=skip_existing,
        files=bool(rows.record.get("files", True)),
        on_bad_sample=job.on_bad_sample,
        workers=job.workers,
        notes=job.notes,
        record={**job.record, **{key: rows.record[key] for key in _RUN if key in rows.record}},
    )


def _seal(job: RepairJob, watcher: Watcher) -> None:
    audit = job.audit
    record = {"shown_path": f"{job.cache_root}/{audit.folder.path.name}", **job.record}
    seal_cache(
        SealJob(audit.folder, audit.manifest, audit.selection, audit.source, workers=job.workers, record=record),
        watcher,
    )


def drop_rows(folder: CacheFolder, origin: Origin, files: Collection[str]) -> None:
    """Take rows out of the packs of one origin: each pack that holds one is written anew without it, then removed."""
    if not files:
        return
    unwanted = {key.tobytes() for key in keys_of(files)}
    superfluous = []
    for pack in folder.packs([origin.teacher]).of(origin):
        keep = np.array([key.tobytes() not in unwanted for key in pack.keys])
        if keep.all():
            continue
        if keep.any():
            write_rows_of(pack, np.flatnonzero(keep), folder.packs_path)
        superfluous.append(pack.path)
    remove_files(folder.packs_path, superfluous)


def write_rows_of(pack: Pack, rows: np.ndarray, directory: Path) -> Path:
    """A pack of some of another's rows (numbers, ascending), durable when this returns. Raises as `write_pack`."""
    return write_pack(
        directory,
        pack.origin,
        pack.keys[rows],
        pack.inputs[rows],
        [pack.file_bytes(row) for row in rows.tolist()],
        lambda part: pack.logits[rows[part]],
    )
