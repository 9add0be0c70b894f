"""What a cache already holds of one teacher, and whether it is fresh."""

from __future__ import annotations

import numpy as np

from kd_cache.store.folder import PackSet
from kd_cache.store.pack import Origin
from kd_cache.store.union import Union

FRESH = "fresh"
NEW = "new"
FEATURE_CHANGED = "its feature changed"
ASKED = "asked for"


class Known:
    """What the cache already holds of one teacher."""

    def __init__(self, origin: Origin, packs: PackSet, keys: np.ndarray) -> None:
        self.union = packs.union(origin)
        self.first = np.full(len(keys), -1, np.int64) if self.union is None else self.union.find(keys)
        self.superseded: dict[int, str] = {}
        for pack in packs.good:
            other = pack.origin
            if other.teacher == origin.teacher and other.fingerprint.digest != origin.fingerprint.digest:
                reason = ", ".join(other.fingerprint.differing_parts(origin.fingerprint)) + " changed"
                for number in np.flatnonzero(Union([pack]).find(keys) >= 0).tolist():
                    self.superseded[number] = reason

    def holds(self, number: int) -> bool:
        """A row of the present fingerprint exists, fresh or not."""
        return bool(self.first[number] >= 0)

    def state(self, number: int, digest: bytes) -> str:
        """`FRESH`, `NEW`, or why the sample must be scored again."""
        if not self.holds(number) or self.union is None:
            return self.superseded.get(number, NEW)
        position = int(self.first[number])
        wanted = np.frombuffer(digest, np.uint8)
        while True:
            if (self.union.inputs[position] == wanted).all():
                return FRESH
            position += 1
            if position >= len(self.union) or not self.union.repeats[position]:
                return FEATURE_CHANGED
