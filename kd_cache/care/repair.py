"""Repairing a cache: an audit of everything, then only what it reports is scored again or rebuilt from the packs.

Rows that are wrong although they look fresh leave first: their packs are removed, and an index names packs without
them. From then on they are missed, never served, and a dump scores them as it scores any missing row. View, index and
the list of permitted samples need no teacher.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.care.problems import (
    CORRUPT,
    INDEX,
    LABEL,
    MISS,
    PACK,
    ROW,
    STALE,
    TEACHER,
    UNCHECKED,
    VIEW,
    Problem,
    VerifyReport,
)
from kd_cache.care.seal import SealJob, seal_cache
from kd_cache.care.verify import VerifyJob, state_problem, verify_cache
from kd_cache.dataset.views import Policy
from kd_cache.errors import CorruptError, FeatureError, MissingLogitsError, StoreError
from kd_cache.files.atomic import remove_files
from kd_cache.keys import keys_of
from kd_cache.score.dump import DumpJob, dump_logits
from kd_cache.store.cache import CacheFolder, teacher_in_name
from kd_cache.store.index import Index
from kd_cache.store.origin import Origin
from kd_cache.store.pack import write_part
from kd_cache.store.publish import Change, Wanted, publish
from kd_cache.store.snapshot import Snapshot
from kd_cache.store.union import Union
from kd_cache.watch import Watcher

_SCORED_AGAIN = (MISS, CORRUPT, STALE)
_REBUILT = {PACK, VIEW, INDEX, LABEL}
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

    By teacher: ``scored`` counts rows scored again, ``confirmed`` adopted rows that scoring again confirmed, and
    ``replaced`` those that were other rows than the teacher gives.
    """

    before: VerifyReport
    after: VerifyReport
    scored: dict[str, int] = field(default_factory=dict)
    confirmed: dict[str, int] = field(default_factory=dict)
    replaced: dict[str, int] = field(default_factory=dict)
    rebuilt: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "exit_code": self.after.exit_code,
            "before": self.before.as_json(),
            "scored": self.scored,
            "confirmed": self.confirmed,
            "replaced": self.replaced,
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
    before = _audit(audit, watcher)
    report = RepairReport(before, before)
    if _index_is_lost(audit.snapshot):
        _rebuild(job, report, watcher)
        report.after = _audit(audit := _anew(audit), watcher)
    if report.after.problems:
        _repair(replace(job, audit=audit), report, watcher)
    else:
        return report
    report.after = _audit(replace(_anew(audit), recompute=False), watcher)
    return report


def _anew(audit: VerifyJob) -> VerifyJob:
    """The same audit of the cache as it is now, with nothing remembered: what was mended is read from the disk."""
    return replace(audit, snapshot=Snapshot(audit.snapshot.folder, maps=True))


def _audit(job: VerifyJob, watcher: Watcher) -> VerifyReport:
    """Raises `StoreError` where the index could not be read: nothing says then what is to be mended."""
    report = verify_cache(job, watcher)
    _refuse_unread(report.problems)
    return report


def _refuse_unread(problems: Sequence[Problem]) -> None:
    for problem in problems:
        if (problem.kind, problem.about) == (UNCHECKED, INDEX):
            raise StoreError(problem.reason)


def _index_is_lost(snapshot: Snapshot) -> bool:
    """There is none, or a damaged one. One of an older script, of another target, of a newer kd-cache is no damage."""
    return snapshot.is_damaged or (snapshot.index is None and snapshot.trouble is None)


def _index_of(snapshot: Snapshot) -> Index | None:
    """The index, ``None`` where it is lost or another's."""
    return snapshot.index if state_problem(snapshot) is None else None


def _rebuild(job: RepairJob, report: RepairReport, watcher: Watcher) -> None:
    """A new index from the packs; where these lack rows as well, by scoring them."""
    current = job.audit.snapshot.current(watcher)
    packs_path = job.audit.snapshot.folder.packs_path
    for origin in current.origins.values():  # no index names them
        remove_files(packs_path, cleaned(job.audit.snapshot.folder, origin))
    rows = _Rows(current.origins, current.record)
    due = rows.at_hand(job)
    try:
        _seal(job, watcher)
    except (MissingLogitsError, FeatureError) as error:
        skipping = job.on_bad_sample == "skip" or not isinstance(error, FeatureError)
        if not due or not skipping:
            raise
        _score(job, report, rows, due, watcher)
    report.rebuilt = True


