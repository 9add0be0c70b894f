"""Where each sample is computed: its rank among the samples of its shape, and so its slot in a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kd_cache.dataset.features import FeatureSource
from kd_cache.errors import FeatureError
from kd_cache.store.plan import BatchPlan, Place, Shape


class Places:
    """Gives each sample its rank. Show it the shape of every permitted sample with a readable feature, in key order."""

    def __init__(self) -> None:
        self._ranks: Counter[Shape] = Counter()

    def next_rank(self, shape: Shape) -> int:
        """The rank of one more sample of this shape."""
        rank = self._ranks[shape]
        self._ranks[shape] += 1
        return rank

    def pass_over(self, shape: Shape, count: int) -> None:
        """So many more samples of this shape, whose ranks nobody asks for."""
        self._ranks[shape] += count


def count_shapes(source: FeatureSource, files: Iterable[str], *, skip_bad: bool) -> dict[Shape, int]:
    """How many features have each ``(T, F)``, from their headers alone.

    With ``skip_bad`` an unreadable feature does not count (the dump reports it); otherwise `FeatureError` is raised.
    """
    counts: Counter[Shape] = Counter()
    for file in files:
        try:
            counts[source.shape(file)] += 1
        except FeatureError:
            if not skip_bad:
                raise
    return dict(counts)


def places_of(source: FeatureSource, files: Iterable[str], plan: BatchPlan) -> dict[str, Place]:
    """The place of every readable sample among ``files``, which are all permitted ones in key order."""
    places = Places()
    found = {}
    for file in files:
        try:
            shape = source.shape(file)
        except FeatureError:
            continue
        found[file] = plan.place(shape, places.next_rank(shape))
    return found
