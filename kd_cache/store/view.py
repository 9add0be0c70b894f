"""The view: one plain ``.npy`` per row, for code that knows nothing of packs. It can always be rebuilt from them."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.errors import CorruptError, MissingLogitsError, shown
from kd_cache.store.atomic import TEMPORARY, make_directory, store_errors, temporary_beside, write_all

ROW_FILE_NAME = re.compile(r"[0-9a-f]{32}\.npy\Z")


@lru_cache(maxsize=16)
def _header(dtype: str, classes: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(classes, dtype))
    return buffer.getvalue()[: -classes * np.dtype(dtype).itemsize or None]


def row_file_bytes(row: np.ndarray) -> bytes:
    """The ``.npy`` file of one ``[C]`` row, byte for byte as ``np.save`` writes it."""
    return _header(row.dtype.str, len(row)) + row.tobytes()


def view_name(key: bytes) -> str:
    return f"{key.hex()}.npy"


def write_rows(directory: Path, keys: np.ndarray, rows: np.ndarray) -> int:
    """Write rows ``[N, C]`` under their keys ``[N, 16]``; returns the bytes written.

    Each file appears whole (unique temporary name, then rename). It is not fsynced one by one: the packs are the truth,
    and a view that a power cut thinned out is rebuilt from them.
    """
    make_directory(directory)
    written = 0
    with store_errors(directory, "write rows into"), temporary_beside(directory / "row.npy") as temporary:
        for key, row in zip(keys, rows, strict=True):
            content = row_file_bytes(row)
            path = directory / view_name(key.tobytes())
            with store_errors(path, "write"):
                with temporary.open("wb", buffering=0) as file:
                    write_all(file, content)
                temporary.replace(path)
            written += len(content)
    return written


def stored_names(directory: Path) -> set[str]:
    """Names of the files in a teacher's view, temporaries left out. A missing folder has none."""
    with store_errors(directory, "list"):
        try:
            return {entry.name for entry in os.scandir(directory) if not entry.name.startswith(TEMPORARY)}
        except FileNotFoundError:
            return set()


def read_row_file(path: Path) -> bytes | None:
    """The bytes of a row's file, ``None`` if there is none; never more than 16 MiB of it.

    Raises:
        CorruptError: a link, a folder or a FIFO stands in its place; it is not followed.
        StoreError: it cannot be read.
    """
    with store_errors(path, "read"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
                raise _in_the_way(path) from None
            raise
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _in_the_way(path)
            return os.read(descriptor, 1 << 24)
        finally:
            os.close(descriptor)


def _in_the_way(path: Path) -> CorruptError:
    return CorruptError(f"{shown(path)} is a link, a folder or a device, expected a plain file", hint="Remove it.")


def differing(directory: Path, keys: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, bool]]:
    """``(number, is_missing)`` of each row whose file is absent or not byte for byte the row's."""
    for number, (key, row) in enumerate(zip(keys, rows, strict=True)):
        try:
            content = read_row_file(directory / view_name(key.tobytes()))
        except CorruptError:
            yield number, False
            continue
        if content != row_file_bytes(row):
            yield number, content is None


def load_cached_logits_batch(
    cache_index: Mapping[str, Any], file_paths: Iterable[str], teacher: str = "city2scene"
) -> np.ndarray:
    """``[B, C]`` logits by the JSON index alone: the unchecked path, for code written against that index.

    Args:
        cache_index: the parsed ``cache_index.json``; its paths hold in the folder where the dump ran.
        file_paths: manifest paths.
        teacher: whose logits.

    Nothing is verified: not the teacher's weights, not the features, not the bytes. `kd_cache.LogitCache` does.

    Raises:
        MissingLogitsError: the index has no such teacher or file, or the row's file is not there.
    """
    paths = cache_index.get(teacher)
    if not isinstance(paths, Mapping):
        raise MissingLogitsError(f"the index holds no teacher {shown(teacher)}")
    rows = []
    for file in file_paths:
        if file not in paths:
            raise MissingLogitsError(f"the index holds no {teacher} logits of {shown(file)}")
        try:
            rows.append(np.load(paths[file], allow_pickle=False))
        except FileNotFoundError:
            raise MissingLogitsError(
                f"{shown(paths[file])} ({teacher} logits of {shown(file)}) does not exist",
                hint="The index's paths hold only in the folder where kd-cache dump ran.",
            ) from None
    return np.stack(rows)