def _repair(job: RepairJob, report: RepairReport, watcher: Watcher) -> None:
    index = _index_of(job.audit.snapshot)
    if index is None:
        return
    rows, found = _Rows(index.origins, index.record), report.after
    due = [name for name in rows.origins if name in job.audit.teachers and _needs_scoring(name, found, job, rows)]
    publishing = not _REBUILT.isdisjoint(problem.about for problem in found.problems)
    # Where an accuracy moved, nobody knows which rows are wrong: every one of that teacher is scored again.
    moved = [problem for problem in found.problems if (problem.kind, problem.about) == (CORRUPT, TEACHER)]
    if due or publishing:
        _refuse_to_keep([problem for problem in moved if problem.teacher not in due], job)
    _take_out(job, report, rows, due, {problem.teacher for problem in moved}, watcher)
    if due:
        _score(job, report, rows, due, watcher)
    elif publishing:
        _publish(job, report, rows, watcher)


def _take_out(
    job: RepairJob,
    report: RepairReport,
    rows: _Rows,
    due: Collection[str],
    every: Collection[str],
    watcher: Watcher,
) -> None:
    """Remove what is wrong and publish the rest, and count the adopted rows that are right: those give way when scored.

    Until the index stands that names the rest, the cache cannot be opened: better than a wrong row.
    """
    folder, superfluous = job.audit.snapshot.folder, dict[Path, Path | None]()
    for name, origin in rows.origins.items():
        wrong = report.after.wrong_rows.get(name, set())
        replaced = name in due and name in rows.adopted
        if replaced:
            report.confirmed[name] = max(0, (report.after.teachers[name].recomputed or 0) - len(wrong))
            report.replaced[name] = len(wrong)
        if name in due and name in every:
            superfluous |= dict.fromkeys(pack.path for pack in folder.packs([name]).of(origin))
        elif not replaced:
            superfluous |= cleaned(folder, origin, job.audit.snapshot.served(name), wrong)
    if not superfluous:
        return
    # First of all: with the next index in place and these still there, a repair that was killed would find their rows.
    remove_files(folder.packs_path, superfluous)
    selection, named = job.audit.data.selection, job.audit.snapshot.served_paths(rows.origins)
    nothing = np.zeros((len(selection.keys), 16), np.uint8), np.zeros(len(selection.keys), bool)
    change = Change(
        str(rows.record.get("shown_path", folder.path)),
        Wanted.of(selection, *nothing),  # no feature is read: what is not wrong stays
        {},
        {**rows.record, "features_at": job.audit.data.features.place},
        bool(rows.record.get("files", True)),
        missing=rows.record["missing"],
        standing=_standing(superfluous, named),
        keep_damaged=True,
    )
    publish(job.audit.snapshot, change, watcher)


def _standing(parts: Mapping[Path, Path | None], named: Sequence[Path]) -> dict[str, list[str]]:
    """By teacher the packs that the index names, or what is left of them where there is such a part."""
    found: dict[str, list[str]] = {}
    for path in named:
        if (left := parts.get(path, path)) is not None:
            found.setdefault(teacher_in_name(path), []).append(left.name)
    return found


def _refuse_to_keep(moved: Sequence[Problem], job: RepairJob) -> None:
    """Whatever is published would measure these rows anew, and then they would pass for right."""
    for problem in moved:
        raise CorruptError(f"{problem.teacher}: {problem.reason}", hint=_what_is_needed(problem.teacher, job))


def _what_is_needed(name: str, job: RepairJob) -> str:
    """What the user must pass so that a teacher's rows can be scored again."""
    reason, _ = job.audit.unchecked.get(name, ("its rows were adopted; pass --recompute to score them", True))
    return f"{name} is needed to score its rows again: {reason}."


def _publish(job: RepairJob, report: RepairReport, rows: _Rows, watcher: Watcher) -> None:
    """View and index anew from the packs. Rows that no teacher is here for stay missed, if there is one for others."""
    lacking = [name for name in rows.origins if any(_asks_for(problem, name) for problem in report.after.problems)]
    report.rebuilt = True
    if lacking and (at_hand := rows.at_hand(job)):
        _score(job, report, rows, at_hand, watcher)
        return
    try:
        _seal(job, watcher)
    except MissingLogitsError as error:
        hints = [_what_is_needed(name, job) for name in lacking]
        raise MissingLogitsError(error.message, hint="\n".join(hints) or error.hint) from error


