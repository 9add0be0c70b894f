"""Rows of very many classes: the K most probable, and what all others have together.

A row is W = K · (2 + b) + 16 bytes, little-endian, b = 2 for up to 65,536 classes, else 4::

    0          K · b  ids of the K most probable classes, the most probable first, of equal ones the lower id first
    K · b      K · 2  their log-probabilities at temperature 1, float16
    K · (b+2)  4      logsumexp of the raw logits, float32
    …          12     log of the probability that all other classes share, at temperature 1, 2 and 4, float32

At another temperature nobody could tell how much the others have: it is kept for those three.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from kd_cache.errors import UsageError, shown
from kd_cache.options import TOPK

TEMPERATURES: Final = (1.0, 2.0, 4.0)
LEAST_CLASSES: Final = 512
"""With fewer classes half precision is small enough, and a thousand times more exact."""
BLOCK = 1 << 21
"""So many values are worked on together, in float64."""


def k_of(dtype: str) -> int | None:
    """K of ``topk:K``; ``None`` for anything else."""
    found = TOPK.match(dtype)
    return None if found is None else int(found[1])


def at_temperature(temperature: float) -> int:
    """Which of `TEMPERATURES` it is. Raises `UsageError` for another."""
    if temperature not in TEMPERATURES:
        raise UsageError(
            f"the temperature is {temperature}: top-k rows know what the other classes share at 1, 2 and 4 only",
            hint="Take one of these, or dump with --dtype fp16.",
        )
    return TEMPERATURES.index(temperature)


@dataclass(frozen=True)
class TopKCodec:
    """Logits of ``classes`` C to rows of ``k`` K and back.

    ``record`` is the layout as a numpy dtype: ``ids`` ``[K]``, ``log_probs`` ``[K]``, ``logsumexp``, ``rest`` ``[3]``.
    """

    k: int
    classes: int

    def __str__(self) -> str:
        return f"topk:{self.k}"

    def refusal(self) -> str | None:
        """Why there are no such rows; ``None`` where there are."""
        if self.classes < LEAST_CLASSES:
            return f"{self} is for {LEAST_CLASSES} classes and more, found {self.classes}"
        if not 0 < self.k < self.classes:
            return f"{self} keeps {self.k} of {self.classes} classes, expected fewer than all"
        return None

    @cached_property
    def record(self) -> np.dtype[Any]:
        ids = "<u2" if self.classes <= 1 << 16 else "<u4"
        return np.dtype(
            [("ids", ids, (self.k,)), ("log_probs", "<f2", (self.k,)), ("logsumexp", "<f4"), ("rest", "<f4", (3,))]
        )

    @property
    def width(self) -> int:
        """W, the bytes of a row."""
        return self.record.itemsize

    def split(self, rows: np.ndarray) -> np.ndarray:
        """``[…, W]`` u1 rows as ``[…]`` of `record`: views, nothing is copied. Their last axis must be contiguous."""
        split: np.ndarray = rows.view(self.record)[..., 0]
        return split

    def encode(self, logits: np.ndarray) -> np.ndarray:
        """``[n, W]`` u1 rows of finite ``[n, C]`` float32 logits, computed in float64.

        A log-probability below −65,504 is −inf in the row.
        """
        rows = np.empty((len(logits), self.width), np.uint8)
        step = max(1, BLOCK // self.classes)
        for start in range(0, len(logits), step):
            part = slice(start, start + step)
            with np.errstate(over="ignore"):  # what is too far below for the format has no probability in it
                self._encode(logits[part], self.split(rows[part]))
        return rows

    def _encode(self, logits: np.ndarray, out: np.ndarray) -> None:
        ids = self._most_probable(logits)
        values = logits.astype(np.float64)
        top = np.take_along_axis(values, ids, axis=1)
        np.put_along_axis(values, ids, -np.inf, axis=1)
        rest = _log_sums(values)
        whole = np.logaddexp(_log_sums(top), rest)
        out["ids"], out["log_probs"], out["logsumexp"] = ids, top - whole[:, :1], whole[:, 0]
        out["rest"] = rest - whole

    def _most_probable(self, logits: np.ndarray) -> np.ndarray:
        """``[n, K]``: the largest first, of equal ones the lower id first."""
        ids = np.empty((len(logits), self.k), np.int64)
        least = np.partition(logits, self.classes - self.k, axis=1)[:, self.classes - self.k]
        for row, (values, bound) in enumerate(zip(logits, least, strict=True)):
            candidates = np.flatnonzero(values >= bound)  # ascending, and more than K where there are ties
            ids[row] = candidates[np.argsort(-values[candidates], kind="stable")[: self.k]]
        return ids

    def softened(self, rows: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
        """``[n, K]`` and ``[n]`` float64 log-probabilities at a temperature: of the ids, and of all others together.

        What the ids have together is what the rest leaves, so that all sum to one whatever float16 rounded.
        """
        split = self.split(rows)
        rest = split["rest"][:, at_temperature(temperature)].astype(np.float64)
        values = split["log_probs"].astype(np.float64) / temperature
        values -= np.log(np.exp(values - values[:, :1]).sum(axis=1, keepdims=True)) + values[:, :1]
        return values + np.log(-np.expm1(rest))[:, None], rest


def _log_sums(values: np.ndarray) -> np.ndarray:
    """``[n, 3]`` log of the sum of exponentials of ``[n, C]`` at each of `TEMPERATURES`; −inf are none."""
    most = values.max(axis=1)
    found = np.empty((len(values), len(TEMPERATURES)))
    powers = np.exp((values - most[:, None]) / TEMPERATURES[-1])
    for number in reversed(range(len(TEMPERATURES))):
        found[:, number] = np.log(powers.sum(axis=1)) + most / TEMPERATURES[number]
        powers *= powers  # the exponentials at half the temperature
    return found


def refuse(k: int, classes: int, value_kind: str, frames: int | None, teacher: str) -> None:
    """Raise `UsageError` where a teacher's vectors cannot be stored as their K most probable classes."""
    why = TopKCodec(k, classes).refusal()
    if value_kind != "logits":
        why = f"topk:{k} is for logits, found {value_kind}"
    elif frames is not None:
        why = f"topk:{k} is for one vector a sample, found {frames} frames"
    if why is not None:
        raise UsageError(f"{shown(teacher)}: {why}", hint="Dump it with --dtype fp16, or fp32.")
