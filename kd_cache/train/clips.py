"""Samples to train on: their features, in memory where they fit, and their labels."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from kd_cache.dataset.features import FeatureSource
from kd_cache.dataset.manifest import IGNORED, Sample
from kd_cache.dataset.task import Task
from kd_cache.errors import FeatureError, StaleError, shown
from kd_cache.score.reading import read_ahead
from kd_cache.serve.placement import fits
from kd_cache.store.origin import canonical_json
from kd_cache.watch import Watcher

_AHEAD = 4


class Clips:
    """N samples of known features. Batches hold clips of one shape, because ``T`` may differ between samples.

    Attributes:
        samples: in the order of the rows.
        shapes: ``[N]`` tuples, the shape of each feature.
        digests: ``[N, 16]`` u1, the digest of each feature.
        scenes, cities: ``[N]`` int64, -100 where the manifest has none.
        changed: makes of rows and their features ``[B, T, F]`` what is handed out in place of these.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        shapes: list[tuple[int, ...]],
        digests: np.ndarray,
        arrays: list[np.ndarray] | None,
        source: FeatureSource | None,
        workers: int = 0,
    ) -> None:
        self.samples = tuple(samples)
        self.shapes = shapes
        self.digests = digests
        self.scenes = _labels([sample.scene_label for sample in samples])
        self.cities = _labels([sample.city_label for sample in samples])
        self._arrays, self._source, self._workers = arrays, source, workers
        self.changed: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None

    @classmethod
    def read(cls, source: FeatureSource, samples: Sequence[Sample], workers: int, watcher: Watcher) -> Clips:
        """Read every feature once, and keep them where they fit into half of the free memory.

        Raises:
            FeatureError: a feature that cannot be read; nothing is trained without it.
        """
        watcher.stage("reading features", len(samples))
        files = [sample.file for sample in samples]
        digests = np.zeros((len(files), 16), np.uint8)
        shapes: list[tuple[int, ...]] = []
        arrays: list[np.ndarray] | None = []
        with closing(read_ahead(source, files, workers)) as chunks:
            for number, feature in enumerate(chain.from_iterable(chunks)):
                if isinstance(feature, FeatureError):
                    raise source.refusal(files[number], feature, files)
                digests[number] = np.frombuffer(feature.digest, np.uint8)
                shapes.append(feature.array.shape)
                if number == 0 and not fits(feature.array.nbytes * len(files)):
                    arrays = None
                    watcher.note("the features do not fit into memory: every epoch reads them again")
                if arrays is not None:
                    arrays.append(np.array(feature.array))
                watcher.advance(1)
        return cls(samples, shapes, digests, arrays, source, workers)

    @classmethod
    def of_rows(cls, samples: Sequence[Sample], rows: np.ndarray) -> Clips:
        """Of one vector ``[D]`` per sample (embeddings): ``rows`` is ``[N, D]`` float32."""
        digests = np.zeros((len(samples), 16), np.uint8)
        return cls(samples, [rows.shape[1:]] * len(samples), digests, list(rows), None)

    def __len__(self) -> int:
        return len(self.samples)

    def stacked(self) -> Tensor:
        """All features at once, ``[N, …]`` float32: of clips of one shape."""
        return self._features(np.arange(len(self)))

    def labels(self, what: str) -> Tensor:
        """``[N]`` int64: ``scene`` or ``city`` labels."""
        return self.cities if what == "city" else self.scenes

    def part(self, rows: Sequence[int]) -> Clips:
        """Some of the samples; features are shared, not copied."""
        arrays = None if self._arrays is None else [self._arrays[row] for row in rows]
        samples = [self.samples[row] for row in rows]
        shapes = [self.shapes[row] for row in rows]
        return Clips(samples, shapes, self.digests[list(rows)], arrays, self._source, self._workers)

    def with_labels_of(self, order: np.ndarray) -> Clips:
        """The control: the same features, sample i with the labels of sample ``order[i]``."""
        made = self.part(range(len(self)))
        made.scenes, made.cities = self.scenes[order], self.cities[order]
        return made

    def digest(self, what: str) -> str:
        """SHA-256 over files, features and ``scene`` or ``city`` labels, whatever their order."""
        labels = self.labels(what).tolist()
        lines = [
            canonical_json([sample.file, digest.tobytes().hex(), label])
            for sample, digest, label in zip(self.samples, self.digests, labels, strict=True)
        ]
        return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()

    # -- batches ------------------------------------------------------------------------------------------------------

    def in_order(self, batch_size: int) -> list[np.ndarray]:
        """Rows of batches that go through all samples once, those of one shape together."""
        return [rows for mine in self._by_shape() for rows in _cut(mine, batch_size)]

    def shuffled(self, batch_size: int, chance: torch.Generator, *, drop_last: bool) -> list[np.ndarray]:
        """Rows of an epoch's batches, in an order drawn by ``chance``.

        ``drop_last`` leaves out what does not fill a batch; otherwise a single clip joins another batch of its shape,
        because batch norm learns nothing from one. A clip that is alone with its shape is left out (`left_out`).
        """
        cut = [_cut_up(mine, batch_size, chance, drop_last=drop_last) for mine in self._by_shape()]
        return _in_any_order(chain.from_iterable(cut), chance)

    def balanced(
        self, batch_size: int, chance: torch.Generator, is_source: np.ndarray, *, drop_last: bool
    ) -> list[np.ndarray]:
        """As `shuffled`, but half of each batch (of an even size) are rows that ``is_source`` ``[N]`` bool says and
        half are others: those that are fewer are drawn again, once all of them were. Of a shape that only one side has,
        batches are of that side.
        """
        batches: list[np.ndarray] = []
        for mine in self._by_shape():
            sides = [mine[is_source[mine]], mine[~is_source[mine]]]
            count = max(map(len, sides))
            if count == len(mine):
                batches += _cut_up(mine, batch_size, chance, drop_last=drop_last)
                continue
            halves = [_cut(_drawn(side, count, chance), batch_size // 2) for side in sides]
            both = [np.concatenate(pair) for pair in zip(*halves, strict=True)]
            batches += [rows for rows in both if len(rows) == batch_size or not drop_last]
        return _in_any_order(batches, chance)

    def left_out(self, batch_size: int, *, drop_last: bool) -> int:
        """How many clips are in no batch of `shuffled`, ever: too few have their shape."""
        least = batch_size if drop_last else min(batch_size, 2)
        return sum(len(rows) for rows in self._by_shape() if len(rows) < least)

    def _by_shape(self) -> list[np.ndarray]:
        found: dict[tuple[int, ...], list[int]] = {}
        for row, shape in enumerate(self.shapes):
            found.setdefault(shape, []).append(row)
        return [np.array(rows) for _, rows in sorted(found.items())]

    def load(
        self, batches: Sequence[np.ndarray], device: torch.device | None = None
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Each batch's rows and its features ``[B, T, F]`` float32, in order; read ahead where they are not in memory.

        ``device``: where they are used. For a GPU they are always put together ahead, in page-locked memory, which it
        copies from while it computes.

        Raises:
            FeatureError, StaleError: a feature that cannot be read any more, or is not what it was.
        """
        pinned = device if device is not None and device.type == "cuda" else None
        if not self._workers or (self._arrays is not None and pinned is None):
            yield from ((rows, self._features(rows)) for rows in batches)
            return

        def loaded(rows: np.ndarray) -> Tensor:
            if pinned is None:
                return self._features(rows)
            with torch.cuda.device(pinned):
                return self._features(rows).pin_memory()

        waiting: deque[tuple[np.ndarray, Future[Tensor]]] = deque()
        with ThreadPoolExecutor(self._workers, thread_name_prefix="read") as pool:
            try:
                for rows in batches:
                    waiting.append((rows, pool.submit(loaded, rows)))
                    if len(waiting) > _AHEAD * self._workers:
                        first, loading = waiting.popleft()
                        yield first, loading.result()
                while waiting:
                    first, loading = waiting.popleft()
                    yield first, loading.result()
            finally:
                for _, loading in waiting:
                    loading.cancel()

    def _features(self, rows: np.ndarray) -> Tensor:
        arrays = [self._array(row) for row in rows.tolist()]
        batch = np.empty((len(arrays), *arrays[0].shape), np.float32)
        for number, array in enumerate(arrays):
            batch[number] = array
        return torch.from_numpy(batch if self.changed is None else self.changed(rows, batch))

    def _array(self, row: int) -> np.ndarray:
        if self._arrays is not None:
            return self._arrays[row]
        assert self._source is not None  # noqa: S101 (what is in no memory has a source)
        file = self.samples[row].file
        feature = self._source.read(file)
        if feature.digest != self.digests[row].tobytes():
            raise StaleError(f"{shown(file)} changed while it was trained on", hint="Start the training again.")
        return feature.array


def _labels(found: list[int | None]) -> Tensor:
    return torch.tensor([IGNORED if label is None else label for label in found], dtype=torch.int64)


def _cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _cut_up(mine: np.ndarray, size: int, chance: torch.Generator, *, drop_last: bool) -> list[np.ndarray]:
    """Batches of the clips of one shape, as `Clips.shuffled` says."""
    order = _drawn(mine, len(mine), chance)
    cut = _cut(order, size)
    if len(order) == 1 < size:
        return []
    if drop_last:
        return [rows for rows in cut if len(rows) == size]
    if len(cut) > 1 and len(cut[-1]) == 1:
        cut[-2:] = [np.concatenate(cut[-2:])]
    return cut


def _drawn(rows: np.ndarray, count: int, chance: torch.Generator) -> np.ndarray:
    """So many of the rows by chance: none of them more than once more often than another."""
    rounds = [torch.randperm(len(rows), generator=chance).numpy() for _ in range(math.ceil(count / len(rows)))]
    found: np.ndarray = rows[np.concatenate(rounds)[:count]]
    return found


def _in_any_order(batches: Iterable[np.ndarray], chance: torch.Generator) -> list[np.ndarray]:
    every = list(batches)
    return [every[at] for at in torch.randperm(len(every), generator=chance).tolist()]


def class_names(task: Task, what: str, count: int) -> list[str]:
    """Names of ``count`` scenes or cities: the field's where they are as many, else their numbers."""
    known = task.cities if what == "city" else task.scenes
    return list(known) if len(known) == count else [str(number) for number in range(count)]
