"""Manifest paths of many rows, without an object for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True)
class FileNames:
    """N paths, UTF-8: how many bytes each has, and what gives the bytes ``[M]`` u1 of neighbouring ones."""

    lengths: np.ndarray  # [N] int64
    blob: Callable[[slice], np.ndarray]

    @classmethod
    def of(cls, names: Sequence[bytes]) -> Self:
        lengths = np.fromiter(map(len, names), np.int64, len(names))
        return cls(lengths, lambda part: np.frombuffer(b"".join(names[part]), np.uint8))

    def __len__(self) -> int:
        return len(self.lengths)


def stretches(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``[M]`` int64: the places of all bytes of stretches ``[n]``, one after the other."""
    ends = np.cumsum(lengths)
    places: np.ndarray = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
    return places
