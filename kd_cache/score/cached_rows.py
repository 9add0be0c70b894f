"""Whether rows that the cache holds are still what a teacher gives, whose code no fingerprint covers.

A fingerprint covers weights, and what a teacher says of itself; not its code. So before a dump believes that rows are
fresh, some of them are scored again, one batch of each teacher that is not built in.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import SystemRandom

import numpy as np

from kd_cache.dataset.features import Feature, shape_of
from kd_cache.errors import StaleError, shown
from kd_cache.score.existing import Found, Known
from kd_cache.score.job import DumpJob
from kd_cache.score.recompute import Recheck
from kd_cache.score.teacher import unknown_state
from kd_cache.score.tolerance import most_allowed
from kd_cache.store.plan import Place
from kd_cache.watch import Watcher

_SAMPLES = 8


def check_unknown_code(job: DumpJob, found: Found, files: Sequence[str], watcher: Watcher) -> None:
    """Score a few cached rows of each teacher again whose code is not built in.

    Raises:
        StaleError: they come out otherwise; the cache stays as it is.
        TeacherError: the teacher fails.
    """
    for name, known in found.known.items():
        if job.notes.get(name, {}).get("source", {}).get("built_in"):
            continue
        if unknown := unknown_state(job.teachers[name]):
            watcher.note(
                f"{name}: its fingerprint does not cover {', '.join(unknown[:3])}; if its numbers depend on that, name "
                "it in fingerprint_parts()"
            )
        if job.skip_existing and job.check_cached and known.union is not None:
            _check(job, found, name, known, files, watcher)


def _check(job: DumpJob, found: Found, name: str, known: Known, files: Sequence[str], watcher: Watcher) -> None:
    plan, places, shapes = found.snapshot.plan, dict[str, Place](), set[tuple[int, ...]]()
    held = np.flatnonzero(known.first >= 0)
    start = SystemRandom().randrange(len(held)) if len(held) else 0
    for number in held[start : start + _SAMPLES].tolist():
        feature = job.data.features.try_read(files[number])
        if isinstance(feature, Feature) and known.is_first(number, feature.digest):
            shape = shape_of(feature.array)
            shapes.add(shape)
            if len(shapes) > 1:
                break  # one shape, one batch
            size = 1 if plan is None else plan.batches.get(shape, 1)
            places[files[number]] = Place(size, len(places) % size)
    if not places or known.union is None:
        return
    checked = Recheck(job.teachers[name], known.union, places, job.device).run(
        list(places), job.data.features, watcher, job.seed
    )
    if checked.deviation > most_allowed(job.precision):
        file, reason = checked.wrong[0]
        raise StaleError(
            f"{name}: rows that the cache holds are not what it gives now ({shown(file)}: {reason}). Its code or a "
            "setting changed, and its fingerprint does not tell",
            hint="Change the version in its fingerprint_parts()['architecture'], or score everything again with "
            "--no-skip-existing.",
        )
    for file, reason in checked.wrong[:1]:
        watcher.note(f"{name}: {shown(file)}: {reason}; another machine or version may do that")
