"""The audit: is all there that the manifest promises, is it what was scored, is nothing there that must not be?

It reads and compares; it repairs nothing. Problems are returned, each with its file and reason, and their kinds decide
the exit status: leak 6, corrupt 4, stale 5, miss 3, unchecked 1.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_cache.accuracy import alarm, changed_labels, labels_of, measure, stored_accuracy
from kd_cache.errors import CorruptError, FeatureError, KDCacheError, shown, worst_exit_code
from kd_cache.features import Feature, FeatureSource
from kd_cache.manifest import Manifest, sample_key
from kd_cache.pending import read_pending
from kd_cache.plan import BatchPlan, load_plan, places_of, plan_of
from kd_cache.splits import Selection
from kd_cache.store.folder import CacheFolder, PackSet, teacher_in_name
from kd_cache.store.index import Index
from kd_cache.store.keys import keys_of
from kd_cache.store.pack import Origin
from kd_cache.store.permitted import NO_LABEL, Permitted
from kd_cache.store.union import Union
from kd_cache.store.view import differing, stored_names, view_name
from kd_cache.teacher import Teacher, teacher_fingerprint
from kd_cache.watch import Watcher

if TYPE_CHECKING:
    import torch

MISS, CORRUPT, STALE, LEAK, UNCHECKED = "miss", "corrupt", "stale", "leak", "unchecked"
# What a problem is about; `kd-cache repair` scores rows, features and teachers again and rebuilds the rest from packs.
ROW, TEACHER, PACK, VIEW, INDEX, FEATURE, LABEL = "row", "teacher", "pack", "view", "index", "feature", "label"
_ALL_ROWS = "(all rows)"
_SEVERITY = (LEAK, CORRUPT, STALE, MISS, UNCHECKED)
EXIT_CODES = {MISS: 3, CORRUPT: 4, STALE: 5, LEAK: 6, UNCHECKED: 1}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    ``file`` is a manifest path or a path in the cache; ``teacher`` is empty where the whole cache is meant. ``about``
    is ``row``, ``teacher`` (all its rows), ``pack``, ``view``, ``index``, ``feature`` or ``label``.
    """

    kind: str
    teacher: str
    file: str
    reason: str
    about: str


@dataclass(frozen=True)
class VerifyJob:
    """What to verify, against what.

    Attributes:
        teachers: loaded teachers by name; their fingerprints must be those of the rows.
        unchecked: teachers whose fingerprint cannot be compared, with the reason; ``True`` makes that a problem.
        n: how many random samples; ``None`` takes every one and looks for surplus rows and files too.
        precision: compute precision to expect; by default the one each row was made in.
        recompute: score the samples again and compare.
        only: audit just these teachers' rows; all by default.
    """

    folder: CacheFolder
    manifest: Manifest
    selection: Selection
    source: FeatureSource
    teachers: Mapping[str, Teacher] = field(default_factory=dict)
    unchecked: Mapping[str, tuple[str, bool]] = field(default_factory=dict)
    n: int | None = 100
    seed: int = 0
    precision: str | None = None
    dtype: str | None = None
    recompute: bool = False
    only: Collection[str] | None = None
    device: torch.device | None = None


@dataclass
class TeacherResult:
    """Counts over the checked samples of one teacher; ``None`` where a check was not made."""

    checked: int = 0
    hits: int = 0
    intact: int = 0
    fresh: int | None = 0
    rows: int = 0
    forbidden: int = 0
    view: int | None = None
    fingerprint: str = ""
    recomputed: int | None = None
    bit_exact: int = 0
    deviation: float = 0.0


