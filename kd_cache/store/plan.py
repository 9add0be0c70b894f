"""The batch plan: one fixed batch size per input shape, kept with the cache, and a fixed slot for every sample.

The last bits of a logit depend on the shape of the batch it was computed in and, for some matrix products, on the row's
position in it; never on what stands in the other rows. So the size per shape is taken from all permitted samples and
remembered, and a sample's slot is its rank, by key, among the permitted samples of its shape, modulo that size. Then a
row has the same bytes whatever the order, the shard or the point of resumption. Where few samples share a shape the
size is small, so that padding wastes little.
"""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from kd_cache.errors import FeatureError, UsageError
from kd_cache.files.atomic import open_file, store_errors, write_atomic
from kd_cache.files.strict_json import strict_json
from kd_cache.store.origin import canonical_json

Shape = tuple[int, ...]

_ENTRIES = {"batch_size", "bins", "batches", "digest"}

MOST_BYTES = 1 << 21
_MOST_SAMPLES = 1 << 16
"""No batch is larger: a damaged plan must not ask for all the memory there is."""


@dataclass(frozen=True)
class Place:
    """A batch size and a position in such a batch."""

    size: int
    slot: int


@dataclass(frozen=True)
class BatchPlan:
    """``batches`` maps a shape, such as ``(T, F)``, to a batch size, at most ``batch_size``.

    ``bins`` is the F of every feature; ``None`` where inputs may have any shape.
    """

    batch_size: int
    bins: int | None
    batches: Mapping[Shape, int]

    @staticmethod
    def from_counts(
        counts: Mapping[Shape, int], batch_size: int, earlier: BatchPlan | None = None, *, anything: bool = False
    ) -> BatchPlan:
        """A plan for so many samples per shape; sizes that ``earlier`` fixed stay as they are.

        With ``anything`` inputs may have any shape, else they are ``[T, F]`` with the F that most have.
        """
        if not counts:
            raise FeatureError("no feature could be read, so there is nothing to plan", hint="Check --data-root.")
        if batch_size > _MOST_SAMPLES:
            raise UsageError(f"batch_size is {batch_size}, expected at most {_MOST_SAMPLES}")
        per_bins: Counter[int] = Counter()
        for shape, count in counts.items():
            per_bins[shape[-1]] += count
        most = None if anything else per_bins.most_common(1)[0][0]
        bins = earlier.bins if earlier else most
        size = earlier.batch_size if earlier else batch_size
        fresh = {shape: min(size, 1 << (count - 1).bit_length()) for shape, count in sorted(counts.items())}
        return BatchPlan(size, bins, fresh | (dict(earlier.batches) if earlier else {}))

    def takes(self, shape: Shape) -> bool:
        """Whether an input of this shape can be scored in this cache: features must have one F."""
        return self.bins is None or shape[1:] == (self.bins,)

    def place(self, shape: Shape, rank: int) -> Place:
        """Where the sample of this rank among those of its shape is computed; alone, if the shape is not planned."""
        size = self.batches.get(shape, 1)
        return Place(size, rank % size)

    def holds(self, other: BatchPlan) -> bool:
        """Whether this is ``other``, or ``other`` with further shapes."""
        same = (self.batch_size, self.bins) == (other.batch_size, other.bins)
        return same and other.batches.items() <= self.batches.items()

    def as_json(self) -> dict[str, Any]:
        sizes = {"x".join(map(str, shape)): size for shape, size in sorted(self.batches.items())}
        return {"batch_size": self.batch_size, "bins": self.bins, "batches": sizes}

    @classmethod
    def from_json(cls, content: Any) -> BatchPlan | None:
        """What `as_json` gave; ``None`` where it makes no sense."""
        try:
            most = _positive(content["batch_size"], _MOST_SAMPLES)
            sizes = {}
            for text, size in content["batches"].items():
                sizes[tuple(map(int, text.split("x")))] = _positive(size, most)
            bins = content["bins"]
            return cls(most, None if bins is None else _positive(bins), sizes)
        except (ValueError, LookupError, TypeError, AttributeError):
            return None

    @property
    def content(self) -> bytes:
        """Its file, with a digest: a plan with a flipped bit would silently make other last bits."""
        content = self.as_json()
        return (json.dumps({**content, "digest": _digest(content)}, indent=1) + "\n").encode()

    def save(self, path: Path) -> None:
        """Write it durably."""
        write_atomic(path, self.content)


class ShapeCodes:
    """Shapes as two int32 each, as notes and columns keep them: ``(T, F)`` itself; else a hash and minus the rank.

    A hash means the shape that was coded, or is planned; one that two shapes have means none.
    """

    def __init__(self, plan: BatchPlan | None = None) -> None:
        self._shapes: dict[tuple[int, int], Shape | None] = {}
        for shape in {} if plan is None else plan.batches:
            self.code(shape)

    def code(self, shape: Shape) -> tuple[int, int]:
        if len(shape) == 2:
            return shape[0], shape[1]
        code = (xxhash.xxh32_intdigest(str(shape).encode()) >> 1 | 1, -len(shape))
        if self._shapes.setdefault(code, shape) != shape:
            self._shapes[code] = None
        return code

    def shape(self, first: int, second: int) -> Shape | None:
        """``None`` where it is not known; ``(0, 0)`` stands for that, too."""
        if second < 0:
            return self._shapes.get((first, second))
        return (first, second) if first else None


def load_plan(path: Path) -> BatchPlan | None:
    """The saved plan; ``None`` when there is none or it makes no sense (a plan can always be made again).

    Raises:
        StoreError: it is there, but cannot be read: rows made by another plan would have other last bits.
    """
    with store_errors(path, "read the batch plan"):
        try:
            with open_file(path) as file:
                raw = file.read(MOST_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.EINVAL:  # not a plain file: no plan of ours
                return None
            raise
    return plan_of_bytes(raw or b"")


def plan_of_bytes(raw: bytes) -> BatchPlan | None:
    """The plan in a file's content; ``None`` where it makes no sense."""
    try:
        content = strict_json(raw, KeyError)
        if not isinstance(content, dict) or content.keys() - _ENTRIES:
            return None
        digest = content.pop("digest", None)  # the first version wrote none
        return BatchPlan.from_json(content) if digest in (None, _digest(content)) else None
    except (ValueError, RecursionError):
        return None


def _digest(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(canonical_json(content))


def _positive(value: Any, most: int = 1 << 30) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"expected an integer from 1 to {most}")
    return value
