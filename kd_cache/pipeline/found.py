"""What a dump finds in the cache when it begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kd_cache.accuracy import refuse_wrong_joins
from kd_cache.errors import CorruptError, StaleError, TeacherError, shown
from kd_cache.pipeline.dump_job import DumpJob
from kd_cache.pipeline.known import Known
from kd_cache.store.folder import PackSet, refuse_file_as_root, refuse_renamed
from kd_cache.store.index import Index, is_teacher_name
from kd_cache.store.pack import Origin
from kd_cache.watch import Watcher


@dataclass(frozen=True)
class Found:
    """An earlier dump's index, the packs, the teachers that are not the job's, and what there is of the job's."""

    earlier: Index | None
    packs: PackSet
    others: Mapping[str, Origin]
    known: Mapping[str, Known]


def find_rows(job: DumpJob, keys: np.ndarray, watcher: Watcher) -> Found:
    """Look at the cache that a job dumps into; ``keys`` ``[N, 16]`` u1 are those of all permitted samples.

    Raises:
        StaleError: an older script's cache, which is not gone on with; a cache of another adaptation.
        CorruptError: no index and nothing to make it from; logits that were joined to wrong rows.
        TeacherError, StoreError: a name that is none; a cache that cannot be read.
    """
    earlier = _earlier_index(job, watcher)
    told = {} if earlier is None else earlier.origins
    others = {name: origin for name, origin in told.items() if name not in job.origins}
    packs = job.folder.packs()
    if earlier is None and job.folder.index_path.exists():
        others = packs.sole_origins(job.origins)
    for error in packs.damaged.values():
        watcher.note(error.message)
    kept = others | (job.origins if job.skip_existing else {})
    refuse_wrong_joins(job.folder, packs, earlier, kept)
    return Found(earlier, packs, others, {name: Known(origin, packs, keys) for name, origin in job.origins.items()})


def _earlier_index(job: DumpJob, watcher: Watcher) -> Index | None:
    for name in job.teachers:
        if not is_teacher_name(name):
            raise TeacherError(f"{shown(name)!r} cannot be a teacher's name (letters, digits, _ . -)")
    refuse_file_as_root(job.cache_root)
    try:
        index = job.folder.index(maps=False)
    except StaleError as error:
        # A dump that was begun anew left packs of its own here; an interrupted adoption's are no reason to go on.
        adopted = all("adopted" in pack.origin.fingerprint.parts for pack in job.folder.packs().good)
        if job.skip_existing and adopted:
            raise StaleError(
                error.message,
                hint="Its rows cannot be checked. Dump into another --cache-root, adopt them, "
                "or pass --no-skip-existing to score everything again.",
            ) from error
        return None
    except CorruptError as error:
        if not job.folder.pack_paths() and job.skip_existing:
            raise CorruptError(
                error.message,
                hint="There are no packs to rebuild it from. Move the folder away, or pass --no-skip-existing.",
            ) from error
        watcher.note(f"{error.message}; it is written anew from the packs")
        return None
    refuse_renamed(job.folder, index)
    return index