@dataclass(frozen=True)
class _Rows:
    """How a cache's rows were made: its teachers, and what the index, or what is left of it, says of the run."""

    origins: Mapping[str, Origin]
    record: Mapping[str, Any]

    @property
    def adopted(self) -> set[str]:
        return {name for name, origin in self.origins.items() if "adopted" in origin.fingerprint.parts}

    def at_hand(self, job: RepairJob) -> list[str]:
        """The teachers whose rows can be scored with their present fingerprint."""
        return [name for name in self.origins if name in job.audit.teachers and name not in self.adopted]


def _needs_scoring(name: str, found: VerifyReport, job: RepairJob, rows: _Rows) -> bool:
    if name in rows.adopted:
        return job.audit.recompute
    return any(_asks_for(problem, name) for problem in found.problems)


def _asks_for(problem: Problem, name: str) -> bool:
    """Whether only a teacher can mend it. A damaged pack's rows are asked for as misses."""
    return problem.teacher == name and problem.kind in _SCORED_AGAIN and problem.about in (ROW, TEACHER, PACK)


def _score(job: RepairJob, report: RepairReport, rows: _Rows, names: Sequence[str], watcher: Watcher) -> None:
    """Score what is not fresh, those teachers together that compute and store alike, in the order of the index."""

    def alike(name: str) -> tuple[str, str, str, int]:
        origin = rows.origins[name]
        precision = "fp32" if name in rows.adopted else origin.fingerprint.parts["precision"]
        return origin.dtype, precision, origin.policy or "", len(origin.views)

    for (dtype, precision, policy, views), group in groupby(sorted(names, key=alike), alike):
        scoring = _dump_job(job, rows, together := list(group), dtype, precision)
        if views:
            scoring = replace(scoring, policy=Policy.from_text(policy), views=views)
        done = dump_logits(scoring, watcher)
        for name in together:
            count = done.teachers[name].scored + done.teachers[name].rescored.total()
            report.scored[name] = report.scored.get(name, 0) + count


def _dump_job(job: RepairJob, rows: _Rows, names: Sequence[str], dtype: str, precision: str) -> DumpJob:
    if job.audit.device is None:
        raise ValueError("scoring again needs a device")
    return DumpJob(
        cache_root=job.cache_root,
        data=job.audit.data,
        teachers={name: job.audit.teachers[name] for name in names},
        device=job.audit.device,
        dtype=dtype,
        precision=precision,
        files=bool(rows.record.get("files", True)),
        on_bad_sample=job.on_bad_sample,
        workers=job.workers,
        check_cached=False,  # an audit came before, as thorough as was asked
        reread=True,  # the audit that asked for this has read the features; no note may gainsay it
        notes=job.notes,
        record={**job.record, **{key: rows.record[key] for key in _RUN if key in rows.record}},
    )


def _seal(job: RepairJob, watcher: Watcher) -> None:
    audit = job.audit
    snapshot = Snapshot(audit.snapshot.folder)
    shown_path = f"{job.cache_root}/{snapshot.folder.path.name}"
    sealing = SealJob(
        snapshot, audit.data, workers=job.workers, inputs="read", record=job.record, shown_path=shown_path
    )
    seal_cache(sealing, watcher)


def cleaned(
    folder: CacheFolder, origin: Origin, served: Union | None = None, files: Collection[str] = ()
) -> dict[Path, Path | None]:
    """Write anew the packs of one origin that hold rows that do not match their checksums, or the ``served`` rows of
    these files, or others that were made of the same input.

    Without these rows, and beside the packs that they stand for. Returns by each of these what was written, if it was.
    """
    unwanted: set[bytes] = set()
    if served is not None and files:
        at = served.find(keys_of(files))
        unwanted = {served.keys[row].tobytes() + served.inputs[row].tobytes() for row in at[at >= 0]}
    superfluous = {}
    for pack in folder.packs([origin.teacher]).of(origin):
        rows = zip(pack.keys, pack.inputs, strict=True)
        keep = np.array([key.tobytes() + made_of.tobytes() not in unwanted for key, made_of in rows])
        keep[pack.wrong_rows(np.arange(len(pack)))] = False
        if keep.all():
            continue
        part = write_part(folder.packs_path, pack, np.flatnonzero(keep)) if keep.any() else None
        superfluous[pack.path] = part
    return superfluous
