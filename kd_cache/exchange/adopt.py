"""Bringing rows that something else made into a cache: checked for what can be checked, marked unverified.

Who made the rows cannot be known: not the weights, not the features. So their fingerprint is that of the rows
themselves and equals no teacher's, and the index entry says ``adopted``; readers warn of that until the rows are
scored again and found equal.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.dataset.dataset import Dataset, nothing_readable
from kd_cache.errors import CorruptError, FeatureError, KDCacheError, StaleError, TeacherError, UsageError, shown
from kd_cache.exchange.imported import MOST_BYTES, Foreign, read_source
from kd_cache.files.atomic import make_directory
from kd_cache.keys import keys_of, sorted_order
from kd_cache.score.reading import read_digests
from kd_cache.score.value_kind import RowCheck
from kd_cache.store.accuracy import Accuracy, near_chance, stored_accuracy
from kd_cache.store.cache import CacheFolder, refuse_file_as_root, teacher_in_name
from kd_cache.store.classes import misplaced, refuse_other_order
from kd_cache.store.index import Index, is_teacher_name
from kd_cache.store.names import refuse_mode
from kd_cache.store.origin import FORMAT_VERSION, STORED, Fingerprint, Origin, class_order
from kd_cache.store.pack import attributes_of, write_pack
from kd_cache.store.pending import Age
from kd_cache.store.publish import Change, Published, Wanted, publish
from kd_cache.store.snapshot import Snapshot
from kd_cache.watch import Watcher

NOT_ADOPTED = "not in what was adopted"
UNVERIFIED = "unverified"
_BLOCK = 65_536


@dataclass(frozen=True)
class AdoptJob:
    """What to adopt, and into which cache.

    Attributes:
        source: a folder of the older script, a ``.pt`` or a ``.tsv``.
        cache_root: as the user wrote it; the cache is the folder in it that is called as the adaptation.
        data: what the cache may hold.
        name: the teacher's name in the cache; by default the source's.
        files_list: the files of a bare tensor, where they are not beside it.
        value_kind: what the rows are; by default what the source says, else logits.
        dtype: what the numbers of a text table are.
        files: whether the cache has a view; by default as it is, or yes.
        max_bytes: a larger source is refused unread.
        min_accuracy: with a lower share of labelled source rows named rightly nothing is adopted.
        on_bad_sample: ``stop`` at a feature or a row that cannot be used, or ``skip`` it and list it as missing.
        record: what the index keeps about the run (settings, tool version).
    """

    source: Path
    cache_root: Path
    data: Dataset
    name: str | None = None
    files_list: Path | None = None
    value_kind: str | None = None
    dtype: str | None = None
    files: bool | None = None
    on_bad_sample: str = "stop"
    workers: int = 2
    max_bytes: int = MOST_BYTES
    min_accuracy: float | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> CacheFolder:
        return CacheFolder(self.cache_root / self.data.adaptation)


@dataclass
class Adopted:
    """One teacher's outcome. ``accuracy`` is over labelled source rows: rows joined to wrong files show in it."""

    kind: str
    origin: Origin
    rows: int
    left_out: int
    missing: int
    accuracy: Accuracy | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "rows": self.rows,
            "left_out": self.left_out,
            "missing": self.missing,
            "num_classes": self.origin.num_classes,
            "value_kind": self.origin.value_kind,
            "dtype": self.origin.dtype,
            "fingerprint": self.origin.fingerprint.digest,
            "accuracy": None if self.accuracy is None else self.accuracy.as_json(),
        }


@dataclass
class AdoptReport:
    """What an adoption did; ``missing`` maps permitted files without a row to the reason."""

    cache: Path
    source: Path
    permitted: int
    teachers: dict[str, Adopted]
    missing: dict[str, str]
    published: Published

    def as_json(self) -> dict[str, Any]:
        return {
            "cache": str(self.cache),
            "source": str(self.source),
            "permitted": self.permitted,
            "teachers": {name: adopted.as_json() for name, adopted in self.teachers.items()},
            "missing": self.missing,
            "published": vars(self.published),
        }


@dataclass(frozen=True)
class _Ready:
    """Rows to write, keys ascending: ``table[numbers[i]]`` is the row of ``files[i]``."""

    foreign: Foreign
    origin: Origin
    files: list[str]
    keys: np.ndarray
    inputs: np.ndarray
    numbers: np.ndarray

    def rows(self, part: slice) -> np.ndarray:
        chosen: np.ndarray = self.foreign.table[self.numbers[part]]
        return chosen


