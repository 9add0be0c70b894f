"""Reading features ahead of their use, in a few threads, in order, with bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain

import numpy as np

from kd_cache.dataset.features import Feature, FeatureSource
from kd_cache.errors import FeatureError
from kd_cache.score.stages import READING, Busy
from kd_cache.watch import Watcher

CHUNK = 32
"""Samples that a thread reads at one go: handing over each by itself costs more than reading a small one."""
CHUNK_BYTES = 8 << 20
_WAITING = 3

Read = list[Feature | FeatureError]


def read_ahead(source: FeatureSource, files: Sequence[str], workers: int, busy: Busy | None = None) -> Generator[Read]:
    """Each file's feature, or why it has none, in the order of ``files``, some at a time.

    At most three chunks for each of ``workers`` threads wait, of up to 32 features and about 8 MiB; with no workers
    features are read when they are asked for. ``busy`` hears how long it takes.
    """
    clock = busy or Busy()

    def read(chunk: Sequence[str]) -> Read:
        with clock.doing(READING, max(workers, 1)):
            return source.read_many(chunk)

    # The first alone: how much there is to a feature is not known before one is read.
    start, size = 0, 1
    if workers == 0:
        while start < len(files):
            features = read(files[start : start + size])
            start += size
            size = _chunk_size(features)
            yield features
        return
    waiting: deque[Future[Read]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        try:
            while waiting or start < len(files):
                most = _WAITING * workers if start > 0 else 1
                while len(waiting) < most and start < len(files):
                    waiting.append(pool.submit(read, files[start : start + size]))
                    start += size
                features = waiting.popleft().result()
                size = _chunk_size(features)
                yield features
        finally:
            for future in waiting:
                future.cancel()


def _chunk_size(features: Read) -> int:
    largest = max((feature.array.nbytes for feature in features if isinstance(feature, Feature)), default=1)
    return max(1, min(CHUNK, CHUNK_BYTES // max(largest, 1)))


def read_digests(
    source: FeatureSource, files: Sequence[str], missing: Mapping[str, str], workers: int, watcher: Watcher
) -> tuple[np.ndarray, np.ndarray]:
    """``[N, 16]`` digests of features as they are now, and ``[N]`` bool: which could be read.

    Raises:
        FeatureError: a feature cannot be read, and nobody listed it as ``missing``.
    """
    inputs, known = np.zeros((len(files), 16), np.uint8), np.zeros(len(files), bool)
    watcher.stage("reading features", len(files))
    with closing(read_ahead(source, files, workers)) as chunks:
        for number, feature in enumerate(chain.from_iterable(chunks)):
            if not isinstance(feature, FeatureError):
                inputs[number] = np.frombuffer(feature.digest, np.uint8)
                known[number] = True
            elif files[number] not in missing:
                error = source.refusal(files[number], feature, files)
                raise FeatureError(error.message, hint=error.hint or "Mend it, or dump with --on-bad-sample skip.")
            watcher.advance(1)
    return inputs, known
