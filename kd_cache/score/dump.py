"""The dump: read every permitted feature once, score what is not fresh with each teacher that needs it, publish.

A row is *fresh* if a pack holds it under the teacher's present fingerprint and the feature's present digest. Scored
rows are committed as small packs (a *shard*) every few seconds; that is all an interruption can lose. A rerun finds
them fresh.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.dataset.dataset import nothing_readable, provenances
from kd_cache.dataset.guard import refuse_leaking, tell_of_untold
from kd_cache.dataset.provenance import Provenance
from kd_cache.errors import FeatureError, UsageError
from kd_cache.files.atomic import make_directory
from kd_cache.keys import KeyFinder
from kd_cache.score.existing import NOWHERE, Elsewhere, Found, find_rows, known_rows
from kd_cache.score.job import DumpJob, DumpReport, TeacherReport
from kd_cache.score.storage_cost import StorageCost, cost_of
from kd_cache.score.teacher import compare_front_ends
from kd_cache.score.unchanged import Unchanged
from kd_cache.store.accuracy import near_chance, stored_accuracy, stored_apart
from kd_cache.store.cache import CacheFolder
from kd_cache.store.index import VIEW_BELOW, refuse_large_index
from kd_cache.store.pending import PendingRecord, notes_beside
from kd_cache.store.preamble import Span
from kd_cache.store.publish import Change, Published, Wanted, publish
from kd_cache.store.union import merge_packs
from kd_cache.store.view import without_files
from kd_cache.watch import Watcher

__all__ = ["DumpJob", "DumpReport", "dump_logits", "lenders", "plan_dump", "plan_dumps", "refuse_unfit"]


def dump_logits(job: DumpJob, watcher: Watcher | None = None, lent_by: Sequence[CacheFolder] = ()) -> DumpReport:
    """Run a dump to its end: every permitted sample scored or listed as missing, packs sealed, view and index written.

    Rows that a cache of ``lent_by`` holds, of the same fingerprint, key and feature, are copied in place of scoring.
    With ``part`` only that part is scored, and nothing is sealed: `kd_cache.seal_cache` does that when all are done.

    Raises:
        StaleError: the cache was written by an older script (and ``skip_existing`` is on).
        CorruptError: logits that the cache holds were joined to wrong rows.
        StaleError: cached rows are not what a teacher gives now; TeacherError: its accuracy is below ``min_accuracy``.
        FeatureError, TeacherError: a bad sample with ``on_bad_sample="stop"``; what was scored before stays committed.
        StoreError: the cache cannot be written.
    """
    return _Dump(job, watcher or Watcher(), Elsewhere(lent_by)).run()


def plan_dump(job: DumpJob) -> DumpReport:
    """What `dump_logits` would do, without scoring or writing anything."""
    return _Dump(job, Watcher()).survey()


# -- several caches, one after the other: what a teacher scored for one of them is copied into the others --------------


def lenders(jobs: Sequence[DumpJob], number: int) -> list[CacheFolder]:
    """The caches that a job takes rows from. What is to be scored again was so in those before it."""
    return [job.folder for at, job in enumerate(jobs) if at < number or (at > number and job.skip_existing)]


def refuse_unfit(jobs: Sequence[DumpJob]) -> None:
    """Raise what a job will be refused for, before any of them scores a sample. Errors as for `dump_logits`."""
    from kd_cache.score.cached_rows import check_unknown_code

    for job in jobs:
        dump = _Dump(job, Watcher())
        check_unknown_code(dump.jobs[0], dump.found, dump.files, Watcher())


def plan_dumps(jobs: Sequence[DumpJob]) -> list[DumpReport]:
    """What dumps would do that are run in this order, each with its `lenders`."""
    reports: list[DumpReport] = []
    planned: dict[str, list[np.ndarray]] = {}
    for number, job in enumerate(jobs):
        lent_by = lenders(jobs, number) if job.skip_existing else []
        dump = _Dump(job, Watcher(), Elsewhere(lent_by, planned))
        reports.append(dump.survey())
        for origin in job.origins.values():
            planned.setdefault(origin.fingerprint.digest, []).append(dump.keys[dump.good])
    return reports


class _Dump:
    def __init__(self, job: DumpJob, watcher: Watcher, elsewhere: Elsewhere = NOWHERE) -> None:
        self.job, self.jobs, self.elsewhere = job, job.by_view, elsewhere
        self.watcher = watcher
        self.folder = job.folder
        self.begun = time.time_ns()
        self.good = np.zeros(0, bool)
        selection = job.data.selection
        self.provenances = provenances(job.teachers, job.data, watcher)
        refuse_leaking(self.provenances, job.data.manifest, selection)
        if job.data.task.is_guarded:
            tell_of_untold(job.teachers, watcher)
        compare_front_ends(job.teachers, job.data, watcher)
        # In key order, so that ranks (and with them the last bits) do not depend on the manifest's order.
        self.files, self.keys = selection.by_key, selection.keys
        self.part = part_range(job, len(self.files))
        own = None if job.part is None else Span.of(self.keys[self.part.start : self.part.stop])
        self.found = find_rows(job, watcher, elsewhere, own)
        self.has_view = self._wants_view()
        self.pending = PendingRecord(job.folder, job.origins, self._record())
        self.report = DumpReport(
            self.folder.path,
            len(self.files),
            len(self.part),
            selection.per_device,
            {name: _empty_report(job, name) for name in job.origins},
            replaced=self._replaced(),
        )
        for name, how in self.report.replaced.items():
            watcher.note(f"{name}: other rows become current ({how})")

    def _wants_view(self) -> bool:
        """Whether to write a view. Raises StoreError, before anything is scored, where its index could not be read."""
        earlier = self.found.earlier
        if topk := without_files({**self.found.others, **self.job.origins}, self.job.files):
            if self.job.files is None:
                self.watcher.note(f"no .npy files are written: rows of {', '.join(topk)} are no vectors")
            return False
        if self.job.files is None and len(self.files) >= VIEW_BELOW and not (earlier and earlier.record.get("files")):
            self.watcher.note(f"no .npy files are written: from {VIEW_BELOW:,} samples on only with --files")
            return False
        if self.job.files is False:
            return False
        names = {*self.job.origins, *self.found.others}
        refuse_large_index(self.folder.index_path, self.files, self._shown_path, names)
        return True

    def _replaced(self) -> dict[str, str]:
        """What was current before and is not what this run makes, and how they differ."""
        before = self.found.earlier.origins if self.found.earlier and self.job.part is None else {}
        return {
            name: before[name].fingerprint.difference(now.fingerprint)
            for name, now in self.job.origins.items()
            if name in before and before[name].fingerprint.digest != now.fingerprint.digest
        }

    # -- the two ways to run ------------------------------------------------------------------------------------------

    def survey(self) -> DumpReport:
        """Count without scoring. Where no stored row could be fresh, only a feature's header is read."""
        for job, found in self._by_view():
            self._survey(job, found)
        self._count_dropped()
        return self.report

    def _by_view(self) -> Iterator[tuple[DumpJob, Found]]:
        """What is done for each view in turn, and what there is of it; for all at once, where there are no views."""
        yield self.jobs[0], self.found
        for job in self.jobs[1:]:
            yield job, replace(self.found, known=known_rows(job, self.found.snapshot, self.elsewhere))

    def _survey(self, job: DumpJob, found: Found) -> None:
        from kd_cache.score.scoring import due_reasons, refuse_bad

        unchanged = Unchanged(job, found, self.files, self.keys, self.part, self.watcher)
        digests, good = unchanged.digests, unchanged.fresh.copy()
        for number in self.part:
            if good[number]:
                continue
            file = self.files[number]
            held = job.skip_existing and any(known.holds(number) for known in found.known.values())
            try:
                if held:
                    digests[number] = np.frombuffer(self.job.data.features.read(file).digest, np.uint8)
                else:
                    self.job.data.features.shape(file)
                good[number] = True
            except FeatureError as error:
                refuse_bad(self.job, self.report, file, error)
        self.good = good
        numbers = np.flatnonzero(good)
        for reasons in due_reasons(job, found, numbers, digests[numbers]):
            self.report.samples_scored += bool(reasons)
            for name, result in self.report.teachers.items():
                if name in reasons:
                    result.count(reasons[name])
                    origin = job.origins[name]
                    self.report.bytes_planned += origin.width * origin.stored.itemsize
                else:
                    result.skipped += 1

    def run(self) -> DumpReport:
        from kd_cache.score.cached_rows import check_unknown_code
        from kd_cache.score.commits import Commits, merge_commits
        from kd_cache.score.scoring import Scoring
        from kd_cache.score.stages import Busy

        check_unknown_code(self.jobs[0], self.found, self.files, self.watcher)
        began = time.monotonic()
        # Packs are content-named: a row scored again may bring back a name that was here before.
        before = [pack.path for origin in self.job.origins.values() for pack in self.found.snapshot.packs.of(origin)]
        busy = Busy()
        if self._is_news() and any(known.union is not None for known in self.found.known.values()):
            self.pending.write(self._entries(), {})  # rows of before count: from now on they are nobody's garbage
        first: Scoring | None = None
        written: list[Path] = []
        for job, found in self._by_view():
            commits = Commits(job, self.pending, self._entries, self.watcher, busy)
            each = Scoring(job, found, self.files, self.keys, self.part, self.report, commits, self.watcher, busy)
            each.run()
            scoring = first = first or each  # it reads every feature; the others say what else cannot be scored
            scoring.readable &= each.readable
            written += commits.written
            if job.part is None:
                written += self._copied(job, found, each.inputs, each.readable)
        self._refuse_moved(scoring.inputs, scoring.readable)
        for remark in scoring.input_remarks():
            self.watcher.note(remark)
        self.report.seconds = time.monotonic() - began
        if self.job.part is not None:
            self.pending.write(self._entries(), self.report.missing)
            scoring.remember(notes_beside(self.pending.path))  # a seal need not read again what its parts have read
            own = slice(self.part.start, self.part.stop)
            merge_commits(self.found.snapshot, self.job.origins, self.keys[own], scoring.inputs[own])
            return self.report
        if self.part and not scoring.readable.any():
            raise nothing_readable(len(self.part))
        self._count_dropped()
        if not self.pending.is_written and self._is_news():
            self.pending.write(self._entries(), self.report.missing)
        replaced = [] if self.job.skip_existing else [path for path in before if path not in written]
        self.report.published = self._publish(scoring.inputs, scoring.readable, replaced)
        scoring.remember()
        return self.report

    def _refuse_moved(self, inputs: np.ndarray, readable: np.ndarray) -> None:
        """Names may have changed places: what made a teacher under a permitted name may be held out under another."""
        data = self.job.data
        for name, teacher in self.job.teachers.items():
            told: Provenance | None = getattr(teacher, "provenance", None)
            if told is None or told.inputs is None:
                continue
            at = KeyFinder(told.keys).find(self.keys)
            other = readable & (at >= 0)
            other[other] = told.inputs[at[other]].any(axis=1) & (told.inputs[at[other]] != inputs[other]).any(axis=1)
            if other.any():
                made = data.names.recognised(told, self.keys[other]).provenance
                refuse_leaking({name: made}, data.manifest, data.selection)

    def _is_news(self) -> bool:
        """Whether rows become current of which no index tells: until then a pending record keeps `gc` from them."""
        told = self.found.earlier.origins if self.found.earlier else {}
        return any(
            name not in told
            or (told[name].fingerprint.digest, told[name].views) != (origin.fingerprint.digest, origin.views)
            for name, origin in self.job.origins.items()
        )

    def _copied(self, job: DumpJob, found: Found, inputs: np.ndarray, readable: np.ndarray) -> list[Path]:
        """Copy the rows that other caches lend; returns the packs of them. Raises `CorruptError` for a damaged row."""
        written = []
        for name, known in found.known.items():
            numbers = np.flatnonzero(readable)
            numbers = numbers[known.are_lent(numbers, inputs[numbers])]
            if job.skip_existing:
                numbers = numbers[~known.are_held(numbers, inputs[numbers])]
            if not len(numbers):
                continue
            make_directory(self.folder.packs_path)
            made = merge_packs(self.folder.packs_path, known.lent, self.keys[numbers], inputs[numbers])
            written += made.paths
            what = f"{len(numbers):,} rows{'' if job.view is None else f' of view {job.view}'}"
            self.watcher.note(f"{name}: {what} were copied that it scored for another target")
        return written

    # -- the end ------------------------------------------------------------------------------------------------------

    def _count_dropped(self) -> None:
        """Samples that the cache holds, of scored and other teachers, and that are no longer permitted."""
        gone: dict[str, set[bytes]] = {}
        for pack in self.found.snapshot.packs.good:
            surplus = pack.keys[self.job.data.selection.finder.find(pack.keys) < 0]
            gone.setdefault(pack.origin.teacher, set()).update(key.tobytes() for key in surplus)
        for name, keys in gone.items():
            if keys or name in self.report.teachers:
                self.report.teachers.setdefault(name, TeacherReport()).dropped = len(keys)

    def _publish(self, inputs: np.ndarray, readable: np.ndarray, replaced: list[Path]) -> Published:
        change = Change(
            self._shown_path,
            Wanted.of(self.job.data.selection, inputs, readable),
            self.job.origins,
            self._record(),
            self.has_view,
            others=self.found.others,
            entries=self._entries(),
            missing=self.report.missing,
            replaced=replaced,
            trained=self._trained(),
            min_accuracy=self.job.min_accuracy,
        )
        published = publish(self.found.snapshot, change, self.watcher)
        for name, origin in self.job.origins.items():
            told = {"accuracy": published.accuracy[name], "held_out": published.held_out.get(name)}
            warning = near_chance(origin, stored_accuracy(told), self.job.data.task.cities, stored_apart(told))
            if warning is not None:
                self.watcher.note(warning)
        self.report.snapshot = self.found.snapshot.again(maps=True)
        return published

    def _trained(self) -> dict[str, np.ndarray]:
        """What trained each teacher that says all of it."""
        known = {name: made for name, made in self.provenances.items() if made is not None and made.complete}
        return {name: made.trained for name, made in known.items()}

    @property
    def _shown_path(self) -> str:
        return f"{self.job.cache_root}/{self.folder.path.name}"

    def _record(self) -> dict[str, Any]:
        """What index and pending record keep of this run, besides its results."""
        from kd_cache.score.device import environment

        plan = self.found.snapshot.again().saved_plan
        own = {
            "plan": None if plan is None else plan.as_json(),
            "environment": environment(self.job.device),
            "files": self.has_view,
            "shown_path": self._shown_path,
        }
        part = {} if self.job.part is None else {"part": list(self.job.part)}
        moment = {"begun": self.begun, "generation": self.found.snapshot.next_generation}
        return {**moment, **self.job.record, **self.job.data.described, **own, **part}

    def _entries(self) -> dict[str, dict[str, Any]]:
        """What this run adds to its teachers' entries."""
        entries = {}
        for name, report in self.report.teachers.items():
            entries[name] = dict(self.job.notes.get(name, {}))
            if report.cost is not None and report.cost.rows:
                entries[name]["storage_cost"] = report.cost.as_json()
            if report.precision_cost is not None and report.precision_cost.rows:
                entries[name]["precision_cost"] = report.precision_cost.as_json()
            if report.scored or report.rescored:
                if self.report.halved_to is not None:
                    entries[name]["batches_halved_to"] = self.report.halved_to
                if self.job.compiled:
                    entries[name]["compiled"] = True
        return entries


