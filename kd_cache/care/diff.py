"""Two caches side by side: what each holds, and how far the rows of their common samples are apart.

It compares what readers are served: both sides are opened as `LogitCache` opens them, one teacher at a time, and rows
are joined by key. Blocks of rows are compared in turn, so that memory does not grow with their number.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd_cache.errors import MissingLogitsError, shown
from kd_cache.score.storage_cost import kl_divergence
from kd_cache.serve.logit_cache import LogitCache
from kd_cache.store.cache import CacheFolder
from kd_cache.store.classes import differing_columns
from kd_cache.store.index import Index, read_older_maps
from kd_cache.store.origin import Origin
from kd_cache.store.snapshot import Snapshot
from kd_cache.watch import Watcher

MOST_CHANGED = 1000
"""So many files with another argmax are kept by name; the count is of all."""


@dataclass(frozen=True)
class Changed:
    """A file whose largest class is another one: its number in A and in B."""

    file: str
    a: int
    b: int


@dataclass
class TeacherDiff:
    """One teacher's rows in A and in B. A figure is ``None`` where it has no meaning or nobody knows it.

    ``compared`` counts common rows that are finite on both sides: argmax and distances are over these. Rows are
    bit-equal if they are once both are float32, which widens float16 exactly. Top-k rows are compared as what they
    give every class at temperature 1.
    """

    rows_a: int
    rows_b: int
    in_both: int = 0
    not_compared: str | None = None  # why
    fingerprints_equal: bool | None = None
    difference: str | None = None  # of the fingerprints, part by part
    bit_equal: int | None = None
    not_finite: int | None = None
    compared: int | None = None
    argmax_changes: int | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    largest_difference: float | None = None
    other_features: int | None = None
    changed: list[Changed] = field(default_factory=list)

    @property
    def only_in_a(self) -> int:
        return self.rows_a - self.in_both

    @property
    def only_in_b(self) -> int:
        return self.rows_b - self.in_both

    @property
    def argmax_share(self) -> float | None:
        return self.argmax_changes / self.compared if self.argmax_changes is not None and self.compared else None

    def as_json(self) -> dict[str, Any]:
        counts = {"only_in_a": self.only_in_a, "only_in_b": self.only_in_b, "argmax_share": self.argmax_share}
        listed = [vars(change) for change in self.changed]
        left_out = None if self.argmax_changes is None else self.argmax_changes - len(listed)
        return vars(self) | counts | {"changed": listed, "changed_left_out": left_out}


@dataclass
class DiffReport:
    """What `diff_caches` found; ``only_in_a`` and ``only_in_b`` name teachers."""

    a: str
    b: str
    teachers: dict[str, TeacherDiff] = field(default_factory=dict)
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"teachers": {name: found.as_json() for name, found in self.teachers.items()}}


def diff_caches(
    a: str | Path,
    b: str | Path,
    only: Collection[str] = (),
    watcher: Watcher | None = None,
    block_values: int = 1 << 20,
) -> DiffReport:
    """Compare two finished caches, or caches of an older script. Reads only.

    Args:
        a, b: their folders.
        only: just these teachers; all by default.
        block_values: about so many values of each are in memory at a time.

    Raises:
        MissingLogitsError: no finished cache there, or neither holds a teacher of ``only``.
        CorruptError, StoreError: as `LogitCache.open`.
    """
    sides = (_Side(a), _Side(b))
    report = DiffReport(str(a), str(b))
    for side in sides:
        if side.note is not None:
            report.notes.append(side.note)
    _choose(report, sides, only)
    for name in report.teachers:
        report.teachers[name] = _Comparison(name, sides, watcher or Watcher(), block_values).run()
    return report


class _Side:
    """One of the two caches: which teachers it holds, made by what."""

    def __init__(self, path: str | Path) -> None:
        self.folder = CacheFolder(Path(path).expanduser())
        self.note: str | None = None
        snapshot = Snapshot(self.folder)
        self.index: Index | None = None
        if snapshot.is_older:
            self.note = f"{snapshot.trouble}: its rows are compared as they are, nothing about them can be checked"
            self.teachers = list(read_older_maps(self.folder.index_path))
        else:
            self.index = snapshot.finished()
            self.teachers = list(self.index.origins)

    def origin(self, name: str) -> Origin | None:
        """What made a teacher's rows; ``None`` in a cache of an older script."""
        return None if self.index is None else self.index.origins[name]

    def open(self, name: str, *, on_miss: str = "raise") -> LogitCache:
        """One teacher's rows, of the fingerprint that the index named when it was read."""
        origin = self.origin(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the note says it
            if origin is None:
                return LogitCache.open(self.folder.path, [name], on_miss=on_miss)
            expect = {name: origin.fingerprint}
            return LogitCache.open(self.folder.path, [name], expect, value_kind=origin.value_kind, on_miss=on_miss)


def _choose(report: DiffReport, sides: tuple[_Side, _Side], only: Collection[str]) -> None:
    """Which teachers are compared, and which only one side holds."""
    in_a, in_b = (side.teachers for side in sides)
    unknown = [name for name in only if name not in in_a and name not in in_b]
    if unknown:
        held = ", ".join(dict.fromkeys([*in_a, *in_b])) or "none"
        raise MissingLogitsError(
            f"neither cache holds logits of {', '.join(map(shown, unknown))} (they hold {held})", hint="Check --only."
        )
    wanted = [name for name in dict.fromkeys([*in_a, *in_b]) if not only or name in only]
    report.only_in_a = [name for name in wanted if name not in in_b]
    report.only_in_b = [name for name in wanted if name not in in_a]
    report.teachers = {name: TeacherDiff(0, 0) for name in wanted if name in in_a and name in in_b}


class _Comparison:
    """One teacher in both caches."""

    def __init__(self, name: str, sides: tuple[_Side, _Side], watcher: Watcher, block_values: int) -> None:
        self.name = name
        self.watcher = watcher
        self.block_values = block_values
        self.origins = tuple(side.origin(name) for side in sides)
        # B gives -1 for a file it lacks: that is the join.
        self.caches = (sides[0].open(name), sides[1].open(name, on_miss="nan"))
        self.found = TeacherDiff(len(self.caches[0]), len(self.caches[1]))

    def run(self) -> TeacherDiff:
        self._compare_origins()
        files = self.caches[0].files
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows_b = self.caches[1].rows(files)
        common = torch.nonzero(rows_b >= 0).flatten()
        rows_a, rows_b = self.caches[0].all_rows()[common], rows_b[common]
        self.found.in_both = len(rows_a)
        self._compare_features(rows_a, rows_b)
        self.found.not_compared = self._why_not()
        if self.found.not_compared is None:
            self._compare_values(rows_a, rows_b, [files[number] for number in common.tolist()])
        return self.found

    def _compare_origins(self) -> None:
        a, b = self.origins
        if a is not None and b is not None:
            self.found.fingerprints_equal = a.fingerprint.digest == b.fingerprint.digest
            self.found.difference = a.fingerprint.difference(b.fingerprint) or None

    def _why_not(self) -> str | None:
        """Why values of the two must not be held against each other."""
        frames = [cache.frames for cache in self.caches]
        if frames[0] != frames[1]:
            return f"A has {frames[0] or 'no'} frames in a row, B {frames[1] or 'none'}"
        classes = [cache.num_classes for cache in self.caches]
        if classes[0] != classes[1]:
            return f"A has {classes[0]} classes, B has {classes[1]}"
        kinds = [origin.value_kind for origin in self.origins if origin is not None]
        if len(set(kinds)) > 1:
            return f"A stores {kinds[0]}, B stores {kinds[1]}"
        a, b = (None if origin is None else origin.class_names for origin in self.origins)
        return differing_columns("A", a, "B", b)

    def _blocks(self, rows_a: torch.Tensor, rows_b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        size = max(1, self.block_values // (self.caches[0].num_classes * (self.caches[0].frames or 1)))
        for start in range(0, len(rows_a), size):
            yield rows_a[start : start + size], rows_b[start : start + size]

    def _compare_features(self, rows_a: torch.Tensor, rows_b: torch.Tensor) -> None:
        """Count common rows that were scored from other features."""
        if any(origin is None for origin in self.origins):
            return
        self.found.other_features = 0
        for part_a, part_b in self._blocks(rows_a, rows_b):
            digests = [self.caches[0].input_digests(part_a), self.caches[1].input_digests(part_b)]
            if digests[0] is not None and digests[1] is not None:
                self.found.other_features += int((digests[0] != digests[1]).any(axis=(1, 2)).sum())

    def _compare_values(self, rows_a: torch.Tensor, rows_b: torch.Tensor, files: Sequence[str]) -> None:
        measured = _Measured(next((origin.value_kind for origin in self.origins if origin is not None), "logits"))
        self.watcher.stage(f"comparing {self.name}", len(rows_a))
        done = 0
        for part_a, part_b in self._blocks(rows_a, rows_b):
            a, b = (_dense(cache, part) for cache, part in zip(self.caches, (part_a, part_b), strict=True))
            for number, was, became in measured.add(a, b):
                if len(self.found.changed) < MOST_CHANGED:
                    self.found.changed.append(Changed(files[done + number], was, became))
            done += len(part_a)
            self.watcher.advance(len(part_a))
        measured.tell(self.found)


def _dense(cache: LogitCache, rows: torch.Tensor) -> np.ndarray:
    """``[n, L · C]``; of top-k rows log-probabilities at temperature 1, the rest spread evenly."""
    found = cache.batch(rows)
    dense: np.ndarray = (found if cache.topk is None else found.dense()).flatten(1).numpy()
    return dense


class _Measured:
    """Running figures over pairs of rows ``[n, C]``."""

    def __init__(self, value_kind: str) -> None:
        self.is_distribution = value_kind in ("logits", "log_probs")
        self.bit_equal = self.not_finite = self.compared = self.changes = 0
        self.sum = self.largest = 0.0

    def add(self, a: np.ndarray, b: np.ndarray) -> list[tuple[int, int, int]]:
        """Count these rows; returns ``(row, argmax in a, argmax in b)`` where the two differ."""
        a, b = a.astype(np.float32), b.astype(np.float32)
        self.bit_equal += int((a.view(np.uint32) == b.view(np.uint32)).all(axis=1).sum())
        finite = np.flatnonzero(np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1))
        self.not_finite += len(a) - len(finite)
        self.compared += len(finite)
        if not len(finite):
            return []
        exact_a, exact_b = a[finite].astype(np.float64), b[finite].astype(np.float64)
        apart = kl_divergence(exact_a, exact_b) if self.is_distribution else np.abs(exact_a - exact_b).max(axis=1)
        self.sum += float(apart.sum())
        self.largest = max(self.largest, float(apart.max()))
        was, became = exact_a.argmax(axis=1), exact_b.argmax(axis=1)
        changed = np.flatnonzero(was != became)
        self.changes += len(changed)
        return list(zip(finite[changed].tolist(), was[changed].tolist(), became[changed].tolist(), strict=True))

    def tell(self, found: TeacherDiff) -> None:
        found.bit_equal, found.not_finite = self.bit_equal, self.not_finite
        found.compared, found.argmax_changes = self.compared, self.changes
        if self.is_distribution and self.compared:
            found.kl_mean, found.kl_max = self.sum / self.compared, self.largest
        elif self.compared:
            found.largest_difference = self.largest