def adopt_rows(job: AdoptJob, watcher: Watcher | None = None) -> AdoptReport:
    """Bring the rows of ``job.source`` in. The selection has passed the guard already.

    Rows of samples that are not permitted are left out; permitted samples without a row are listed as missing.

    Raises:
        UsageError: a source that is not complete and plain, holds nothing of this selection, or a name that is taken.
        CorruptError: a source that is not what it was when it was exported, or a damaged cache.
        StaleError: the cache's folder holds something else (an older script's cache that is not the source).
        FeatureError, TeacherError: a bad feature or row with ``on_bad_sample="stop"``.
        StoreError: the cache cannot be written.
    """
    return _Adoption(job, watcher or Watcher()).run()


class _Adoption:
    def __init__(self, job: AdoptJob, watcher: Watcher) -> None:
        self.job = job
        self.watcher = watcher
        self.folder = job.folder
        self.files = job.data.selection.listed
        self.snapshot = Snapshot(job.folder)
        self.earlier = self._earlier()
        self.missing: dict[str, str] = {}

    def run(self) -> AdoptReport:
        found = self._read_source()
        inputs, known = self._read_features()
        ready = {foreign.teacher: self._ready(foreign, inputs, known) for foreign in found}
        refuse_other_order(self.snapshot.origins | {name: one.origin for name, one in ready.items()})
        held = {name: set(one.files) for name, one in ready.items()}
        for file in self.files:
            if any(file not in files for files in held.values()):
                self.missing.setdefault(file, NOT_ADOPTED)
        published = self._write(ready, inputs, known)
        return AdoptReport(
            self.folder.path,
            self.job.source,
            len(self.files),
            self._outcomes(ready, published),
            {file: self.missing[file] for file in self.files if file in self.missing},
            published,
        )

    # -- the beginning ------------------------------------------------------------------------------------------------

    def _earlier(self) -> Index | None:
        """The cache's index as it is. An older script's is replaced only by the adoption of that very cache."""
        refuse_file_as_root(self.job.cache_root)
        if self.snapshot.is_older:
            if os.path.realpath(self.job.source) == os.path.realpath(self.folder.path):
                return None
            hint = f"Adopt that cache first (kd-cache adopt {shown(self.folder.path)} …), or use another --cache-root."
            raise StaleError(str(self.snapshot.trouble), hint=hint)
        if self.snapshot.trouble is not None:
            raise self.snapshot.trouble
        self._refuse_damage()
        return self.snapshot.known(self.watcher)

    def _refuse_damage(self) -> None:
        """Whatever is published leaves out rows that cannot be read: those of teachers that nobody asked about."""
        for path, error in self.snapshot.packs.damaged.items():
            if teacher_in_name(path) in self.snapshot.origins:
                raise CorruptError(error.message, hint="Mend the cache first: kd-cache repair.")

    def _read_source(self) -> list[Foreign]:
        job = self.job
        self._refuse_other_target()
        found = read_source(
            job.source,
            self.files,
            files_list=job.files_list,
            dtype=job.dtype,
            max_bytes=job.max_bytes,
            watcher=self.watcher,
        )
        if job.name is not None:
            if len(found) > 1:
                raise UsageError(f"--name names one teacher, but {shown(job.source)} holds {len(found)}")
            found = [replace(found[0], teacher=job.name)]
        taken = self._taken()
        for foreign in found:
            if not is_teacher_name(foreign.teacher):
                raise UsageError(
                    f"{shown(foreign.teacher)!r} cannot be a teacher's name (letters, digits, _ . -)",
                    hint="Give it one with --name.",
                )
            refuse_mode(foreign.teacher, "Give it another with --name.")
            if foreign.teacher in taken:
                raise UsageError(
                    f"{shown(self.folder.path)} has rows of a teacher {foreign.teacher} already",
                    hint="Give the adopted rows another name with --name.",
                )
        return found

    def _refuse_other_target(self) -> None:
        """A teacher adapted to another device is another teacher, whatever the samples have in common."""
        target = self.job.data.task.target_in(Path(os.path.realpath(self.job.source)).name)
        if self.job.source.is_dir() and target not in (None, self.job.data.target):
            raise UsageError(
                f"{shown(self.job.source)} is a cache of target {target}, not {self.job.data.target}",
                hint=f"Adopt it with --target {target}.",
            )

    def _taken(self) -> set[str]:
        """Names that stand for rows which kd-cache made, or that are current."""
        taken = set(self.snapshot.origins)
        made = [pack.origin for pack in self.snapshot.packs.good]
        for record in self.snapshot.pending:
            made += record.origins.values()
        # An adoption that was interrupted may be made again, from a mended source too.
        return taken | {origin.teacher for origin in made if "adopted" not in origin.fingerprint.parts}

    def _read_features(self) -> tuple[np.ndarray, np.ndarray]:
        """Digests ``[N, 16]`` of the permitted features as they are now, ``[N]`` which could be read."""
        skip = self.job.on_bad_sample == "skip"
        told = self.earlier.missing if self.earlier else {}
        try:
            inputs, known = read_digests(
                self.job.data.features, self.files, dict.fromkeys(self.files, "") if skip else told, self.job.workers,
                self.watcher,
            )  # fmt: skip
        except FeatureError as error:
            raise FeatureError(error.message, hint=_hint("the feature")) from error
        if not known.any():
            raise nothing_readable(len(known))
        for number in np.flatnonzero(~known).tolist():
            now = self.job.data.features.try_read(self.files[number])
            changed = "it changed while it was read"
            self.missing[self.files[number]] = now.message if isinstance(now, FeatureError) else changed
        return inputs, known

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _ready(self, foreign: Foreign, inputs: np.ndarray, known: np.ndarray) -> _Ready:
        """The rows that can be kept, in key order, with the origin that they get."""
        for file, error in foreign.bad.items():
            self._bad(file, error)
        if not foreign.files:
            raise UsageError(
                f"none of the rows of {foreign.teacher} in {shown(self.job.source)} is of a permitted sample",
                hint=f"Files are compared as written; the manifest's first is {shown(self.files[0])}.",
            )
        kind = self._value_kind(foreign)
        number_of = {file: number for number, file in enumerate(self.files)}
        samples = np.array([number_of[file] for file in foreign.files], np.int64)
        good = self._good_rows(foreign, kind) & known[samples]
        if not good.any():
            raise UsageError(f"no row of {foreign.teacher} in {shown(self.job.source)} can be kept")
        kept = np.flatnonzero(good)
        keys = keys_of(foreign.files[number] for number in kept.tolist())
        order = sorted_order(keys)
        kept = kept[order]
        files = [foreign.files[number] for number in kept.tolist()]
        numbers = foreign.numbers[kept]
        origin = _origin(foreign, kind, files, numbers)
        attributes_of(origin)
        self._refuse_misplaced(origin)
        return _Ready(foreign, origin, files, keys[order], inputs[samples[kept]], numbers)

    def _refuse_misplaced(self, origin: Origin) -> None:
        why = misplaced(origin.class_names, self.job.data.task.scenes, self.job.data.task.cities)
        if why is not None:
            raise UsageError(
                f"{origin.teacher} in {shown(self.job.source)}: {why}",
                hint="Bring its columns and their names into the task's order.",
            )

    def _value_kind(self, foreign: Foreign) -> str:
        asked, said = self.job.value_kind, foreign.value_kind
        if asked is not None and said not in (None, asked):
            raise UsageError(f"--value-kind is {asked}, but {shown(self.job.source)} says that its rows are {said}")
        return asked or said or "logits"

    def _good_rows(self, foreign: Foreign, kind: str) -> np.ndarray:
        """``[n]`` bool: rows that are finite. Raises `TeacherError` if they cannot be of this kind."""
        good, check = np.zeros(len(foreign.files), bool), RowCheck(kind)
        for part, rows in _blocks(foreign.table, foreign.numbers):
            good[part] = np.isfinite(rows).all(axis=1)
            check.add(rows[good[part]])
        wrong, remark = check.contradiction(), check.remark()
        if wrong is not None:
            raise TeacherError(
                f"the rows of {foreign.teacher} in {shown(self.job.source)} {wrong}",
                hint="Say what they are with --value-kind logits|log_probs|probs|sigmoid.",
            )
        if remark is not None:
            self.watcher.note(f"{foreign.teacher}: {remark}")
        for number in np.flatnonzero(~good).tolist():
            file = foreign.files[number]
            self._bad(file, TeacherError(f"{foreign.teacher}: the row of {shown(file)} is not finite"))
        return good

    def _bad(self, file: str, error: KDCacheError) -> None:
        if self.job.on_bad_sample == "stop":
            raise type(error)(error.message, hint=error.hint or _hint("the source"))
        self.missing.setdefault(file, error.message)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _write(self, ready: Mapping[str, _Ready], inputs: np.ndarray, known: np.ndarray) -> Published:
        """Commit one pack per teacher, and make them current."""
        origins = {name: one.origin for name, one in ready.items()}
        entries = {name: {"adopted": self._told(one)} for name, one in ready.items()}
        still = {} if self.earlier is None else self.earlier.missing
        permitted = set(self.files)
        missing = {file: reason for file, reason in still.items() if file in permitted} | self.missing
        make_directory(self.folder.packs_path)
        record = self._record()
        for one in ready.values():
            names = [file.encode() for file in one.files]
            write_pack(self.folder.packs_path, one.origin, one.keys, one.inputs, names, one.rows)
        order = self.job.data.selection.order
        as_old = Age.of({} if self.earlier is None else self.earlier.record)
        change = Change(
            str(record["shown_path"]),
            Wanted.of(self.job.data.selection, inputs[order], known[order]),
            origins,
            # It overtakes nobody's dump, so it began when the index's did.
            {**record, **self.job.data.described, **as_old._asdict()},
            bool(record["files"]),
            entries=entries,
            missing=missing,
            keep_damaged=True,
            min_accuracy=self.job.min_accuracy,
        )
        return publish(self.snapshot, change, self.watcher)

    def _record(self) -> dict[str, Any]:
        """What the index keeps of the run; where adopted rows were computed, nobody knows."""
        before = {} if self.earlier is None else self.earlier.record
        as_before = bool(before.get("files", True))
        return {
            **self.job.record,
            "environment": before.get("environment", {"device": "not known", "torch": "not known"}),
            "files": as_before if self.job.files is None else self.job.files,
            "shown_path": f"{self.job.cache_root}/{self.folder.path.name}",
        }

    def _told(self, one: _Ready) -> dict[str, Any]:
        name = Path(os.path.realpath(self.job.source)).name
        return {"source": name, "kind": one.foreign.kind, "rows": len(one.files)}

    def _outcomes(self, ready: Mapping[str, _Ready], published: Published) -> dict[str, Adopted]:
        index = self.snapshot.again().index
        entries = {} if index is None else index.record["teachers"]
        for name, one in ready.items():
            warning = near_chance(one.origin, stored_accuracy(entries.get(name, {})), self.job.data.task.cities)
            if warning is not None:
                self.watcher.note(warning)
        return {
            name: Adopted(
                one.foreign.kind,
                one.origin,
                published.rows[name],
                one.foreign.left_out,
                len(self.files) - published.rows[name],
                stored_accuracy(entries.get(name, {})),
            )
            for name, one in ready.items()
        }


