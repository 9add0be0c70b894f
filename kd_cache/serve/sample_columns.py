"""Samples as a few arrays, for data sets that workers share.

A million `Sample` objects would be copied, page by page, into every forked worker (looking at an object writes its
reference count), and pickled whole into every spawned one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from kd_cache.dataset.manifest import Sample

_NO_LABEL = np.iinfo(np.int64).min


class SampleColumns(Sequence[Sample]):
    """The same samples in the same order; each is made when it is asked for."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        names = [sample.file.encode("utf-8", "surrogatepass") for sample in samples]
        self._files = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)])
        numbers = [(sample.scene_label, sample.city_label, sample.domain) for sample in samples]
        labels = [[_NO_LABEL if number is None else number for number in row] for row in numbers]
        self._numbers = np.array(labels, np.int64).reshape(len(samples), 3)
        texts = [tuple(sample[4:]) for sample in samples]
        self._rest = list(dict.fromkeys(texts))
        code = {text: number for number, text in enumerate(self._rest)}
        self._codes = np.array([code[text] for text in texts], np.int32)

    def __len__(self) -> int:
        return len(self._codes)

    @overload
    def __getitem__(self, number: int) -> Sample: ...
    @overload
    def __getitem__(self, number: slice) -> list[Sample]: ...
    def __getitem__(self, number: int | slice) -> Sample | list[Sample]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        at = range(len(self))[number]
        scene, city, domain = self._numbers[at].tolist()
        file = self._files[self._ends[at] : self._ends[at + 1]].decode("utf-8", "surrogatepass")
        scene, city = None if scene == _NO_LABEL else scene, None if city == _NO_LABEL else city
        return Sample(file, scene, city, domain, *self._rest[self._codes[at]])
