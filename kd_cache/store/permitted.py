"""``permitted-<digest>.npy``: the keys that a finished cache may serve, and the labels its accuracy was measured with.

One plain array, u1 ``[N, 20]``, ascending: 16 bytes of key, then the scene label as little-endian i4, -1 where there is
none. The name carries the xxh3-128 of the file, and the index carries the name.
"""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import xxhash

from kd_cache.errors import CorruptError, StoreError, shown
from kd_cache.files.atomic import open_file, write_atomic
from kd_cache.files.mapped import file_content
from kd_cache.keys import NO_LABEL as NO_LABEL
from kd_cache.keys import are_ascending

PERMITTED_NAME = re.compile(r"permitted-([0-9a-f]{32})\.npy\Z")
_ROW = 20
_BLOCK = 65_536
_MAPPED = 1 << 20
_MOST = 1 << 31
"""For a hundred million samples."""


@dataclass(frozen=True)
class Permitted:
    """``rows`` u1 ``[N, 20]``, read-only, as they are in the file."""

    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, keys: np.ndarray, labels: np.ndarray) -> Permitted:
        """Of keys ``[N, 16]`` (ascending) and labels ``[N]``."""
        return cls(np.concatenate([keys, labels.astype("<i4").view(np.uint8).reshape(-1, 4)], axis=1))

    @property
    def keys(self) -> np.ndarray:
        """``[N, 16]`` u1, ascending."""
        return np.ascontiguousarray(self.rows[:, :16])

    @property
    def labels(self) -> np.ndarray:
        """``[N]`` int32, -1 where a sample has no label or must not show it."""
        return np.ascontiguousarray(self.rows[:, 16:]).view("<i4").reshape(-1)

    def has_keys(self, *parts: np.ndarray) -> bool:
        """Whether these ``[M, 16]``, part after part, are exactly the permitted keys; looks without copying them."""
        begins = [0, *accumulate(map(len, parts))]
        return begins[-1] == len(self) and all(
            np.array_equal(self.rows[begin + at :][: len(block), :16].view("<u8"), block.view("<u8"))
            for begin, keys in zip(begins, parts, strict=False)
            for at in range(0, len(keys), _BLOCK)
            for block in [keys[at : at + _BLOCK]]
        )

    @property
    def _content(self) -> bytes:
        return _header(len(self)) + self.rows.tobytes()

    @cached_property
    def name(self) -> str:
        """The name of its file. Equal content has one name."""
        return f"permitted-{xxhash.xxh3_128_hexdigest(self._content)}.npy"

    def write(self, directory: Path) -> str:
        """Write it durably; returns the file's name."""
        write_atomic(directory / self.name, self._content)
        return self.name


def read_permitted(path: Path, name: str | None = None) -> Permitted:
    """Read and check it; ``name`` is what it will be called, where it still has a temporary one.

    Raises:
        FileNotFoundError: it is not there (any more).
        CorruptError: not byte for byte as it was written.
        StoreError: it cannot be read.
    """
    try:
        content = _content(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"cannot read {shown(path)}: {error.strerror or error}") from error
    named = PERMITTED_NAME.match(name or path.name)
    if named is None or xxhash.xxh3_128_hexdigest(content.data) != named[1]:
        raise _damaged(path, "its bytes do not match its name")
    start = len(_header(0))
    header = _header(max(0, len(content) - start) // _ROW)
    if content[: len(header)].tobytes() != header or (len(content) - len(header)) % _ROW:
        raise _damaged(path, "it is not an array of keys and labels")
    permitted = Permitted(content[len(header) :].reshape(-1, _ROW))
    if not are_ascending(permitted.rows[:, :16]):
        raise _damaged(path, "its keys are not sorted")
    return permitted


def _content(path: Path) -> np.ndarray:
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MOST:
            raise _damaged(path, f"it has {size} bytes, expected at most {_MOST}")
        return file_content(file, _MAPPED)


def _header(count: int) -> bytes:
    """The header that ``np.save`` writes; 128 bytes for any number of rows."""
    buffer = io.BytesIO()
    fields = {"descr": "|u1", "fortran_order": False, "shape": (count, _ROW)}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def _damaged(path: Path, why: str) -> CorruptError:
    return CorruptError(f"the list of permitted samples {shown(path)} is damaged: {why}", hint="Run kd-cache seal.")
