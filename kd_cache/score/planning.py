"""Which batch plan a dump follows: the saved one wherever rows made by it are kept, else a new one, saved first."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from kd_cache.dataset.features import FeatureSource
from kd_cache.errors import FeatureError
from kd_cache.files.atomic import make_directory
from kd_cache.score.batch_size import best_batch_size
from kd_cache.score.engine import Engine
from kd_cache.score.existing import Found
from kd_cache.score.job import DEFAULT_BATCH, DumpJob
from kd_cache.score.places import Places, count_shapes
from kd_cache.store.plan import BatchPlan, Shape
from kd_cache.watch import Watcher


class Planner:
    """Gives the plan, made or extended where it does not cover a shape yet. Use inside `device.numerics`.

    Args:
        files: of all permitted samples: the sizes are planned for all of them, whichever part is scored.
    """

    def __init__(self, job: DumpJob, found: Found, files: Sequence[str], engine: Engine, watcher: Watcher) -> None:
        self._job, self._found, self._files, self._engine, self._watcher = job, found, files, engine, watcher
        self._plan: BatchPlan | None = None

    def plan_for(self, shape: Shape) -> BatchPlan:
        """The plan to score a sample of ``shape`` with; it covers the shape unless its number of bins is another."""
        if self._plan is None:
            self._plan = self._saved(shape[1])
        # A shape with other bins is of a bad sample, for which the plan must not grow.
        if self._plan is None or (shape[1] == self._plan.bins and shape not in self._plan.batches):
            self._plan = self._make(earlier=self._plan)
        return self._plan

    def _saved(self, bins: int) -> BatchPlan | None:
        """The plan of the rows that are kept, or that other processes are making; none where there are no such rows."""
        job, found = self._job, self._found
        begun = found.snapshot.packs.good or job.folder.pending_path.exists()
        saved = found.snapshot.again().plan if begun and job.skip_existing else None
        asked = any(known.union is not None for known in found.known.values())
        if saved is None or (saved.bins != bins and not asked):
            return None
        if job.batch_size in (None, "auto", saved.batch_size):
            return saved
        if asked or any(found.snapshot.packs.of(origin) for origin in found.others.values()):
            self._watcher.note(f"the batch size stays {saved.batch_size}, with which this cache was begun")
            return saved
        return None

    def _make(self, earlier: BatchPlan | None) -> BatchPlan:
        counts = count_shapes(self._job.data.features, self._files, skip_bad=self._job.on_bad_sample == "skip")
        size = self._job.batch_size or DEFAULT_BATCH[self._job.device.type]
        if size == "auto":
            size = earlier.batch_size if earlier else self._measured(counts)
        plan = BatchPlan.from_counts(counts, size, earlier)
        make_directory(self._job.folder.path)
        plan.save(self._job.folder.plan_path)
        return plan

    def _measured(self, counts: dict[Shape, int]) -> int:
        if not counts:
            return DEFAULT_BATCH[self._job.device.type]
        shape, count = max(counts.items(), key=lambda item: item[1])
        size = best_batch_size(self._engine, shape, count)
        self._watcher.note(f"batch size {size}, measured with features of {shape[0]} × {shape[1]}")
        return size


class Ranks:
    """Gives samples their ranks among those of their shape, in key order.

    The shapes of samples that this run does not read, of other parts or known to be fresh, count as well: they are
    looked up in headers, but only where a later sample is scored. A file with a good header has its rank even if the
    rest of it cannot be read: its neighbours keep theirs.
    """

    def __init__(self, source: FeatureSource, files: Sequence[str]) -> None:
        self._source, self._files = source, files
        self._places = Places()
        self._at = 0
        self.shapes = np.zeros((len(files), 2), np.int32)
        """``[N, 2]``: what is known of the samples' shapes; 0 where nothing is."""

    def rank(self, number: int, shape: Shape) -> int:
        """The rank of this sample. Ask in ascending order."""
        if number > self._at:
            self._pass_over(number)
        self._at = number + 1
        return self._places.next_rank(shape)

    def _pass_over(self, number: int) -> None:
        between = self.shapes[self._at : number]
        for offset in np.flatnonzero(between[:, 0] == 0).tolist():
            with suppress(FeatureError):
                between[offset] = self._source.shape(self._files[self._at + offset])
        known, counts = np.unique(between[between[:, 0] > 0], axis=0, return_counts=True)
        for (frames, bins), count in zip(known.tolist(), counts.tolist(), strict=True):
            self._places.pass_over((frames, bins), count)
