"""Features that need not be read: nobody touched their files since a dump read them, and their rows are fresh."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from kd_cache.score.existing import Found
from kd_cache.score.feature_notes import Seen
from kd_cache.score.job import DumpJob

_AT_ONCE = 65_536


class Unchanged:
    """The shortcut of a rerun. `feature_notes` says when a note is believed; a row's freshness is decided as ever.

    Args:
        files: of all permitted samples, in key order; ``keys`` ``[N, 16]`` u1 theirs.
        part: which of them this run scores.

    Attributes:
        digests, shapes: ``[N, 16]`` u1 and ``[N, 2]`` int32 of the features that need not be read, 0 elsewhere.
        fresh: ``[N]`` bool: which those are.
    """

    def __init__(self, job: DumpJob, found: Found, files: Sequence[str], keys: np.ndarray, part: range) -> None:
        self._path, self._keys = job.folder.seen_path, keys
        self._part = slice(part.start, part.stop)
        self._moment = time.time_ns()
        self._stats = np.full((len(files), 5), -1, np.int64)
        self.digests = np.zeros((len(files), 16), np.uint8)
        self.shapes = np.zeros((len(files), 2), np.int32)
        self.fresh = np.zeros(len(files), bool)
        self._seen = Seen.load(self._path)
        for start in range(part.start, part.stop, _AT_ONCE):
            block = slice(start, min(start + _AT_ONCE, part.stop))
            self._stats[block] = job.data.features.stat_many(files[block])
        if job.reread or not job.skip_existing or not len(self._seen):
            return
        believed, digests, shapes = self._seen.lookup(keys[self._part], self._stats[self._part])
        numbers = np.flatnonzero(believed)
        for known in found.known.values():
            numbers = numbers[known.are_fresh(numbers + part.start, digests[numbers])]
        at = numbers + part.start
        self.fresh[at] = True
        self.digests[at], self.shapes[at] = digests[numbers], shapes[numbers]

    def remember(self, read: np.ndarray, digests: np.ndarray, shapes: np.ndarray) -> None:
        """Take notes of the samples of which ``read`` ``[N]`` bool says that their features were read by this run.

        A note that cannot be written is none: the next run reads the feature.
        """
        if not read.any():
            return
        noted = self._seen.record(self._keys[read], self._stats[read], shapes[read], digests[read], self._moment)
        if len(noted) or len(self._seen):
            noted.only(self._keys).save(self._path)
