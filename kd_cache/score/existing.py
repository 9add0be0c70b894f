"""What a dump finds in the cache when it begins: which rows exist, and whether they are fresh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from kd_cache.errors import CorruptError, StaleError, TeacherError, UsageError, shown
from kd_cache.keys import KeyFinder
from kd_cache.score.job import NEW, DumpJob
from kd_cache.store.cache import CacheFolder, refuse_file_as_root
from kd_cache.store.classes import misplaced, refuse_other_order
from kd_cache.store.index import Index, is_teacher_name
from kd_cache.store.names import refuse_mode
from kd_cache.store.origin import Origin
from kd_cache.store.pack import Pack, attributes_of
from kd_cache.store.preamble import Span
from kd_cache.store.snapshot import Snapshot
from kd_cache.store.union import Union
from kd_cache.watch import Watcher

FRESH = "fresh"
FEATURE_CHANGED = "its feature changed"
ASKED = "asked for"


class Known:
    """What the cache already holds of one teacher; samples are numbered as in ``keys`` ``[N, 16]``.

    ``lent`` are rows of the same making in other caches, which are copied in place of scoring; ``promised`` ``[N]``
    bool says of which samples another dump, that is only planned, will have made them.
    """

    def __init__(
        self,
        origin: Origin,
        snapshot: Snapshot,
        keys: np.ndarray,
        lent: Sequence[Pack] = (),
        promised: np.ndarray | None = None,
    ) -> None:
        self._keys, self.lent, self._promised = keys, Union(lent) if lent else None, promised
        self.union = snapshot.union(origin)
        self.first = np.full(len(keys), -1, np.int64) if self.union is None else self.union.find(keys)
        self.reasons = [NEW]
        self._superseded = np.zeros(len(keys), np.int16)  # of each sample, the position in reasons
        for pack in snapshot.packs.good:
            other = pack.origin
            if other.teacher == origin.teacher and other.fingerprint.digest != origin.fingerprint.digest:
                reason = ", ".join(other.fingerprint.differing_parts(origin.fingerprint)) + " changed"
                if reason not in self.reasons:
                    self.reasons.append(reason)
                self._superseded[snapshot.union_of(pack).find(keys) >= 0] = self.reasons.index(reason)

    def holds(self, number: int) -> bool:
        """A row of the present fingerprint exists, fresh or not, here or lent."""
        is_lent = self.lent is not None and self.lent.find(self._keys[number : number + 1])[0] >= 0
        return bool(self.first[number] >= 0) or bool(is_lent)

    def is_first(self, number: int, digest: bytes) -> bool:
        """Whether the row that a search finds first was made of a feature with this digest."""
        position = int(self.first[number])
        return self.union is not None and position >= 0 and self.union.inputs[position].tobytes() == digest

    def was_scored(self, numbers: np.ndarray) -> np.ndarray:
        """``[n]`` bool: a row exists, whatever its fingerprint."""
        scored: np.ndarray = (self.first[numbers] >= 0) | (self._superseded[numbers] > 0)
        return scored

    def are_fresh(self, numbers: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """``[n]`` bool: a row of the present fingerprint and of these digests ``[n, 16]`` is here, or lent."""
        fresh: np.ndarray = self.are_held(numbers, digests) | self.are_lent(numbers, digests)
        return fresh

    def are_lent(self, numbers: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """``[n]`` bool: another cache has, or will have, such a row."""
        lent = np.zeros(len(numbers), bool) if self._promised is None else self._promised[numbers]
        if self.lent is not None:
            lent = lent | (self.lent.match(self._keys[numbers], digests) >= 0)
        return lent

    def are_held(self, numbers: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """``[n]`` bool: such a row is in some pack of this cache."""
        fresh = np.zeros(len(numbers), bool)
        if self.union is None:
            return fresh
        pending = np.flatnonzero(self.first[numbers] >= 0)
        position = self.first[numbers]
        while len(pending):
            fresh[pending] = (self.union.inputs[position[pending]] == digests[pending]).all(axis=1)
            pending = pending[~fresh[pending]]
            position[pending] += 1
            pending = pending[position[pending] < len(self.union)]
            pending = pending[self.union.repeats[position[pending]]]
        return fresh

    def states(self, numbers: np.ndarray, digests: np.ndarray) -> list[str]:
        """Of each sample: `FRESH`, `NEW`, or why it must be scored again; ``digests`` ``[n, 16]`` are the features'."""
        fresh = self.are_fresh(numbers, digests)
        held = self.first[numbers] >= 0
        names = [FRESH, FEATURE_CHANGED, *self.reasons]
        codes = np.where(fresh, 0, np.where(held, 1, 2 + self._superseded[numbers]))
        return [names[code] for code in codes.tolist()]

    def state(self, number: int, digest: bytes) -> str:
        """`states` of one sample."""
        return self.states(np.array([number]), np.frombuffer(digest, np.uint8)[None])[0]


@dataclass(frozen=True)
class Found:
    """The cache, its index where that can be gone on from, other teachers than the job's, and the job's rows.

    Where there are views, these are those of the clean one (`known_rows` finds the others).
    """

    snapshot: Snapshot
    earlier: Index | None
    others: Mapping[str, Origin]
    known: Mapping[str, Known]


