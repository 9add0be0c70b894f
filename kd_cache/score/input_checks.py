"""What the digests of all inputs say for nothing: features that were never written, and one feature under two names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kd_cache.dataset.features import Feature, FeatureSource, input_digest
from kd_cache.errors import shown
from kd_cache.keys import KeyFinder
from kd_cache.store.plan import Shape

_EXAMPLES = 3
_MOST_SHAPES = 256
_ZEROS = ("<f4", "<f2", "|u1")


def input_remarks(
    files: Sequence[str],
    digests: np.ndarray,
    shapes: Sequence[Shape],
    labels: np.ndarray,
    source: FeatureSource,
) -> Iterator[str]:
    """What a person should know of these samples' features.

    Args:
        digests: ``[N, 16]`` u1; ``labels`` ``[N]``, negative where none is.
        shapes: those that the features have.
    """
    zero = _are_zero(digests, shapes)
    if zero.any():
        yield (
            f"{int(zero.sum()):,} of {len(files):,} features hold nothing but zeros: rows that an extraction never "
            f"wrote? {_examples(files, np.flatnonzero(zero))}"
        )
    groups = [group for group in _equal(digests) if not zero[group[0]]]
    if not groups:
        return
    known = [set(labels[group][labels[group] >= 0].tolist()) for group in groups]
    contrary = [group for group, found in zip(groups, known, strict=True) if len(found) > 1]
    first = (contrary or groups)[0]
    example = source.try_read(files[first[0]])
    is_flat = isinstance(example, Feature) and bool(example.array.min() == example.array.max())
    yield (
        f"{sum(map(len, groups)):,} of {len(files):,} samples have the same features as another"
        + (f", {sum(map(len, contrary)):,} of them with other scene labels" if contrary else "")
        + f"; such as {_examples(files, first)}"
        + (", which hold a single value" if is_flat else "")
    )


def _are_zero(digests: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
    """``[N]`` bool: the digest is that of zeros. Of many shapes the first ones."""
    known = sorted(shapes)[:_MOST_SHAPES]
    zeros = sorted({input_digest(np.zeros(shape, kind)) for shape in known for kind in _ZEROS})
    finder = KeyFinder(np.frombuffer(b"".join(zeros), np.uint8).reshape(-1, 16))
    found: np.ndarray = finder.find(digests) >= 0
    return found


def _equal(digests: np.ndarray) -> list[np.ndarray]:
    """The numbers of samples that share a digest, a group each, in the order of their first."""
    halves = np.ascontiguousarray(digests).view("<u8")
    order = np.argsort(halves[:, 0], kind="stable")
    same = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    ends = np.append(starts[1:], len(order))
    groups = [order[starts[at] : ends[at]] for at in np.flatnonzero(ends - starts > 1).tolist()]
    return sorted(groups, key=lambda group: int(group[0]))


def _examples(files: Sequence[str], numbers: np.ndarray) -> str:
    return ", ".join(shown(files[number]) for number in numbers[:_EXAMPLES].tolist())
