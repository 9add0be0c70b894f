"""One teacher's rows as a reader sees them, whether packed or left by an older script."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.errors import CorruptError, MissingLogitsError, shown
from kd_cache.features import parse_header
from kd_cache.store.keys import KeyFinder, keys_of, sorted_order
from kd_cache.store.pack import Pack
from kd_cache.store.union import Union
from kd_cache.store.view import read_row_file


class TeacherRows:
    """One teacher's rows, whatever they are stored in. A *position* counts in key order."""

    name: str
    num_classes: int
    dtype: np.dtype[Any]
    keys: np.ndarray
    signature: tuple[str, ...]

    def find(self, keys: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def take(self, positions: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def files(self, positions: np.ndarray) -> list[str]:
        raise NotImplementedError

    def is_ambiguous(self, key: np.ndarray) -> bool:
        raise NotImplementedError


class PackRows(TeacherRows):
    def __init__(self, packs: Sequence[Pack]) -> None:
        self._union = union = Union(packs)
        self.name = union.origin.teacher
        self.num_classes = union.origin.num_classes
        self.dtype = union.origin.stored
        self.signature = tuple(pack.path.name for pack in union.packs)
        plain = len(union.packs) == 1
        self._kept = np.arange(len(union)) if plain else np.flatnonzero(~union.repeats & ~union.ambiguous)
        self.keys = union.keys[self._kept]
        self._finder = KeyFinder(self.keys)

    def find(self, keys: np.ndarray) -> np.ndarray:
        return self._finder.find(keys)

    def take(self, positions: np.ndarray) -> np.ndarray:
        return self._union.take(self._kept[positions])

    def files(self, positions: np.ndarray) -> list[str]:
        return [name.decode("utf-8") for name in self._union.file_bytes(self._kept[positions])]

    def is_ambiguous(self, key: np.ndarray) -> bool:
        position = int(self._union.find(key)[0])
        return position >= 0 and bool(self._union.ambiguous[position])


class OlderRows(TeacherRows):
    """Rows of a cache written by an older script: plain files, nothing to check them by."""

    def __init__(self, name: str, paths: Mapping[str, Path]) -> None:
        self.name = name
        names = list(paths)
        keys = keys_of(names)
        order = sorted_order(keys)
        self.keys = keys[order]
        self._names = [names[number] for number in order]
        rows = [_older_row(paths[file]) for file in self._names]
        if len({(len(row), row.dtype) for row in rows}) != 1:
            raise CorruptError(f"the rows of {shown(name)} differ in length or dtype, or there are none")
        self._logits = np.stack(rows)
        self.num_classes = self._logits.shape[1]
        self.dtype = self._logits.dtype
        self.signature = (hashlib.sha256(self._logits.tobytes()).hexdigest(),)
        self._finder = KeyFinder(self.keys)

    def find(self, keys: np.ndarray) -> np.ndarray:
        return self._finder.find(keys)

    def take(self, positions: np.ndarray) -> np.ndarray:
        return self._logits[positions]

    def files(self, positions: np.ndarray) -> list[str]:
        return [self._names[number] for number in positions.tolist()]

    def is_ambiguous(self, key: np.ndarray) -> bool:
        return False


def _older_row(path: Path) -> np.ndarray:
    """``[C]`` from a plain ``.npy`` of an older cache."""
    content = read_row_file(path)
    if content is None:
        raise MissingLogitsError(f"{shown(path)} is in the index, but not on disk")
    try:
        header = parse_header(content)
        if len(header.shape) != 1 or header.size != len(content):
            raise ValueError(f"its shape is {list(header.shape)} and it has {len(content)} bytes, expected [classes]")
    except ValueError as error:
        raise CorruptError(f"{shown(path)}: {error}") from None
    return np.frombuffer(content, header.dtype, offset=header.offset)
