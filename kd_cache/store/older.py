"""The plain row files of an older script, and all of a teacher's as one pack in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kd_cache.errors import CorruptError, MissingLogitsError, shown
from kd_cache.files.npy import parse_header
from kd_cache.keys import keys_of, sample_key, sorted_order
from kd_cache.store.origin import Fingerprint, Origin
from kd_cache.store.pack import Pack
from kd_cache.store.view import read_row_file, view_name

_DTYPES = {"<f4": "fp32", "<f2": "fp16"}


def older_pack(name: str, paths: Mapping[str, Path]) -> Pack:
    """One teacher's rows by file. There is nothing to check them by, so inputs and checksums are zero.

    Raises:
        CorruptError, MissingLogitsError: a row that is none, rows of different length or dtype, no rows.
    """
    names = list(paths)
    keys = keys_of(names)
    order = sorted_order(keys)
    names, keys = [names[number] for number in order], keys[order]
    rows = [older_row(paths[file], file) for file in names]
    if len({(len(row), row.dtype) for row in rows}) != 1:
        raise CorruptError(f"the rows of {shown(name)} differ in length or dtype, or there are none")
    logits, encoded = np.stack(rows), [file.encode() for file in names]
    digest = hashlib.sha256(keys.tobytes() + logits.tobytes()).hexdigest()
    return Pack(
        Path(f"{name}-{digest}"),
        Origin(name, Fingerprint({"older": digest}), "logits", logits.shape[1], _DTYPES[logits.dtype.str]),
        keys,
        np.zeros((len(names), 16), np.uint8),
        np.zeros(len(names), np.uint64),
        logits,
        np.cumsum([0, *map(len, encoded)], dtype=np.uint64),
        np.frombuffer(b"".join(encoded), np.uint8),
    )


def older_row(path: Path, file: str) -> np.ndarray:
    """``[C]`` from a plain ``.npy`` of an older cache. Raises as `older_pack`."""
    if path.name != view_name(bytes.fromhex(sample_key(file))):
        raise CorruptError(f"the index names {shown(path.name)} for {shown(file)}, which is another sample's row")
    content = read_row_file(path)
    if content is None:
        raise MissingLogitsError(f"{shown(path)} is in the index, but not on disk")
    try:
        header = parse_header(content)
        if len(header.shape) != 1 or not header.shape[0] or header.size != len(content):
            raise ValueError(f"its shape is {list(header.shape)} and it has {len(content)} bytes, expected [classes]")
    except ValueError as error:
        raise CorruptError(f"{shown(path)}: {error}") from None
    row: np.ndarray = np.frombuffer(content, header.dtype, offset=header.offset)
    return row