def _hint(what: str) -> str:
    return f"Mend {what}, or pass --on-bad-sample skip to leave such samples out."


def _blocks(table: np.ndarray, numbers: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, len(numbers), _BLOCK):
        part = slice(start, min(start + _BLOCK, len(numbers)))
        yield part, table[numbers[part]]


def _origin(foreign: Foreign, kind: str, files: Sequence[str], numbers: np.ndarray) -> Origin:
    """Made by nobody knows what: its fingerprint is that of these very rows and names, so it equals no teacher's."""
    digest = hashlib.sha256("\0".join(files).encode())
    for _, rows in _blocks(foreign.table, numbers):
        digest.update(np.ascontiguousarray(rows).data)
    classes = foreign.table.shape[1]
    dtype = next(name for name, stored in STORED.items() if np.dtype(stored) == foreign.table.dtype)
    parts = dict.fromkeys(("weights", "architecture", "feature_spec", "precision"), UNVERIFIED) | {
        "adopted": digest.hexdigest(),
        "value_kind": kind,
        "num_classes": str(classes),
        "class_order": class_order(foreign.class_names, classes),
        "dtype": dtype,
        "format_version": str(FORMAT_VERSION),
    }
    return Origin(foreign.teacher, Fingerprint(parts), kind, classes, dtype, foreign.class_names)