def part_range(job: DumpJob, size: int) -> range:
    """The samples to score, by number: neighbours in key order, so that few batches are shared between parts.

    Raises `UsageError` for a part that is none, and for what cannot be asked of a part.
    """
    number, count = job.part or (0, 1)
    if not 0 <= number < count:
        raise UsageError(f"part {number} of {count} does not exist; the first is 0/{count}")
    if job.part is not None and job.batch_size == "auto":
        raise UsageError(
            "--batch-size auto cannot be used for a part: each would choose a size of its own",
            hint="Give a number, the same for all parts.",
        )
    if job.part is not None and job.min_accuracy is not None:
        raise UsageError(
            "--min-accuracy is about a whole cache, not about a part",
            hint="Seal the parts, then: kd-cache verify --min-accuracy.",
        )
    if job.part is not None and not job.skip_existing:
        raise UsageError(
            "a part cannot score again what is fresh: nobody could tell its rows from those of before",
            hint="Dump with --no-skip-existing in one process, or remove the cache.",
        )
    return range(size * number // count, size * (number + 1) // count)


def _empty_report(job: DumpJob, name: str) -> TeacherReport:
    origin = job.origins[name]
    return TeacherReport(
        cost=cost_of(origin),
        precision_cost=StorageCost(origin.value_kind) if job.precision != "fp32" else None,
    )