@dataclass(frozen=True)
class Elsewhere:
    """Where else rows of a job's teachers are: caches to copy them from.

    ``planned``: by fingerprint the keys ``[n, 16]`` of rows that dumps which are only planned will have made.
    """

    lenders: Sequence[CacheFolder] = ()
    planned: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)

    @cached_property
    def _packs(self) -> list[Pack]:
        return [pack for folder in self.lenders for pack in Snapshot(folder).packs.good]

    def lent(self, origin: Origin) -> list[Pack]:
        """Packs of rows made by just this; of rows with more views those that are wanted."""
        cut = [pack.of_views(origin.views) for pack in self._packs if pack.origin.teacher == origin.teacher]
        return [pack for pack in cut if pack is not None and pack.origin == origin]

    def promised(self, origin: Origin, keys: np.ndarray) -> np.ndarray | None:
        """``[N]`` bool, of which of these keys rows will be there."""
        planned = [KeyFinder(made).find(keys) >= 0 for made in self.planned.get(origin.fingerprint.digest, ())]
        return np.logical_or.reduce(planned) if planned else None


NOWHERE = Elsewhere()


def find_rows(job: DumpJob, watcher: Watcher, elsewhere: Elsewhere = NOWHERE, needed: Span | None = None) -> Found:
    """Look at the cache that a job dumps into, and at those that lend rows; of a part's ``needed`` keys alone.

    Raises:
        StaleError: an older script's cache, which is not gone on with; a cache of another adaptation.
        CorruptError: no index and nothing to make it from; logits that were joined to wrong rows.
        TeacherError: a name that is none; columns in another order than the task's labels.
        UsageError: two teachers that have the same classes in another order; a new one that is called like a mode.
        StoreError: a cache that cannot be read; more class names than a pack can hold.
    """
    for name in job.teachers:
        if not is_teacher_name(name):
            raise TeacherError(f"{shown(name)!r} cannot be a teacher's name (letters, digits, _ . -)")
    for name, origin in job.origins.items():
        attributes_of(origin)  # what no pack can hold is said before anything is scored
        why = misplaced(origin.class_names, job.data.task.scenes, job.data.task.cities)
        if why is not None:
            raise TeacherError(f"teacher {name}: {why}", hint="Return its columns in the order of the task's labels.")
    refuse_file_as_root(job.cache_root)
    snapshot = Snapshot(job.folder, needed=needed)
    for name in sorted(job.origins.keys() - snapshot.origins.keys()):
        refuse_mode(name, "Give it another name: --teacher NAME=….")
    earlier = _earlier_index(job, snapshot, watcher)
    others = {name: origin for name, origin in snapshot.origins.items() if name not in job.origins}
    packs = snapshot.packs
    for name, origin in job.origins.items():
        _refuse_fewer_views(origin, snapshot.origins.get(name))
    if earlier is None and (job.folder.index_path.exists() or not snapshot.pending):
        others = packs.sole_origins(job.origins)  # the index is lost: what packs leave no choice about stays
    for error in packs.damaged.values():
        watcher.note(error.message)
    snapshot.refuse_wrong_joins(others | (job.origins if job.skip_existing else {}))
    refuse_other_order(others | job.origins)
    return Found(snapshot, earlier, others, known_rows(job.by_view[0], snapshot, elsewhere))


def known_rows(job: DumpJob, snapshot: Snapshot, elsewhere: Elsewhere) -> dict[str, Known]:
    """What the cache, and those that lend, hold of each teacher."""
    keys = job.data.selection.keys
    return {
        name: Known(origin, snapshot, keys, elsewhere.lent(origin), elsewhere.promised(origin, keys))
        for name, origin in job.origins.items()
    }


def _refuse_fewer_views(origin: Origin, before: Origin | None) -> None:
    if (
        before is not None
        and before.fingerprint.digest == origin.fingerprint.digest
        and len(before.views) > len(origin.views)
    ):
        raise UsageError(
            f"{origin.teacher} has rows of {len(before.views)} views here, {len(origin.views)} were asked for",
            hint=f"Pass --views {len(before.views)}, or dump into another --cache-root.",
        )


def _earlier_index(job: DumpJob, snapshot: Snapshot, watcher: Watcher) -> Index | None:
    if snapshot.is_older:
        # A dump that was begun anew left packs of its own here; an interrupted adoption's are no reason to go on.
        adopted = all("adopted" in pack.origin.fingerprint.parts for pack in snapshot.packs.good)
        if not job.skip_existing or not adopted:
            return None
        hint = "Its rows cannot be checked. Dump into another --cache-root, adopt them, or pass --no-skip-existing to "
        raise StaleError(str(snapshot.trouble), hint=f"{hint}score everything again; other teachers' rows stay.")
    if snapshot.is_damaged and job.skip_existing and not job.folder.pack_paths():
        hint = "There are no packs to rebuild it from. Move the folder away, or pass --no-skip-existing."
        raise CorruptError(snapshot.trouble.message if snapshot.trouble else "", hint=hint)
    return snapshot.known(watcher)
