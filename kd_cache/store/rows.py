"""What rows are made of in a pack: the datasets that hold them, the checksums over them, and rows of several views."""

from __future__ import annotations

import numpy as np
import xxhash

from kd_cache.store.origin import STORED, Fingerprint

_RECORD_BYTES = 1 << 20
"""Records of so many bytes are made together: memory does not grow with a pack."""
PAGE = 4096
"""The rows begin at a multiple of this in the file, so that they can be mapped alone."""


def values_name(dtype: str) -> str:
    """The dataset that holds the rows."""
    return "logits" if dtype in STORED else "rows"


def datasets_of(dtype: str, version: int, *, has_views: bool) -> dict[str, tuple[str, int, int]]:
    """Datasets in the order of `Pack`'s arrays: dtype, number of axes, and what its place is a multiple of."""
    found = {
        "keys": ("|u1", 2, 64),
        "inputs": ("|u1", 2, 64),
        "checksums": ("<u8", 1, 64),
        values_name(dtype): (STORED.get(dtype, "|u1"), 3 if has_views else 2, PAGE if version > 1 else 64),
        "file_offsets": ("<u8", 1, 64),
        "files": ("|u1", 1, 64),
    }
    return found | ({"draws": ("<u4", 3, 64), "views": ("<u4", 1, 64)} if has_views else {})


def row_checksums(
    fingerprint: Fingerprint,
    keys: np.ndarray,
    inputs: np.ndarray,
    logits: np.ndarray,
    draws: np.ndarray | None = None,
) -> np.ndarray:
    """``[N]`` u8: xxh3-64 of key, input digest, fingerprint (32 bytes), and the bytes of the row and of its draws."""
    if draws is not None:
        logits = np.concatenate([np.ascontiguousarray(each).view(np.uint8) for each in (logits, draws)], axis=1)
    count, width = len(keys), logits.shape[1] * logits.itemsize
    block = max(1, min(count, _RECORD_BYTES // (64 + width)))
    records = np.empty((block, 64 + width), np.uint8)
    records[:, 32:64] = np.frombuffer(bytes.fromhex(fingerprint.digest), np.uint8)
    sums = np.empty(count, np.uint64)
    for start in range(0, count, block):
        part = slice(start, min(start + block, count))
        filled = records[: part.stop - start]
        filled[:, :16], filled[:, 16:32] = keys[part], inputs[part]
        filled[:, 64:] = np.ascontiguousarray(logits[part]).view(np.uint8).reshape(len(filled), width)
        sums[part] = np.fromiter(map(xxhash.xxh3_64_intdigest, filled), np.uint64, len(filled))
    return sums


def flat_views(logits: np.ndarray, draws: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``[N, V, C]`` and draws ``[N, V, D]`` of these V views as ``[N, V · …]``.

    Raises ``ValueError`` where they do not fit together, or the views are no neighbours.
    """
    neighbours = len(views) and (views - views[0] == np.arange(len(views))).all()
    if not neighbours or logits.shape[:2] != draws.shape[:2] or logits.shape[1] != len(views) or not draws.shape[2]:
        raise ValueError("its views, their rows and their draws do not fit together")
    return logits.reshape(len(logits), -1), draws.reshape(len(draws), -1)


def cut_views(rows: np.ndarray, held: tuple[int, ...], views: tuple[int, ...]) -> np.ndarray:
    """Some neighbours of the views that rows ``[N, V · …]`` hold, without a copy."""
    first = held.index(views[0])
    cut = rows.reshape(len(rows), len(held), -1)[:, first : first + len(views)]
    return cut.reshape(len(rows), -1)
