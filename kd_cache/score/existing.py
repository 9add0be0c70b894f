"""What a dump finds in the cache when it begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kd_cache.errors import CorruptError, StaleError, TeacherError, shown
from kd_cache.score.existing_rows import Known
from kd_cache.score.job import DumpJob
from kd_cache.store.cache import refuse_file_as_root
from kd_cache.store.index import Index, is_teacher_name
from kd_cache.store.origin import Origin
from kd_cache.store.snapshot import Snapshot
from kd_cache.watch import Watcher


@dataclass(frozen=True)
class Found:
    """The cache, its index where that can be gone on from, other teachers than the job's, and the job's rows."""

    snapshot: Snapshot
    earlier: Index | None
    others: Mapping[str, Origin]
    known: Mapping[str, Known]


def find_rows(job: DumpJob, watcher: Watcher) -> Found:
    """Look at the cache that a job dumps into.

    Raises:
        StaleError: an older script's cache, which is not gone on with; a cache of another adaptation.
        CorruptError: no index and nothing to make it from; logits that were joined to wrong rows.
        TeacherError, StoreError: a name that is none; a cache that cannot be read.
    """
    for name in job.teachers:
        if not is_teacher_name(name):
            raise TeacherError(f"{shown(name)!r} cannot be a teacher's name (letters, digits, _ . -)")
    refuse_file_as_root(job.cache_root)
    snapshot = Snapshot(job.folder)
    earlier = _earlier_index(job, snapshot, watcher)
    others = {name: origin for name, origin in snapshot.origins.items() if name not in job.origins}
    packs = snapshot.packs
    if earlier is None and job.folder.index_path.exists():
        others = packs.sole_origins(job.origins)
    for error in packs.damaged.values():
        watcher.note(error.message)
    snapshot.refuse_wrong_joins(others | (job.origins if job.skip_existing else {}))
    keys = job.data.selection.keys
    known = {name: Known(origin, snapshot, keys) for name, origin in job.origins.items()}
    return Found(snapshot, earlier, others, known)


def _earlier_index(job: DumpJob, snapshot: Snapshot, watcher: Watcher) -> Index | None:
    if snapshot.is_older:
        # A dump that was begun anew left packs of its own here; an interrupted adoption's are no reason to go on.
        adopted = all("adopted" in pack.origin.fingerprint.parts for pack in snapshot.packs.good)
        if not job.skip_existing or not adopted:
            return None
        hint = "Its rows cannot be checked. Dump into another --cache-root, adopt them, or pass --no-skip-existing to "
        raise StaleError(str(snapshot.trouble), hint=f"{hint}score everything again.")
    if snapshot.is_damaged and job.skip_existing and not job.folder.pack_paths():
        hint = "There are no packs to rebuild it from. Move the folder away, or pass --no-skip-existing."
        raise CorruptError(snapshot.trouble.message if snapshot.trouble else "", hint=hint)
    return snapshot.known(watcher)
