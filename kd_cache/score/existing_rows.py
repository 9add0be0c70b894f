"""What a cache already holds of one teacher, and whether it is fresh."""

from __future__ import annotations

import numpy as np

from kd_cache.store.origin import Origin
from kd_cache.store.snapshot import Snapshot

FRESH = "fresh"
NEW = "new"
FEATURE_CHANGED = "its feature changed"
ASKED = "asked for"


class Known:
    """What the cache already holds of one teacher; samples are numbered as in ``keys`` ``[N, 16]``."""

    def __init__(self, origin: Origin, snapshot: Snapshot, keys: np.ndarray) -> None:
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
        """A row of the present fingerprint exists, fresh or not."""
        return bool(self.first[number] >= 0)

    def was_scored(self, numbers: np.ndarray) -> np.ndarray:
        """``[n]`` bool: a row exists, whatever its fingerprint."""
        scored: np.ndarray = (self.first[numbers] >= 0) | (self._superseded[numbers] > 0)
        return scored

    def are_fresh(self, numbers: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """``[n]`` bool: there is a row of the present fingerprint and of these digests ``[n, 16]``, in some pack."""
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
