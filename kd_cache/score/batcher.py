"""Putting samples into batches of one shape, each at its planned slot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from kd_cache.dataset.features import shape_of
from kd_cache.score.engine import Batch, Engine, Scored
from kd_cache.score.given import scored_dtype
from kd_cache.store.plan import Place, Shape


class Batcher:
    """Puts samples into batches of one shape, each at its planned slot, and has a batch scored when it is full.

    Where only some samples are to be scored, a few batches are kept open at once, so that little of them stays empty;
    never more than ``most_samples`` samples or ``most_bytes`` bytes of features (or two batches) wait.
    """

    _OPEN = 8
    _MOST_BYTES = 256 << 20

    def __init__(self, engine: Engine, most_bytes: int = _MOST_BYTES, most_samples: int = 1024) -> None:
        self._engine = engine
        self._most = (most_bytes, most_samples)
        self._open: dict[tuple[Shape, np.dtype[Any], frozenset[str]], list[Batch]] = {}
        self._bytes = self._samples = 0

    def add(self, number: int, array: np.ndarray, teachers: frozenset[str], place: Place) -> Iterator[Scored]:
        """Take one sample for these teachers; gives what had to be scored to make room, or has become full."""
        batches = self._open.setdefault((shape_of(array), scored_dtype(array), teachers), [])
        batch = next((batch for batch in batches if place.slot not in batch.rows), None)
        if batch is None:
            if len(batches) == self._OPEN:
                yield from self._score(max(batches, key=lambda batch: len(batch.rows)), batches)
            batch = Batch(place.size, teachers)
            batches.append(batch)
        batch.rows[place.slot] = (number, array)
        self._bytes += array.nbytes
        self._samples += 1
        if len(batch.rows) == batch.size:
            yield from self._score(batch, batches)
        room = (max(self._most[0], 2 * place.size * array.nbytes), max(self._most[1], 2 * place.size))
        while self._bytes > room[0] or self._samples > room[1]:
            # Many shapes with few samples each: what waits must not grow with the data set.
            fullest, among = max(
                ((batch, batches) for batches in self._open.values() for batch in batches),
                key=lambda pair: len(pair[0].rows) / pair[0].size,
            )
            yield from self._score(fullest, among)

    def finish(self) -> Iterator[Scored]:
        """Score what is still open, and give what was still being scored."""
        for batches in self._open.values():
            while batches:
                yield from self._score(batches[0], batches)
        yield from self._engine.finish()

    def _score(self, batch: Batch, among: list[Batch]) -> Iterator[Scored]:
        among.remove(batch)
        self._bytes -= sum(array.nbytes for _, array in batch.rows.values())
        self._samples -= len(batch.rows)
        yield from self._engine.submit(batch)
