"""What an audit looks at, many samples at once: their features as they are now, and a teacher's rows of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kd_cache.store.union import Union


@dataclass(frozen=True)
class Features:
    """The checked samples' features as they are now: digests ``[n, 16]`` u1, and which could be read ``[n]`` bool."""

    digests: np.ndarray
    readable: np.ndarray


@dataclass(frozen=True)
class Rows:
    """The checked samples' rows of one teacher, each ``[n]``: the position (-1: none), and what is wrong with it."""

    at: np.ndarray
    wrong: np.ndarray  # it fails its checksum, or stands under a wrong key
    twin: np.ndarray  # it is of another file with the same key
    outdated: np.ndarray  # its feature is not the one that was scored

    @classmethod
    def absent(cls, count: int) -> Rows:
        """Of a teacher without packs."""
        return cls(np.full(count, -1, np.int64), *(np.zeros(count, bool) for _ in range(3)))

    @classmethod
    def of(cls, union: Union, files: Sequence[str], keys: np.ndarray, present: Features) -> Rows:
        """Of the samples with these files and their ``[n, 16]`` keys."""
        rows = cls.absent(len(keys))
        rows.at[:] = union.find(keys)
        held = np.flatnonzero(rows.at >= 0)
        at = rows.at[held]
        rows.wrong[held] = _are_wrong(union, at)
        names = zip(held.tolist(), union.file_bytes(at), strict=True)
        rows.twin[held] = [files[number].encode() != name for number, name in names]
        rows.outdated[held] = (union.inputs[at] != present.digests[held]).any(axis=1) & present.readable[held]
        return rows


def _are_wrong(union: Union, positions: np.ndarray) -> np.ndarray:
    """``[n]`` bool: which rows fail their checksum or stand under a wrong key."""
    wrong = np.zeros(len(union), bool)
    for number, pack in enumerate(union.packs):
        mine = np.unique(positions[union.pack_no[positions] == number])
        rows = union.row_no[mine]
        wrong[mine] = np.isin(rows, pack.wrong_rows(rows))
    found: np.ndarray = wrong[positions]
    return found
