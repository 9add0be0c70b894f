"""The audit: has every permitted sample its row, is it what was scored, is nothing there that must not be?

It reads and compares; it repairs nothing. Problems are returned, each with its file and reason, and their kinds decide
the exit status: leak 6, corrupt 4, stale 5, miss 3, unchecked 1.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_cache.care.problems import (
    ALL_ROWS,
    CORRUPT,
    FEATURE,
    INDEX,
    LABEL,
    LEAK,
    MISS,
    PACK,
    ROW,
    STALE,
    TEACHER,
    UNCHECKED,
    VIEW,
    Problem,
    TeacherResult,
    VerifyReport,
)
from kd_cache.care.row_checks import Features, Rows
from kd_cache.dataset.dataset import Dataset, provenances
from kd_cache.dataset.guard import leaked, tell_of_untold
from kd_cache.dataset.manifest import FRONT_END
from kd_cache.dataset.views import Augmented, Policy
from kd_cache.errors import CorruptError, FeatureError, shown
from kd_cache.keys import keys_of
from kd_cache.score.planning import places_of
from kd_cache.score.reading import read_ahead
from kd_cache.score.teacher import Teacher, teacher_fingerprint
from kd_cache.store.accuracy import alarm, below, changed_labels, near_chance, stored_accuracy, stored_apart
from kd_cache.store.cache import teacher_in_name
from kd_cache.store.classes import misplaced
from kd_cache.store.index import Index
from kd_cache.store.origin import Origin
from kd_cache.store.permitted import NO_LABEL, Permitted
from kd_cache.store.plan import BatchPlan
from kd_cache.store.snapshot import Snapshot
from kd_cache.store.union import Union
from kd_cache.store.view import ROW_FILE_NAME, differing, rows_of, stored_names, view_names
from kd_cache.watch import Watcher

if TYPE_CHECKING:
    import torch

    from kd_cache.score.recompute import Rechecked

_BLOCK = 65_536


@dataclass(frozen=True)
class VerifyJob:
    """What to verify, against what.

    Attributes:
        snapshot: the cache.
        data: what it promises to hold.
        teachers: loaded teachers by name; their fingerprints must be those of the rows.
        unchecked: teachers whose fingerprint cannot be compared, with the reason; ``True`` makes that a problem.
        n: how many random samples; ``None`` takes every one and looks for surplus rows and files too.
        precision: compute precision to expect; by default the one each row was made in.
        recompute: score the samples again and compare.
        min_accuracy: a lower share of labelled source rows named rightly is a problem.
        only: audit just these teachers' rows; all by default.
    """

    snapshot: Snapshot
    data: Dataset
    teachers: Mapping[str, Teacher] = field(default_factory=dict)
    unchecked: Mapping[str, tuple[str, bool]] = field(default_factory=dict)
    n: int | None = 100
    seed: int = 0
    precision: str | None = None
    dtype: str | None = None
    recompute: bool = False
    min_accuracy: float | None = None
    only: Collection[str] | None = None
    device: torch.device | None = None


def verify_cache(job: VerifyJob, watcher: Watcher | None = None) -> VerifyReport:
    """Audit one cache. Problems are returned, not raised; nothing on disk changes."""
    return _Audit(job, watcher or Watcher()).run()


def state_problem(snapshot: Snapshot) -> Problem | None:
    """What keeps everything else of a cache from being checked; ``None`` where it is finished and in its place."""
    error = snapshot.refusal or snapshot.renamed
    if error is None:
        return None
    kind = {3: MISS, 4: CORRUPT, 5: STALE}.get(error.exit_code, UNCHECKED)
    return Problem(kind, "", shown(snapshot.folder.index_path), shown(error.message), INDEX)


class _Audit:
    def __init__(self, job: VerifyJob, watcher: Watcher) -> None:
        self.job = job
        self.watcher = watcher
        self.snapshot = job.snapshot.again(maps=True)
        selection = job.data.selection
        self.files, self.keys = selection.listed, selection.listed_keys
        if job.n is not None and job.n < len(self.files):
            drawn = sorted(random.Random(job.seed).sample(range(len(self.files)), job.n))  # noqa: S311 (no secret)
            self.files, self.keys = [self.files[number] for number in drawn], self.keys[drawn]
        self.changed: set[str] = set()
        self.report = VerifyReport(
            str(self.snapshot.folder.path),
            job.seed,
            len(self.files),
            len(selection.listed),
            everything=job.n is None,
        )

    def run(self) -> VerifyReport:
        index, problem = self.snapshot.index, state_problem(self.snapshot)
        if index is None or problem is not None:
            self.report.problems += [] if problem is None else [problem]
            return self.report
        for path, error in self.snapshot.packs.damaged.items():
            self._problem(CORRUPT, teacher_in_name(path), str(path), error.message, PACK)
        permitted = self._permitted_then(index)
        if permitted is not None:
            self._compare_labels(index, permitted)
        for damaged in self.snapshot.damaged_pending:
            self.watcher.note(f"{damaged.message}; it is passed over")
        if pending := self.snapshot.pending:
            self.report.notes.append(f"dumps begun that the index does not know yet: {len(pending)}; see kd-cache seal")
        if "inputs" in index.record:
            self.report.notes.append(
                f"it was sealed with the features taken {shown(index.record['inputs'])}: only this audit compares them"
            )
        present = self._features_now(index)
        for name, origin in index.origins.items():
            if self.job.only is not None and name not in self.job.only:
                continue
            self._audit_teacher(index, name, origin, present)
            if permitted is not None:
                self._compare_accuracy(index, permitted, name)
            self._compare_provenance(name)
            why = misplaced(origin.class_names, self.job.data.task.scenes, self.job.data.task.cities)
            if why is not None:
                self._problem(UNCHECKED, name, ALL_ROWS, why, TEACHER)
        self._look_for_forbidden_rows()
        self._look_for_forbidden_entries(index)
        self._compare_manifest(index)
        if self.job.n is None:
            self._check_plan(index)
            self._look_the_other_way(index)
        if self.job.recompute:
            self._recompute(index)
        return self.report

    def _problem(self, kind: str, teacher: str, file: str, reason: str, about: str = ROW) -> None:
        self.report.problems.append(Problem(kind, teacher, shown(file), shown(reason), about))

    def _wrong_row(self, teacher: str, file: str, reason: str) -> None:
        self._problem(CORRUPT, teacher, file, reason)
        self.report.wrong_rows.setdefault(teacher, set()).add(file)

    # -- what the rows are worth --------------------------------------------------------------------------------------

    def _permitted_then(self, index: Index) -> Permitted | None:
        """The permitted samples and labels of the dump."""
        try:
            return self.snapshot.permitted
        except FileNotFoundError:
            reason = "the index names it, but it is not there; run kd-cache seal"
        except CorruptError as error:
            reason = error.message
        path = self.snapshot.folder.path / index.record["permitted"]["file"]
        self._problem(CORRUPT, "", str(path), reason, INDEX)
        return None

    def _compare_labels(self, index: Index, then: Permitted) -> None:
        """Labels are no part of a row, but an accuracy measured with others says nothing any more."""
        selection = self.job.data.selection
        now = Permitted.of(selection.keys, selection.labels)
        changed = changed_labels(then, now)
        if not changed:
            return
        moved = []
        for name in index.origins:
            before = stored_accuracy(index.record["teachers"][name])
            if before is not None:
                accuracy = self.snapshot.accuracy(self.snapshot.served(name), now)
                moved.append(f"{name} {before.share} → {accuracy.share}")
        file_of = {key.tobytes(): file for key, file in zip(selection.keys, selection.by_key, strict=True)}
        for key, old, new in changed:
            was, is_now = ("none" if label == NO_LABEL else label for label in (old, new))
            reason = f"its scene label was {was} at the dump and is {is_now} now (accuracy: {', '.join(moved)})"
            self._problem(STALE, "", file_of[key], f"{reason}; run kd-cache repair", LABEL)

    def _compare_accuracy(self, index: Index, then: Permitted, name: str) -> None:
        now = self.snapshot.accuracy(self.snapshot.served(name), then)
        wrong = alarm(now, index.record["teachers"][name])
        if wrong is not None:
            self._problem(CORRUPT, name, ALL_ROWS, f"{wrong}; run kd-cache repair", TEACHER)
        low = below(name, now, self.job.min_accuracy)
        if low is not None:
            self._problem(UNCHECKED, name, ALL_ROWS, low, TEACHER)
        entry = index.record["teachers"][name]
        # What trained it only its dump knew; of other rows than those its figure would not be.
        apart = stored_apart(entry) if now.measured == entry.get("measured") else None
        result = self.report.teachers[name]
        result.accuracy, result.held_out = now.as_json(), None if apart is None else apart.as_json()
        warning = near_chance(index.origins[name], now, self.job.data.task.cities, apart)
        if warning is not None:
            self.report.notes.append(warning)

    def _compare_provenance(self, name: str) -> None:
        """What the teacher learnt from must be permitted, as what it scores must."""
        if name not in self.job.teachers:
            return
        teacher = {name: self.job.teachers[name]}
        if self.job.data.task.is_guarded:
            tell_of_untold(teacher, self.watcher)
        provenance = provenances(teacher, self.job.data, self.watcher)[name]
        if provenance is None:
            return
        for told in leaked(provenance, self.job.data.manifest, self.job.data.selection):
            self._problem(LEAK, name, ALL_ROWS, f"its teacher was made with {told}", TEACHER)

    # -- features -----------------------------------------------------------------------------------------------------

    def _features_now(self, index: Index) -> Features:
        """The digest of each checked sample's present feature."""
        self.watcher.stage("checking", len(self.files))
        found = Features(np.zeros((len(self.files), 16), np.uint8), np.zeros(len(self.files), bool))
        known_missing = index.missing
        chunks = read_ahead(self.job.data.features, self.files, workers=0)
        for number, feature in enumerate(chain.from_iterable(chunks)):
            if not isinstance(feature, FeatureError):
                found.digests[number] = np.frombuffer(feature.digest, np.uint8)
                found.readable[number] = True
            elif (file := self.files[number]) not in known_missing:
                self._problem(UNCHECKED, "", file, f"its freshness cannot be checked: {feature.message}", FEATURE)
            self.watcher.advance(1)
        return found

    # -- one teacher --------------------------------------------------------------------------------------------------

    def _audit_teacher(self, index: Index, name: str, origin: Origin, present: Features) -> None:
        result = self.report.teachers[name] = TeacherResult(checked=len(self.files))
        entry = index.record["teachers"][name]
        if "adopted" in entry:
            reason = "they were adopted from elsewhere and never verified; run kd-cache repair --recompute"
            self._problem(UNCHECKED, name, ALL_ROWS, reason, TEACHER)
            if name not in self.job.teachers:
                why, _ = self.job.unchecked.get(name, ("it was not loaded", False))
                self.report.notes.append(f"{name}: its adopted rows cannot be scored again: {why}")
            is_current = False
        else:
            is_current = self._check_fingerprint(name, origin, result)
        union = self.snapshot.served(name)
        self._look_at_packs(name, origin)
        rows = Rows.absent(len(self.files)) if union is None else Rows.of(union, self.files, self.keys, present)
        self._tell_of_rows(name, rows, index.missing)
        result.rows = 0 if union is None else len(union)
        result.hits = int((rows.at >= 0).sum())
        result.intact = result.hits - int(rows.wrong.sum())
        if name in self.job.teachers and "adopted" not in entry:
            good = (rows.at >= 0) & ~rows.wrong & ~rows.twin & ~rows.outdated
            result.fresh = int((good & present.readable).sum()) if is_current else 0
        else:
            result.fresh = None
        if index.record["files"] and union is not None:
            result.view = self._audit_view(index, name, union, rows.at)

    def _look_at_packs(self, name: str, origin: Origin) -> None:
        """The packs that the index names are there, and no other one of the same origin contradicts them."""
        named = self.snapshot.served_paths([name])
        for path in named:
            if not path.exists():
                self._problem(MISS, name, str(path), "the index names it, but it is not there; run kd-cache dump", PACK)
        everything = self.snapshot.union(origin)
        others = [pack for pack in everything.packs if pack.path not in named] if everything else []
        for pack in others:
            if wrong := pack.wrong_rows():
                reason = f"{len(wrong):,} of its rows do not match their checksums; run kd-cache repair"
                self._problem(CORRUPT, name, str(pack.path), reason, PACK)
        if everything is not None and (twice := everything.disagreements()):
            packs = ", ".join(pack.path.name for pack in others)
            reason = (
                f"{len(twice):,} samples were scored twice with different bits, also in {packs}: kd-cache seal decides"
            )
            self._problem(UNCHECKED, name, twice[0], reason, PACK)

    def _tell_of_rows(self, name: str, rows: Rows, missing: Mapping[str, str]) -> None:
        """One problem for each sample whose row is not what it should be, in their order."""
        for number in np.flatnonzero((rows.at < 0) | rows.wrong | rows.twin | rows.outdated).tolist():
            file = self.files[number]
            if rows.at[number] < 0:
                self._problem(MISS, name, file, missing.get(file) or "no row; run kd-cache dump")
            elif rows.wrong[number]:
                self._wrong_row(name, file, "its row does not match its checksum")
            elif rows.twin[number]:
                self._wrong_row(name, file, "its row is of another file with the same MD5 key; run kd-cache repair")
            else:
                self._problem(STALE, name, file, "its feature file is not the one that was scored; run kd-cache dump")

    def _check_fingerprint(self, name: str, origin: Origin, result: TeacherResult) -> bool:
        result.fingerprint = origin.fingerprint.digest
        teacher, front_end = self.job.teachers.get(name), self.job.data.manifest.front_end_text
        if teacher is None:
            if front_end != origin.fingerprint.parts.get(FRONT_END):
                reason = "the manifest names another front end than when its features were scored; run kd-cache dump"
                self._problem(STALE, name, ALL_ROWS, reason, TEACHER)
            reason, is_problem = self.job.unchecked.get(name, ("it was not loaded", False))
            if is_problem:
                self._problem(UNCHECKED, name, ALL_ROWS, f"its fingerprint cannot be checked: {reason}", TEACHER)
            else:
                self.report.notes.append(f"{name}: its fingerprint was not checked: {reason}")
            return False
        now = teacher_fingerprint(
            teacher,
            precision=self.job.precision or origin.fingerprint.parts.get("precision", "fp32"),
            dtype=self.job.dtype or origin.dtype,
            front_end=front_end,
            policy=origin.policy,
        )
        if now.digest == origin.fingerprint.digest:
            return True
        self.changed.add(name)
        reason = f"the teacher changed since the dump ({origin.fingerprint.difference(now)}); run kd-cache dump"
        self._problem(STALE, name, ALL_ROWS, reason, TEACHER)
        return False

    def _audit_view(self, index: Index, name: str, union: Union, at: np.ndarray) -> int:
        """How many of the rows that are there have a file that is named, there, and equal."""
        present = np.flatnonzero(at >= 0)
        names = [f"{name}/{row_file}" for row_file in view_names(self.keys[present])]
        paths = index.maps[name]
        bad = set()
        for number, expected in zip(present.tolist(), names, strict=True):
            if not paths.get(self.files[number], "").endswith(expected):
                reason = "the index does not name its .npy file; run kd-cache seal"
                self._problem(MISS, name, self.files[number], reason, VIEW)
                bad.add(number)
        for start in range(0, len(present), _BLOCK):
            part = present[start : start + _BLOCK]
            for position, is_missing in differing(
                self.snapshot.folder.view_path(name), self.keys[part], union.take(at[part])
            ):
                number = int(part[position])
                what = "is missing" if is_missing else "differs from the pack"
                reason = f"{names[start + position]} {what}; run kd-cache seal"
                self._problem(MISS if is_missing else CORRUPT, name, self.files[number], reason, VIEW)
                bad.add(number)
        return len(present) - len(bad)

    # -- rows without a manifest entry -------------------------------------------------------------------------------

    def _look_for_forbidden_rows(self) -> None:
        permitted = self.job.data.selection.finder
        for pack in self.snapshot.packs.good:
            for row in np.flatnonzero(permitted.find(pack.keys) < 0).tolist():
                file = pack.file_bytes(row).decode("utf-8", "replace")
                reason = f"{pack.path.name} holds it, but the manifest does not permit it; run kd-cache dump"
                self._problem(LEAK, pack.origin.teacher, file, reason, PACK)
                if pack.origin.teacher in self.report.teachers:
                    self.report.teachers[pack.origin.teacher].forbidden += 1

    def _compare_manifest(self, index: Index) -> None:
        if index.record["manifest"]["sha256"] != self.job.data.manifest.digest:
            self.report.notes.append("the manifest is not byte for byte the one that was dumped")

    def _look_for_forbidden_entries(self, index: Index) -> None:
        """Index → manifest: entries of samples that are not permitted."""
        permitted = set(self.job.data.selection.listed)
        for name in index.origins:
            for file in index.maps[name]:
                if file not in permitted:
                    self._problem(LEAK, name, file, "the index names it, but the manifest does not permit it", INDEX)

    def _check_plan(self, index: Index) -> None:
        """The batch plan beside the index is the one that it tells of, or one that a later dump has begun to extend."""
        told, path = BatchPlan.from_json(index.record.get("plan")), self.snapshot.folder.plan_path
        saved = self.snapshot.saved_plan
        if told is not None and (saved is None or not saved.holds(told)):
            kind = CORRUPT if path.exists() else MISS
            self._problem(kind, "", str(path), "it is not the plan that the index tells of; run kd-cache repair", INDEX)

    def _look_the_other_way(self, index: Index) -> None:
        """Disk → index: row files without an index entry. Files that no pack's row is may be the user's own."""
        for name in sorted(self.snapshot.named):
            directory = self.snapshot.folder.view_path(name)
            promised = {path.rpartition("/")[2] for path in index.maps.get(name, {}).values()}
            surplus = {found for found in stored_names(directory) - promised if ROW_FILE_NAME.match(found)}
            if not surplus:
                continue
            listed = {*view_names(keys_of(sample.file for sample in self.job.data.manifest))}
            forbidden = surplus & (listed - {*view_names(self.job.data.selection.keys)})
            packs = [pack for pack in self.snapshot.packs.good if pack.origin.teacher == name]
            wrong = forbidden | rows_of(directory, surplus, packs)
            if others := len(surplus - wrong):
                self.report.notes.append(f"{others} files in {shown(directory)} stay, which kd-cache did not write")
            for found in sorted(wrong):
                kind = LEAK if found in forbidden else STALE
                reason = "the index does not name this file; run kd-cache dump, or remove it"
                self._problem(kind, name, f"{name}/{found}", reason, VIEW)

    # -- scoring again ------------------------------------------------------------------------------------------------

    def _recompute(self, index: Index) -> None:
        from kd_cache.score.recompute import Recheck

        if self.job.device is None:
            raise ValueError("recomputing needs a device")
        plan = self.snapshot.plan
        places = {} if plan is None else places_of(self.job.data.features, self.job.data.selection.by_key, plan)
        for name in index.origins:
            if self.job.only is not None and name not in self.job.only:
                continue
            union = self.snapshot.served(name)
            if name in self.changed or union is None:
                why = "it changed since the dump" if name in self.changed else "it has no rows"
                self.report.notes.append(f"{name}: not recomputed, because {why}")
                continue
            if name not in self.job.teachers:
                why, is_problem = self.job.unchecked.get(name, ("it was not loaded", False))
                if not is_problem:  # else it is one already
                    self._problem(UNCHECKED, name, ALL_ROWS, f"it cannot be recomputed: {why}", TEACHER)
                continue
            for view, part in _each_view(union):
                features: Any = self.job.data.features
                if view is not None:
                    features = Augmented(features, Policy.from_text(str(union.origin.policy)), view)
                recheck = Recheck(self.job.teachers[name], part, places, self.job.device)
                self._tell_of_recomputed(name, view, recheck.run(self.files, features, self.watcher))

    def _tell_of_recomputed(self, name: str, view: int | None, checked: Rechecked) -> None:
        result = self.report.teachers[name]
        result.recomputed = (result.recomputed or 0) + checked.rows
        result.bit_exact = (result.bit_exact or 0) + checked.bit_exact
        result.deviation = max(result.deviation or 0.0, checked.deviation)
        for file, reason in checked.wrong:
            self._wrong_row(name, file, reason if view is None else f"view {view}: {reason}")


def _each_view(union: Union) -> Iterator[tuple[int | None, Union]]:
    """The rows of each view by themselves; all, where there are none."""
    if not union.origin.views:
        yield None, union
    for view in union.origin.views:
        yield view, Union([pack for pack in (each.of_views((view,)) for each in union.packs) if pack is not None])