@dataclass
class VerifyReport:
    """Everything `verify_cache` found.

    ``wrong_rows`` are the files by teacher whose stored row is not what it should be, under their own names.
    """

    cache: str
    seed: int
    checked: int = 0
    promised: int = 0
    everything: bool = False
    teachers: dict[str, TeacherResult] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong_rows: dict[str, set[str]] = field(default_factory=dict)

    @property
    def worst_first(self) -> list[Problem]:
        """The problems by severity: leaks, damage, stale rows, misses, what could not be checked."""
        return sorted(self.problems, key=lambda problem: _SEVERITY.index(problem.kind))

    @property
    def exit_code(self) -> int:
        return worst_exit_code(EXIT_CODES[problem.kind] for problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        return {
            "cache": self.cache,
            "seed": self.seed,
            "checked": self.checked,
            "promised": self.promised,
            "all": self.everything,
            "exit_code": self.exit_code,
            "teachers": {name: vars(result) for name, result in self.teachers.items()},
            "problems": [vars(problem) for problem in self.worst_first],
            "notes": self.notes,
        }


def verify_cache(job: VerifyJob, watcher: Watcher | None = None) -> VerifyReport:
    """Audit one cache. Problems are returned, not raised; nothing on disk changes."""
    return _Audit(job, watcher or Watcher()).run()


def open_index(folder: CacheFolder) -> tuple[Index | None, list[Problem]]:
    """The index, or the problem that keeps everything else from being checked."""
    try:
        index = folder.index()
    except KDCacheError as error:
        kind = {4: CORRUPT, 5: STALE}.get(error.exit_code, UNCHECKED)
        return None, [Problem(kind, "", shown(folder.index_path), shown(error.message), INDEX)]
    if index is not None:
        adaptation = str(index.record.get("adaptation", folder.path.name))
        if adaptation == folder.path.name:
            return index, []
        reason = f"this folder holds the cache of {adaptation}: it was copied or renamed"
        return None, [Problem(STALE, "", shown(folder.index_path), shown(reason), INDEX)]
    exists = folder.packs_path.is_dir()
    reason = "the dump did not finish; run it again" if exists else "there is no cache here; run kd-cache dump"
    return None, [Problem(MISS, "", shown(folder.index_path), reason, INDEX)]


class _Audit:
    def __init__(self, job: VerifyJob, watcher: Watcher) -> None:
        self.job = job
        self.watcher = watcher
        self.all_files = job.selection.files
        self.files = self.all_files
        if job.n is not None and job.n < len(self.all_files):
            drawn = random.Random(job.seed).sample(range(len(self.all_files)), job.n)  # noqa: S311 (no secret)
            self.files = [self.all_files[number] for number in sorted(drawn)]
        self.permitted = {key.tobytes() for key in keys_of(self.all_files)}
        self.keys = keys_of(self.files)
        self.changed: set[str] = set()
        self.report = VerifyReport(
            str(job.folder.path), job.seed, len(self.files), len(self.all_files), everything=job.n is None
        )

    def run(self) -> VerifyReport:
        index, problem = open_index(self.job.folder)
        if index is None:
            self.report.problems += problem
            return self.report
        packs = self.job.folder.packs()
        for path, error in packs.damaged.items():
            self._problem(CORRUPT, teacher_in_name(path), str(path), error.message, PACK)
        permitted = self._permitted_then(index)
        if permitted is not None:
            self._compare_labels(index, packs, permitted)
        if pending := read_pending(self.job.folder, self.watcher):
            self.report.notes.append(f"dumps begun of which the index tells nothing: {len(pending)}; see kd-cache seal")
        digests = self._feature_digests(index)
        for name, origin in index.origins.items():
            if self.job.only is not None and name not in self.job.only:
                continue
            self._audit_teacher(index, packs, name, origin, digests)
            if permitted is not None:
                self._compare_accuracy(index, packs, permitted, name, origin)
        self._look_for_forbidden_rows(packs)
        self._look_for_forbidden_entries(index)
        self._compare_manifest(index)
        if self.job.n is None:
            self._check_plan(index)
            self._look_the_other_way(index)
        if self.job.recompute:
            self._recompute(index, packs)
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
            return self.job.folder.permitted(index)
        except FileNotFoundError:
            path = self.job.folder.path / index.record["permitted"]["file"]
            self._problem(CORRUPT, "", str(path), "the index names it, but it is not there; run kd-cache seal", INDEX)
        except CorruptError as error:
            path = self.job.folder.path / index.record["permitted"]["file"]
            self._problem(CORRUPT, "", str(path), error.message, INDEX)
        return None

    def _compare_labels(self, index: Index, packs: PackSet, then: Permitted) -> None:
        """Labels are no part of a row, but an accuracy measured with others says nothing any more."""
        now = Permitted.of(*labels_of(self.job.selection))
        changed = changed_labels(then, now)
        if not changed:
            return
        moved = []
        for name, origin in index.origins.items():
            before = stored_accuracy(index.record["teachers"][name])
            if before is not None:
                moved.append(f"{name} {before.share} → {measure(packs.union(origin), now).share}")
        file_of = {key.tobytes(): file for key, file in zip(keys_of(self.all_files), self.all_files, strict=True)}
        for key, old, new in changed:
            was, is_now = ("none" if label == NO_LABEL else label for label in (old, new))
            reason = f"its scene label was {was} at the dump and is {is_now} now (accuracy: {', '.join(moved)})"
            self._problem(STALE, "", file_of[key], f"{reason}; run kd-cache repair", LABEL)

    def _compare_accuracy(self, index: Index, packs: PackSet, then: Permitted, name: str, origin: Origin) -> None:
        wrong = alarm(packs.union(origin), then, index.record["teachers"][name])
        if wrong is not None:
            self._problem(CORRUPT, name, _ALL_ROWS, f"{wrong}; run kd-cache repair", TEACHER)

    # -- features -----------------------------------------------------------------------------------------------------

    def _feature_digests(self, index: Index) -> list[bytes | None]:
        """The digest of each checked sample's present feature; ``None`` where it cannot be read."""
        self.watcher.stage("checking", len(self.files))
        digests: list[bytes | None] = []
        known_missing = index.missing
        for file in self.files:
            feature = self.job.source.try_read(file)
            if isinstance(feature, FeatureError) and file not in known_missing:
                self._problem(UNCHECKED, "", file, f"its freshness cannot be checked: {feature.message}", FEATURE)
            digests.append(feature.digest if isinstance(feature, Feature) else None)
            self.watcher.advance(1)
        return digests

    # -- one teacher --------------------------------------------------------------------------------------------------

    def _audit_teacher(
        self, index: Index, packs: PackSet, name: str, origin: Origin, digests: Sequence[bytes | None]
    ) -> None:
        result = self.report.teachers[name] = TeacherResult(checked=len(self.files))
        entry = index.record["teachers"][name]
        if "adopted" in entry:
            reason = "they were adopted from elsewhere and never verified; run kd-cache repair --recompute"
            self._problem(UNCHECKED, name, _ALL_ROWS, reason, TEACHER)
            if name not in self.job.teachers:
                why, _ = self.job.unchecked.get(name, ("it was not loaded", False))
                self.report.notes.append(f"{name}: its adopted rows cannot be scored again: {why}")
            fresh_teacher = False
        else:
            fresh_teacher = self._check_fingerprint(name, origin, result)
        fresh = 0
        union = packs.union(origin)
        result.rows = 0 if union is None else int((~union.repeats).sum())
        found = np.full(len(self.files), -1, np.int64) if union is None else union.find(self.keys)
        wrong = self._wrong_positions(union, found)
        missing = index.missing
        for number, file in enumerate(self.files):
            if union is None or found[number] < 0:
                reason = missing.get(file) or "no row; run kd-cache dump"
                self._problem(MISS, name, file, reason)
                continue
            result.hits += 1
            if int(found[number]) in wrong:
                self._wrong_row(name, file, "its row does not match its checksum")
                continue
            result.intact += 1
            stale = self._stale_reason(union, int(found[number]), digests[number])
            if stale is not None:
                self._problem(STALE, name, file, stale)
            elif fresh_teacher and digests[number] is not None:
                fresh += 1
        result.fresh = fresh if name in self.job.teachers and "adopted" not in entry else None
        if index.record["files"] and union is not None:
            result.view = self._audit_view(index, name, union, found)

    def _check_fingerprint(self, name: str, origin: Origin, result: TeacherResult) -> bool:
        result.fingerprint = origin.fingerprint.digest
        teacher = self.job.teachers.get(name)
        if teacher is None:
            reason, is_problem = self.job.unchecked.get(name, ("it was not loaded", False))
            if is_problem:
                self._problem(UNCHECKED, name, _ALL_ROWS, f"its fingerprint cannot be checked: {reason}", TEACHER)
            else:
                self.report.notes.append(f"{name}: its fingerprint was not checked: {reason}")
            return False
        now = teacher_fingerprint(
            teacher,
            precision=self.job.precision or origin.fingerprint.parts.get("precision", "fp32"),
            dtype=self.job.dtype or origin.dtype,
        )
        if now.digest == origin.fingerprint.digest:
            return True
        self.changed.add(name)
        reason = f"the teacher changed since the dump ({origin.fingerprint.difference(now)}); run kd-cache dump"
        self._problem(STALE, name, _ALL_ROWS, reason, TEACHER)
        return False

    def _wrong_positions(self, union: Union | None, found: np.ndarray) -> set[int]:
        """Positions among ``found`` whose row fails its checksum or stands under a wrong key."""
        wrong: set[int] = set()
        if union is None:
            return wrong
        present = found[found >= 0]
        for number, pack in enumerate(union.packs):
            mine = present[union.pack_no[present] == number]
            bad = set(pack.wrong_rows(union.row_no[mine]))
            wrong.update(int(position) for position in mine if int(union.row_no[position]) in bad)
        return wrong

    def _stale_reason(self, union: Union, position: int, digest: bytes | None) -> str | None:
        if bool(union.ambiguous[position]):
            return "its feature changed, and the dump that scored it again has not finished"
        if digest is not None and union.inputs[position].tobytes() != digest:
            return "its feature file is not the one that was scored; run kd-cache dump"
        return None

    def _audit_view(self, index: Index, name: str, union: Union, found: np.ndarray) -> int:
        present = np.flatnonzero(found >= 0)
        directory = self.job.folder.view_path(name)
        paths = index.maps[name]
        bad = set()
        for number in present.tolist():
            file = self.files[number]
            expected = f"{name}/{view_name(self.keys[number].tobytes())}"
            if not paths.get(file, "").endswith(expected):
                self._problem(MISS, name, file, "the index does not name its .npy file; run kd-cache seal", VIEW)
                bad.add(number)
        rows = union.take(found[present])
        for position, is_missing in differing(directory, self.keys[present], rows):
            number = int(present[position])
            path = f"{name}/{view_name(self.keys[number].tobytes())}"
            what = "is missing" if is_missing else "differs from the pack"
            kind = MISS if is_missing else CORRUPT
            self._problem(kind, name, self.files[number], f"{path} {what}; run kd-cache seal", VIEW)
            bad.add(number)
        return len(present) - len(bad)

    # -- what nothing promises ----------------------------------------------------------------------------------------

    def _look_for_forbidden_rows(self, packs: PackSet) -> None:
        for pack in packs.good:
            for row, key in enumerate(pack.keys):
                if key.tobytes() not in self.permitted:
                    file = pack.file_bytes(row).decode("utf-8", "replace")
                    reason = f"{pack.path.name} holds it, but the manifest does not permit it; run kd-cache dump"
                    self._problem(LEAK, pack.origin.teacher, file, reason, PACK)
                    if pack.origin.teacher in self.report.teachers:
                        self.report.teachers[pack.origin.teacher].forbidden += 1

    def _compare_manifest(self, index: Index) -> None:
        if index.record["manifest"]["sha256"] != self.job.manifest.digest:
            self.report.notes.append("the manifest is not byte for byte the one that was dumped")

    def _look_for_forbidden_entries(self, index: Index) -> None:
        """Index → manifest: entries of samples that are not permitted."""
        permitted = set(self.all_files)
        for name in index.origins:
            for file in index.maps[name]:
                if file not in permitted:
                    self._problem(LEAK, name, file, "the index names it, but the manifest does not permit it", INDEX)

    def _check_plan(self, index: Index) -> None:
        """The batch plan beside the index is the one that it tells of, or one that a later dump has begun to extend."""
        told, path = BatchPlan.from_json(index.record.get("plan")), self.job.folder.plan_path
        saved = load_plan(path)
        if told is not None and (saved is None or not saved.holds(told)):
            kind = CORRUPT if path.exists() else MISS
            self._problem(kind, "", str(path), "it is not the plan that the index tells of; run kd-cache repair", INDEX)

    def _look_the_other_way(self, index: Index) -> None:
        """Disk → index: row files that nothing promises, in every folder that may hold some."""
        listed = {key.tobytes() for key in keys_of(sample.file for sample in self.job.manifest)}
        forbidden = {view_name(key) for key in listed - self.permitted}
        for directory in self.job.folder.view_folders():
            name = directory.name
            promised = {path.rpartition("/")[2] for path in index.maps.get(name, {}).values()}
            for surplus in sorted(stored_names(directory) - promised):
                kind = LEAK if surplus in forbidden else STALE
                reason = "nothing promises this file; run kd-cache dump, or remove it"
                self._problem(kind, name, f"{name}/{surplus}", reason, VIEW)

    # -- scoring again ------------------------------------------------------------------------------------------------

    def _recompute(self, index: Index, packs: PackSet) -> None:
        from kd_cache.recompute import Recheck

        if self.job.device is None:
            raise ValueError("recomputing needs a device")
        plan = plan_of(self.job.folder.plan_path, index.record)
        in_order = sorted(self.all_files, key=sample_key)
        places = {} if plan is None else places_of(self.job.source, in_order, plan)
        for name, origin in index.origins.items():
            union = packs.union(origin)
            if union is None or name not in self.job.teachers or name in self.changed:
                why = "it changed since the dump" if name in self.changed else "it is not loaded, or has no rows"
                self.report.notes.append(f"{name}: not recomputed, because {why}")
                continue
            recheck = Recheck(self.job.teachers[name], union, places, self.job.device)
            checked = recheck.run(self.files, self.job.source, self.watcher)
            result = self.report.teachers[name]
            result.recomputed, result.bit_exact, result.deviation = checked.rows, checked.bit_exact, checked.deviation
            for file, reason in checked.wrong:
                self._wrong_row(name, file, reason)
